"""Trainable: one thing that a run trains and saves, such as a U-Net, a network or a placeholder token."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from library.param_group import ParamGroup
from library.safetensors_io import save_tensors


class Trainable(ABC):
    """Something that is trained and saved to a file of its own.

    Saved states, the moving average and checks go by the names that `tensors` gives.
    """

    def __init__(self, groups: Sequence[ParamGroup], extension: str):
        """Initialize the trainable.

        Args:
            groups: the trained parameters by learning rate.
            extension: the ending of its files, without a dot.
        """
        self._groups, self._extension = list(groups), extension

    @abstractmethod
    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Return every parameter of its file, trained or not, by the name in the file."""

    def groups(self) -> list[ParamGroup]:
        """Return its trained parameters by learning rate."""
        return self._groups

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather sharded parameters for `save` and `full_tensors`; all processes enter it together."""
        yield

    def full_tensors(self) -> Mapping[str, Tensor]:
        """Return the values of `tensors`, not sharded."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def after_step(self) -> None:  # noqa: B027 (nothing by default)
        """Change the parameters after an optimizer step; most trainables don't."""

    def file_bytes(self, dtype: torch.dtype | None) -> int:
        """Return the approximate size of its file.

        Args:
            dtype: the dtype of the saved tensors; None: each tensor's own.
        """
        return bytes_in(self.tensors().values(), dtype)

    def path(self, stem: Path) -> Path:
        """Return the file, or the folder, that `save` writes."""
        return stem.with_name(f"{stem.name}.{self._extension}")

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        """Write `path(stem)` and return it.

        Args:
            stem: the path without its ending.
            dtype: the dtype of the saved tensors; None: each tensor's own.
            metadata: the file's metadata.

        Raises:
            NotFinite: a value is NaN or Inf; nothing is written.
        """
        path = self.path(stem)
        save_tensors(path, self.full_tensors(), metadata, dtype)
        return path


def bytes_in(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> int:
    """Return the bytes of the tensors in this dtype; None: each in its own."""
    size = 0
    for tensor in tensors:
        size += tensor.numel() * (tensor.dtype if dtype is None else dtype).itemsize
    return size
