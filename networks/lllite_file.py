"""ControlNet-LLLite files: which modules and sizes one holds, and a control net from it.

Format: contract, formats.md section 8; that of ComfyUI's node for them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from library.errors import OptionError
from library.models.checkpoint.reader import identify
from networks.lllite import PREFIX, ControlNetLLLite, Place
from networks.lora_file import copy_fitting, read_tensors

_LINEAR = ("down.0.weight", "mid.0.weight", "up.0.weight")


def read_lllite(path: Path, *, flag: str) -> dict[str, Tensor]:
    """The tensors of a file; 1x1 convolutions, as some files have them, as the matrices that they are.

    Raises OptionError for what is no LLLite, can't be read, or holds numbers that aren't finite.
    """
    tensors = read_tensors(path, flag=flag)
    if not any(name.startswith(f"{PREFIX}_") for name in tensors):
        raise OptionError(
            f"{flag} {path}: this is {identify(tensors)}; a ControlNet-LLLite with {PREFIX}_… keys is needed"
        )
    return {
        name: tensor.flatten(1) if name.endswith(_LINEAR) and tensor.shape[2:] == (1, 1) else tensor
        for name, tensor in tensors.items()
    }


def shapes_in_file(
    tensors: Mapping[str, Tensor], places: Iterable[Place]
) -> dict[Place, tuple[int, int]]:
    """(C, M) of the file's module at each place where it has one."""
    shapes = {}
    for place in places:
        convolution, down = (
            tensors.get(f"{place.name}.{part}.weight") for part in ("conditioning1.0", "down.0")
        )
        if convolution is not None and down is not None:
            shapes[place] = (2 * len(convolution), len(down))
    return shapes


def lllite_from_file(
    path: Path, places: Iterable[Place], *, flag: str, allow_partial: bool = False
) -> ControlNetLLLite:
    """The control net of a file, float32, frozen.

    Raises OptionError with counts and names for what has no layer in this model, or another shape than its layer asks for, unless
    `allow_partial`; and always if nothing fits.
    """
    tensors = read_lllite(path, flag=flag)
    net = ControlNetLLLite(shapes_in_file(tensors, places))
    remedy = "It was trained for another model; --allow_partial takes what fits"
    fitting = copy_fitting(
        tensors,
        dict(net.named_parameters()),
        source=f"{flag} {path}",
        remedy=remedy,
        allow_partial=allow_partial,
    )
    _drop_incomplete(net, set(fitting))
    if not net.places:
        raise OptionError(
            f"{flag} {path}: none of its modules is complete and has a layer in this model"
        )
    return net.requires_grad_(False).eval()


def _drop_incomplete(net: ControlNetLLLite, fitting: set[str]) -> None:
    """Leave out modules that have only a part of their weights."""
    for place in list(net.places):
        if any(
            f"{place.name}.{name}" not in fitting
            for name, _ in net.lllite(place).named_parameters()
        ):
            net.places.remove(place)
            delattr(net, place.name)
