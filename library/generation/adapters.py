"""Adapters: what the generation pipeline asks of networks, control nets and embeddings on a model.

The package `networks` implements this protocol and the script passes it in, because packages of
one floor never import each other.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from library.models.control import ControlInputs
from library.models.sdxl import SdxlModels

ControlSchedule = Callable[[int, int], ControlInputs | None]
"""(step index, number of steps) -> the U-Net's control inputs in that step."""


class Adapters(Protocol):
    """Networks, control nets and embeddings that were loaded onto a model."""

    @property
    def num_control_nets(self) -> int:
        """Number of ControlNet-LLLite models; each takes one guide image per generated image."""
        ...

    @property
    def is_regional(self) -> bool:
        """Whether each network works in its own region and on its own sub-prompt."""
        ...

    def set_multipliers(
        self, multipliers: Sequence[float] | None, sub_prompt: int | None = None
    ) -> None:
        """Set the strengths of the networks in the text encoders and the U-Net.

        Args:
            multipliers: one per network. None: those of the options.
            sub_prompt: index of the sub-prompt that is being encoded; only the network of its
                region is active. None: all networks are.
        """
        ...

    def prepare_batch(
        self,
        *,
        guide_images: Sequence[Tensor],
        sub_contexts: Sequence[Tensor],
        mask: Tensor | None,
        num_branches: int,
    ) -> ControlSchedule:
        """Prepare the denoising of one batch and return the control inputs of its steps.

        Args:
            guide_images: one per control net, [B, 3, H, W] in -1..1. Empty: control nets are off.
            sub_contexts: the context of each sub-prompt, [B, T, 2048]. Empty: prompts aren't split.
            mask: the region of each network, uint8 [H, W, 3]. None: everywhere.
            num_branches: guidance branches (1 to 3). The U-Net's batch holds all images once per
                branch, branch after branch.
        """
        ...


LoadAdapters = Callable[[SdxlModels], Adapters]
"""Loads the run's networks, control nets and embeddings onto a model."""
