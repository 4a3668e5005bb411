"""networks.lora: building a LoRA for its options, and LoRA files: reading, checking, and writing with metadata and hashes.

Format: contract, formats.md section 4.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import NotFinite, OptionError, RunError
from library.files import write_atomically
from library.log import log
from library.models.checkpoint.key_maps import Renaming, unet_pairs_of_config
from library.models.checkpoint.reader import identify, open_tensors
from library.models.unet import UNet
from library.safetensors_io import network_hashes, storable_metadata, write_safetensors
from networks.lora import UNET, LoraNetwork, Target, module_key, text_encoder_targets, unet_targets
from networks.lora_settings import LoraSettings
from networks.options import NetworkOptions

_SHOWN = 5
BUNDLED = "bundle_emb."  # before the word and clip_l or clip_g
TRAINING_REMEDY = "Give the options it was trained with, --dim_from_weights, or --allow_partial to take what fits"


def build(options: NetworkOptions, unet: UNet, encoders: Sequence[Any], compute: torch.dtype) -> LoraNetwork:
    """Build a LoRA with the weights of --network_weights; networks/kinds.py calls it.

    Args:
        options: the options of the network.
        unet: the U-Net.
        encoders: the text encoders that it covers.
        compute: not used: layers compute in the dtype of their input.

    Raises:
        OptionError: --network_weights don't fit.
    """
    settings, _ = options.read_settings()
    targets: list[Target] = []
    for index, encoder in enumerate(encoders):
        targets += text_encoder_targets(encoder, index + 1)
    if not options.network_train_text_encoder_only:
        targets += unet_targets(unet)
    if options.network_weights is None:
        return LoraNetwork.from_settings(targets, settings)
    tensors = read_lora(options.network_weights, unet)
    if options.dim_from_weights:
        # Ranks and alphas are the file's. Learning rate factors apply, dropouts don't (as in sd-scripts).
        settings = replace(settings, dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
        network = network_from_file(targets, tensors, settings)
    else:
        network = LoraNetwork.from_settings(targets, settings)
    load_into(network, tensors, source=options.network_weights, allow_partial=options.allow_partial)
    return network


def read_tensors(path: Path, *, flag: str = "--network_weights") -> dict[str, Tensor]:
    """The tensors of a network file. Raises OptionError if it can't be read or holds numbers that aren't finite."""
    try:
        file = open_tensors(path, mapped=False)
        tensors = {name: file[name] for name in file.shapes}
    except RunError as error:
        raise OptionError(f"{flag} {error}") from None
    bad = [name for name, tensor in tensors.items() if tensor.ndim and not _is_finite(tensor)]
    if bad:
        raise OptionError(f"{flag} {path}: {len(bad)} tensors hold no finite numbers ({some(bad)})")
    return tensors


def read_bundled_words(path: Path) -> dict[str, dict[str, Tensor]]:
    """The new words that a network file holds too, each as an embedding file has it."""
    file = open_tensors(path, mapped=False)
    words: dict[str, dict[str, Tensor]] = {}
    for key in file.shapes:
        word, _, name = key.removeprefix(BUNDLED).rpartition(".")
        if key.startswith(BUNDLED):
            words.setdefault(word.removesuffix(".string_to_param"), {})[name] = file[key]  # as A1111 may spell it
    return words


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def read_lora(path: Path, unet: UNet, *, flag: str = "--network_weights") -> dict[str, Tensor]:
    """The tensors of a LoRA file, U-Net names in Diffusers' spelling (lora_unet_down_blocks_…) turned into the original's.

    Raises OptionError for what is no LoRA, or holds numbers that aren't finite.
    """
    tensors = read_tensors(path, flag=flag)
    if not any(name.endswith(".lora_down.weight") for name in tensors):
        raise OptionError(f"{flag} {path}: this is {identify(tensors)}; a LoRA with .lora_down.weight keys is needed")
    respelt = diffusers_names(unet)
    return {
        f"{respelt.get(module, module)}.{rest}": tensor
        for (module, _, rest), tensor in ((key.partition("."), t) for key, t in tensors.items())
    }


def diffusers_names(unet: UNet) -> dict[str, str]:
    """Our module names by those that Diffusers' module names lead to."""
    rename = Renaming(unet_pairs_of_config(unet.config))
    paths = [path for path, _ in unet.named_modules() if path]
    return {module_key(UNET, rename(path)): module_key(UNET, path) for path in paths}


