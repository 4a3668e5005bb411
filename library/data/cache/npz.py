"""Numpy's .npz files: writing them completely or not at all, reading and verifying them.

Next to its arrays, a file contains a fingerprint: JSON with what they were made from, and their
checksums. They show when another program has changed some arrays and kept others, as sd-scripts
does when it writes to existing files.
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
# What zipfile and numpy raise for damaged files.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


class NpzError(ValueError):
    """A file without valid arrays. The text gives the reason, without the path."""


@dataclass(frozen=True)
class Contents:
    """What a file contains, without the values of its arrays.

    Attributes:
        arrays: name -> (dtype kind, shape).
        fingerprint: what the arrays were made from. None if the file has no fingerprint.
    """

    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    fingerprint: Mapping[str, Any] | None

    def as_json(self) -> list[Any]:
        arrays = {}
        for name, (kind, shape) in self.arrays.items():
            arrays[name] = [kind, list(shape)]
        return [arrays, self.fingerprint]

    @classmethod
    def from_json(cls, value: Any) -> "Contents":
        """Return the contents that `as_json` turned into JSON."""
        stored, fingerprint = value
        arrays = {}
        for name, (kind, shape) in stored.items():
            arrays[name] = (kind, tuple(shape))
        return cls(arrays, fingerprint)


def write(path: Path, arrays: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any]) -> Contents:
    """Write the arrays and the fingerprint, and return the contents of the file.

    Raises:
        RunError: the file can't be written.
    """
    members = {name: _as_npy(array) for name, array in arrays.items()}
    checksums = {name: zlib.crc32(member) for name, member in members.items()}
    text = json.dumps({**fingerprint, "arrays": checksums}, sort_keys=True)
    members[FINGERPRINT] = _as_npy(np.array(text))

    def write_zip(file: Any) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, member in members.items():
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member)

    write_atomically(path, write_zip)
    shapes = {name: (array.dtype.kind, array.shape) for name, array in arrays.items()}
    return Contents(shapes, json.loads(text))


def _as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def verify(path: Path) -> Contents:
    """Read the complete file, compare its checksums, and return its contents.

    Sizes are checked before arrays are read, so a header that claims terabytes is harmless. Objects
    are never unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        NpzError: the file is damaged.
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
                        raise NpzError(f"its {name} are objects, not numbers")
                    _check_content(member, name, shape, dtype, info.file_size)
                arrays[name] = (dtype.kind, shape)
            fingerprint = _fingerprint(archive, checksums) if FINGERPRINT in arrays else None
    except (FileNotFoundError, NpzError):
        raise
    except _UNREADABLE as error:
        raise NpzError("unreadable") from error
    arrays.pop(FINGERPRINT, None)
    return Contents(arrays, fingerprint)


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _check_content(
    member: Any, name: str, shape: Sequence[int], dtype: np.dtype, file_size: int
) -> None:
    expected = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if expected > file_size:
        raise NpzError("unreadable")
    content = member.read()  # compares the checksum
    if len(content) != expected:
        raise NpzError("unreadable")
    if dtype.kind == "f" and not np.isfinite(np.frombuffer(content, dtype)).all():
        raise NpzError(f"its {name} aren't finite")


def _fingerprint(archive: zipfile.ZipFile, checksums: Mapping[str, int]) -> Mapping[str, Any]:
    with archive.open(f"{FINGERPRINT}.npy") as member:
        fingerprint = json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))
    for name, checksum in fingerprint["arrays"].items():
        if checksums.get(name) != checksum:
            raise NpzError("changed by another program")
    return fingerprint


def read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the arrays of these names, checked against their checksums.

    Raises:
        NpzError: the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _as_array(archive.read(f"{name}.npy")) for name in names}
    except _UNREADABLE as error:
        raise NpzError(str(error)) from error


def _as_array(content: bytes) -> np.ndarray:
    """Return the array of an .npy member, copied once.

    Numpy's own read_array takes several times as long for latents.
    """
    member = io.BytesIO(content)
    shape, fortran_order, dtype = _header(member)
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    return np.frombuffer(member.getbuffer(), dtype, offset=member.seek(0, io.SEEK_CUR)).reshape(
        shape, order=order
    )


def foreign_arrays(path: Path, ours: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the arrays of a file that aren't ours; none if the file can't be read.

    They are kept when the file is written again.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files).difference(ours, [FINGERPRINT])
            return {name: arrays[name] for name in arrays.files if name in names}
    except _UNREADABLE:
        return {}
