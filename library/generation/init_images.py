"""Input images of a generation: init images, masks and guides. Paths, sizes and pixels.

Nothing heavy is imported before an image is read.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import OptionError
from library.generation.options import SIDE
from library.size import Size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def list_images(paths: Iterable[Path], flag: str) -> list[Path]:
    """Return the image files, and those in folders sorted by name.

    Raises:
        OptionError: if a folder contains no image.
    """
    images: list[Path] = []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in _EXTENSIONS)
        if not files:
            raise OptionError(
                f"{flag} {path}: the folder contains no images ({', '.join(_EXTENSIONS)})"
            )
        images += files
    return images


def size_of(path: Path, flag: str) -> Size:
    """Return the size at which an image is used: upright, sides cut to multiples of 32.

    Raises:
        OptionError: if the file can't be read or the image is too small.
    """
    from library import images

    try:
        width, height = images.read_image_info(path).size
    except images.ImageError as error:
        raise OptionError(f"{flag} {path}: {error}") from None
    if min(width, height) < SIDE:
        raise OptionError(
            f"{flag} {path}: {width}x{height} is too small; each side needs at least {SIDE} pixels"
        )
    return Size(width // SIDE * SIDE, height // SIDE * SIDE)


def read_image(path: Path, flag: str) -> "np.ndarray":
    """Return the image's pixels: upright, transparent parts on white, [H, W, 3], uint8.

    Raises:
        OptionError: if the file can't be read.
    """
    from library import images

    try:
        return images.load(path)
    except images.ImageError as error:
        raise OptionError(f"{flag} {path}: {error}") from None


def resized(pixels: "np.ndarray", size: Size) -> "np.ndarray":
    """Resize [H, W, 3] uint8 with a Lanczos filter."""
    from library import images

    return images.resize(pixels, size, "lanczos")


def to_tensor(pixels: "Sequence[np.ndarray]") -> "Tensor":
    """Convert RGB images of one size to a tensor: [B, 3, H, W] in -1..1, float32."""
    import numpy as np
    import torch

    from library import images

    return torch.from_numpy(np.stack([images.normalized(image) for image in pixels]))


def to_latent_mask(pixels: "Sequence[np.ndarray]") -> "Tensor":
    """Shrink masks to the size of latents: [B, 1, H/8, W/8], float32, 1 where white."""
    import numpy as np
    import torch
    from PIL import Image

    masks = []
    for image in pixels:
        gray = Image.fromarray(image).convert("L")
        small = gray.resize((gray.width // 8, gray.height // 8), Image.Resampling.BOX)
        masks.append(np.asarray(small))
    return torch.from_numpy(np.stack(masks))[:, None].float() / 255
