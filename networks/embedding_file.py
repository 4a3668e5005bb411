"""Textual Inversion files on a model that generates images: each is a placeholder token.

The token of a file is the file's name. Formats: contract, formats.md section 7 (clip_l and clip_g);
and those of older programs, a single tensor or a tensor in `string_to_param`, whose width says which
text encoder it belongs to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.errors import OptionError, RunError
from library.log import log
from library.models.checkpoint.reader import identify, open_tensors
from library.models.sdxl import SdxlModels
from library.models.text_encoders import clip_body
from library.models.textual_inversion import PlaceholderToken, TokenExistsError, first_rows
from networks.lora_file import read_bundled_tokens

_FLAG = "--textual_inversion_embeddings"
_ENCODERS = ("clip_l", "clip_g")


def add_embeddings(models: SdxlModels, files: tuple[Path, ...]) -> None:
    """Add the tokens of these files to the models' tokenizers and text encoders.

    Raises:
        OptionError: if a file can't be read, or doesn't fit.
    """
    for path in files:
        try:
            _add(models, path.stem, _read(path), f"{_FLAG} {path}")
        except TokenExistsError as error:
            raise OptionError(f"{_FLAG} {path}: {error}; give the file another name") from None


def add_bundled_tokens(models: SdxlModels, path: Path, *, flag: str) -> None:
    """Add the placeholder tokens in a network file. Tokens that already exist aren't changed.

    Args:
        models: the models.
        path: the network file.
        flag: names the option in messages.

    Raises:
        OptionError: if an embedding doesn't fit.
    """
    for token, tensors in read_bundled_tokens(path).items():
        try:
            _add(models, token, tensors, f"{flag} {path}")
        except TokenExistsError:
            log.warning("%s %s: its token %s exists already and isn't loaded", flag, path, token)


def _add(models: SdxlModels, token: str, tensors: Mapping[str, Tensor], source: str) -> None:
    if "text_encoder_1" not in models.checkpoint.parts:
        raise OptionError(
            f"{source}: a placeholder token requires both text encoders, and the refiner has only "
            "one; generate with the model that it was trained for"
        )
    rows = [encoder_rows.to(models.device) for encoder_rows in _rows(tensors, models, source)]
    placeholder = PlaceholderToken(models.tokenizers, models.text_layers, token, rows)
    for table in placeholder.tables:
        table.requires_grad_(False)
    log.info("%s: the token %s, %d vectors", source, token, len(rows[0]))


def _rows(tensors: Mapping[str, Tensor], models: SdxlModels, source: str) -> list[Tensor]:
    """Return the vectors for both text encoders, [n, C] each, float32."""
    widths = []
    for encoder in models.text_encoders:
        widths.append(clip_body(encoder).embeddings.token_embedding.weight.shape[1])
    rows_of: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rows = tensor.float()
        if rows.ndim != 2:
            rows = rows[None]
        index = _encoder_index(name, rows, widths, is_named=len(tensors) > 2)
        if index is None or rows.shape[-1] != widths[index]:
            raise OptionError(
                f"{source}: {name} has shape {list(tensor.shape)}, of {identify(tensors)}; an "
                f"embedding for SDXL has clip_l [n, {widths[0]}] and clip_g [n, {widths[1]}]"
            )
        if not rows.isfinite().all():
            raise OptionError(f"{source}: {name} contains NaN or Inf")
        rows_of[_ENCODERS[index]] = rows
    counts = {name: len(rows) for name, rows in rows_of.items()}
    if not counts:
        raise OptionError(f"{source}: there is no vector in it")
    if len(set(counts.values())) > 1:
        raise OptionError(
            f"{source}: both text encoders require the same number of vectors, found {counts}"
        )
    if len(counts) == 1:
        log.warning(
            "%s: it has vectors for %s only; the other text encoder gets the mean of its vocabulary",
            source,
            *counts,
        )
    count = next(iter(counts.values()))
    means = first_rows(models.tokenizers, models.text_layers, None, count)
    return [rows_of.get(name, mean) for name, mean in zip(_ENCODERS, means, strict=True)]


def _encoder_index(name: str, rows: Tensor, widths: Sequence[int], *, is_named: bool) -> int | None:
    """Return the index of the text encoder that a tensor is for; None if that is unknown.

    Args:
        name: the tensor's name.
        rows: its vectors, [n, C].
        widths: C of each text encoder.
        is_named: whether only the name counts, not the width.
    """
    if name in _ENCODERS:
        return _ENCODERS.index(name)
    if is_named or rows.shape[-1] not in widths:
        return None
    return widths.index(rows.shape[-1])


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            file = open_tensors(path, mapped=False)
        except RunError as error:
            raise OptionError(f"{_FLAG} {error}") from None
        return {name: file[name] for name in file.shapes}
    try:
        # weights_only: no code of the pickle is run.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OptionError(
            f"{_FLAG} {path}: can't be read as a file of tensors only ({type(error).__name__})"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        content = content["string_to_param"]
    if isinstance(content, Tensor):
        return {path.stem: content}
    if not isinstance(content, Mapping):
        raise OptionError(f"{_FLAG} {path}: it contains no vectors")
    tensors = {}
    for name, tensor in content.items():
        if isinstance(tensor, Tensor):
            tensors[str(name)] = tensor
    return tensors
