"""ParamGroup: parameters that are trained at one learning rate."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

SMALL = 1 << 15
"""Elements of a tensor. Smaller ones are biases and norms, a thousandth of a model's weights, and are handled together."""

Component = Literal["unet", "text_encoders", "text_encoder_1", "text_encoder_2", "token", "mixed"]
"""What the parameters of a group belong to or change: "text_encoders" is both of them, "token" the rows of a placeholder
token, "mixed" a group of another package's network that covers the U-Net and the text encoders."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are trained at one learning rate.

    Attributes:
        name: the group's name in logs.
        parameters: the parameters by their names in files.
        lr: the learning rate.
        component: what the parameters belong to or change.
        last_step: optimizer steps after which the group is frozen; None: it is trained until the end.
    """

    name: str
    parameters: dict[str, "nn.Parameter"]
    lr: float
    component: Component = "unet"
    last_step: int | None = None

    @property
    def is_of_text_encoders(self) -> bool:
        """Whether the group belongs to the text encoders alone (--stop_text_encoder_training)."""
        return self.component in ("text_encoders", "text_encoder_1", "text_encoder_2")

    @property
    def needs_text_gradients(self) -> bool:
        """Whether its gradients pass through the text encoders."""
        return self.component != "unet"


def split_groups(groups: Sequence[ParamGroup], count: int) -> list[ParamGroup]:
    """Return the groups split into about `count` groups with equally many tensors.

    Source: contract, training_math.md section 5, fused_optimizer_groups.
    """
    size = math.ceil(sum(len(group.parameters) for group in groups) / count)
    split = []
    for group in groups:
        members = list(group.parameters.items())
        for start in range(0, len(members), size):
            split.append(dataclasses.replace(group, parameters=dict(members[start : start + size])))
    return split
