"""Numpy's .npz files: written whole, looked at without reading their arrays, read, verified.

A file holds, beside its arrays, a fingerprint: JSON with what they were made of, and their checksums. So arrays that
another program changed, keeping ours (sd-scripts merges into existing files), are seen.
"""

import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
                    shape, dtype = _header(member)
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


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


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
    """The arrays of these names, checked against their sums. Raises BadFile, for a file that isn't there too."""
    try:
        with open(path, "rb", buffering=0) as file:
            found = _read_in_order(file, names)
            if found is None:
                with zipfile.ZipFile(file) as archive:
                    found = {name: _as_array(archive.read(f"{name}.npy")) for name in names}
            return found
    except _UNREADABLE as error:
        raise BadFile(str(error)) from error


_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")  # of a zip's member, which its name, extra field and content follow


def _read_in_order(file: io.FileIO, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays by the headers before them, as write() lays them out; None for files that others laid out otherwise.

    Reading a zip's directory takes as long as reading the latents of a picture.
    """
    found: dict[str, np.ndarray] = {}
    while len(found) < len(names):
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            return None
        mark, _, flags, method, _, _, checksum, _, size, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if mark != b"PK\x03\x04" or flags or method or size == 0xFFFFFFFF:
            return None
        name = file.read(name_length).decode().removesuffix(".npy")
        if name not in names:
            file.seek(extra_length + size, os.SEEK_CUR)
            continue
        file.seek(extra_length, os.SEEK_CUR)
        content = bytearray(size)
        if file.readinto(content) != size or zlib.crc32(content) != checksum:
            raise BadFile(f"its {name} are damaged")
        found[name] = _as_array(content)
    return {name: found[name] for name in names}


def _as_array(content: bytes | bytearray) -> np.ndarray:
    """The array of an .npy member; of the usual kind, where it lies in `content`, as a copy costs as much as the checksum."""
    if isinstance(content, bytearray) and (match := _FLOATS.match(content)):
        shape = tuple(map(int, match[1].replace(b",", b" ").split()))
        return np.frombuffer(content, np.float32, offset=match.end()).reshape(shape)
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


# The header that numpy writes for float32; its own reader takes longer over it than the disk over the array.
_FLOATS = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f4', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n", re.DOTALL
)


def foreign_arrays(path: Path, ours: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of a file that aren't ours, which a new version keeps; nothing of a file that can't be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if name not in ours and name != FINGERPRINT}
    except _UNREADABLE:
        return {}
