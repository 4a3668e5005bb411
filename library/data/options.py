"""Options of datasets, captions and caches. Torch-free."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from library.errors import Mistake
from library.models.unet_config import AESTHETIC_SCORE
from library.option_types import DatasetKey
from library.options import OptionGroup, option
from library.size import INTERPOLATIONS, Size

DEFAULT_CAPTION_EXTENSION = ".caption"
# Of bucket sides: latents are an eighth of the pixels, and the U-Net halves them twice.
_MULTIPLE = 32

_DATASET_KEY = DatasetKey(("general", "dataset"))
_SUBSET_KEY = DatasetKey(("general", "dataset", "subset"))
_FOLDER_KEY = replace(_SUBSET_KEY, folders_only=True)
_OWN_KEY = DatasetKey(("subset",))


@dataclass(frozen=True)
class DatasetOptions(OptionGroup):
    """Dataset (values in --dataset_config win over these)."""

    train_data_dir: Path | None = option(
        None,
        "folder whose subfolders are named N_class: each image is repeated N times per epoch, and "
        "class is the caption of images without a caption file",
        affects_result=False,
        private=True,
    )
    reg_data_dir: Path | None = option(
        None,
        "the same with regularization images, weighted by --prior_loss_weight and repeated to "
        "match the number of training images",
        affects_result=False,
        private=True,
    )
    in_json: Path | None = option(
        None,
        "metadata with captions, .json or .jsonl, of the images in --train_data_dir; replaces "
        "N_class folders",
        affects_result=False,
        private=True,
    )
    dataset_repeats: int = option(
        1, "how often each image of --in_json is repeated per epoch", at_least=1
    )
    dataset_config: Path | None = option(
        None,
        "dataset definition, .toml or .json; replaces --train_data_dir, --reg_data_dir and "
        "--in_json",
        affects_result=False,
        private=True,
    )
    resolution: str | None = option(
        None,
        "training resolution in pixels: one number for a square, or width,height",
        dataset_key=replace(
            _DATASET_KEY, type=tuple[int, ...] | None, rules={"at_least": _MULTIPLE}
        ),
    )
    train_batch_size: int = option(
        1,
        "images per batch and process",
        at_least=1,
        dataset_key=replace(_DATASET_KEY, name="batch_size"),
    )
    conditioning_data_dir: Path | None = option(
        None,
        "folder with a mask for each image, of the same name, for --masked_loss; inpainting "
        "models paint the masked area",
        affects_result=False,
        private=True,
        dataset_key=_OWN_KEY,
    )
    aesthetic_score: float = option(
        AESTHETIC_SCORE,
        "aesthetic score that a refiner gets for images whose metadata has none; other models "
        "don't use it",
    )
    prior_loss_weight: float = option(
        1.0, "factor of the loss of regularization images", at_least=0
    )
    validation_split: float = option(
        0.0,
        "fraction of the images that is held out from training",
        at_least=0,
        at_most=1,
        dataset_key=_DATASET_KEY,
    )
    validation_seed: int | None = option(
        None,
        "seed for choosing the images that are held out; unset: --seed, or 0",
        dataset_key=_DATASET_KEY,
    )
    cache_info: bool = option(
        False,
        "keep captions and sizes of each folder in its metadata_cache.json, whose captions "
        "replace missing files",
        affects_result=False,
        dataset_key=_FOLDER_KEY,
    )
    allow_missing_captions: bool = option(
        False,
        "use empty captions where --caption_extension is given and a folder has no such file",
        affects_result=False,
    )
    debug_dataset: bool = option(
        False,
        "print what the model would see, write it as a page with thumbnails, and exit",
        affects_result=False,
    )
    skip_bad_images: bool = option(
        False,
        "skip images that can't be read, instead of stopping with a list of them",
        affects_result=False,
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.resolution is not None and parse_resolution(self.resolution) is None:
            yield Mistake(
                f"--resolution {self.resolution!r}: expected a size in pixels like 1024, or "
                "width,height like 832,1216",
                ("resolution",),
            )


@dataclass(frozen=True)
class BucketOptions(OptionGroup):
    """Buckets (values in --dataset_config win over these)."""

    enable_bucket: bool = option(
        False,
        "train each image in the bucket of the nearest aspect ratio, instead of all at --resolution",
        dataset_key=_DATASET_KEY,
    )
    min_bucket_reso: int = option(
        256,
        "shortest bucket side in pixels; unused with --bucket_no_upscale",
        at_least=_MULTIPLE,
        dataset_key=_DATASET_KEY,
    )
    max_bucket_reso: int = option(
        1024,
        "longest bucket side in pixels; unused with --bucket_no_upscale",
        at_least=_MULTIPLE,
        dataset_key=_DATASET_KEY,
    )
    bucket_reso_steps: int = option(
        64,
        "bucket sides are multiples of this number of pixels, itself a multiple of 32",
        at_least=_MULTIPLE,
        dataset_key=_DATASET_KEY,
    )
    bucket_no_upscale: bool = option(
        False,
        "make buckets from the images' own sizes and never enlarge an image",
        dataset_key=_DATASET_KEY,
    )


@dataclass(frozen=True)
class PixelKeys(OptionGroup):
    """How the pixels of images are processed: command-line options, and settings of each subset."""

    resize_interpolation: str | None = option(
        None,
        "filter of all resizes; unset: area where both sides shrink, else lanczos",
        choices=INTERPOLATIONS,
        dataset_key=_SUBSET_KEY,
    )
    flip_aug: bool = option(
        False, "mirror each image with probability 0.5", dataset_key=_SUBSET_KEY
    )
    color_aug: bool = option(
        False,
        "change hue or gamma slightly in a third of the samples; excludes --cache_latents",
        dataset_key=_SUBSET_KEY,
    )
    random_crop: bool = option(
        False,
        "crop at a random position instead of the center; excludes --cache_latents",
        dataset_key=_SUBSET_KEY,
    )
    alpha_mask: bool = option(
        False, "weight the loss by the images' alpha channel", dataset_key=_OWN_KEY
    )


@dataclass(frozen=True)
class PixelOptions(PixelKeys):
    """Resizing, augmentation and alpha (values in --dataset_config win over these)."""

    face_crop_aug_range: str | None = option(
        None,
        "smallest,largest: the shorter side of the image per face side when cropping around the "
        "face that a file name ends in (_x_y_width_height); only without buckets and "
        "--cache_latents",
        dataset_key=replace(_SUBSET_KEY, type=tuple[float, ...] | None, rules={"above": 0}),
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.face_crop_aug_range is not None and parse_range(self.face_crop_aug_range) is None:
            yield Mistake(
                f"--face_crop_aug_range {self.face_crop_aug_range!r}: expected two numbers above "
                "0, smallest,largest",
                ("face_crop_aug_range",),
            )


@dataclass(frozen=True)
class CaptionKeys(OptionGroup):
    """How captions are processed: command-line options, and settings of each subset."""

    shuffle_caption: bool = option(
        False,
        "shuffle a caption's tags for every sample; excludes --cache_text_encoder_outputs",
        dataset_key=_SUBSET_KEY,
    )
    caption_separator: str = option(",", "text between two tags", dataset_key=_SUBSET_KEY)
    keep_tokens: int = option(
        0,
        "keep the first N tags in place under shuffling, dropout and warm-up",
        at_least=0,
        dataset_key=_SUBSET_KEY,
    )
    keep_tokens_separator: str | None = option(
        "",
        "mark in a caption: tags before the first one stay first, those after a second one stay "
        "last",
        dataset_key=_SUBSET_KEY,
    )
    secondary_separator: str | None = option(
        None,
        "text that becomes the caption separator after shuffling, so that tags joined by it move "
        "together",
        dataset_key=_SUBSET_KEY,
    )
    enable_wildcard: bool = option(
        False,
        "replace {a|b|c} by one of its alternatives at random, and use one random line of a "
        "multi-line caption",
        dataset_key=_SUBSET_KEY,
    )
    caption_prefix: str | None = option(None, "text before every caption", dataset_key=_SUBSET_KEY)
    caption_suffix: str | None = option(None, "text after every caption", dataset_key=_SUBSET_KEY)
    caption_dropout_rate: float = option(
        0.0,
        "probability of an empty caption; excludes --cache_text_encoder_outputs",
        at_least=0,
        at_most=1,
        dataset_key=_SUBSET_KEY,
    )
    caption_dropout_every_n_epochs: int = option(
        0, "use empty captions in every Nth epoch", at_least=0, dataset_key=_SUBSET_KEY
    )
    caption_tag_dropout_rate: float = option(
        0.0,
        "probability of dropping each tag that isn't kept",
        at_least=0,
        at_most=1,
        dataset_key=_SUBSET_KEY,
    )
    token_warmup_min: int = option(
        1, "number of tags used at step 0 of the tag warm-up", at_least=1, dataset_key=_SUBSET_KEY
    )
    token_warmup_step: float = option(
        0,
        "optimizer step at which all tags are in use; below 1 a fraction of all steps",
        at_least=0,
        dataset_key=_SUBSET_KEY,
    )


@dataclass(frozen=True)
class CaptionOptions(CaptionKeys):
    """Captions (values in --dataset_config win over these)."""

    caption_extension: str = option(
        DEFAULT_CAPTION_EXTENSION,
        "suffix of caption files; unset: .txt where a folder has no .caption files",
        dataset_key=_FOLDER_KEY,
    )
    caption_extention: str | None = option(None, "old spelling of --caption_extension")
    weighted_captions: bool = option(
        False, "read (word:1.2), (word) and [word] in captions as weights"
    )


@dataclass(frozen=True)
class CacheOptions(OptionGroup):
    """Latent and text caches, and loading."""

    cache_latents: bool = option(
        False,
        "encode each image once, before training, and keep the latents in RAM",
        affects_result=False,
    )
    cache_latents_to_disk: bool = option(
        False,
        "store latents as NAME_WWWWxHHHH_sdxl.npz next to the images, and use those that exist; "
        "implies --cache_latents",
        affects_result=False,
    )
    vae_batch_size: int = option(
        1, "images that the VAE encodes at once while caching", at_least=1, unset=(0,)
    )
    cache_text_encoder_outputs: bool = option(
        False,
        "encode each caption once, before training; excludes training the text encoders and "
        "captions that vary",
        affects_result=False,
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False,
        "store text encoder outputs as NAME_te_outputs.npz next to the images, and use those that "
        "exist; implies --cache_text_encoder_outputs",
        affects_result=False,
    )
    text_cache_variants: int | None = option(
        None,
        "encode N random variants of each caption (shuffled, with tags dropped, wildcards), and "
        "the empty caption; every sample gets a random one",
        at_least=1,
    )
    cache_dir: Path | None = option(
        None,
        "folder for all cache files and the index, instead of next to the images: for read-only "
        "data",
        affects_result=False,
        private=True,
    )
    skip_cache_check: bool = option(
        False,
        "use every existing cache file without checking its content or that of the image",
        affects_result=False,
    )
    max_data_loader_n_workers: int = option(
        8,
        "maximum number of processes that load images; 0: the main process does",
        at_least=0,
        affects_result=False,
    )
    persistent_data_loader_workers: bool = option(
        False,
        "keep the loader processes between epochs",
        no_effect="they are always kept: one loader serves the complete run",
        affects_result=False,
    )

    @property
    def latents(self) -> bool:
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk


DATA_OPTIONS = (DatasetOptions, BucketOptions, PixelOptions, CaptionOptions, CacheOptions)
"""The groups that describe datasets."""


def parse_resolution(text: str) -> Size | None:
    """Return the size that "1024" or "832,1216" gives; None for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:,\s*(\d+)\s*)?", text)
    if match is None or int(match[1]) < _MULTIPLE or (match[2] and int(match[2]) < _MULTIPLE):
        return None
    return Size(int(match[1]), int(match[2] or match[1]))


def parse_range(text: str) -> tuple[float, float] | None:
    """Return (1.0, 2.5) for "1.0,2.5"; None for anything else."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        return None
    return (low, high) if 0 < low <= high else None
