"""The tensors of one part of a checkpoint, from the names and shapes of one layout to those of another.

Layouts: `file` (single file, without the part's prefix), `folder` (Diffusers), `module` (the live module; key_maps.py).
All are views where that is possible; nothing is cast.

Source of the transposed projection: open_clip computes `x @ text_projection`; Stability-AI/generative-models issue 111.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from library.models.checkpoint import key_maps
from library.models.checkpoint.key_maps import DROPPED, STACKED, Renaming, inverse
from library.models.unet_config import UNetConfig

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


def unet_name_from_folder(names: Iterable[str]) -> Renaming:
    """Diffusers U-Net name -> single-file name."""
    return Renaming(inverse(key_maps.unet_pairs_of_diffusers_names(names)))


def module_from_file(part: str, tensors: Tensors) -> dict[str, "torch.Tensor"]:
    """Module tensors of the tensors that a single file keeps under the part's prefix."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(DROPPED)}
    if part == "text_encoder_2":
        kept.pop("logit_scale", None)
        return _text_encoder_2_from_file(kept)
    if part == "vae":
        rename = Renaming(key_maps.vae_pairs())
        return _vae_attention_shaped(
            {rename(name): tensor for name, tensor in kept.items()}, linear=True
        )
    return kept


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """Tensors that are made whenever they are read, so that not all of them are in memory at once."""

    def __init__(self, made: "Mapping[str, Callable[[], torch.Tensor]]"):
        self._made = made

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def file_from_module(part: str, tensors: Tensors) -> Tensors:
    """What a single file keeps under the part's prefix."""
    if part == "text_encoder_2":
        return _text_encoder_2_to_file(tensors)
    if part == "vae":
        rename = Renaming(inverse(key_maps.vae_pairs()))
        return {
            rename(name): tensor
            for name, tensor in _vae_attention_shaped(tensors, linear=False).items()
        }
    return dict(tensors)


def module_from_folder(part: str, tensors: Tensors) -> dict[str, "torch.Tensor"]:
    """Module tensors of the tensors in a Diffusers folder."""
    if part == "unet":
        rename = unet_name_from_folder(tensors)
    elif part == "vae":
        rename = Renaming(key_maps.OLD_VAE_ATTENTION)
    else:
        rename = Renaming(())
    return {rename(name): tensor for name, tensor in tensors.items() if not name.endswith(DROPPED)}


def folder_from_module(
    part: str, tensors: Tensors, config: UNetConfig
) -> dict[str, "torch.Tensor"]:
    """What a Diffusers folder keeps; `config` is the U-Net's, which decides its names."""
    rename = Renaming(key_maps.unet_pairs_of_config(config) if part == "unet" else ())
    return {rename(name): tensor for name, tensor in tensors.items()}


def _text_encoder_2_from_file(tensors: Tensors) -> dict[str, "torch.Tensor"]:
    rename = Renaming(
        key_maps.open_clip_pairs(_layers(tensors, r"transformer\.resblocks\.(\d+)\."))
    )
    module = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(
            r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name
        ):
            layer, kind = match.groups()
            for projection, piece in zip(STACKED, tensor.chunk(3), strict=True):
                module[f"text_model.encoder.layers.{layer}.self_attn.{projection}.{kind}"] = piece
        else:
            module[rename(name)] = tensor.t() if name == "text_projection" else tensor
    return module


def _text_encoder_2_to_file(tensors: Tensors) -> LazyTensors:
    import torch

    rename = Renaming(
        inverse(key_maps.open_clip_pairs(_layers(tensors, r"text_model\.encoder\.layers\.(\d+)\.")))
    )
    file: dict[str, Callable[[], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(
            r"(text_model\.encoder\.layers\.(\d+)\.self_attn)\.([qkv]_proj)\.(weight|bias)", name
        )
        if match is None:
            file[rename(name)] = partial(
                torch.t if name == "text_projection.weight" else torch.as_tensor, tensor
            )
        elif match[3] == STACKED[0]:
            pieces = [tensors[f"{match[1]}.{projection}.{match[4]}"] for projection in STACKED]
            file[f"transformer.resblocks.{match[2]}.attn.in_proj_{match[4]}"] = partial(
                torch.cat, pieces
            )
    return LazyTensors(file)


def _vae_attention_shaped(tensors: Tensors, *, linear: bool) -> dict[str, "torch.Tensor"]:
    """[C, C, 1, 1] in single files, [C, C] in modules and folders."""
    shaped = {}
    for name, tensor in tensors.items():
        if key_maps.VAE_ATTENTION_WEIGHT.fullmatch(name):
            tensor = tensor.flatten(1) if linear else tensor.reshape(*tensor.shape[:2], 1, 1)
        shaped[name] = tensor
    return shaped


def _layers(names: Iterable[str], pattern: str) -> int:
    return 1 + max(
        (int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1
    )
