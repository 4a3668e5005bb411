"""Fine-tuning metadata: a JSON object {picture: {"caption": text, "tags": text, ...}}, and the texts beside pictures merged into it.

Source: contract, formats.md section 3.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from library.errors import OptionError, RunError
from library.files import write_atomically
from library.log import LogOptions, log, start_logging
from library.options import Options

# Every ending that can be trained on with some plug-in: merging texts decodes no picture. Here, so that numpy isn't needed.
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".heic", ".heif")

Metadata = dict[str, dict[str, Any]]


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
    """Write `out_json`: the input's entries, with the text beside each picture as `field` of the picture's entry.

    Args:
        extension: of the text files, with or without its dot.
        in_json: the input; when unset an existing `out_json` is.
        full_path: keys are absolute paths, not names without ending.

    Raises OptionError or RunError, naming every file concerned; nothing is written then.
    """
    if recursive and not full_path:
        raise OptionError("--recursive needs --full_path: pictures of two folders may have one name")
    images = find_images(train_data_dir, recursive=recursive)
    keyed = key_images(images, full_path=full_path)
    if in_json is None and out_json.exists():
        in_json = out_json
    metadata = {} if in_json is None else read_metadata(in_json)
    for key, text in zip(keyed, read_texts(images, extension), strict=True):
        log.debug("%s: %s", key, text)
        metadata.setdefault(key, {})[field] = text
    write_metadata(out_json, metadata)
    log.info("%s: %s of %d pictures merged, %d entries in all", out_json, field, len(images), len(metadata))


def find_images(folder: Path, *, recursive: bool) -> list[Path]:
    """The pictures of a folder, sorted. Raises OptionError if there are none."""
    if not folder.is_dir():
        raise OptionError(f"{folder}: no such folder")
    try:
        found = folder.rglob("*") if recursive else folder.iterdir()
        images = sorted(path for path in found if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())
    except OSError as error:
        raise RunError(f"{folder}: can't be read: {error.strerror}") from error
    if not images:
        raise OptionError(f"{folder}: no pictures in it; looked for {' '.join(IMAGE_EXTENSIONS)}")
    return images


def key_images(images: Sequence[Path], *, full_path: bool) -> dict[str, Path]:
    """The pictures by their keys, in their order. Raises OptionError where two would share an entry."""
    keyed: dict[str, Path] = {}
    clashes = []
    for image in images:
        key = str(image.absolute()) if full_path else image.stem
        if key in keyed:
            clashes.append(f"{keyed[key]} and {image} would share the entry {key!r}; rename one, or give --full_path")
        keyed[key] = image
    if clashes:
        raise OptionError(*clashes)
    return keyed


def read_texts(images: Sequence[Path], extension: str) -> list[str]:
    """The stripped text beside each picture. Raises RunError with all that are missing or can't be read."""
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
        lines = "\n  ".join(problems)
        raise RunError(f"{len(problems)} of {len(images)} text files can't be used, nothing was written:\n  {lines}")
    return texts


def read_metadata(path: Path) -> Metadata:
    """The entries of a metadata file. Raises OptionError if there is none, RunError if it is something else."""
    try:
        metadata = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise OptionError(f"{path}: no such file") from None
    except OSError as error:
        raise RunError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise RunError(f"{path}: expected a JSON object of entries by picture, found {_kind(metadata)}")
    for key, entry in metadata.items():
        if not isinstance(entry, dict):
            raise RunError(f"{path}: expected an object as the entry of {key!r}, found {_kind(entry)}")
    return metadata


def write_metadata(path: Path, metadata: Metadata) -> None:
    """Write a metadata file, as a whole or not at all."""
    raw = json.dumps(metadata, indent=2).encode("ascii")
    write_atomically(path, lambda file: file.write(raw))


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


class ToolParser(argparse.ArgumentParser):
    """A parser for tools with positional arguments, which read_options doesn't know; its mistakes are OptionErrors."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see --help")


def merge_parser(description: str, *, extension: str) -> ToolParser:
    """The arguments that both merge tools have; `extension` is the default of --caption_extension."""
    parser = ToolParser(description)
    parser.add_argument("train_data_dir", type=Path, help="folder of the pictures and the text files beside them")
    parser.add_argument("out_json", type=Path, help="metadata file to write")
    parser.add_argument("--in_json", type=Path, help="metadata file to extend; when unset an existing out_json is")
    parser.add_argument("--full_path", action="store_true", help="keys are the pictures' paths, not their bare names")
    parser.add_argument("--recursive", action="store_true", help="search sub-folders too; needs --full_path")
    parser.add_argument(
        "--caption_extension", default=extension, help="ending of the text files (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="log each entry")
    return parser


def start_tool_logging(*, debug: bool) -> None:
    """Log to stderr, with `debug` each entry too."""
    start_logging(Options([LogOptions(console_log_level="DEBUG" if debug else None)], sources={}, notices=()))
