"""Metadata files: captions, tags and sizes of images in one .json or .jsonl file.

Reading them for training, and merging text files into them. Source: contract, dataset_config.md
section 3 and formats.md section 3.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from library.data.captions import CaptionSettings
from library.errors import OptionError, RunError
from library.files import write_atomically
from library.log import log
from library.size import Size

# All extensions that can be trained on with some plugin: merging texts decodes no image. They are
# listed here, and not imported from library.images, so that merging doesn't need numpy.
IMAGE_EXTENSIONS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".avif",
    ".jxl",
    ".heic",
    ".heif",
)


class MetadataEntry(NamedTuple):
    """The metadata of one image.

    Attributes:
        key: its path, absolute or relative to the image folder. Keys of sd-scripts' tools may lack
            the extension.
        caption: its caption and tags.
        tags: its tags.
        size: its size, if it is stored.
        aesthetic_score: the score that a refiner gets, if it is stored.
    """

    key: str
    caption: str
    tags: str
    size: Size | None
    aesthetic_score: float | None = None


class MetadataError(ValueError):
    """A metadata file that can't be read. Each line of the text is one mistake."""


# -------------------------------------------------------------------------------- reading, to train


def read_entries(path: Path, settings: CaptionSettings) -> Iterator[MetadataEntry]:
    """Yield the entries of a metadata file, in its order.

    Args:
        path: the file.
        settings: how a caption and tags are joined.

    Raises:
        MetadataError: with all mistakes in the file, after the last entry.
    """
    mistakes: list[str] = []
    seen: set[str] = set()
    for key, values, where in _rows(path, mistakes):
        problem = f"{key!r} is there twice" if key in seen else _problem(key, values)
        seen.add(key)
        if problem is not None:
            mistakes.append(f"{where}: {problem}")
            continue
        tags, size = values.get("tags") or "", values.get("image_size")
        caption = _join(values.get("caption") or "", tags, settings)
        score = values.get("aesthetic_score")
        yield MetadataEntry(key, caption, tags, Size(*size) if size else None, score)
    if mistakes:
        raise MetadataError("\n".join(mistakes))


