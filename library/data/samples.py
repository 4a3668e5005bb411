"""Sample: one image file as training sees it, without pixels. And the dataset and subset it is in."""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from library.data.buckets import BucketSettings, Crop, Fit, crop_for_conditioning
from library.data.captions import CaptionSettings
from library.data.options import PixelKeys
from library.size import Size

PRESERVE_OUTPUT = "diff_output_preservation"
"""Custom attribute of images whose target, when a network is trained, is the base model's output."""


@dataclass(frozen=True)
class PixelSettings(PixelKeys):
    """How the pixels of one subset are processed.

    Attributes:
        face_crop_aug_range: smallest and largest ratio of the image's shorter side to the face.
    """

    face_crop_aug_range: tuple[float, float] | None = None

    def random_settings(self) -> list[str]:
        """Return the settings that make pixels vary, so that they can't be encoded in advance."""
        return [name for name in ("color_aug", "random_crop") if getattr(self, name)]


@dataclass(frozen=True)
class Subset:
    """Images with common settings. Names are those of the dataset file.

    Attributes:
        image_dir: the folder; None for metadata with absolute paths.
        is_extension_given: the user gave caption_extension, so it isn't the default.
        conditioning_is_mask: the images of conditioning_data_dir are masks, not the conditions of a
            control net.
    """

    image_dir: Path | None
    num_repeats: int
    captions: CaptionSettings
    pixels: PixelSettings
    caption_extension: str = ".caption"
    is_extension_given: bool = False
    class_tokens: str | None = None
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    conditioning_is_mask: bool = False
    is_reg: bool = False
    recursive: bool = False
    cache_info: bool = False
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The name of the subset in messages and metadata."""
        source = self.metadata_file or self.image_dir
        assert source is not None
        return source


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share buckets and batch size. Batches never mix datasets.

    Attributes:
        validation_split: the fraction of the images that is held out.
        validation_seed: the seed for choosing them.
    """

    batch_size: int
    buckets: BucketSettings
    subsets: tuple[Subset, ...]
    validation_split: float = 0.0
    validation_seed: int | None = None


class Face(NamedTuple):
    """The face that a file name ends in: center and size in pixels of the image."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One image in one dataset. It is small, so that a million of them fit in a gigabyte.

    Attributes:
        file: path of the image.
        caption: the caption as read, not processed. With enable_wildcard it has all lines.
        tags: the part of the caption that tag statistics count.
        dataset: index of the dataset.
        size: size of the upright image.
        cache_stem: path of the cache files without their endings. No two samples share one.
        repeats: how often the image is used per epoch.
        conditioning: path of the conditioning image or mask.
        aesthetic_score: the score that a refiner gets. None means --aesthetic_score.
    """

    file: str
    caption: str
    tags: str
    subset: Subset
    dataset: int
    size: Size
    fit: Fit
    cache_stem: str
    repeats: int
    conditioning: str | None = None
    aesthetic_score: float | None = None

    @property
    def path(self) -> Path:
        return Path(self.file)

    @property
    def latents_file(self) -> Path:
        width, height = self.size
        return Path(f"{self.cache_stem}_{width:04d}x{height:04d}_sdxl.npz")

    @property
    def old_latents_file(self) -> Path:
        """The name without the size, which prepare_buckets_latents.py still writes."""
        return Path(f"{self.cache_stem}.npz")

    @property
    def text_file(self) -> Path:
        return Path(f"{self.cache_stem}_te_outputs.npz")

    @property
    def has_mask(self) -> bool:
        """Whether it has a mask of its own, in its alpha channel or in conditioning_data_dir."""
        has_image = self.subset.conditioning_is_mask and self.conditioning is not None
        return has_image or self.subset.pixels.alpha_mask

    @property
    def face(self) -> Face | None:
        """The face that the file name ends in, as _x_y_width_height."""
        pieces = self.path.stem.rsplit("_", 4)[1:]
        if len(pieces) < 4 or not all(piece.isdecimal() for piece in pieces):
            return None
        face = Face(*map(int, pieces))
        # A name may end in a date and time with zeros.
        return face if face.width and face.height else None

    @property
    def crop(self) -> Crop:
        return crop_for_conditioning(self.size, self.fit.bucket)

    def crop_top_left(self, *, flipped: bool) -> tuple[int, int]:
        """Return the (top, left) that conditions the model on a center crop.

        A mirrored image was cropped from the other side.
        """
        crop = self.crop
        left = self.fit.bucket.width - crop.right if flipped else crop.left
        return int(crop.top), int(left)


def split(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Return the samples to train on, and the fraction that is held out without repeats.

    Both are in the given order.
    """
    num_held_out = len(samples) - math.ceil(len(samples) * (1 - fraction))
    if not num_held_out:
        return list(samples), []
    shuffled = list(range(len(samples)))
    random.Random(seed).shuffle(shuffled)
    held_out_indices = set(shuffled[len(samples) - num_held_out :])
    kept, held_out = [], []
    for i, sample in enumerate(samples):
        if i in held_out_indices:
            held_out.append(dataclasses.replace(sample, repeats=1))
        else:
            kept.append(sample)
    return kept, held_out


def balance(samples: Sequence[Sample], wanted: int) -> list[Sample]:
    """Return regularization samples with repeats that add up to `wanted`.

    The first samples are used first. If there are too few, all are repeated more often.
    """
    kept: list[Sample] = []
    count = 0
    for sample in samples:
        if count >= wanted:
            break
        kept.append(sample)
        count += sample.repeats
    if not kept:
        return []
    more_for_all, num_with_one_more = divmod(max(0, wanted - count), len(kept))
    balanced = []
    for i, sample in enumerate(kept):
        repeats = sample.repeats + more_for_all
        if i < num_with_one_more:
            repeats += 1
        balanced.append(dataclasses.replace(sample, repeats=repeats))
    return balanced
