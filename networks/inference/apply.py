"""Applying network files to a model: merged, attached to layers, or fused for each batch.

y = base(x) + sum of strength_i * patch_i(x)
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
from networks.inference.deltas import (
    ModuleTensors,
    is_low_rank,
    scale_of,
    unknown_tensors,
    weight_delta,
)
from networks.inference.key_formats import fits, modules_in_file
from networks.lora_file import some
from networks.targets import Target

WeightPatch = Callable[[Tensor], Tensor]
"""A layer's input -> what a network adds to its output at strength 1."""


def matched_modules(
    path: Path, layers: Sequence[Target], unet: UNet, *, flag: str, allow_partial: bool
) -> dict[str, ModuleTensors]:
    """Read a network file and return the modules that fit the model, by our names.

    Args:
        path: the network file.
        layers: all layers that can have a module.
        unet: whose names the file's keys are translated to.
        flag: names the option in messages.
        allow_partial: whether modules that don't fit are ignored.

    Raises:
        OptionError: if modules don't fit, with counts and names, unless `allow_partial`; always if
            none fits.
    """
    modules = modules_in_file(path, unet, flag=flag)
    by_name = {target.name: target.layer for target in layers}
    unknown: list[str] = []
    without_layer: list[str] = []
    other_size: list[str] = []
    for name, tensors in modules.items():
        if unknown_tensors(tensors):
            unknown.append(name)
        elif name not in by_name:
            without_layer.append(name)
        elif not fits(tensors, by_name[name]):
            other_size.append(name)
    if len(unknown) == len(modules):
        raise OptionError(
            f"{flag} {path}: this is {identify(modules)}; a LoRA, LoHa or LoKr is needed"
        )
    problems = []
    for names, problem in (
        (sorted(unknown), "aren't understood"),
        (without_layer, "have no layer in this model"),
        (other_size, "have another size than their layer"),
    ):
        if names:
            problems.append(f"{len(names)} of its {len(modules)} modules {problem} ({some(names)})")
    description = "; ".join(problems)
    bad = {*unknown, *without_layer, *other_size}
    if bad == modules.keys():
        raise OptionError(f"{flag} {path}: nothing of it fits this model: {description}")
    if bad and not allow_partial:
        raise OptionError(
            f"{flag} {path}: {description}. It was made for another model; "
            "--allow_partial uses the modules that fit"
        )
    if bad:
        log.warning("%s %s: %s; the others are used (--allow_partial)", flag, path, description)
    return {name: tensors for name, tensors in modules.items() if name not in bad}


class AdaptedLayer(NamedTuple):
    """A layer with networks attached.

    Attributes:
        target: the layer and its name.
        base: the layer's own forward.
        patches: of each network that has a module for the layer, by the network's index.
    """

    target: Target
    base: WeightPatch
    patches: Mapping[int, WeightPatch]


def attach_adapters(
    layers: Sequence[Target],
    networks: Mapping[int, Mapping[str, ModuleTensors]],
    forward_of: Callable[[AdaptedLayer], WeightPatch | None],
) -> None:
    """Attach networks to layers by replacing the layers' forward.

    Args:
        layers: all layers of the model.
        networks: the modules of each network, by its index.
        forward_of: returns the new forward of a layer; None: the layer keeps its own.
    """
    for target in layers:
        layer: Any = target.layer
        patches = {}
        for i, modules in networks.items():
            if target.name in modules:
                patches[i] = make_patch(modules[target.name], layer)
        forward = forward_of(AdaptedLayer(target, layer.forward, patches))
        if forward is not None:
            layer.forward = forward


def sum_of_patches(strengths: Sequence[float], layer: AdaptedLayer) -> WeightPatch | None:
    """Return the forward of a layer to which networks add everywhere.

    A network with strength 0 is skipped, so that the output is the layer's own bit for bit.

    Args:
        strengths: of each network; they are read at each call.
        layer: with its networks.
    """
    if not layer.patches:
        return None

    def forward(x: Tensor) -> Tensor:
        y = layer.base(x)
        for i, patch in layer.patches.items():
            if strengths[i]:
                y = y + strengths[i] * patch(x)
        return y

    return forward


@torch.no_grad()
def make_patch(tensors: ModuleTensors, layer: Any) -> WeightPatch:
    """Make a callable module on the device and in the dtype of its layer's weight.

    Down and up projections stay separate. For all other kinds the full delta is computed, which
    takes as much memory as the layer.
    """
    weight = layer.weight
    if not is_low_rank(tensors):
        delta = weight_delta(tensors, weight).to(weight.dtype)
        if isinstance(layer, nn.Conv2d):
            return lambda x: F.conv2d(x, delta, None, layer.stride, layer.padding)
        return lambda x: F.linear(x, delta)
    down = tensors["lora_down.weight"].to(weight)
    scaled_up = scale_of(tensors) * tensors["lora_up.weight"].to(weight.device, torch.float32)
    up = scaled_up.to(weight.dtype)
    if isinstance(layer, nn.Conv2d):
        # Files may store the matrices of 1x1 convolutions.
        down = down.reshape(len(down), *weight.shape[1:])
        up = up.reshape(*up.shape[:2], 1, 1)
        return lambda x: F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding), up)
    down, up = down.flatten(1), up.flatten(1)
    return lambda x: F.linear(F.linear(x, down), up)


class FusedAdapters:
    """Networks fused into the weights of their layers (--network_pre_calc).

    They cost nothing per step, and some time whenever strengths change.
    """

    def __init__(
        self, layers: Sequence[Target], networks: Mapping[int, Mapping[str, ModuleTensors]]
    ):
        self._networks = networks
        self._base_weights: list[tuple[Target, nn.Parameter]] = []
        for target in layers:
            if any(target.name in modules for modules in networks.values()):
                weight = target.layer.weight
                assert isinstance(weight, nn.Parameter)
                self._base_weights.append((target, weight))
        self._strengths: list[float] = []

    @torch.no_grad()
    def fuse(self, strengths: Sequence[float]) -> None:
        """Give every layer its base weight plus the deltas at these strengths."""
        if list(strengths) == self._strengths:
            return
        self._strengths = list(strengths)
        for target, base in self._base_weights:
            deltas = []
            for i, modules in self._networks.items():
                if strengths[i] and target.name in modules:
                    deltas.append(strengths[i] * weight_delta(modules[target.name], base))
            layer: Any = target.layer
            layer.weight = base
            if deltas:
                fused = base.float() + torch.stack(deltas).sum(0)
                layer.weight = _frozen(fused.to(base.dtype))


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
def merge_into(
    layers: Sequence[Target], modules: Mapping[str, ModuleTensors], strength: float
) -> None:
    """Add a network to the weights of layers, in float32 and rounded once.

    Weights are replaced and not modified in place, because they may be mapped from a file.

    Raises:
        OptionError: if a module has another size than its layer.
    """
    for target in layers:
        if target.name not in modules:
            continue
        tensors = modules[target.name]
        if not fits(tensors, target.layer):
            raise OptionError(f"{target.name}: the module has another size than the layer's weight")
        layer: Any = target.layer
        weight = layer.weight
        merged = weight.float() + strength * weight_delta(tensors, weight)
        layer.weight = _frozen(merged.to(weight.dtype))
