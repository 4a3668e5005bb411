"""Images: the size from the header, pixels, resizing and normalizing, without torch.

Sizes are Size(width, height) in pixels of the upright image, after its EXIF orientation. Arrays are height first.
"""

import importlib.util
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from library.errors import RunError
from library.size import Size

# Extensions in lower case. The format of a file is detected from its content, whatever its extension.
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
PLUGINS = {".jxl": ("pillow_jxl", "pillow-jxl-plugin"), ".heic": ("pillow_heif", "pillow-heif"), ".heif": ("pillow_heif", "pillow-heif")}  # fmt: skip
"""Extensions that need a Pillow plugin: its module, and its pip package."""

# Not in a context manager: those of the warnings module aren't safe in the threads that decode.
warnings.filterwarnings("ignore", module="PIL")

_LARGE_PIXELS = (
    89_478_485  # Pillow refuses images with more than twice as many (decompression bombs)
)
_ORIENTATION = 0x0112
# Texts that may hold the orientation: XMP, and EXIF as ImageMagick wrote it before PNG had the chunk eXIf.
_PNG_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_PNG_TAIL = 1 << 14  # bytes in which metadata after the pixels are looked for


class ImageError(RunError):
    """An image that can't be read. The text gives the reason, without the path."""


def readable_extensions() -> tuple[str, ...]:
    """Return the extensions that this installation can read."""
    installed = [
        extension for extension, (module, _) in PLUGINS.items() if importlib.util.find_spec(module)
    ]
    return (*EXTENSIONS, *installed)


def _register_plugin(path: str) -> None:
    extension = path[path.rfind(".") :].lower()
    if extension == ".jxl":
        importlib.import_module("pillow_jxl")  # registers itself
    elif extension in PLUGINS:
        importlib.import_module("pillow_heif").register_heif_opener()


class ImageInfo(NamedTuple):
    """What the header of an image says.

    Attributes:
        size: of the upright image.
        is_turned: the EXIF orientation rotates or mirrors the stored pixels.
        is_animated: the image has several frames.
    """

    size: Size
    is_turned: bool
    is_animated: bool


def read_image_info(path: str | Path) -> ImageInfo:
    """Read the header of an image, without its pixels.

    Raises:
        ImageError: the file can't be read.
    """
    with _image_errors():
        _register_plugin(str(path))
        with open(path, "rb") as file, Image.open(file) as image:
            if image.format == "PNG" and "exif" not in image.info:
                _read_metadata_after_pixels(image, file)
            (width, height), orientation = image.size, _orientation(image)
            # The further images of an MPO file, which many cameras write, are previews of the first.
            is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
    size = Size(height, width) if orientation in _SIDEWAYS else Size(width, height)
    return ImageInfo(size, orientation in _TURNS, is_animated)


def is_large(size: Size) -> bool:
    """Return whether an image is so large that it could be a decompression bomb."""
    return size.area > _LARGE_PIXELS


def _read_metadata_after_pixels(image: Image.Image, file: BinaryIO) -> None:
    """Add the EXIF that ExifTool and others write after a PNG's pixels, where Pillow alone reads it only with the pixels."""
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - _PNG_TAIL))
    tail = file.read()
    file.seek(position)
    if any(name in tail for name in _PNG_TEXTS):
        image.load()
        return
    start = tail.rfind(b"eXIf")
    length = int.from_bytes(tail[max(0, start - 4) : max(0, start)], "big")
    chunk, checksum = (
        tail[start : start + 4 + length],
        tail[start + 4 + length : start + 8 + length],
    )
    # The four letters may occur in the pixels by chance, but not with the right checksum.
    if start >= 0 and zlib.crc32(chunk).to_bytes(4, "big") == checksum:
        image.info["exif"] = chunk[4:]


