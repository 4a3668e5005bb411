"""Key formats: network files with kohya's, Diffusers' or PEFT's keys, read as modules by our names.

lora_unet_input_blocks_4_1_proj_in.lora_down.weight              kohya, original module names
lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight    kohya, Diffusers' module names
unet.down_blocks.1.attentions.0.proj_in.lora_A.weight            Diffusers (PEFT); in older files
                                                                 lora.down.weight or
                                                                 processor.to_q_lora.down.weight
base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight    PEFT, of a U-Net
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
from networks.inference.deltas import ModuleTensors, unscaled_delta
from networks.lora_file import BUNDLED, diffusers_names, read_tensors
from networks.targets import TEXT_ENCODERS, UNET, Target, module_key

_DOTTED_KEY = re.compile(
    r"(?P<path>.+?)(?:\.processor\.(?P<projection>\w+)_lora|\.lora_linear_layer|\.lora)?"
    r"\.(?P<tensor>down\.weight|up\.weight|lora_[AB](?:\.\w+)?\.weight|lora_(?:down|up)\.weight"
    r"|lora_magnitude_vector(?:\.\w+)*|alpha|dora_scale)"
)
_MODELS = {"unet": UNET, "text_encoder": TEXT_ENCODERS[0], "text_encoder_2": TEXT_ENCODERS[1]}


def every_layer(unet: UNet, encoders: Iterable[nn.Module]) -> list[Target]:
    """Return every linear layer and convolution for which a file may have a module."""
    targets = []
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parent, _, attribute = path.rpartition(".")
            targets.append(
                Target(UNET, module_key(UNET, path), unet.get_submodule(parent), attribute)
            )
    for model, encoder in zip(TEXT_ENCODERS, encoders, strict=True):
        body = clip_body(encoder)
        for path, layer in body.named_modules():
            if isinstance(layer, nn.Linear):
                parent, _, attribute = path.rpartition(".")
                name = module_key(model, f"text_model.{path}")
                targets.append(Target(model, name, body.get_submodule(parent), attribute))
        if isinstance(getattr(encoder, "text_projection", None), nn.Linear):
            targets.append(
                Target(model, module_key(model, "text_projection"), encoder, "text_projection")
            )
    return targets


def modules_in_file(path: Path, unet: UNet, *, flag: str) -> dict[str, dict[str, Tensor]]:
    """Read a network file and return the tensors of each module, by our names for both.

    Keys that aren't understood keep their name.

    Args:
        path: the network file.
        unet: whose names Diffusers' names are translated to.
        flag: names the option in messages.

    Raises:
        OptionError: if the file can't be read or contains NaN or Inf.
    """
    our_names = diffusers_names(unet)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path, flag=flag).items():
        if key.startswith(BUNDLED):  # placeholder tokens, which embedding_file.py reads
            continue
        name, tensor_name = _split(key)
        modules.setdefault(our_names.get(name, name), {})[tensor_name] = tensor
    _add_peft_alphas(modules, path, our_names)
    return modules


def _split(key: str) -> tuple[str, str]:
    """Split a key into our names of the module and the tensor."""
    if key.startswith("lora_"):  # kohya's
        name, _, tensor_name = key.partition(".")
        return name, _our_tensor_name(tensor_name)
    match = _DOTTED_KEY.fullmatch(key)
    if match is None:
        return key, ""
    path = match["path"].removeprefix("base_model.model.")
    if match["projection"]:
        path = f"{path}.{match['projection']}"
        if match["projection"] == "to_out":
            path += ".0"
    return _our_module_name(path), _our_tensor_name(match["tensor"])


def _our_module_name(path: str) -> str:
    """Return our name of the module at a dotted path."""
    first, _, rest = path.partition(".")
    model = _MODELS.get(first, UNET)
    if first in _MODELS:
        path = rest
    if model != UNET and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"  # transformers 5 leaves it out
    return module_key(model, path)


def _our_tensor_name(name: str) -> str:
    if name.startswith("lora_magnitude_vector"):
        return "dora_scale"
    match = re.fullmatch(r"(?:lora_)?(down|up|A|B)(?:\.\w+)?\.weight", name)
    if match is None:
        return name
    projection = {"A": "down", "B": "up"}.get(match[1], match[1])
    return f"lora_{projection}.weight"


def _add_peft_alphas(
    modules: Mapping[str, dict[str, Tensor]], path: Path, our_names: Mapping[str, str]
) -> None:
    """Add the alphas of Diffusers and PEFT, which are stored in PEFT's configuration."""
    config = _peft_config(path)
    for prefix, model in _MODELS.items():
        alpha = config.get(f"{prefix}.lora_alpha")
        if alpha is None:
            continue
        alphas = {}  # of single modules
        for layer, value in (config.get(f"{prefix}.alpha_pattern") or {}).items():
            name = _our_module_name(f"{prefix}.{layer}")
            alphas[our_names.get(name, name)] = value
        for name, tensors in modules.items():
            down = tensors.get("lora_down.weight")
            if down is None or "alpha" in tensors or not name.startswith(module_key(model, "")):
                continue
            value = float(alphas.get(name, alpha))
            if config.get(f"{prefix}.use_rslora"):
                value *= len(down) ** 0.5
            tensors["alpha"] = torch.tensor(value)


def _peft_config(path: Path) -> dict[str, Any]:
    """Return PEFT's configuration, with keys such as "unet.lora_alpha"; empty if there is none.

    It is stored in the metadata of Diffusers' files. PEFT, which trained a U-Net, writes it to
    another file in the same folder.

    Raises:
        OptionError: if it can't be read.
    """
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        metadata = read_header(path).metadata
    config_file = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            return json.loads(metadata["lora_adapter_metadata"])
        if path.name.startswith("adapter_model.") and config_file.is_file():
            config = json.loads(config_file.read_text(encoding="utf-8"))
            return {f"unet.{name}": value for name, value in config.items()}
    except ValueError as error:
        raise OptionError(f"{path}: its PEFT configuration can't be read: {error}") from None
    return {}


def fits(tensors: ModuleTensors, layer: nn.Module) -> bool:
    """Whether a module's delta has the size of the layer's weight. Only shapes are computed."""
    weight: Any = layer.weight
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items() if tensor.ndim}
    try:
        delta = unscaled_delta(shapes)
    except (RuntimeError, ValueError):
        return False
    if delta.numel() != weight.numel():
        return False
    magnitude = tensors.get("dora_scale")
    return magnitude is None or magnitude.numel() in weight.shape[:2]
