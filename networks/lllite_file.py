"""ControlNet-LLLite files: which modules and sizes a file has, and a control net from it.

Format: contract, formats.md section 8, as ComfyUI's node for them reads it.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from library.errors import OptionError
from library.models.checkpoint.reader import identify
from networks.lllite import PREFIX, AttentionProjection, ControlNetLLLite
from networks.lora_file import copy_fitting, read_tensors

_LINEAR = ("down.0.weight", "mid.0.weight", "up.0.weight")


def read_lllite(path: Path, *, flag: str) -> dict[str, Tensor]:
    """Return the tensors of a file; 1x1 convolutions, which some files have, as matrices.

    Args:
        path: the file.
        flag: names the option in messages.

    Raises:
        OptionError: if the file is not a ControlNet-LLLite, can't be read, or contains NaN or Inf.
    """
    tensors = read_tensors(path, flag=flag)
    if not any(name.startswith(f"{PREFIX}_") for name in tensors):
        raise OptionError(
            f"{flag} {path}: this is {identify(tensors)}; a ControlNet-LLLite with {PREFIX}_… keys "
            "is required"
        )
    for name, tensor in tensors.items():
        if name.endswith(_LINEAR) and tensor.shape[2:] == (1, 1):
            tensors[name] = tensor.flatten(1)
    return tensors


def shapes_in_file(
    tensors: Mapping[str, Tensor], projections: Iterable[AttentionProjection]
) -> dict[AttentionProjection, tuple[int, int]]:
    """Return (C, M) of the file's module for each projection that has one."""
    shapes = {}
    for projection in projections:
        convolution = tensors.get(f"{projection.name}.conditioning1.0.weight")
        down = tensors.get(f"{projection.name}.down.0.weight")
        if convolution is not None and down is not None:
            shapes[projection] = (2 * len(convolution), len(down))
    return shapes


def lllite_from_file(
    path: Path,
    projections: Iterable[AttentionProjection],
    *,
    flag: str,
    allow_partial: bool = False,
) -> ControlNetLLLite:
    """Return the control net of a file, float32, frozen.

    Args:
        path: the file.
        projections: the projections that can have a module.
        flag: names the option in messages.
        allow_partial: whether modules that don't fit are ignored.

    Raises:
        OptionError: if modules have no layer in this model or another shape than it requires, with
            counts and names, unless `allow_partial`; always if none fits.
    """
    tensors = read_lllite(path, flag=flag)
    net = ControlNetLLLite(shapes_in_file(tensors, projections))
    fitting = copy_fitting(
        tensors,
        dict(net.named_parameters()),
        source=f"{flag} {path}",
        remedy="It was trained for another model; --allow_partial loads the tensors that fit",
        allow_partial=allow_partial,
    )
    _drop_incomplete(net, set(fitting))
    if not net.projections:
        raise OptionError(
            f"{flag} {path}: none of its modules is complete and has a layer in this model"
        )
    return net.requires_grad_(False).eval()


def _drop_incomplete(net: ControlNetLLLite, loaded: Collection[str]) -> None:
    """Remove the modules of which not all tensors were loaded."""
    for projection in list(net.projections):
        names = [name for name, _ in net.lllite(projection).named_parameters()]
        if not all(f"{projection.name}.{name}" in loaded for name in names):
            net.projections.remove(projection)
            delattr(net, projection.name)
