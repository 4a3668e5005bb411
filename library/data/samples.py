"""Sample: one picture file as the training sees it; no pixels. And the dataset and subset that it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from library.data.buckets import BucketPlan, Crop, Fit, crop_for_conditioning
from library.data.captions import CaptionSettings
from library.size import Size

PRESERVE_OUTPUT = "diff_output_preservation"
"""Custom attribute: beside a network, pictures whose target is what the base model makes of them."""


@dataclass(frozen=True)
class PixelSettings:
    """What is done to the pixels of one subset; names as in the dataset file."""

    resize_interpolation: str | None = None
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False

    def random_parts(self) -> list[str]:
        """The settings that make pixels differ from sample to sample, so that they can't be encoded once and for all."""
        return [name for name in ("color_aug", "random_crop") if getattr(self, name)]


@dataclass(frozen=True)
class Subset:
    """Pictures with common settings; names as in the dataset file.

    Attributes:
        image_dir: None for metadata with absolute paths.
        extension_was_chosen: by the user, as opposed to the default.
        conditioning_is_mask: the images of conditioning_data_dir are masks, as opposed to what a control net follows.
    """

    image_dir: Path | None
    num_repeats: int
    captions: CaptionSettings
    pixels: PixelSettings
    caption_extension: str = ".caption"
    extension_was_chosen: bool = False
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
        """What the subset is called by in messages and metadata."""
        source = self.metadata_file or self.image_dir
        assert source is not None
        return source


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share buckets and batch size. Batches never mix datasets.

    Attributes:
        validation_split: share of the pictures that is held out; validation_seed: chooses them.
    """

    batch_size: int
    buckets: BucketPlan
    subsets: tuple[Subset, ...]
    validation_split: float = 0.0
    validation_seed: int | None = None


class Face(NamedTuple):
    """The face that a file name ends in: centre and size in pixels of the picture."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture in one dataset. Slim, so that a million of them fit in a gigabyte.

    Attributes:
        file: path of the picture.
        caption: as read, not processed; all lines with enable_wildcard.
        tags: the part of the caption that tag statistics count.
        dataset: the number of its dataset.
        size: of the picture, upright.
        cache_stem: path of the cache files without their endings; two samples never share one.
        repeats: how often it is shown in an epoch.
        conditioning: path of the conditioning image or mask.
        aesthetic_score: what a refiner is told of it; None: --aesthetic_score.
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
        return Path(f"{self.cache_stem}_{self.size.width:04d}x{self.size.height:04d}_sdxl.npz")

    @property
    def old_latents_file(self) -> Path:
        """The name before sizes were part of it; prepare_buckets_latents.py still writes it."""
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
        pieces = self.path.stem.rsplit("_", 4)[1:]
        if len(pieces) < 4 or not all(piece.isdecimal() for piece in pieces):
            return None
        face = Face(*map(int, pieces))
        return face if face.width and face.height else None  # a date may end so

    @property
    def crop(self) -> Crop:
        return crop_for_conditioning(self.size, self.fit.bucket)

    def crop_top_left(self, *, flipped: bool) -> tuple[int, int]:
        """(top, left) as the model is told of a picture cropped in its middle; mirrored, it was cropped from the other side."""
        crop = self.crop
        left = self.fit.bucket.width - crop.right if flipped else crop.left
        return int(crop.top), int(left)
