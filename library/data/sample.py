"""Sample: one picture file as the training sees it; no pixels. And the dataset and subset that it comes from."""

import random
from dataclasses import dataclass
from pathlib import Path

from library.data.buckets import BucketPlan, Crop, Fit, crop_for_conditioning
from library.data.captions import CaptionSettings, process_caption
from library.data.size import Size


@dataclass(frozen=True)
class Subset:
    """A folder of pictures with common settings; names as in the dataset file."""

    image_dir: Path
    num_repeats: int
    class_tokens: str | None
    caption_extension: str
    extension_was_chosen: bool  # by the user, as opposed to the default
    captions: CaptionSettings
    flip_aug: bool
    resize_interpolation: str | None


@dataclass(frozen=True)
class DatasetPlan:
    """Subsets that share buckets and batch size. Batches never mix datasets."""

    batch_size: int
    buckets: BucketPlan
    subsets: tuple[Subset, ...]


@dataclass(frozen=True)
class Sample:
    """One picture in one dataset.

    Attributes:
        caption: as read, not processed; all lines with enable_wildcard.
        dataset: the number of its dataset.
        size: of the picture, upright.
        cache_stem: path of the cache files without their endings; two samples never share one.
    """

    path: Path
    caption: str
    subset: Subset
    dataset: int
    size: Size
    fit: Fit
    cache_stem: Path

    @property
    def latents_file(self) -> Path:
        return self.cache_stem.with_name(
            f"{self.cache_stem.name}_{self.size.width:04d}x{self.size.height:04d}_sdxl.npz"
        )

    @property
    def text_file(self) -> Path:
        return self.cache_stem.with_name(f"{self.cache_stem.name}_te_outputs.npz")

    @property
    def settled_caption(self) -> str:
        """The processed caption, where the subset's settings hold nothing random: what text caches encode."""
        return process_caption(self.caption, self.subset.captions, random.Random(0), epoch=1, step=0, max_train_steps=1)

    @property
    def crop(self) -> Crop:
        return crop_for_conditioning(self.size, self.fit.bucket)

    def crop_top_left(self, *, flipped: bool) -> tuple[int, int]:
        """(top, left) as the model is told; a mirrored picture was cropped from the other side."""
        crop = self.crop
        left = self.fit.bucket.width - crop.right if flipped else crop.left
        return int(crop.top), int(left)
