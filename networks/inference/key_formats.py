"""Layouts: network files of kohya's, Diffusers' and PEFT's spelling, as modules with the names that we give them.

lora_unet_input_blocks_4_1_proj_in.lora_down.weight              kohya, the original's module names
lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight    kohya, Diffusers' module names
unet.down_blocks.1.attentions.0.proj_in.lora_A.weight            Diffusers (PEFT); older: lora.down.weight, processor.to_q_lora.down.weight
base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight    PEFT alone, of a U-Net
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError
from library.models.text_encoders import clip_body
from library.models.unet import UNet
from library.safetensors_io import read_header
from networks.inference.deltas import Parts, unscaled_change
from networks.lora import TEXT_ENCODERS, UNET, Target, module_key
from networks.lora_file import BUNDLED, diffusers_names, read_tensors

_DOTTED_PART = re.compile(
    r"(?P<path>.+?)(?:\.processor\.(?P<projection>\w+)_lora|\.lora_linear_layer|\.lora)?"
    r"\.(?P<part>down\.weight|up\.weight|lora_[AB](?:\.\w+)?\.weight|lora_(?:down|up)\.weight|lora_magnitude_vector(?:\.\w+)*|alpha|dora_scale)"
)
_PARTS_OF = {"unet": UNET, "text_encoder": TEXT_ENCODERS[0], "text_encoder_2": TEXT_ENCODERS[1]}


def every_layer(unet: UNet, encoders: Iterable[nn.Module]) -> list[Target]:
    """Every linear layer and convolution that a file may have a module for."""
    found = [
        Target(UNET, module_key(UNET, path), layer)
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    for part, encoder in zip(TEXT_ENCODERS, encoders, strict=True):
        layers: dict[str, Any] = {f"text_model.{path}": layer for path, layer in clip_body(encoder).named_modules()}
        layers["text_projection"] = getattr(encoder, "text_projection", None)
        found += [
            Target(part, module_key(part, path), layer)
            for path, layer in layers.items()
            if isinstance(layer, nn.Linear)
        ]
    return found


def modules_in_file(path: Path, unet: UNet, *, flag: str) -> dict[str, dict[str, Tensor]]:
    """The parts of each module of a network file, by our names for both. What isn't understood keeps its own name.

    Raises OptionError if the file can't be read or holds numbers that aren't finite.
    """
    respelt = diffusers_names(unet)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path, flag=flag).items():
        if key.startswith(BUNDLED):  # embedding_file.py adds these words
            continue
        name, part = _split(key)
        modules.setdefault(respelt.get(name, name), {})[part] = tensor
    _add_alphas(modules, path, respelt)
    return modules


def _split(key: str) -> tuple[str, str]:
    """(module, part) of a key."""
    if key.startswith("lora_"):  # kohya's
        name, _, part = key.partition(".")
        return name, _our_part(part)
    match = _DOTTED_PART.fullmatch(key)
    if match is None:
        return key, ""
    path = match["path"].removeprefix("base_model.model.")
    if match["projection"]:
        path = f"{path}.{match['projection']}" + (".0" if match["projection"] == "to_out" else "")
    return _module(path), _our_part(match["part"])


def _module(path: str) -> str:
    """Our name of the module at a dotted path."""
    first, _, rest = path.partition(".")
    part = _PARTS_OF.get(first, UNET)
    own = rest if first in _PARTS_OF else path
    if part != UNET and not own.startswith(("text_model.", "text_projection")):
        own = f"text_model.{own}"  # transformers 5 leaves it out
    return module_key(part, own)


def _our_part(part: str) -> str:
    if part.startswith("lora_magnitude_vector"):
        return "dora_scale"
    if match := re.fullmatch(r"(?:lora_)?(down|up|A|B)(?:\.\w+)?\.weight", part):
        return {"A": "lora_down.weight", "B": "lora_up.weight"}.get(match[1], f"lora_{match[1]}.weight")
    return part


def _add_alphas(modules: Mapping[str, dict[str, Tensor]], path: Path, respelt: Mapping[str, str]) -> None:
    """Diffusers and PEFT write alphas elsewhere, as PEFT's configuration of each model."""
    config = _peft_config(path)
    for first, part in _PARTS_OF.items():
        alpha = config.get(f"{first}.lora_alpha")
        patterns = {
            respelt.get(name, name): own
            for name, own in (
                (_module(f"{first}.{layer}"), own)
                for layer, own in (config.get(f"{first}.alpha_pattern") or {}).items()
            )
        }
        if alpha is None:
            continue
        for name, parts in modules.items():
            down = parts.get("lora_down.weight")
            if down is not None and name.startswith(module_key(part, "")) and "alpha" not in parts:
                own = float(patterns.get(name, alpha))
                parts["alpha"] = torch.tensor(own * len(down) ** 0.5 if config.get(f"{first}.use_rslora") else own)


def _peft_config(path: Path) -> dict[str, Any]:
    """By model and name, "unet.lora_alpha": from Diffusers' metadata, or the file that PEFT, which trained a U-Net, writes beside its own.

    Raises OptionError if it can't be read.
    """
    metadata = read_header(path).metadata if path.suffix == ".safetensors" else {}
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            return json.loads(metadata["lora_adapter_metadata"])
        if path.name.startswith("adapter_model.") and beside.is_file():
            return {f"unet.{name}": value for name, value in json.loads(beside.read_text(encoding="utf-8")).items()}
    except ValueError as error:
        raise OptionError(f"{path}: PEFT's configuration of it can't be read: {error}") from None
    return {}


def fits(parts: Parts, layer: nn.Module) -> bool:
    """Whether the module's change has the size of the layer's weight. Computes shapes alone."""
    weight: Any = layer.weight
    try:
        change = unscaled_change({name: tensor.to("meta") for name, tensor in parts.items() if tensor.ndim})
    except (RuntimeError, ValueError):
        return False
    magnitude = parts.get("dora_scale")
    return change.numel() == weight.numel() and (
        magnitude is None or magnitude.numel() in (weight.shape[0], weight.shape[1])
    )
