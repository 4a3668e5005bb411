"""Base weights: LoRA files that are merged into a model before it is trained: W += multiplier * (alpha / r) * up @ down.

Source: contract, formats.md section 10 (sdxl_merge_lora with --sd_model).
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import OptionError
from library.models.unet import UNet
from networks.inference.apply import merge_into
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
            modules: dict[str, dict[str, Tensor]] = {}
            for key, tensor in self._read(path).items():
                name, _, rest = key.partition(".")
                modules.setdefault(name, {})[rest] = tensor
            merge_into(targets, modules, multiplier)


def _of_encoders(encoders: Iterable[nn.Module]) -> list[Target]:
    return [target for number, encoder in enumerate(encoders, 1) for target in text_encoder_targets(encoder, number)]