def load(path: str | Path, *, keep_alpha: bool = False) -> np.ndarray:
    """Return the pixels of the upright image: [H, W, 3], or [H, W, 4] with keep_alpha; uint8.

    16-bit images are scaled to 8 bits, and animated images give their first frame. Transparent images are composited on
    white, unless alpha is kept; then images without alpha are opaque.

    Raises:
        ImageError: the file can't be read.
    """
    return decode(Path(path).read_bytes(), str(path), keep_alpha=keep_alpha)


def decode(content: bytes, name: str, *, keep_alpha: bool = False) -> np.ndarray:
    """Do the same as `load` with the content of a file; the extension of `name` selects the plugin."""
    with _image_errors():
        _register_plugin(name)
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            orientation = _orientation(image)
            converted = _to_rgba(image) if keep_alpha else _to_rgb(image)
            if orientation in _TURNS:
                converted = converted.transpose(_TURNS[orientation])
            return np.asarray(converted)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Broken EXIF counts as none, as the pixels are complete; then XMP is used."""
    try:
        # Not image.getexif(), which decodes a PNG that has no EXIF.
        exif = Image.Image.getexif(image).get(_ORIENTATION)
    except (SyntaxError, struct.error, ValueError):
        exif = None
    if exif:
        return exif
    match = re.search(rb'tiff:Orientation(="|>)([0-9])', image.info.get("xmp") or b"")
    return int(match[2]) if match else 1


# How each EXIF orientation is turned upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = (5, 6, 7, 8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bit(image).convert("RGB")
    if _has_alpha(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bit(image).convert("RGBA")
    return image.convert("RGBA") if _has_alpha(image) else image.convert("RGB").convert("RGBA")


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.mode or "a" in image.mode or "transparency" in image.info


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a 16-bit image to 8 bits; convert() would clip it to white."""
    return Image.fromarray(
        (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
    )


@contextmanager
def _image_errors() -> Iterator[None]:
    """Turn what Pillow raises for damaged files into ImageError."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except Image.UnidentifiedImageError:
        raise ImageError("not an image: its content has no known format") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large; make it smaller: {error}") from None
    except MemoryError:
        raise ImageError("too large for this machine's memory") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        TypeError,
        OverflowError,
        struct.error,
    ) as error:
        raise ImageError(f"damaged: {str(error) or type(error).__name__}") from None


# ------------------------------------------------------------------------------------------------------------ resizing


def resize(pixels: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """Return `pixels` [H, W, C] uint8, resized.

    Args:
        interpolation: one of INTERPOLATIONS. None means area averaging if no side grows, otherwise Lanczos. Lanczos and box
            are Pillow's, the others OpenCV's (contract: dataset_config.md section 6).
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if width >= size.width and height >= size.height else "lanczos"
    return _RESIZERS[interpolation](pixels, size)


def _pillow(resampling: Image.Resampling) -> Callable[[np.ndarray, Size], np.ndarray]:
    return lambda pixels, size: np.asarray(Image.fromarray(pixels).resize(size, resampling))


def _opencv(name: str) -> Callable[[np.ndarray, Size], np.ndarray]:
    def resized(pixels: np.ndarray, size: Size) -> np.ndarray:
        import cv2

        return cv2.resize(pixels, size, interpolation=getattr(cv2, name))

    return resized


_RESIZERS = {
    "lanczos": _pillow(Image.Resampling.LANCZOS), "box": _pillow(Image.Resampling.BOX), "area": _opencv("INTER_AREA"),
    "nearest": _opencv("INTER_NEAREST_EXACT"), "bilinear": _opencv("INTER_LINEAR"), "linear": _opencv("INTER_LINEAR"),
    "bicubic": _opencv("INTER_CUBIC"), "cubic": _opencv("INTER_CUBIC"),
}  # fmt: skip


def normalized(pixels: np.ndarray) -> np.ndarray:
    """Convert [H, W, 3] uint8 to [3, H, W] float32 in -1..1."""
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    values /= 127.5  # in place, as new memory costs more than the arithmetic
    values -= 1.0
    return values