def _rows(path: Path, mistakes: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield each key, its values, and its position in the file for messages."""
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _lines(path, mistakes)
            return
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise MetadataError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(pairs, _Pairs):
        raise MetadataError(f"{path}: expected an object with the paths of images as keys")
    for key, values in pairs:
        if isinstance(values, _Pairs):
            values = dict(values)
        yield key, values, f"{path}: {key!r}"


def _lines(path: Path, mistakes: list[str]) -> Iterator[tuple[str, Any, str]]:
    with open(path, encoding="utf-8-sig") as file:
        for i, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {i}"
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
    """A JSON object as a list of pairs, in which duplicate keys can be found."""


def _problem(key: str, values: Any) -> str | None:
    """Return what is wrong with an entry; None if nothing is."""
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        return f"expected an object with caption, tags or image_size, got {kind}"
    if "\0" in key or not key:
        return "the image's path is empty or contains a NUL character"
    for name in ("caption", "tags"):
        if not isinstance(values.get(name), str | None):
            return f"{name}: expected text, got {values[name]!r}"
    size = values.get("image_size")
    if size is not None and not _is_size(size):
        return f"image_size: expected [width, height] in pixels, got {size!r}"
    score = values.get("aesthetic_score")
    if score is not None and not _is_number(score):
        return f"aesthetic_score: expected a number, got {score!r}"
    return None


def _is_size(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(side, int) and _is_number(side) and side > 0 for side in value)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _join(caption: str, tags: str, settings: CaptionSettings) -> str:
    """Return the two texts as one caption. With wildcards, the tags follow each line of the caption."""
    if not tags:
        return caption
    separator = settings.caption_separator
    if not settings.enable_wildcard:
        return f"{caption}{separator}{tags}" if caption else tags
    tags = separator.join(tags.splitlines())
    lines = [line for line in caption.splitlines() if line.strip()]
    return "\n".join(f"{line}{separator}{tags}" for line in lines) or tags


# -------------------------------------------------------------------------------- editing by tools

Metadata = dict[str, dict[str, Any]]
"""Entries by key, as they are in the file."""


def load_metadata(path: Path) -> Metadata:
    """Return the entries of a metadata file as they are.

    Raises:
        OptionError: there is no such file.
        RunError: it isn't a metadata file.
    """
    try:
        metadata = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise OptionError(f"{path}: no such file") from None
    except OSError as error:
        raise RunError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(metadata, dict):
        found = _json_type(metadata)
        raise RunError(f"{path}: expected a JSON object of entries by image, found {found}")
    for key, entry in metadata.items():
        if not isinstance(entry, dict):
            found = _json_type(entry)
            raise RunError(f"{path}: expected an object as the entry of {key!r}, found {found}")
    return metadata


def save_metadata(path: Path, metadata: Metadata) -> None:
    """Write a metadata file completely, or not at all."""
    content = json.dumps(metadata, indent=2).encode("ascii")
    write_atomically(path, lambda file: file.write(content))


def _json_type(value: object) -> str:
    names = {
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def merge_texts(
    train_data_dir: Path,
    out_json: Path,
    *,
    field: str,
    extension: str,
    in_json: Path | None = None,
    full_path: bool = False,
    recursive: bool = False,
) -> None:
    """Write a metadata file with the entries of another one and the text files next to images.

    Args:
        train_data_dir: folder of the images.
        out_json: the file to write.
        field: the name of the texts in the images' entries.
        extension: of the text files, with or without its dot.
        in_json: the file to read. None means out_json, if it exists.
        full_path: keys are absolute paths, not names without extension.
        recursive: search subfolders too.

    Raises:
        OptionError: the options or files can't be used. Nothing is written.
        RunError: files can't be read. Nothing is written.
    """
    check_recursive(recursive=recursive, full_path=full_path)
    images = find_images(train_data_dir, recursive=recursive)
    keyed = key_images(images, full_path=full_path)
    if in_json is None and out_json.exists():
        in_json = out_json
    metadata = {} if in_json is None else load_metadata(in_json)
    for key, text in zip(keyed, read_texts(images, extension), strict=True):
        log.debug("%s: %s", key, text)
        metadata.setdefault(key, {})[field] = text
    save_metadata(out_json, metadata)
    log.info(
        "%s: %s of %d images merged, %d entries in total",
        out_json,
        field,
        len(images),
        len(metadata),
    )


def check_recursive(*, recursive: bool, full_path: bool) -> None:
    """Raise OptionError if images are searched in subfolders, but keys are names."""
    if recursive and not full_path:
        raise OptionError(
            "--recursive needs --full_path: images in two folders may have the same name"
        )


def find_images(folder: Path, *, recursive: bool) -> list[Path]:
    """Return the images of a folder, sorted.

    Raises:
        OptionError: there are none.
        RunError: the folder can't be read.
    """
    if not folder.is_dir():
        raise OptionError(f"{folder}: no such folder")
    images = []
    try:
        for path in folder.rglob("*") if recursive else folder.iterdir():
            if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file():
                images.append(path)
    except OSError as error:
        raise RunError(f"{folder}: can't be read: {error.strerror}") from error
    if not images:
        raise OptionError(f"{folder}: no images in it; looked for {' '.join(IMAGE_EXTENSIONS)}")
    return sorted(images)


def key_images(images: Sequence[Path], *, full_path: bool) -> dict[str, Path]:
    """Return the images by their keys, in their order.

    Raises:
        OptionError: two images have the same key.
    """
    keyed: dict[str, Path] = {}
    clashes = []
    for image in images:
        key = str(image.absolute()) if full_path else image.stem
        if key in keyed:
            clashes.append(
                f"{keyed[key]} and {image} would share the entry {key!r}; rename one, or give "
                "--full_path"
            )
        keyed[key] = image
    if clashes:
        raise OptionError(*clashes)
    return keyed


def read_texts(images: Sequence[Path], extension: str) -> list[str]:
    """Return the stripped text in the file next to each image.

    Raises:
        RunError: with all files that are missing or can't be read.
    """
    texts, problems = [], []
    for image in images:
        file = image.parent / f"{image.stem}.{extension.removeprefix('.')}"
        try:
            texts.append(file.read_text(encoding="utf-8-sig").strip())
        except FileNotFoundError:
            problems.append(f"{file}: no such file, needed for {image.name}")
        except UnicodeDecodeError as error:
            problems.append(f"{file}: it is not UTF-8 (byte {error.start}); save it as UTF-8")
        except OSError as error:
            problems.append(f"{file}: can't be read: {error.strerror}")
    if problems:
        listed = "\n  ".join(problems)
        raise RunError(
            f"{len(problems)} of {len(images)} text files can't be used, so nothing was written:\n"
            f"  {listed}"
        )
    return texts