def ranks_in_file(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """(rank, alpha) of each module in a file; a missing alpha means the rank."""
    ranks = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        if rest == "lora_down.weight":
            alpha = tensors.get(f"{name}.alpha")
            if tensor.ndim not in (2, 4) or (alpha is not None and alpha.numel() != 1):
                raise OptionError(f"{name}: lora_down.weight is {list(tensor.shape)}, alpha is {alpha}: no LoRA's")
            ranks[name] = (len(tensor), float(len(tensor) if alpha is None else alpha))
    return ranks


def load_into(network: LoraNetwork, tensors: Mapping[str, Tensor], *, source: Path, allow_partial: bool) -> None:
    """Copy a file's weights and alphas into a network.

    Raises OptionError with counts and the first names if modules are missing, left over or of another shape, unless
    `allow_partial`; and always if none fits.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    fitting = copy_fitting(
        weights, dict(network.named_parameters()), source=f"--network_weights {source}", remedy=TRAINING_REMEDY, allow_partial=allow_partial
    )  # fmt: skip
    for module, (_, alpha) in ranks_in_file(
        {name: tensors[name] for name in tensors if name in fitting or name.endswith(".alpha")}
    ).items():
        network.lora(
            module
        ).alpha = alpha  # scale and file agree, where sd-scripts keeps the option's scale and the file's alpha


@torch.no_grad()
def copy_fitting(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, source: str, remedy: str, allow_partial: bool
) -> list[str]:
    """Copy the weights into the tensors of the same name and shape; returns their names. Raises as load_into does.

    Args: source, remedy: the option and its file, and what to do if not all fits, for the message.
    """
    fitting = [name for name in weights if name in wanted and weights[name].shape == wanted[name].shape]
    problems = {
        "are missing in it": [name for name in wanted if name not in weights],
        "are not in this network": [name for name in weights if name not in wanted],
        "have another shape": [
            _shapes(name, weights, wanted) for name in weights if name in wanted and name not in fitting
        ],
    }
    told = "; ".join(f"{len(names)} tensors {what} ({some(names)})" for what, names in problems.items() if names)
    if not fitting:
        raise OptionError(f"{source}: none of its {len(weights)} tensors fits this network: {told}")
    if told and not allow_partial:
        raise OptionError(f"{source}: {told}. {remedy}")
    if told:
        log.warning("%s: %s; the rest, %d tensors, is taken (--allow_partial)", source, told, len(fitting))
    for name in fitting:
        wanted[name].copy_(weights[name])
    return fitting


def network_from_file(targets: Iterable[Target], tensors: Mapping[str, Tensor], settings: LoraSettings) -> LoraNetwork:
    """A network with the modules, ranks and alphas of a file (--dim_from_weights); its weights are not copied yet."""
    return LoraNetwork(targets, ranks_in_file(tensors), settings, from_file=True)


def _shapes(name: str, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    return f"{name} {list(weights[name].shape)} instead of {list(wanted[name].shape)}"


def some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Write a network file in the format of its ending: safetensors with metadata and hashes, else a torch file of the bare tensors."""
    stored = {name: tensor.to(device="cpu", dtype=dtype or tensor.dtype) for name, tensor in tensors.items()}
    bad = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if bad:
        raise NotFinite(f"{path}: not saved, as {len(bad)} of its tensors aren't finite ({some(bad)})")
    if path.suffix != ".safetensors":
        write_atomically(path, lambda file: torch.save(stored, file))
        return
    texts = storable_metadata(stored, metadata)
    model_hash, legacy_hash = network_hashes(stored, texts)
    write_safetensors(path, stored, {**texts, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash})
