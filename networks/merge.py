"""Merging LoRA files into the weights of a model: W += multiplier * (alpha / r) * up @ down.

Source: contract, formats.md section 10 (sdxl_merge_lora with --sd_model).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError
from library.models.unet import UNet
from networks.lora import Target, text_encoder_targets, unet_targets
from networks.lora_file import read_lora


class BaseWeights:
    """LoRA files that become part of the base model before anything else is done with it (--base_weights)."""

    def __init__(self, files: Sequence[Path], multipliers: Sequence[float], unet: UNet, encoders: Iterable[nn.Module]):
        """See that every module of the files has a layer; the models need no weights for that.

        Args: multipliers: one for each file; those that are missing are 1.

        Raises OptionError with counts and names.
        """
        missing = [1.0] * (len(files) - len(multipliers))
        self._files = list(zip(files, [*multipliers, *missing], strict=True))
        self._unet = unet
        names = {target.name for target in [*unet_targets(unet), *_of_encoders(encoders)]}
        for path, _ in self._files:
            modules = {key.partition(".")[0] for key in self._read(path)}
            if unknown := sorted(modules - names):
                raise OptionError(
                    f"--base_weights {path}: {len(unknown)} of its {len(modules)} modules have no layer in this model ({', '.join(unknown[:5])})"
                )

    def _read(self, path: Path) -> dict[str, Tensor]:
        return read_lora(path, self._unet, flag="--base_weights")

    def text_identity(self) -> str:
        """What tells text encoders with these files merged from others; "" if no file changes them."""
        told = []
        for path, multiplier in self._files:
            if any(key.startswith("lora_te") for key in self._read(path)):
                told.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()} x {multiplier:g}")
        return " + ".join(told)

    def apply(self, part: str, module: Any) -> None:
        """Change the layers of a freshly loaded part: "unet", "text_encoder_1" or "text_encoder_2"."""
        targets = list(unet_targets(module) if part == "unet" else text_encoder_targets(module, int(part[-1])))
        for path, multiplier in self._files:
            merge(targets, self._read(path), multiplier)


def _of_encoders(encoders: Iterable[nn.Module]) -> list[Target]:
    return [target for number, encoder in enumerate(encoders, 1) for target in text_encoder_targets(encoder, number)]


@torch.no_grad()
def merge(targets: Iterable[Target], tensors: Mapping[str, Tensor], multiplier: float) -> None:
    """Add a file's changes to the layers' weights, in float32 and rounded once; weights may lie in a mapped file, so they are replaced."""
    for target in targets:
        if f"{target.name}.lora_down.weight" not in tensors:
            continue
        layer: Any = target.layer
        change = multiplier * change_of(tensors, target.name).to(layer.weight.device)
        if change.numel() != layer.weight.numel():
            raise OptionError(
                f"{target.name}: its change is {list(change.shape)}, the layer {list(layer.weight.shape)}"
            )
        weight = (layer.weight.float() + change.reshape(layer.weight.shape)).to(layer.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def change_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """(alpha / r) * up @ down of one module: [out, in], or [out, in, kh, kw]; float32."""
    down, up = (tensors[f"{name}.lora_{which}.weight"].float() for which in ("down", "up"))
    rank = len(down)
    alpha = tensors.get(f"{name}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / rank
    if (mid := tensors.get(f"{name}.lora_mid.weight")) is not None:  # a convolution taken apart by Tucker's rule
        return scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), mid.float(), down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
