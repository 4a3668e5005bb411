"""ParamGroup: parameters that are trained at one learning rate."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ParamGroup:
    """`name` is what logs call it; `parameters` are named as in files; `stops_at`: the optimizer step, or the share of all, after which it stays as it is."""

    name: str
    parameters: dict[str, "nn.Parameter"]
    lr: float
    stops_at: int | float | None = None
