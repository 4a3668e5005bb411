"""ParamGroup: parameters that are trained at one learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

SMALL = 1 << 15
"""Numbers: tensors with fewer are biases and norms, a thousandth of a model's numbers, and handled together."""


@dataclass(frozen=True)
class ParamGroup:
    """`name` is what logs call it; `parameters` are named as in files; `stops_at`: the optimizer step, or the share of all, after which it stays as it is."""

    name: str
    parameters: dict[str, "nn.Parameter"]
    lr: float
    stops_at: int | float | None = None


def split_groups(groups: Sequence[ParamGroup], count: int) -> list[ParamGroup]:
    """The groups cut into about `count`, of one number of tensors each. Contract: training_math.md section 5, fused_optimizer_groups."""
    size = math.ceil(sum(len(group.parameters) for group in groups) / count)
    cut = []
    for group in groups:
        members = list(group.parameters.items())
        for start in range(0, len(members), size):
            cut.append(ParamGroup(group.name, dict(members[start : start + size]), group.lr, group.stops_at))
    return cut
