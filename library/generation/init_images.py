"""Sources: the files that pictures are drawn from: where they are, how large, and their pixels."""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import OptionError
from library.generation.options import SIDE

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


def list_images(paths: Iterable[Path], flag: str) -> list[Path]:
    """The pictures that files and folders name, folders' by name. Raises OptionError for a folder without any."""
    found: list[Path] = []
    for path in paths:
        own = sorted(p for p in path.iterdir() if p.suffix.lower() in _ENDINGS) if path.is_dir() else [path]
        if not own:
            raise OptionError(f"{flag} {path}: no picture in it ({', '.join(_ENDINGS)})")
        found += own
    return found


def size_of(path: Path, flag: str) -> tuple[int, int]:
    """(width, height) in pixels as the picture is drawn from: sides cut to multiples of 32. Raises OptionError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION) in _TURNED:
                width, height = height, width
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise OptionError(f"{flag} {path}: can't be read as a picture: {error}") from None
    if min(width, height) < SIDE:
        raise OptionError(f"{flag} {path}: {width}x{height} is too small; each side needs {SIDE} pixels or more")
    return width // SIDE * SIDE, height // SIDE * SIDE


def read_image(path: Path, flag: str) -> "Image":
    """The picture upright, transparent parts on white, 16 bits scaled to 8. Raises OptionError."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I") or upright.mode == "F":  # convert() would clip 16 bits to white
                scaled = (np.asarray(upright, dtype=np.float64) / 257).round().clip(0, 255)
                upright = Image.fromarray(scaled.astype(np.uint8))
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise OptionError(f"{flag} {path}: can't be read as a picture: {error}") from None


def resized(image: "Image", width: int, height: int) -> "Image":
    """At this size in pixels, by Lanczos' filter."""
    from PIL import Image

    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def as_tensor(images: Sequence["Image"]) -> "Tensor":
    """RGB pictures of one size: [B, 3, H, W] in -1..1, float32."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_mask(images: Sequence["Image"]) -> "Tensor":
    """Masks at an eighth of the pictures' size, 1 where white: [B, 1, H/8, W/8], float32."""
    import numpy as np
    import torch

    small = [image.convert("L").resize((image.width // 8, image.height // 8), resample=4) for image in images]  # 4: box
    return torch.from_numpy(np.stack([np.asarray(mask) for mask in small]))[:, None].float() / 255


def as_images(pixels: "np.ndarray") -> list["Image"]:
    """uint8 [B, H, W, 3] as pictures."""
    from PIL import Image

    return [Image.fromarray(one) for one in pixels]
