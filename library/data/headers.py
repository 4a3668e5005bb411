"""Headers of PNG and JPEG files: size and EXIF orientation from one read, without Pillow, which takes several times as long.

Other formats, and what looks odd, are left to Pillow (images.py).
"""

import os
import re
import zlib
from typing import Literal, NamedTuple

from library.size import Size

_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # bytes as they are, on Windows too
_FIRST_READ = 4096  # holds the header of nearly every file
_LAST_READ = 1 << 14  # where the EXIF chunk of a PNG lies if it stands behind the pixels
_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_XMP = b"XML:com.adobe.xmp\0"
_RAW_EXIF = b"Raw profile type exif\0"  # EXIF in hexadecimal digits, as ImageMagick wrote it before there was eXIf


class Header(NamedTuple):
    """What a file says of itself: size as stored, how to turn it upright (EXIF, 1 to 8), whether it has several frames."""

    size: Size
    orientation: int
    is_animated: bool = False


def read_header(path: str) -> Header | None:
    """The header of a PNG or JPEG; None for anything else, or if something is odd. Raises OSError."""
    descriptor = os.open(path, _READ)
    try:
        start = os.read(descriptor, _FIRST_READ)
        if start.startswith(_PNG):
            return _png(descriptor, start)
        return _jpeg(descriptor, start) if start.startswith(b"\xff\xd8\xff") else None
    finally:
        os.close(descriptor)


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)  # os.pread isn't there on Windows
    return os.read(descriptor, length)


_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TEXT_START = 8 + len(_RAW_EXIF)  # by which a text chunk is known


def _png(descriptor: int, start: bytes) -> Header | None:
    if start[12:16] != b"IHDR" or len(start) < 33:
        return None
    size = Size(int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big"))
    exif = xmp = None
    is_animated = False
    at = 33
    while at + 8 <= len(start):
        length, kind = int.from_bytes(start[at : at + 4], "big"), start[at + 4 : at + 8]
        if kind == b"IDAT":
            if exif is None:
                tail = _read_tail(descriptor)
                if _RAW_EXIF in tail or _XMP in tail:
                    return None
                exif = _exif_behind_pixels(tail)
            return Header(size, exif or xmp or 1, is_animated)
        if kind == b"eXIf":
            exif = exif_orientation(_read_at(descriptor, at + 8, length))
        elif kind == b"acTL":
            is_animated = True
        elif kind in _TEXTS and start.startswith((_XMP, _RAW_EXIF), at + 8):
            if kind != b"iTXt" or not start.startswith(_XMP + b"\0", at + 8):  # the flag behind the name: compressed
                return None
            xmp = xmp_orientation(_read_at(descriptor, at + 8, length))
        at += 12 + length
        if at + _TEXT_START > len(start):  # behind a long chunk, say a colour profile
            start = _read_behind(descriptor, start, at)
    return None


def _read_behind(descriptor: int, start: bytes, at: int) -> bytes:
    """`start`, of which nothing before `at` is needed any more, with what follows there."""
    return b"\0" * at + _read_at(descriptor, at, _FIRST_READ)


def _read_tail(descriptor: int) -> bytes:
    end = os.lseek(descriptor, 0, os.SEEK_END)
    return _read_at(descriptor, max(0, end - _LAST_READ), _LAST_READ)


def _exif_behind_pixels(tail: bytes) -> int | None:
    at = tail.rfind(b"eXIf")
    if at < 4:
        return None
    length = int.from_bytes(tail[at - 4 : at], "big")
    content, checksum = tail[at : at + 4 + length], tail[at + 4 + length : at + 8 + length]
    # The four letters may stand in the pixels by chance; the checksum can't.
    return exif_orientation(content[4:]) if zlib.crc32(content).to_bytes(4, "big") == checksum else None


# Start-of-frame markers, which hold the size: C0 to CF without C4 (Huffman tables), C8, CC (arithmetic coding's tables).
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_APP1 = 0xE1


def _jpeg(descriptor: int, start: bytes) -> Header | None:
    exif = xmp = None
    at = 2
    while True:
        if at + 9 > len(start):
            start = _read_behind(descriptor, start, at)
            if at + 9 > len(start):
                return None
        if start[at] != 0xFF:
            return None
        marker = start[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _FRAMES:
            height, width = int.from_bytes(start[at + 5 : at + 7], "big"), int.from_bytes(start[at + 7 : at + 9], "big")
            return Header(Size(width, height), exif or xmp or 1) if width and height else None
        length = int.from_bytes(start[at + 2 : at + 4], "big")
        if marker == _APP1:
            segment = start[at + 4 : at + 2 + length]
            if len(segment) < length - 2:
                segment = _read_at(descriptor, at + 4, length - 2)
            if segment.startswith(b"Exif\0\0"):
                exif = exif_orientation(segment[6:])
            else:
                xmp = xmp_orientation(segment) or xmp
        at += 2 + length


def exif_orientation(exif: bytes) -> int | None:
    """The orientation tag in the first directory of EXIF data (a small TIFF file)."""
    exif = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    if exif[:2] not in (b"II", b"MM") or len(exif) < 8:
        return None

    def number(at: int, length: int) -> int:
        return int.from_bytes(exif[at : at + length], order)

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(exif) - 11), 12):
        if number(entry, 2) == _ORIENTATION:
            return number(entry + 8, 2)
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation that XMP text names, which counts where EXIF has none."""
    match = re.search(rb'tiff:Orientation(="|>)([0-9])', xmp)
    return int(match[2]) if match else None
