"""Textual Inversion files on a model that draws pictures: each is a new word, called as its file is.

Formats: contract, formats.md section 7 (clip_l and clip_g); and a tensor alone or in `string_to_param`, as older programs write,
whose width says for which encoder it is.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import OptionError, RunError
from library.log import log
from library.models.checkpoint.reader import identify, open_tensors
from library.models.sdxl import SdxlModels
from library.models.text_encoders import clip_body
from library.models.textual_inversion import PlaceholderToken, TokenExistsError, first_rows
from networks.lora_file import read_bundled_words

_FLAG = "--textual_inversion_embeddings"
_ENCODERS = ("clip_l", "clip_g")


def add_embeddings(models: SdxlModels, files: tuple[Path, ...]) -> None:
    """Add the words of these files to the models' tokenizers and encoders. Raises OptionError for a file that doesn't fit."""
    for path in files:
        try:
            _add(models, path.stem, _read(path), f"{_FLAG} {path}")
        except TokenExistsError as error:
            raise OptionError(f"{_FLAG} {path}: {error}; give the file another name") from None


def add_bundled_words(models: SdxlModels, path: Path, *, flag: str) -> None:
    """Add the words that a network file holds too. One that is known already, as its own file was given, stays what it is."""
    for word, tensors in read_bundled_words(path).items():
        try:
            _add(models, word, tensors, f"{flag} {path}")
        except TokenExistsError:
            log.warning("%s %s: its word %s is known already, and stays as it is", flag, path, word)


def _add(models: SdxlModels, word: str, tensors: Mapping[str, Tensor], where: str) -> None:
    if "text_encoder_1" not in models.checkpoint.parts:
        raise OptionError(
            f"{where}: a new word needs both text encoders, and the refiner has one; draw with the model it was made for"
        )
    rows = _rows(tensors, models, where)
    token = PlaceholderToken(
        models.tokenizers, models.text_layers, word, [own.to(models.device) for own in rows]
    )
    for table in token.tables:
        table.requires_grad_(False)
    log.info("%s: the word %s, %d vectors", where, word, len(rows[0]))


def _rows(tensors: Mapping[str, Tensor], models: SdxlModels, where: str) -> list[Tensor]:
    """The vectors of both encoders, [n, C] each, float32."""
    widths = [
        clip_body(encoder).embeddings.token_embedding.weight.shape[1]
        for encoder in models.text_encoders
    ]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rows = tensor.float() if tensor.ndim == 2 else tensor.float()[None]
        by_width = [
            encoder
            for encoder, width in zip(_ENCODERS, widths, strict=True)
            if rows.shape[-1] == width
        ]
        encoder = (
            name if name in _ENCODERS else by_width[0] if by_width and len(tensors) <= 2 else None
        )
        if encoder is None or rows.shape[-1] != widths[_ENCODERS.index(encoder)]:
            raise OptionError(
                f"{where}: {name} is {list(tensor.shape)}, of {identify(tensors)}; an embedding for SDXL has clip_l [n, {widths[0]}] and clip_g [n, {widths[1]}]"
            )
        if not rows.isfinite().all():
            raise OptionError(f"{where}: {name} holds numbers that aren't finite")
        found[encoder] = rows
    counts = {name: len(rows) for name, rows in found.items()}
    if len(set(counts.values())) > 1:
        raise OptionError(f"{where}: both encoders need as many vectors, found {counts}")
    if not counts:
        raise OptionError(f"{where}: there is no vector in it")
    if len(counts) == 1:
        log.warning(
            "%s: it has vectors for %s alone; the other text encoder sees a mean word",
            where,
            *counts,
        )
    means = first_rows(models.tokenizers, models.text_layers, None, next(iter(counts.values())))
    return [found.get(name, mean) for name, mean in zip(_ENCODERS, means, strict=True)]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            file = open_tensors(path, mapped=False)
        except RunError as error:
            raise OptionError(f"{_FLAG} {error}") from None
        return {name: file[name] for name in file.shapes}
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True
        )  # nothing else of a foreign pickle is run
    except Exception as error:
        raise OptionError(
            f"{_FLAG} {path}: it can't be read as a file of tensors alone ({type(error).__name__})"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        content = content["string_to_param"]
    if isinstance(content, Tensor):
        return {path.stem: content}
    if not isinstance(content, Mapping):
        raise OptionError(f"{_FLAG} {path}: it holds no vectors")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
