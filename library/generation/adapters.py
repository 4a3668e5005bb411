"""Changes: what networks and new words do to a model while pictures are drawn, as drawing asks for it.

`networks` makes them, and the script hands them over: no room of this floor knows another.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from library.models.control import ControlInputs
from library.models.sdxl import SdxlModels

ControlAt = Callable[[int, int], ControlInputs | None]
"""(step, steps) -> what else reaches the U-Net in that step."""


class Adapters(Protocol):
    """Networks, LLLite models and new words on a model."""

    @property
    def num_guides(self) -> int:
        """LLLite models: each takes one guide image for a picture."""
        ...

    @property
    def is_regional(self) -> bool:
        """Whether each network has its region, and its own sub-prompt."""
        ...

    def set_multipliers(self, multipliers: Sequence[float] | None, sub_prompt: int | None = None) -> None:
        """From now on, for text encoders and U-Net; None: those of the options.

        Args: sub_prompt: while this one is encoded, only the network of its region works.
        """
        ...

    def conditions(
        self, *, guides: Sequence[Tensor], sub_contexts: Sequence[Tensor], mask: Tensor | None, parts: int
    ) -> ControlAt:
        """What else reaches the U-Net while one batch is drawn.

        Args:
            guides: one for each LLLite model, [B, 3, H, W] in -1..1; none: they are off.
            sub_contexts: of each sub-prompt, [B, T, 2048]; none where prompts aren't split.
            mask: which network works where, uint8 [H, W, 3]; None: everywhere.
            parts: the U-Net's batch is so many times the pictures (guidance: 2, or 3), picture after picture in each part.
        """
        ...


LoadAdapters = Callable[[SdxlModels], Adapters]
"""Puts the run's networks on a model."""
