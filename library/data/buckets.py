"""Buckets: which size each picture is trained at, and how it gets there. Pure: sizes in, sizes out, no pixels.

Source: contract, dataset_config.md sections 5 and 6; golden 01.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from library.size import Size


@dataclass(frozen=True)
class BucketPlan:
    """The bucket settings of one dataset, sizes in pixels. `min_side` and `max_side` are not used with no_upscale."""

    resolution: Size
    enabled: bool
    min_side: int
    max_side: int
    step: int
    no_upscale: bool


class Fit(NamedTuple):
    """How one picture gets into its bucket: resize to `resized`, then crop the middle `bucket`."""

    bucket: Size
    resized: Size


class Crop(NamedTuple):
    """The rectangle that size conditioning speaks of, in pixels of the bucket's scale; not the pixels that are cut off."""

    left: float
    top: float
    right: float
    bottom: float


def make_buckets(resolution: Size, min_side: int, max_side: int, step: int) -> list[Size]:
    """All bucket sizes of at most the resolution's area, sides multiples of `step`, sorted by width.

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
    """The buckets of one plan, and the fit of a picture to them."""

    def __init__(self, plan: BucketPlan):
        self.plan = plan
        self.sizes: list[Size] = []  # by width; with no_upscale a bucket is made for each picture
        if not plan.enabled:
            self.sizes = [plan.resolution]
        elif not plan.no_upscale:
            self.sizes = make_buckets(plan.resolution, plan.min_side, plan.max_side, plan.step)
        # The first of each aspect ratio, by ratio: a scan fits every picture, and most sizes come but once.
        first = {size.aspect: i for i, size in reversed(list(enumerate(self.sizes)))}
        self._by_aspect = sorted(first.items())
        self._set = frozenset(self.sizes)
        self._aspects = [aspect for aspect, _ in self._by_aspect]

    def fit(self, image: Size) -> Fit:
        """The bucket of a picture of this size, and the resize that covers it."""
        if self.sizes:
            return cover(image, image if image in self._set else self._nearest(image.aspect))
        return fit_without_upscaling(image, self.plan.resolution.area, self.plan.step)

    def _nearest(self, aspect: float) -> Size:
        """The bucket nearest in aspect ratio, the first of equals."""
        at = bisect_left(self._aspects, aspect)
        (below, i), (above, j) = self._by_aspect[max(0, at - 1)], self._by_aspect[min(at, len(self._aspects) - 1)]
        return self.sizes[i if (aspect - below, i) <= (above - aspect, j) or above < aspect else j]


def cover(image: Size, bucket: Size) -> Fit:
    """The smallest resize of a picture that covers the bucket.

    >>> cover(Size(1920, 1080), Size(1344, 768))
    Fit(bucket=Size(width=1344, height=768), resized=Size(width=1365, height=768))
    """
    scale = bucket.height / image.height if image.aspect > bucket.aspect else bucket.width / image.width
    return Fit(bucket, Size(_rounded(image.width * scale), _rounded(image.height * scale)))


def fit_without_upscaling(image: Size, area: int, step: int) -> Fit:
    """A bucket of the picture's own: at most `area` pixels, sides multiples of `step`, never larger than the picture."""
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
    """The picture fitted inside its bucket: what the model is told of the crop. Not truncated."""
    if bucket.aspect > original.aspect:
        width, height = bucket.height * original.aspect, float(bucket.height)
    else:
        width, height = float(bucket.width), bucket.width / original.aspect
    left, top = (bucket.width - width) // 2, (bucket.height - height) // 2
    return Crop(left, top, left + width, top + height)
