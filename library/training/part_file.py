"""Part file: the file of a small thing that is trained, new words or a control net, without hashes of its own."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import NotFinite
from library.files import write_atomically
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
