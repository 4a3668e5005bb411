"""Pixels of a sample: from its file to its bucket, with the augmentations. No torch here.

Source: contract, dataset_config.md section 6. Randomness comes through `draw`.
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
    """A picture in its bucket of height H and width W.

    Attributes:
        rgb: [H, W, 3], uint8.
        alpha: the loss mask of its alpha channel, [H, W], float32 in 0..1; None without alpha_mask.
        crop_top_left: (top, left) as the model is told, in pixels of the resized picture.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    crop_top_left: tuple[int, int]


def load_pixels(
    sample: Sample, draw: random.Random | None = None, *, flipped: bool = False, content: bytes | None = None
) -> Pixels:
    """The sample's picture in its bucket. Raises BadImage.

    Args:
        draw: the sample's own randomness, for what its subset draws; None: no augmentation, as for caches.
        content: the picture file's bytes, where they were read already.
    """
    settings = sample.subset.pixels
    content = sample.path.read_bytes() if content is None else content
    pixels = images.decode(content, sample.file, keep_alpha=settings.alpha_mask)
    found = Size(pixels.shape[1], pixels.shape[0])
    if found != sample.size:
        raise ImageError(f"it was {sample.size} when the dataset was read, and is {found} now")
    bucket, resized, corner, told = sample.fit.bucket, sample.fit.resized, None, None
    if draw is not None and settings.face_crop_aug_range and (face := sample.face):
        resized, corner = face_crop(sample.size, bucket, face, settings.face_crop_aug_range, draw, wide=settings.random_crop)  # fmt: skip
    elif draw is not None and settings.random_crop:
        corner = draw.randint(0, resized.height - bucket.height), draw.randint(0, resized.width - bucket.width)
    if corner is not None:
        told = corner if not flipped else (corner[0], resized.width - bucket.width - corner[1])
    pixels = crop(images.resize(pixels, resized, settings.resize_interpolation), bucket, corner)
    rgb, alpha = pixels[..., :3], None
    if settings.alpha_mask:
        alpha = pixels[..., 3].astype(np.float32) / 255
    if draw is not None and settings.color_aug:
        rgb = color_augmented(rgb, draw)
    if flipped:
        rgb, alpha = rgb[:, ::-1], None if alpha is None else alpha[:, ::-1]
    return Pixels(rgb, alpha, told or sample.crop_top_left(flipped=flipped))


def load_conditioning(sample: Sample, *, flipped: bool, content: bytes | None = None) -> np.ndarray:
    """The sample's conditioning image or mask, resized and cropped as its picture: [H, W, 3], uint8. Raises BadImage.

    Args: content: the file's bytes, where they were read already.
    """
    assert sample.conditioning is not None
    content = Path(sample.conditioning).read_bytes() if content is None else content
    pixels = images.decode(content, sample.conditioning)
    pixels = images.resize(pixels, sample.fit.resized, sample.subset.pixels.resize_interpolation)
    pixels = crop(pixels, sample.fit.bucket, None)
    return pixels[:, ::-1] if flipped else pixels


def crop(pixels: np.ndarray, size: Size, corner: tuple[int, int] | None) -> np.ndarray:
    """The `size` of `pixels` at `corner` (top, left), or in the middle."""
    if corner is None:
        corner = (pixels.shape[0] - size.height) // 2, (pixels.shape[1] - size.width) // 2
    top, left = corner
    return pixels[top : top + size.height, left : left + size.width]


_COLOR_PROBABILITY = 0.33


def color_augmented(rgb: np.ndarray, draw: random.Random) -> np.ndarray:
    """One time in three a small change of hue or of gamma: [H, W, 3], uint8."""
    if draw.random() >= _COLOR_PROBABILITY:
        return rgb
    if draw.random() < 0.5:
        import cv2

        # The reference takes red for blue here, and hue in OpenCV's half degrees.
        hsv = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.float32) + draw.uniform(-8, 8)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    gamma = draw.uniform(0.95, 1.05)
    return (rgb.astype(np.float32) ** gamma).clip(0, 255).astype(np.uint8)


_SMALLEST_SHAKEN_FACE = 40  # pixels


def face_crop(
    image: Size, target: Size, face: Face, range_: tuple[float, float], draw: random.Random, *, wide: bool
) -> tuple[Size, tuple[int, int]]:
    """The resize, and the corner (top, left) of a `target` around the face.

    The face's longer side becomes 1/range[1] to 1/range[0] of the target's shorter one, as far as the picture covers the
    target and isn't enlarged.

    Args:
        wide: let the window wander over the picture (random_crop), instead of shaking it a little.
    """
    shorter, longer_face = min(target), max(face.width, face.height)
    cover = max(target.width / image.width, target.height / image.height)
    low = min(1.0, max(cover, shorter / (longer_face * range_[1])))
    high = min(1.0, max(low, shorter / (longer_face * range_[0])))
    scale = max(cover, draw.uniform(low, high) if low < high else low)
    resized = Size(int(image.width * scale + 0.5), int(image.height * scale + 0.5))
    face_length = int(longer_face * scale + 0.5)
    corner = []
    for centre, length, window in ((face.y, resized.height, target.height), (face.x, resized.width, target.width)):
        at = int(centre * scale + 0.5) - window // 2
        if wide:
            reach = max(length - face_length, face_length)
            at += draw.randint(0, reach) + draw.randint(0, reach) - reach
        elif range_[0] != range_[1] and face_length > shorter // 10 and face_length >= _SMALLEST_SHAKEN_FACE:
            at += draw.randint(-(face_length // 20), face_length // 20)
        corner.append(max(0, min(at, length - window)))
    return resized, (corner[0], corner[1])
