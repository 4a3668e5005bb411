"""Metadata files: captions, tags and sizes of pictures in one .json or .jsonl.

Source: contract, dataset_config.md section 3 and formats.md section 3.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from library.data.captions import CaptionSettings
from library.size import Size

_WANTED = "expected text"


class Entry(NamedTuple):
    """One picture's metadata.

    Attributes:
        key: path, absolute or inside the image folder; metadata of sd-scripts' tools may lack its ending.
        where: how to point at it in a message.
    """

    key: str
    caption: str
    tags: str
    size: Size | None
    where: str
    aesthetic_score: float | None = None


class BadMetadata(ValueError):
    """A metadata file that can't be read; each line of the text is one mistake."""


def read_metadata(path: Path, settings: CaptionSettings) -> Iterator[Entry]:
    """The entries of a metadata file, in its order. Raises BadMetadata with all its mistakes, when it has been read through."""
    mistakes: list[str] = []
    seen: set[str] = set()
    for key, values, where in _rows(path, mistakes):
        if key in seen:
            mistakes.append(f"{where}: {key!r} is there twice")
            continue
        seen.add(key)
        problem = _problem(key, values)
        if problem:
            mistakes.append(f"{where}: {problem}")
            continue
        tags = values.get("tags") or ""
        size = values.get("image_size")
        yield Entry(
            key, _caption(values.get("caption") or "", tags, settings), tags, Size(*size) if size else None, where,
            values.get("aesthetic_score"),
        )  # fmt: skip
    if mistakes:
        raise BadMetadata("\n".join(mistakes))


def _rows(path: Path, mistakes: list[str]) -> Iterator[tuple[str, Any, str]]:
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _lines(path, mistakes)
            return
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise BadMetadata(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(pairs, _Pairs):
        raise BadMetadata(f"{path}: expected an object with a picture's path as each key")
    for key, values in pairs:
        yield key, dict(values) if isinstance(values, _Pairs) else values, f"{path}: {key!r}"


def _lines(path: Path, mistakes: list[str]) -> Iterator[tuple[str, Any, str]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                mistakes.append(f"{where}: can't be read as JSON: {error}")
                continue
            key = values.get("image_path") if isinstance(values, dict) else None
            if isinstance(key, str):
                yield key, values, where
            else:
                mistakes.append(f"{where}: expected an object with image_path")


class _Pairs(list):
    """A JSON object as its pairs, so that a key that is there twice is seen."""


def _problem(key: str, values: Any) -> str | None:
    if not isinstance(values, Mapping):
        return f"expected an object with caption, tags or image_size, got {type(values).__name__}"
    if "\0" in key or not key:
        return "the picture's path is empty or holds a NUL character"
    for name in ("caption", "tags"):
        if not isinstance(values.get(name), str | None):
            return f"{name}: {_WANTED}, got {values[name]!r}"
    size = values.get("image_size")
    if size is not None and not _is_size(size):
        return f"image_size: expected [width, height] in pixels, got {size!r}"
    score = values.get("aesthetic_score")
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score)
    ):
        return f"aesthetic_score: expected a number, got {score!r}"
    return None


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < math.inf for side in value)
    )


def _caption(caption: str, tags: str, settings: CaptionSettings) -> str:
    """The two texts as one caption; with wildcards the tags go behind each of the caption's lines."""
    if not tags:
        return caption
    separator = settings.caption_separator
    if not settings.enable_wildcard:
        return f"{caption}{separator}{tags}" if caption else tags
    tags = separator.join(tags.splitlines())
    lines = [line for line in caption.splitlines() if line.strip()]
    return "\n".join(f"{line}{separator}{tags}" for line in lines) or tags
