"""Pictures: size from the header, pixels as RGB, resizing and cropping to a bucket. No torch here.

Sizes are Size(width, height) in pixels, as the picture is seen: after its EXIF orientation. Arrays are height first.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.size import Size
from library.errors import RunError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
_ORIENTATION = 0x0112


class BadImage(RunError):
    """A picture that can't be read; the text says why, without the path."""


def read_size(path: Path) -> Size:
    """The picture's size, from its header alone. Raises BadImage."""
    with _image_errors(), Image.open(path) as image:
        width, height = image.size
        return Size(height, width) if _orientation(image, path) in _SIDEWAYS else Size(width, height)


def load_rgb(path: Path) -> np.ndarray:
    """The picture's pixels, upright: [H, W, 3], uint8. Raises BadImage.

    16-bit pictures are scaled to 8 bit, transparent ones laid on white, of animated ones the first frame is taken.
    """
    with _image_errors(), Image.open(path) as image:
        orientation = _orientation(image, path)
        image.load()
        rgb = _to_rgb(image)
        return np.asarray(rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb)


# How each EXIF orientation is turned upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = (5, 6, 7, 8)


def _orientation(image: Image.Image, path: Path) -> int:
    """The EXIF orientation, 1 if there is none, without decoding the picture."""
    if image.format != "PNG" or "exif" in image.info:
        return image.getexif().get(_ORIENTATION, 1)
    # Pillow decodes a whole PNG to look for EXIF behind its pixels; the chunks can be walked instead.
    exif = Image.Exif()
    exif.load(_png_exif_chunk(path))
    return exif.get(_ORIENTATION, 1)


def _png_exif_chunk(path: Path) -> bytes:
    """The content of a PNG's eXIf chunk; empty if it has none."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, 1)
    return b""


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bit, which convert() would clip to white
        return Image.fromarray(
            (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _image_errors() -> Iterator[None]:
    """Turns what Pillow raises for damaged files into BadImage, and keeps its warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("no picture: its content is of no known format") from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise BadImage(f"damaged: {str(error) or type(error).__name__}") from None


# ------------------------------------------------------------------------------------------------------------ resizing


def resize(pixels: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """`pixels` [H, W, C] uint8 at another size.

    Unset: area averaging where both sides shrink or stay, else Lanczos. Lanczos and box are Pillow's, the others OpenCV's
    (contract: dataset_config.md section 6).
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


def center_crop(pixels: np.ndarray, size: Size) -> np.ndarray:
    """The middle `size` of `pixels`, which is at least that large."""
    left, top = (pixels.shape[1] - size.width) // 2, (pixels.shape[0] - size.height) // 2
    return pixels[top : top + size.height, left : left + size.width]


def normalised(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [3, H, W] float32 in -1..1."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1.0
