"""Applied: network files on a model that draws pictures: merged into its weights, beside them, or folded in for each batch.

y = base(x) + sum of strength_i * change_i(x)
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import OptionError
from library.log import log
from library.models.checkpoint.reader import identify
from library.models.unet import UNet
from networks.inference.deltas import Parts, change_of, is_low_rank, scale_of, unread_parts
from networks.inference.key_formats import fits, modules_in_file
from networks.lora import Target
from networks.lora_file import some

WeightPatch = Callable[[Tensor], Tensor]
"""A layer's input -> what a network adds to its output at strength 1."""


def matched_modules(
    path: Path, layers: Sequence[Target], unet: UNet, *, flag: str, allow_partial: bool
) -> dict[str, Parts]:
    """The file's modules by our names, each of which has a layer that it fits.

    Raises OptionError with counts and names for what isn't understood, has no layer in this model or another size than its layer,
    unless `allow_partial`; and always if nothing fits.
    """
    modules = modules_in_file(path, unet, flag=flag)
    by_name = {target.name: target.layer for target in layers}
    unread = {name for name, parts in modules.items() if unread_parts(parts)}
    if unread == modules.keys():
        raise OptionError(f"{flag} {path}: this is {identify(modules)}; a LoRA, LoHa or LoKr is needed")
    problems = {
        "aren't understood": sorted(unread),
        "have no layer in this model": [name for name in modules if name not in by_name and name not in unread],
        "have another size than their layer": [
            name for name, parts in modules.items() if name in by_name and name not in unread and not fits(parts, by_name[name])
        ],
    }  # fmt: skip
    bad = {name for names in problems.values() for name in names}
    told = "; ".join(f"{len(names)} of its {len(modules)} modules {what} ({some(names)})" for what, names in problems.items() if names)  # fmt: skip
    if bad == modules.keys():
        raise OptionError(f"{flag} {path}: nothing of it fits this model: {told}")
    if told and not allow_partial:
        raise OptionError(f"{flag} {path}: {told}. It was made for another model; --allow_partial takes what fits")
    if told:
        log.warning("%s %s: %s; the rest is taken (--allow_partial)", flag, path, told)
    return {name: parts for name, parts in modules.items() if name not in bad}


class AdaptedLayer(NamedTuple):
    """A layer with networks beside it, and its own forward.

    Attributes: changes: by the number of the network.
    """

    target: Target
    base: WeightPatch
    changes: Mapping[int, WeightPatch]


def attach_adapters(
    layers: Sequence[Target],
    networks: Mapping[int, Mapping[str, Parts]],
    forward_of: Callable[[AdaptedLayer], WeightPatch | None],
) -> None:
    """Let networks change what layers give.

    Args: forward_of: the forward that a layer gets; None: it keeps its own.
    """
    for target in layers:
        layer: Any = target.layer
        changes = {i: make_change(own[target.name], layer) for i, own in networks.items() if target.name in own}
        forward = forward_of(AdaptedLayer(target, layer.forward, changes))
        if forward is not None:
            layer.forward = forward


def summed(strengths: Sequence[float], beside: AdaptedLayer) -> WeightPatch | None:
    """The forward of a layer that networks work on everywhere. A strength of 0 leaves every bit as it is.

    Args: strengths: of each network; read at each call.
    """
    if not beside.changes:
        return None

    def forward(x: Tensor) -> Tensor:
        y = beside.base(x)
        for i, change in beside.changes.items():
            if strengths[i]:
                y = y + strengths[i] * change(x)
        return y

    return forward


@torch.no_grad()
def make_change(parts: Parts, layer: Any) -> WeightPatch:
    """A module ready to be called, on the device and in the dtype of its layer's weight.

    Down and up projections stay apart; of everything else the whole change is made, which takes as much memory as the layer.
    """
    weight = layer.weight
    if is_low_rank(parts):
        scale = scale_of(parts)
        down = parts["lora_down.weight"].to(weight)
        up = (scale * parts["lora_up.weight"].to(weight.device, torch.float32)).to(weight.dtype)
        if isinstance(layer, nn.Conv2d):
            # Files may hold the matrices of 1x1 convolutions.
            down = down.reshape(len(down), *weight.shape[1:])
            up = up.reshape(*up.shape[:2], 1, 1)
            return lambda x: F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding), up)
        down, up = down.flatten(1), up.flatten(1)
        return lambda x: F.linear(F.linear(x, down), up)
    whole = change_of(parts, weight).to(weight.dtype)
    if isinstance(layer, nn.Conv2d):
        return lambda x: F.conv2d(x, whole, None, layer.stride, layer.padding)
    return lambda x: F.linear(x, whole)


class FusedAdapters:
    """Networks in the weights of their layers (--network_pre_calc): no cost for each step, some for each new set of strengths."""

    def __init__(self, layers: Sequence[Target], networks: Mapping[int, Mapping[str, Parts]]):
        self._networks = networks
        covered = {name for own in networks.values() for name in own}
        self._own: list[tuple[Target, nn.Parameter]] = [
            (target, _weight_of(target)) for target in layers if target.name in covered
        ]
        self._strengths: list[float] = []

    @torch.no_grad()
    def fold(self, strengths: Sequence[float]) -> None:
        """Give every layer its own weight with the changes at these strengths; at 0, its own."""
        if list(strengths) == self._strengths:
            return
        self._strengths = list(strengths)
        for target, own in self._own:
            added = [
                strengths[i] * change_of(modules[target.name], own)
                for i, modules in self._networks.items()
                if strengths[i] and target.name in modules
            ]
            layer: Any = target.layer
            layer.weight = own if not added else _frozen((own.float() + torch.stack(added).sum(0)).to(own.dtype))


def _weight_of(target: Target) -> nn.Parameter:
    weight = target.layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
def merge_into(layers: Sequence[Target], modules: Mapping[str, Parts], strength: float) -> None:
    """Add a network to the layers' weights, in float32 and rounded once; weights may lie in a mapped file, so they are replaced."""
    for target in layers:
        if (parts := modules.get(target.name)) is not None:
            if not fits(parts, target.layer):
                raise OptionError(f"{target.name}: its change has another size than the layer's weight")
            layer: Any = target.layer
            weight = layer.weight
            layer.weight = _frozen((weight.float() + strength * change_of(parts, weight)).to(weight.dtype))
