"""ParamGroup: parameters that are trained at one learning rate."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ParamGroup:
    """`name` is what logs call it; `parameters` are named as in files."""

    name: str
    parameters: dict[str, "nn.Parameter"]
    lr: float
