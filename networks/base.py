"""Network: what training requires of a network, whether this suite's or another package's."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from library.param_group import ParamGroup


class Network(ABC):
    """Modules that change the layers of a frozen U-Net and of frozen text encoders.

    Modules and tensors are named as in network files.
    """

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module that holds the parameters. It is never called itself."""

    @property
    @abstractmethod
    def shape(self) -> tuple[object, object]:
        """Rank and alpha, for the metadata; "Dynamic" where modules differ."""

    @abstractmethod
    def attach(self) -> None:
        """Make the network change the outputs of its layers from now on."""

    @abstractmethod
    def set_multiplier(self, multiplier: float) -> None:
        """Scale the changes of all layers by `multiplier`."""

    @abstractmethod
    def limit_norms(self, max_norm: float) -> None:
        """Scale down each module whose weight change has a norm above `max_norm`."""

    @abstractmethod
    def groups(self, unet_lr: float, text_encoder_lrs: tuple[float, float]) -> list[ParamGroup]:
        """Return the trainable parameters by learning rate; those with learning rate 0 are left out."""

    def untrainable(self) -> list[str]:
        """Return the names of the modules that no output depends on."""
        return []

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Return all parameters by name."""
        return dict(self.module.named_parameters())

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the content of a network file: parameters, and constants such as alpha."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
