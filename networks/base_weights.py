"""Base weights: LoRA files that are merged into the base model before training (--base_weights).

W += multiplier * (alpha / r) * up @ down

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
from networks.lora_file import read_lora, some
from networks.targets import TEXT_ENCODERS, UNET, all_targets, text_encoder_targets, unet_targets


class BaseWeights:
    """LoRA files that become part of the base model. It is a `WeightPatch` (library/models/sdxl.py)."""

    def __init__(
        self,
        files: Sequence[Path],
        multipliers: Sequence[float],
        unet: UNet,
        encoders: Iterable[nn.Module],
    ):
        """Check that every module of the files has a layer. The models need no weights for that.

        Args:
            files: the LoRA files.
            multipliers: one for each file; missing ones are 1.
            unet: the U-Net.
            encoders: the text encoders.

        Raises:
            OptionError: if modules have no layer, with counts and names.
        """
        missing = [1.0] * (len(files) - len(multipliers))
        self._files = list(zip(files, [*multipliers, *missing], strict=True))
        self._unet = unet
        names = {target.name for target in all_targets(unet, encoders)}
        for path in files:
            modules = {key.partition(".")[0] for key in self._read(path)}
            unknown = sorted(modules - names)
            if unknown:
                raise OptionError(
                    f"--base_weights {path}: {len(unknown)} of its {len(modules)} modules have no "
                    f"layer in this model ({some(unknown)})"
                )

    def _read(self, path: Path) -> dict[str, Tensor]:
        return read_lora(path, self._unet, flag="--base_weights")

    def text_identity(self) -> str:
        """Return a text that identifies the files that change text encoders; "" if none does."""
        identities = []
        for path, multiplier in self._files:
            if any(key.startswith("lora_te") for key in self._read(path)):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                identities.append(f"{digest} x {multiplier:g}")
        return " + ".join(identities)

    def apply(self, part: str, module: Any) -> None:
        """Merge the files into a model that was just loaded.

        Args:
            part: "unet", "text_encoder_1" or "text_encoder_2".
            module: the model.
        """
        if part == UNET:
            targets = list(unet_targets(module))
        else:
            index = TEXT_ENCODERS.index(part)
            targets = list(text_encoder_targets(module, index))
        for path, multiplier in self._files:
            modules: dict[str, dict[str, Tensor]] = {}
            for key, tensor in self._read(path).items():
                name, _, rest = key.partition(".")
                modules.setdefault(name, {})[rest] = tensor
            merge_into(targets, modules, multiplier)
