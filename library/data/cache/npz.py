"""Numpy's .npz files: written whole, looked at without reading their arrays, read, verified.

A file holds, beside its arrays, a fingerprint: JSON with what they were made of, and their checksums. So arrays that
another program changed, keeping ours (sd-scripts merges into existing files), are seen.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from library.files import write_atomically

FINGERPRINT = "fingerprint"
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, MemoryError, SyntaxError, zipfile.BadZipFile, zlib.error)  # fmt: skip


class BadFile(ValueError):
    """A file that holds no arrays of ours; the text says why, without the path."""


@dataclass(frozen=True)
class Contents:
    """What a file says of itself.

    Attributes:
        arrays: name -> (dtype kind, shape).
        fingerprint: what the arrays were made of; None if the file doesn't say.
    """

    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    fingerprint: Mapping[str, Any] | None

    def as_json(self) -> list[Any]:
        return [{name: [kind, list(shape)] for name, (kind, shape) in self.arrays.items()}, self.fingerprint]

    @classmethod
    def from_json(cls, value: Any) -> "Contents":
        arrays, fingerprint = value
        return cls({name: (kind, tuple(shape)) for name, (kind, shape) in arrays.items()}, fingerprint)


def write(path: Path, arrays: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any]) -> Contents:
    """Write the arrays and the fingerprint; returns what the file says then. Raises RunError."""
    members = {name: _as_npy(array) for name, array in arrays.items()}
    checksums = {name: zlib.crc32(member) for name, member in members.items()}
    text = json.dumps({**fingerprint, "arrays": checksums}, sort_keys=True)
    members[FINGERPRINT] = _as_npy(np.array(text))

    def write_zip(file: Any) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, member in members.items():
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member)

    write_atomically(path, write_zip)
    return Contents({name: (array.dtype.kind, array.shape) for name, array in arrays.items()}, json.loads(text))


def _as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def verify(path: Path) -> Contents:
    """Read the whole file and compare its checksums. Raises FileNotFoundError; BadFile with the reason.

    Sizes are looked at before arrays are read, so a header that claims terabytes does no harm; objects are never unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays, checksums = {}, {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                checksums[name] = info.CRC
                with archive.open(info) as member:
                    shape, _, dtype = _header(member)
                    if dtype.hasobject:
                        raise BadFile(f"its {name} are objects, not numbers")
                    _check_content(member, name, shape, dtype, info.file_size)
                arrays[name] = (dtype.kind, shape)
            fingerprint = _fingerprint(archive, checksums) if FINGERPRINT in arrays else None
    except (FileNotFoundError, BadFile):
        raise
    except _UNREADABLE as error:
        raise BadFile("unreadable") from error
    arrays.pop(FINGERPRINT, None)
    return Contents(arrays, fingerprint)


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _check_content(member: Any, name: str, shape: Sequence[int], dtype: np.dtype, file_size: int) -> None:
    expected = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if expected > file_size:
        raise BadFile("unreadable")
    content = member.read()  # checks the sum
    if len(content) != expected:
        raise BadFile("unreadable")
    if dtype.kind == "f" and not np.isfinite(np.frombuffer(content, dtype)).all():
        raise BadFile(f"its {name} aren't finite")


def _fingerprint(archive: zipfile.ZipFile, checksums: Mapping[str, int]) -> Mapping[str, Any]:
    with archive.open(f"{FINGERPRINT}.npy") as member:
        fingerprint = json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))
    if any(checksums.get(name) != checksum for name, checksum in fingerprint["arrays"].items()):
        raise BadFile("changed by another program")
    return fingerprint


def read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names, checked against their sums. Raises BadFile, for a missing file too."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _as_array(archive.read(f"{name}.npy")) for name in names}
    except _UNREADABLE as error:
        raise BadFile(str(error)) from error


def _as_array(content: bytes) -> np.ndarray:
    """The array of an .npy member, in one copy; numpy's own read_array takes several times as long over the latents."""
    member = io.BytesIO(content)
    shape, fortran_order, dtype = _header(member)
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    return np.frombuffer(member.getbuffer(), dtype, offset=member.tell()).reshape(shape, order=order)


def foreign_arrays(path: Path, ours: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of a file that aren't ours, which a new version keeps; nothing of a file that can't be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if name not in ours and name != FINGERPRINT}
    except _UNREADABLE:
        return {}
