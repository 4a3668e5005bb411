"""Pixels of a sample: from its file to its bucket, with augmentations. Torch-free.

Source: contract, dataset_config.md section 6.
"""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library import images
from library.data.samples import Face, Sample
from library.images import ImageError
from library.size import Size


class Pixels(NamedTuple):
    """An image in its bucket of height H and width W.

    Attributes:
        rgb: [H, W, 3], uint8.
        alpha: the loss mask in its alpha channel, [H, W], float32 in 0..1. None without alpha_mask.
        crop_top_left: (top, left) for size conditioning, in pixels of the resized image.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    crop_top_left: tuple[int, int]


def load_pixels(
    sample: Sample,
    rng: random.Random | None = None,
    *,
    flipped: bool = False,
    content: bytes | None = None,
) -> Pixels:
    """Return the sample's image in its bucket.

    Args:
        sample: the sample.
        rng: its random number generator. None means no augmentation, as for caches.
        flipped: mirror the image.
        content: the content of the file, if it has been read already.

    Raises:
        ImageError: the image can't be read, or its size has changed.
    """
    settings, bucket = sample.subset.pixels, sample.fit.bucket
    if content is None:
        content = sample.path.read_bytes()
    pixels = images.decode(content, sample.file, keep_alpha=settings.alpha_mask)
    size = Size(pixels.shape[1], pixels.shape[0])
    if size != sample.size:
        raise ImageError(f"it was {sample.size} when the dataset was read, and is {size} now")
    resized, corner = _random_crop(sample, rng)
    pixels = images.resize(pixels, resized, settings.resize_interpolation)
    pixels = crop(pixels, bucket, corner)
    rgb, alpha = pixels[..., :3], None
    if settings.alpha_mask:
        alpha = pixels[..., 3].astype(np.float32) / 255
    if rng is not None and settings.color_aug:
        rgb = color_augmented(rgb, rng)
    if flipped:
        rgb = rgb[:, ::-1]
        alpha = None if alpha is None else alpha[:, ::-1]
    if corner is None:
        return Pixels(rgb, alpha, sample.crop_top_left(flipped=flipped))
    top, left = corner
    if flipped:
        left = resized.width - bucket.width - left
    return Pixels(rgb, alpha, (top, left))


def _random_crop(sample: Sample, rng: random.Random | None) -> tuple[Size, tuple[int, int] | None]:
    """Return the size to resize to, and the (top, left) of a random crop; None to crop the center."""
    settings, bucket, resized = sample.subset.pixels, sample.fit.bucket, sample.fit.resized
    if rng is None:
        return resized, None
    face, face_range = sample.face, settings.face_crop_aug_range
    if face is not None and face_range is not None:
        return face_crop(sample.size, bucket, face, face_range, rng, wide=settings.random_crop)
    if not settings.random_crop:
        return resized, None
    top = rng.randint(0, resized.height - bucket.height)
    left = rng.randint(0, resized.width - bucket.width)
    return resized, (top, left)


def load_conditioning(sample: Sample, *, flipped: bool, content: bytes | None = None) -> np.ndarray:
    """Return the sample's conditioning image or mask: [H, W, 3], uint8.

    It is resized and cropped like the sample's image.

    Args:
        sample: the sample.
        flipped: mirror the image.
        content: the content of the file, if it has been read already.

    Raises:
        ImageError: the image can't be read.
    """
    assert sample.conditioning is not None
    if content is None:
        content = Path(sample.conditioning).read_bytes()
    pixels = images.decode(content, sample.conditioning)
    interpolation = sample.subset.pixels.resize_interpolation
    pixels = images.resize(pixels, sample.fit.resized, interpolation)
    pixels = crop(pixels, sample.fit.bucket, None)
    return pixels[:, ::-1] if flipped else pixels


def crop(pixels: np.ndarray, size: Size, corner: tuple[int, int] | None) -> np.ndarray:
    """Return the part of this size at the corner (top, left); at the center if there is no corner."""
    if corner is None:
        corner = (pixels.shape[0] - size.height) // 2, (pixels.shape[1] - size.width) // 2
    top, left = corner
    return pixels[top : top + size.height, left : left + size.width]


_COLOR_PROBABILITY = 0.33


def color_augmented(rgb: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return [H, W, 3] uint8 pixels, of which a third have a slightly changed hue or gamma."""
    if rng.random() >= _COLOR_PROBABILITY:
        return rgb
    if rng.random() < 0.5:
        import cv2

        # sd-scripts confuses red with blue here; hue is in OpenCV's units of two degrees.
        hsv = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.float32) + rng.uniform(-8, 8)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    gamma = rng.uniform(0.95, 1.05)
    return (rgb.astype(np.float32) ** gamma).clip(0, 255).astype(np.uint8)


_SMALLEST_SHIFTED_FACE = 40  # pixels


def face_crop(
    image: Size,
    target: Size,
    face: Face,
    range_: tuple[float, float],
    rng: random.Random,
    *,
    wide: bool,
) -> tuple[Size, tuple[int, int]]:
    """Return the size to resize to, and the corner (top, left) of a crop around the face.

    The face's longer side becomes 1/range_[1] to 1/range_[0] of the target's shorter side, as far
    as the image covers the target and isn't enlarged.

    Args:
        image: size of the image.
        target: size of the crop.
        face: the face in the image.
        range_: smallest and largest ratio of the target's shorter side to the face.
        rng: the sample's random number generator.
        wide: move the crop across the image (random_crop), instead of shifting it slightly.
    """
    shorter, longer_face = min(target), max(face.width, face.height)
    cover = max(target.width / image.width, target.height / image.height)
    low = min(1.0, max(cover, shorter / (longer_face * range_[1])))
    high = min(1.0, max(low, shorter / (longer_face * range_[0])))
    scale = rng.uniform(low, high) if low < high else low
    scale = max(cover, scale)
    resized = Size(int(image.width * scale + 0.5), int(image.height * scale + 0.5))
    face_length = int(longer_face * scale + 0.5)
    is_large_face = face_length > shorter // 10 and face_length >= _SMALLEST_SHIFTED_FACE
    shifts = range_[0] != range_[1] and is_large_face
    corner = []
    for center, length, window in (
        (face.y, resized.height, target.height),
        (face.x, resized.width, target.width),
    ):
        start = int(center * scale + 0.5) - window // 2
        if wide:
            reach = max(length - face_length, face_length)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif shifts:
            start += rng.randint(-(face_length // 20), face_length // 20)
        corner.append(max(0, min(start, length - window)))
    return resized, (corner[0], corner[1])
