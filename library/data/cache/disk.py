"""What both caches on disk do: name their sources, remember what files contain, and compare.

A cache file is valid if it was made from the same things as now. Its fingerprint says from which:
an image is the same if its content is, or its size and time are unchanged.
"""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.cache import npz
from library.data.cache.npz import Contents, NpzError
from library.data.file_index import FileIndex, FileStamp, file_stamp
from library.errors import RunError

VERSION = 1  # of the fingerprints
NOT_THERE = "not there"


class SourceStamp(NamedTuple):
    """The image file from which latents were made.

    Attributes:
        content: hash of its content.
        stamp: its size and time before it was read.
        mask: the same of the file with its mask.
    """

    content: str
    stamp: FileStamp
    mask: "SourceStamp | None" = None

    def as_json(self) -> dict[str, Any]:
        """Return the stamp for a fingerprint.

        A file that has just changed may change again within the resolution of its time, so its time
        isn't stored, and contents are compared later.
        """
        size, changed = self.stamp
        is_settled = time.time_ns() - changed > 2_000_000_000
        return {"content": self.content, "size": size, "time": changed if is_settled else 0}


def source_stamp(path: Path) -> tuple[bytes, SourceStamp]:
    """Return the content of a file, and its stamp."""
    stamp = file_stamp(path)
    content = path.read_bytes()
    return content, SourceStamp(content_hash(content), stamp)


def content_hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class DiskCache:
    """Base of the caches on disk: every file is verified once, and its contents remembered."""

    in_memory = False

    def __init__(self, file_index: FileIndex | None = None, *, trusted: bool = False):
        """Create a cache.

        Args:
            file_index: what is known of files from earlier runs.
            trusted: every existing file counts as valid (--skip_cache_check).
        """
        self._file_index = file_index or FileIndex()
        self._trusted = trusted
        self._written: dict[Path, Contents] = {}

    def record_written(self) -> None:
        """Remember the contents of the files that were written, so that the next run needn't read them."""
        for path, contents in self._written.items():
            self._record(path, file_stamp(path), contents)
        self._written.clear()

    def _contents(self, path: Path) -> tuple[Contents, FileStamp]:
        """Return the contents of a file, verified now or before, and its stamp.

        Raises:
            FileNotFoundError: there is no such file.
            NpzError: it is damaged.
        """
        stamp = file_stamp(path)
        folder, name = os.path.split(path)
        known = self._file_index.get(folder, name, stamp)
        if "npz" in known:
            return Contents.from_json(known["npz"]), stamp
        contents = npz.verify(path)
        self._record(path, stamp, contents)
        return contents, stamp

    def _record(self, path: Path, stamp: FileStamp, contents: Contents) -> None:
        folder, name = os.path.split(path)
        self._file_index.record(folder, name, stamp, npz=contents.as_json())

    def _source_difference(self, source: Mapping[str, Any], file: str, what: str) -> str | None:
        """Return why a cache wasn't made from the file as it is now; None if it was."""
        stamp = file_stamp(file)
        if (source.get("size"), source.get("time")) == stamp:
            return None
        folder, name = os.path.split(file)
        content = self._file_index.get(folder, name, stamp).get("content")
        if content is None:
            content = content_hash(Path(file).read_bytes())
            self._file_index.record(folder, name, stamp, content=content)
        return None if content == source.get("content") else f"the {what} has changed"

    def _write(
        self, path: Path, arrays: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any]
    ) -> None:
        self._written[path] = npz.write(path, arrays, fingerprint)


def damage_reason(error: OSError | NpzError) -> str:
    """Return why a cache file can't be read."""
    return str(error) if isinstance(error, NpzError) else "unreadable"


def shape_difference(
    contents: Contents, expected: Mapping[str, Sequence[int | None]]
) -> str | None:
    """Return how arrays differ from the expected shapes, in which None means any; None if they don't."""
    for name, shape in expected.items():
        if name not in contents.arrays:
            return f"lacks {name}"
        kind, found = contents.arrays[name]
        if kind != "f":
            return f"its {name} are not floats"
        if not _fits(found, shape):
            return f"its {name} are {_format_shape(found)} where {_format_shape(shape)} are needed"
    return None


def _fits(found: Sequence[int], expected: Sequence[int | None]) -> bool:
    if len(found) != len(expected):
        return False
    return all(side in (None, size) for size, side in zip(found, expected, strict=True))


def _format_shape(shape: Sequence[int | None]) -> str:
    return "x".join("?" if side is None else str(side) for side in shape)


_REASONS = {
    "version": "of another version",
    "bucket": "of another bucket",
    "resized": "resized in another way",
    "resize_interpolation": "resized in another way",
    "alpha_mask": "with alpha_mask on or off",
    "vae": "of another VAE or dtype",
    "inpainting": "of masks from another source",
    "captions": "of other captions",
    "tokens": "of another token length",
    "encoders": "of other text encoders or dtype",
}


def fingerprint_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Return the first thing from which a cache was made that is different now; None if all are the same."""
    for key, value in expected.items():
        if found.get(key) != value:
            return _REASONS[key]
    return None


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return arrays of a cache file, in the order of their names.

    Raises:
        RunError: they can't be read.
    """
    try:
        arrays = npz.read(path, names)
    except NpzError as error:
        raise RunError(
            f"{path}: the cache was changed or damaged since the run began ({error}); remove it "
            "and run again"
        ) from None
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
