"""Part file: the file of a small thing that is trained, new words or a control net, without hashes of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from library.errors import NotFinite
from library.files import write_atomically
from library.param_group import ParamGroup
from library.safetensors_io import write_safetensors


def write_part(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Write the tensors in the format of the file's ending: safetensors with metadata, else a torch file.

    Args: dtype: None: the tensors' own.

    Raises NotFinite, and writes nothing, if a number isn't finite.
    """
    stored = {name: tensor.to("cpu", dtype or tensor.dtype) for name, tensor in tensors.items()}
    bad = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if bad:
        raise NotFinite(f"{path}: not saved, as {len(bad)} of its tensors aren't finite ({bad[0]})")
    if path.suffix == ".safetensors":
        write_safetensors(path, stored, metadata)
    else:
        write_atomically(path, lambda file: torch.save(stored, file))


class Trainable(Protocol):
    """Something that is trained. Saves, states and checks go by the names that `tensors` gives."""

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Every parameter that a file of this part holds, trained or not, by its name there."""
        ...

    def groups(self) -> list[ParamGroup]:
        """What is trained of it, by learning rate."""
        ...

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around save and values, on all processes together: meanwhile what is sharded is whole."""
        yield

    def values(self) -> Mapping[str, Tensor]:
        """The numbers of tensors(), whole."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def after_step(self) -> None:
        """What is done to it after every optimizer step."""
        ...

    def file_bytes(self, dtype: torch.dtype | None) -> int:
        """About the size of its file. Args: dtype: None: the tensors' own."""
        item = None if dtype is None else torch.empty((), dtype=dtype).element_size()
        return sum(tensor.numel() * (item or tensor.element_size()) for tensor in self.tensors().values())

    def path(self, stem: Path) -> Path:
        """The file, or folder, that `save` writes."""
        return stem.with_name(f"{stem.name}.safetensors")

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        """Write `path(stem)` and return it. Args: dtype: None: the tensors' own."""
        ...
