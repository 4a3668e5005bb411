"""LoRA files: reading, checking, and writing with metadata and hashes.

Format: contract, formats.md section 4.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.errors import OptionError, RunError
from library.log import log
from library.models.checkpoint.key_maps import Renaming, unet_pairs_of_config
from library.models.checkpoint.reader import identify, open_tensors
from library.models.unet import UNet
from library.safetensors_io import save_tensors
from networks.targets import UNET, module_key

_NUM_SHOWN = 5
BUNDLED = "bundle_emb."
"""Prefix of the rows of a placeholder token: bundle_emb.TOKEN.clip_l and bundle_emb.TOKEN.clip_g."""
TRAINING_REMEDY = (
    "Set the options that the file was trained with, --dim_from_weights, or --allow_partial to load "
    "the tensors that fit"
)


def read_tensors(path: Path, *, flag: str = "--network_weights") -> dict[str, Tensor]:
    """Return the tensors of a network file.

    Args:
        path: the file.
        flag: names the option in messages.

    Raises:
        OptionError: if it can't be read, or contains NaN or Inf.
    """
    try:
        file = open_tensors(path, mapped=False)
        tensors = {name: file[name] for name in file.shapes}
    except RunError as error:
        raise OptionError(f"{flag} {error}") from None
    bad = [name for name, tensor in tensors.items() if tensor.ndim and not _is_finite(tensor)]
    if bad:
        raise OptionError(
            f"{flag} {path}: {len(bad)} tensors contain NaN or Inf, or aren't floating point "
            f"({some(bad)})"
        )
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def read_bundled_tokens(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the placeholder tokens in a network file, each with the tensors of an embedding file."""
    file = open_tensors(path, mapped=False)
    tokens: dict[str, dict[str, Tensor]] = {}
    for key in file.shapes:
        if not key.startswith(BUNDLED):
            continue
        token, _, name = key.removeprefix(BUNDLED).rpartition(".")
        token = token.removesuffix(".string_to_param")  # A1111 may write it
        tokens.setdefault(token, {})[name] = file[key]
    return tokens


def read_lora(path: Path, unet: UNet, *, flag: str = "--network_weights") -> dict[str, Tensor]:
    """Return the tensors of a LoRA file, by this suite's names.

    Diffusers' names of the U-Net's modules (lora_unet_down_blocks_…) are translated.

    Args:
        path: the file.
        unet: the U-Net whose modules are named.
        flag: names the option in messages.

    Raises:
        OptionError: if the file is not a LoRA, can't be read, or contains NaN or Inf.
    """
    tensors = read_tensors(path, flag=flag)
    if not any(name.endswith(".lora_down.weight") for name in tensors):
        raise OptionError(
            f"{flag} {path}: this is {identify(tensors)}; a LoRA with .lora_down.weight keys is "
            "required"
        )
    our_names = diffusers_names(unet)
    translated = {}
    for key, tensor in tensors.items():
        module, _, rest = key.partition(".")
        translated[f"{our_names.get(module, module)}.{rest}"] = tensor
    return translated


def diffusers_names(unet: UNet) -> dict[str, str]:
    """Return our name of each module by the name that Diffusers' module paths give it."""
    rename = Renaming(unet_pairs_of_config(unet.config))
    names = {}
    for path, _ in unet.named_modules():
        if path:
            names[module_key(UNET, rename(path))] = module_key(UNET, path)
    return names


def ranks_in_file(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Return (rank, alpha) of each module in a file. A missing alpha means the rank.

    Raises:
        OptionError: if a tensor of a module has a shape that is not valid.
    """
    ranks = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        if rest != "lora_down.weight":
            continue
        alpha = tensors.get(f"{name}.alpha")
        if tensor.ndim not in (2, 4) or (alpha is not None and alpha.numel() != 1):
            raise OptionError(
                f"{name}: lora_down.weight has shape {list(tensor.shape)} and alpha is {alpha}, "
                "which is not valid for a LoRA"
            )
        rank = len(tensor)
        ranks[name] = (rank, float(rank if alpha is None else alpha))
    return ranks


@torch.no_grad()
def copy_fitting(
    weights: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    *,
    source: str,
    remedy: str,
    allow_partial: bool,
) -> list[str]:
    """Copy a file's weights into the parameters of the same name and shape, and return their names.

    Args:
        weights: the weights in the file.
        parameters: the parameters of the network.
        source: the option and its file, for messages.
        remedy: what to do if not all of them fit, for messages.
        allow_partial: whether weights may be missing, left over or of another shape.

    Raises:
        OptionError: if weights don't fit, with counts and the first names, unless `allow_partial`;
            always if none fits.
    """
    fitting = []
    unknown = []
    other_shape = []
    for name, tensor in weights.items():
        parameter = parameters.get(name)
        if parameter is None:
            unknown.append(name)
        elif parameter.shape == tensor.shape:
            fitting.append(name)
        else:
            other_shape.append(f"{name} {list(tensor.shape)} instead of {list(parameter.shape)}")
    problems = []
    for names, problem in (
        ([name for name in parameters if name not in weights], "are missing in it"),
        (unknown, "are not in this network"),
        (other_shape, "have another shape"),
    ):
        if names:
            problems.append(f"{len(names)} tensors {problem} ({some(names)})")
    description = "; ".join(problems)
    if not fitting:
        raise OptionError(
            f"{source}: none of its {len(weights)} tensors fits this network: {description}"
        )
    if problems and not allow_partial:
        raise OptionError(f"{source}: {description}. {remedy}")
    if problems:
        log.warning(
            "%s: %s; the other %d tensors are loaded (--allow_partial)",
            source,
            description,
            len(fitting),
        )
    for name in fitting:
        parameters[name].copy_(weights[name])
    return fitting


def some(names: Sequence[str]) -> str:
    """Return the first names, separated by commas, with … if there are more."""
    shown = list(names[:_NUM_SHOWN])
    if len(names) > _NUM_SHOWN:
        shown.append("…")
    return ", ".join(shown)


def write_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> None:
    """Write a network file in the format of its ending.

    Args:
        path: ends with .safetensors, whose file gets metadata and hashes; a file with any other
            ending is torch's and contains only the tensors.
        tensors: the tensors by name.
        metadata: the metadata.
        dtype: the dtype of the stored tensors; None: unchanged.

    Raises:
        NotFinite: if a tensor contains NaN or Inf.
    """
    save_tensors(path, tensors, metadata, dtype, with_hashes=True)
