"""Network: what training asks of a network beside a frozen model, whoever made it."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from library.param_group import ParamGroup


class Network(Protocol):
    """Modules that change the layers of a U-Net and of text encoders. Names are those of files."""

    @property
    def module(self) -> nn.Module:
        """What holds the parameters; never called itself."""
        ...

    @property
    def shape(self) -> tuple[object, object]:
        """Rank and alpha, for the metadata; "Dynamic" where they differ."""
        ...

    def attach(self) -> None:
        """From now on the layers' results are changed."""
        ...

    def set_multiplier(self, multiplier: float) -> None: ...

    def limit_norms(self, most: float) -> None:
        """Scale each module's change down to this norm."""
        ...

    def untrainable(self) -> list[str]:
        """Modules that nothing depends on."""
        ...

    def groups(self, unet_lr: float, text_encoder_lrs: tuple[float, float]) -> list[ParamGroup]: ...

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """All parameters."""
        ...

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file holds: parameters, and numbers that belong to them."""
        ...
