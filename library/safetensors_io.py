"""Read (mapped into memory), write (atomically, one tensor at a time) and hash safetensors files with metadata.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}},
then the tensors' bytes without holes (huggingface/safetensors, README "Format"). Reading a header needs no torch, so a
wrong or damaged file is reported before torch is imported.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from library.errors import NotFinite, RunError, first_line
from library.files import write_atomically
from library.log import log

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_HEADER_MARGIN = 1 << 16  # for hashes that are added to the metadata later
_CHUNK = 1 << 24

# Format name -> torch name, bytes per element; in the order in which the reference library sorts tensors, last first.
_DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4), "F64": ("float64", 8),
    "I64": ("int64", 8), "U64": ("uint64", 8),
}  # fmt: skip
_ORDER = {name: rank for rank, name in enumerate(_DTYPES)}
_FORMAT_NAMES = {torch_name: name for name, (torch_name, _) in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """What a header says of one tensor; `start` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one file: its tensors in file order, and its metadata."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size. Raises RunError in one line if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        # "np" doesn't import torch; "pread" also reads from disks that can't map files into memory.
        with safe_open(path, "np", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            stored = {
                name: (entry.get_dtype(), tuple(entry.get_shape()))
                for name, entry in slices.items()
            }
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except OSError as error:
        raise RunError(f"{path}: can't be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise RunError(
            f"{path}: not a complete safetensors file: {_damage(path, error)}. {_GET_AGAIN}"
        ) from None
    for name, (dtype, _) in stored.items():
        if dtype not in _DTYPES:
            raise RunError(f"{path}: tensor {name[:200]!r} has the unknown dtype {dtype!r}")
    sizes = {name: math.prod(shape) * _DTYPES[dtype][1] for name, (dtype, shape) in stored.items()}
    tensors = {}
    position = size - sum(
        sizes.values()
    )  # safe_open has checked that the tensors fill the rest of the file
    for name, (dtype, shape) in stored.items():
        tensors[name] = TensorInfo(dtype, shape, position, position + sizes[name])
        position += sizes[name]
    return Header(path, tensors, metadata)


_GET_AGAIN = "Copy or download it again"


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that safe_open refuses, with the sizes that its own message leaves out."""
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            return f"the header should have {length:,} bytes, the file has {size:,} in all"
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            needed = (
                8
                + length
                + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            needed = size
    if needed == size:
        return first_line(error).removeprefix("Error while deserializing header: ")[:300]
    problem = "cut short" if needed > size else "followed by foreign bytes"
    return f"{problem}: the header needs {needed:,} bytes, the file has {size:,}"


class TensorFile:
    """The tensors of one safetensors file, read when asked for.

    With `mapped`, tensors share the file's pages (private: writing into one never reaches the file), so reading costs
    no memory until a tensor is changed. The file is open from the start: replacing it on disk doesn't change what is
    read here. That is why the tensors aren't read by safe_open: it would import torch as soon as the file is opened.
    """

    def __init__(self, path: Path, *, mapped: bool = True):
        self.header = read_header(path)
        self._file = open(path, "rb")  # noqa: SIM115 - lives as long as the object
        self._map = (
            mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            if mapped and self.header.tensors
            else None
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.header.shapes

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata

    def __getitem__(self, name: str) -> "Tensor":
        """The tensor as stored: its dtype, its shape, in RAM."""
        import torch

        info = self.header.tensors[name]
        torch_name, item_size = _DTYPES[info.dtype]
        dtype = getattr(torch, torch_name)
        if info.start == info.end:
            return torch.empty(info.shape, dtype=dtype)
        if self._map is not None and info.start % item_size == 0:
            return torch.frombuffer(
                self._map, dtype=dtype, count=math.prod(info.shape), offset=info.start
            ).view(info.shape)
        raw = bytearray(info.end - info.start)
        self._file.seek(info.start)
        if self._file.readinto(raw) != len(raw):
            raise RunError(f"{self.header.path}: was cut short while it was read")
        return torch.frombuffer(raw, dtype=dtype).view(info.shape)


def load_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """All tensors of a small file, read into memory, and its metadata."""
    file = TensorFile(path, mapped=False)
    return {name: file[name] for name in file.header.tensors}, dict(file.header.metadata)


# ------------------------------------------------------------------------------------------------------------ writing


def storable_metadata(
    tensors: Mapping[str, "Tensor"], metadata: Mapping[str, object]
) -> dict[str, str]:
    """The metadata as a header can hold them: everything text, without None. What is too large is left out, largest first.

    Weights are saved whatever their metadata are.
    """
    texts = {
        str(key): str(value).encode("utf-8", "backslashreplace").decode()
        for key, value in metadata.items()
        if value is not None
    }
    left_out = []
    while (
        len(_encode_header(_plan(tensors, None), texts)) > MAX_HEADER_BYTES - _HEADER_MARGIN
        and texts
    ):
        left_out.append(max(texts, key=lambda key: len(texts[key])))
        del texts[left_out[-1]]
    if left_out:
        log.warning("metadata too large for a file's header are left out: %s", ", ".join(left_out))
    return texts


class _Planned(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def write_safetensors(
    path: Path,
    tensors: Mapping[str, "Tensor"],
    metadata: Mapping[str, object],
    *,
    dtype_of: Callable[[str, "Tensor"], "str | None"] | None = None,
) -> None:
    """Write tensors so that `path` is at any moment the old file or the complete new one, with one further tensor in memory.

    Args:
        dtype_of: gives the torch dtype name in which a tensor is stored; None keeps the tensor's own.

    The file is written to the same folder under a temporary name, flushed to the disk, read back and compared, then renamed.

    Raises:
        RunError: the disk refuses; the old file stays.
    """
    plan = _plan(tensors, dtype_of)
    header = _encode_header(plan, storable_metadata(tensors, metadata))

    written = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        for start in (len(header).to_bytes(8, "little"), header):
            file.write(start)
            written.update(start)
        for entry in plan:
            data = _bytes(tensors[entry.name], entry.dtype)
            file.write(data)
            written.update(data)

    def check(temporary: Path) -> None:
        if (
            read_header(temporary).shapes.keys() != tensors.keys()
            or file_hashes(temporary)[0] != written.hexdigest()
        ):
            raise RunError(
                f"{path}: what the disk gives back isn't what was written; the file before it stays"
            )

    write_atomically(path, write, check)


def _plan(
    tensors: Mapping[str, "Tensor"], dtype_of: Callable[[str, "Tensor"], "str | None"] | None
) -> list[_Planned]:
    """The tensors in the order of the reference library: wider dtypes first, then by name."""
    plan = []
    for name, tensor in tensors.items():
        chosen = (dtype_of(name, tensor) if dtype_of else None) or str(tensor.dtype).removeprefix(
            "torch."
        )
        dtype = _FORMAT_NAMES[chosen]
        plan.append(_Planned(name, dtype, tuple(tensor.shape), tensor.numel() * _DTYPES[dtype][1]))
    return sorted(plan, key=lambda entry: (-_ORDER[entry.dtype], entry.name))


def _encode_header(plan: list[_Planned], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in plan:
        entries[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (position, position + entry.size),
        }
        position += entry.size
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def _bytes(tensor: "Tensor", dtype: str) -> memoryview:
    import torch

    stored = tensor.detach().to(device="cpu", dtype=getattr(torch, _DTYPES[dtype][0])).contiguous()
    return stored.reshape(-1).view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------------------------------- hashes

_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def network_hashes(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a network file (contract: formats.md section 4, Hashes).

    The first is the sha256 of all tensor bytes; the second the first 8 hex digits of the sha256 of 64 KiB at 1 MiB of the
    file that would hold only the `ss_` metadata.
    """
    plan = _plan(tensors, None)
    header = _encode_header(
        plan, {key: value for key, value in metadata.items() if key.startswith("ss_")}
    )
    whole, window = hashlib.sha256(), bytearray()
    position = 0

    def take(data: memoryview | bytes) -> None:
        nonlocal position
        start, end = max(_LEGACY_START - position, 0), _LEGACY_START + _LEGACY_LENGTH - position
        if end > start:
            window.extend(data[start:end])
        position += len(data)

    take(len(header).to_bytes(8, "little"))
    take(header)
    for entry in plan:
        data = _bytes(tensors[entry.name], entry.dtype)
        whole.update(data)
        take(data)
    return whole.hexdigest(), hashlib.sha256(window).hexdigest()[:8]


def data_hash(path: Path) -> str:
    """sha256 of all tensor bytes of a safetensors file: what `sshs_model_hash` and `modelspec.hash_sha256` say of it."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def file_hashes(path: Path) -> tuple[str, str]:
    """Return the sha256 of the file, and the first 8 hex digits of the sha256 of 64 KiB at 1 MiB."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(_LEGACY_START)
        legacy = hashlib.sha256(file.read(_LEGACY_LENGTH)).hexdigest()[:8]
        file.seek(0)
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest(), legacy


# ------------------------------------------------------------------------------------------------ saved models


def check_finite(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Raise NotFinite, which names `path` and the tensors, if any value of them is NaN or Inf."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        names = ", ".join(bad[:5])
        raise NotFinite(f"{path}: not saved, as {len(bad)} of its tensors aren't finite ({names})")


def save_tensors(
    path: Path,
    tensors: Mapping[str, "Tensor"],
    metadata: Mapping[str, str],
    dtype: "torch.dtype | None" = None,
    *,
    with_hashes: bool = False,
) -> None:
    """Save tensors in the format of the path's ending: .safetensors with metadata, any other a torch file without.

    Args:
        dtype: the dtype of the saved tensors; None: each tensor's own.
        with_hashes: add the hashes of network files to the metadata.

    Raises:
        NotFinite: a value is NaN or Inf; nothing is written.
        RunError: the file can't be written.
    """
    stored = {
        name: tensor.to(device="cpu", dtype=dtype or tensor.dtype)
        for name, tensor in tensors.items()
    }
    check_finite(path, stored)
    if path.suffix != ".safetensors":
        import torch

        write_atomically(path, lambda file: torch.save(stored, file))
        return
    if with_hashes:
        texts = storable_metadata(stored, metadata)
        model_hash, legacy_hash = network_hashes(stored, texts)
        metadata = {**texts, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
    write_safetensors(path, stored, metadata)
