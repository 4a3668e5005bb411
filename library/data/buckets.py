"""Buckets: the size that each image is trained at, and how it is resized and cropped to it.

Pure functions of sizes, without pixels.

Source: contract, dataset_config.md sections 5 and 6; golden 01.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from library.data.options import BucketOptions
from library.size import Size


@dataclass(frozen=True)
class BucketSettings(BucketOptions):
    """The bucket settings of one dataset, with sides in pixels.

    Attributes:
        resolution: the size without buckets; with buckets, their largest area.
    """

    resolution: Size = field(kw_only=True)


class Fit(NamedTuple):
    """How an image gets into its bucket: it is resized to `resized`, and its center of size `bucket` cropped."""

    bucket: Size
    resized: Size


class Crop(NamedTuple):
    """The rectangle that size conditioning describes, in pixels at the bucket's scale.

    It isn't the pixels that are cut off.
    """

    left: float
    top: float
    right: float
    bottom: float


def make_buckets(resolution: Size, min_side: int, max_side: int, step: int) -> list[Size]:
    """Return all bucket sizes of at most the resolution's area, sorted by width.

    Sides are multiples of `step`.

    >>> make_buckets(Size(128, 128), 96, 192, 32)
    [Size(width=96, height=160), Size(width=128, height=128), Size(width=160, height=96)]
    """
    side = int(math.sqrt(resolution.area) // step) * step
    buckets = {Size(side, side)}
    for width in range(min_side, max_side + 1, step):
        height = min(max_side, int(resolution.area // width // step) * step)
        if height >= min_side:
            buckets |= {Size(width, height), Size(height, width)}
    return sorted(buckets)


class Buckets:
    """The buckets of a dataset.

    Attributes:
        settings: the bucket settings.
        sizes: the buckets by width. With bucket_no_upscale none, as each image makes its own.
    """

    def __init__(self, settings: BucketSettings):
        self.settings = settings
        self.sizes: list[Size] = []
        if not settings.enable_bucket:
            self.sizes = [settings.resolution]
        elif not settings.bucket_no_upscale:
            self.sizes = make_buckets(
                settings.resolution,
                settings.min_bucket_reso,
                settings.max_bucket_reso,
                settings.bucket_reso_steps,
            )
        # Index of the first bucket of each aspect ratio, by ratio. A scan fits every image, and
        # most of their sizes are unique, so this must be fast.
        first: dict[float, int] = {}
        for i, size in enumerate(self.sizes):
            first.setdefault(size.aspect, i)
        self._by_aspect = sorted(first.items())
        self._aspects = [aspect for aspect, _ in self._by_aspect]
        self._set = frozenset(self.sizes)

    def fit(self, image: Size) -> Fit:
        """Return the bucket of an image of this size, and the resize that covers it."""
        if not self.sizes:
            area, step = self.settings.resolution.area, self.settings.bucket_reso_steps
            return fit_without_upscaling(image, area, step)
        return cover(image, image if image in self._set else self._nearest(image.aspect))

    def _nearest(self, aspect: float) -> Size:
        """Return the bucket nearest in aspect ratio, the first of equals."""
        position = bisect_left(self._aspects, aspect)
        below, i = self._by_aspect[max(0, position - 1)]
        above, j = self._by_aspect[min(position, len(self._aspects) - 1)]
        is_below_nearer = (aspect - below, i) <= (above - aspect, j)
        return self.sizes[i if is_below_nearer or above < aspect else j]


def cover(image: Size, bucket: Size) -> Fit:
    """Return the smallest resize of an image that covers the bucket.

    >>> cover(Size(1920, 1080), Size(1344, 768))
    Fit(bucket=Size(width=1344, height=768), resized=Size(width=1365, height=768))
    """
    is_wider = image.aspect > bucket.aspect
    scale = bucket.height / image.height if is_wider else bucket.width / image.width
    return Fit(bucket, Size(_rounded(image.width * scale), _rounded(image.height * scale)))


def fit_without_upscaling(image: Size, area: int, step: int) -> Fit:
    """Return a bucket for this image alone.

    It has at most `area` pixels, sides that are multiples of `step`, and is never larger than the
    image. A side is 0 if the image is thinner than a step.
    """
    resized = image
    if image.area > area:
        aspect = image.aspect
        ideal_width = math.sqrt(area * aspect)
        width = _rounded(ideal_width) // step * step
        height = _rounded(area / ideal_width) // step * step
        if not width or not height:  # thinner than a step
            return Fit(Size(width, height), image)
        by_width = Size(width, _rounded(width / aspect) // step * step)
        by_height = Size(_rounded(height * aspect) // step * step, height)
        if not by_width.height or not by_height.width:
            return Fit(Size(by_height.width, by_width.height), image)
        # Of the two roundings, the one that keeps the aspect ratio better.
        if abs(by_width.aspect - aspect) < abs(by_height.aspect - aspect):
            resized = Size(width, _rounded(width / aspect))
        else:
            resized = Size(_rounded(height * aspect), height)
    return Fit(Size(resized.width // step * step, resized.height // step * step), resized)


def _rounded(x: float) -> int:
    return int(x + 0.5)


def crop_for_conditioning(original: Size, bucket: Size) -> Crop:
    """Return the rectangle of the image fitted inside its bucket, which conditions the model.

    The sides aren't rounded.
    """
    if bucket.aspect > original.aspect:
        width, height = bucket.height * original.aspect, float(bucket.height)
    else:
        width, height = float(bucket.width), bucket.width / original.aspect
    left, top = (bucket.width - width) // 2, (bucket.height - height) // 2
    return Crop(left, top, left + width, top + height)
