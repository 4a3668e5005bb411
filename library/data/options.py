"""Options of the data room. No torch here."""

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
_MULTIPLE = 32  # SDXL's bucket sides: three halvings of the latents, which are an eighth of the pixels, less one

_DATASET_KEY = DatasetKey(("general", "dataset"))
_SUBSET_KEY = DatasetKey(("general", "dataset", "subset"))
_FOLDER_KEY = replace(_SUBSET_KEY, folders_only=True)
_OWN_KEY = DatasetKey(("subset",))


@dataclass(frozen=True)
class DatasetOptions(OptionGroup):
    """Dataset (values in --dataset_config win over these)"""

    train_data_dir: Path | None = option(
        None,
        "folder whose sub-folders are named N_class: pictures shown N times, captioned by class unless they have a file",
        affects_result=False,
        private=True,
    )
    reg_data_dir: Path | None = option(
        None,
        "the same with regularisation pictures, weighted by --prior_loss_weight and shown as often as the others",
        affects_result=False,
        private=True,
    )
    in_json: Path | None = option(
        None,
        "metadata with captions, .json or .jsonl, of the pictures in --train_data_dir; takes the place of N_class folders",
        affects_result=False,
        private=True,
    )
    dataset_repeats: int = option(1, "how often each picture of --in_json is shown in an epoch", at_least=1)
    dataset_config: Path | None = option(
        None,
        "dataset definition, .toml or .json; --train_data_dir, --reg_data_dir and --in_json aren't used then",
        affects_result=False,
        private=True,
    )
    resolution: str | None = option(
        None,
        "training resolution in pixels: one number for a square, or width,height",
        dataset_key=replace(_DATASET_KEY, type=tuple[int, ...] | None, rules={"at_least": _MULTIPLE}),
    )
    train_batch_size: int = option(
        1, "pictures per batch and process", at_least=1, dataset_key=replace(_DATASET_KEY, name="batch_size")
    )
    enable_bucket: bool = option(
        False,
        "train each picture in the bucket nearest its aspect ratio, instead of all at --resolution",
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
        "bucket sides are multiples of this many pixels, itself a multiple of 32",
        at_least=_MULTIPLE,
        dataset_key=_DATASET_KEY,
    )
    bucket_no_upscale: bool = option(
        False, "make each bucket from the picture's own size and never enlarge a picture", dataset_key=_DATASET_KEY
    )
    resize_interpolation: str | None = option(
        None,
        "filter of all resizes; unset: area where both sides shrink, else lanczos",
        choices=INTERPOLATIONS,
        dataset_key=_SUBSET_KEY,
    )
    flip_aug: bool = option(False, "mirror each sample with probability 0.5", dataset_key=_SUBSET_KEY)
    color_aug: bool = option(
        False,
        "change hue or gamma a little in a third of the samples; rules out --cache_latents",
        dataset_key=_SUBSET_KEY,
    )
    random_crop: bool = option(
        False, "crop at a random place instead of the middle; rules out --cache_latents", dataset_key=_SUBSET_KEY
    )
    face_crop_aug_range: str | None = option(
        None,
        "two numbers, smallest,largest: the picture's shorter side per face side when cropping around the face that a file "
        "name ends in (_x_y_width_height); only without buckets and --cache_latents",
        dataset_key=replace(_SUBSET_KEY, type=tuple[float, ...] | None, rules={"above": 0}),
    )
    alpha_mask: bool = option(False, "weigh the loss by the pictures' alpha channel", dataset_key=_OWN_KEY)
    conditioning_data_dir: Path | None = option(
        None,
        "folder with a mask for each picture, of its name, for --masked_loss; inpainting models paint what it marks",
        affects_result=False,
        private=True,
        dataset_key=_OWN_KEY,
    )
    aesthetic_score: float = option(
        AESTHETIC_SCORE,
        "what a refiner is told of pictures whose metadata hold no aesthetic_score; other models aren't told",
    )
    prior_loss_weight: float = option(1.0, "factor of the loss of regularisation pictures", at_least=0)
    validation_split: float = option(
        0.0, "share of the pictures that is held out from training", at_least=0, at_most=1, dataset_key=_DATASET_KEY
    )
    validation_seed: int | None = option(
        None, "chooses the pictures that are held out; unset: --seed, or 0", dataset_key=_DATASET_KEY
    )
    cache_info: bool = option(
        False,
        "keep captions and sizes of each folder in its metadata_cache.json; captions there stand in for missing files",
        affects_result=False,
        dataset_key=_FOLDER_KEY,
    )
    allow_missing_captions: bool = option(
        False,
        "go on with empty captions where --caption_extension is given and a folder has no such file",
        affects_result=False,
    )
    debug_dataset: bool = option(
        False, "print what the model would see, write it as a page with thumbnails, and exit", affects_result=False
    )
    skip_bad_images: bool = option(
        False, "go on without pictures that can't be read, instead of stopping with their list", affects_result=False
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.resolution is not None and parse_resolution(self.resolution) is None:
            yield Mistake(
                f"--resolution {self.resolution!r}: expected a size in pixels like 1024, or width,height like 832,1216",
                ("resolution",),
            )
        if self.face_crop_aug_range is not None and parse_range(self.face_crop_aug_range) is None:
            yield Mistake(
                f"--face_crop_aug_range {self.face_crop_aug_range!r}: expected two numbers above 0, smallest,largest",
                ("face_crop_aug_range",),
            )


def parse_resolution(text: str) -> Size | None:
    """Size of "1024" or "832,1216"; None for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:,\s*(\d+)\s*)?", text)
    if match is None or int(match[1]) < _MULTIPLE or (match[2] and int(match[2]) < _MULTIPLE):
        return None
    return Size(int(match[1]), int(match[2] or match[1]))


def parse_range(text: str) -> tuple[float, float] | None:
    """(1.0, 2.5) of "1.0,2.5"; None for anything else."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        return None
    return (low, high) if 0 < low <= high else None


@dataclass(frozen=True)
class CaptionOptions(OptionGroup):
    """Captions (values in --dataset_config win over these)"""

    caption_extension: str = option(
        DEFAULT_CAPTION_EXTENSION,
        "ending of caption files; unset: .txt is taken where no .caption lies",
        dataset_key=_FOLDER_KEY,
    )
    caption_extention: str | None = option(None, "old spelling of --caption_extension")
    shuffle_caption: bool = option(
        False,
        "shuffle a caption's tags for every sample; rules out --cache_text_encoder_outputs",
        dataset_key=_SUBSET_KEY,
    )
    caption_separator: str = option(",", "text between two tags", dataset_key=_SUBSET_KEY)
    keep_tokens: int = option(
        0, "so many first tags stay in place under shuffling, dropout and warm-up", at_least=0, dataset_key=_SUBSET_KEY
    )
    keep_tokens_separator: str = option(
        "",
        "mark in a caption: tags before the first one stay first, those behind a second one stay last",
        dataset_key=replace(_SUBSET_KEY, type=str | None, default=None),
    )
    secondary_separator: str | None = option(
        None,
        "text that becomes the caption separator after shuffling, so that tags joined by it move together",
        dataset_key=_SUBSET_KEY,
    )
    enable_wildcard: bool = option(
        False,
        "{a|b|c} becomes one of its parts, and one line of a caption of several lines is drawn",
        dataset_key=_SUBSET_KEY,
    )
    caption_prefix: str | None = option(None, "text before every caption", dataset_key=_SUBSET_KEY)
    caption_suffix: str | None = option(None, "text behind every caption", dataset_key=_SUBSET_KEY)
    caption_dropout_rate: float = option(
        0.0,
        "probability of an empty caption; rules out --cache_text_encoder_outputs",
        at_least=0,
        at_most=1,
        dataset_key=_SUBSET_KEY,
    )
    caption_dropout_every_n_epochs: int = option(
        0, "all captions are empty in every Nth epoch", at_least=0, dataset_key=_SUBSET_KEY
    )
    caption_tag_dropout_rate: float = option(
        0.0, "probability of leaving out each tag that isn't kept", at_least=0, at_most=1, dataset_key=_SUBSET_KEY
    )
    weighted_captions: bool = option(False, "read (word:1.2), (word) and [word] in captions as weights")
    token_warmup_min: int = option(1, "tags used at step 0 of the tag warm-up", at_least=1, dataset_key=_SUBSET_KEY)
    token_warmup_step: float = option(
        0,
        "optimizer step at which all tags are in use; below 1 a share of all steps",
        at_least=0,
        dataset_key=_SUBSET_KEY,
    )


@dataclass(frozen=True)
class CacheOptions(OptionGroup):
    """Latent and text caches, and loading"""

    cache_latents: bool = option(
        False, "encode each picture once, before training, and keep the latents in memory", affects_result=False
    )
    cache_latents_to_disk: bool = option(
        False,
        "keep them as NAME_WWWWxHHHH_sdxl.npz beside the pictures, and use those that lie there; implies --cache_latents",
        affects_result=False,
    )
    vae_batch_size: int = option(1, "pictures the VAE encodes at once while caching", at_least=1, unset=(0,))
    cache_text_encoder_outputs: bool = option(
        False,
        "encode each caption once, before training; rules out training the text encoders and captions that change",
        affects_result=False,
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False,
        "keep them as NAME_te_outputs.npz beside the pictures, and use those that lie there; implies --cache_text_encoder_outputs",
        affects_result=False,
    )
    text_cache_variants: int | None = option(
        None,
        "encode each caption so many times as it would be drawn (shuffled, with tags left out, wildcards), and the empty one; "
        "one of them is drawn for every sample",
        at_least=1,
    )
    cache_dir: Path | None = option(
        None,
        "folder for all cache files and the index, instead of beside the pictures: for data that is read-only",
        affects_result=False,
        private=True,
    )
    skip_cache_check: bool = option(
        False,
        "use every cache file that is there without looking at its content or the picture's",
        affects_result=False,
    )
    max_data_loader_n_workers: int = option(
        8, "at most this many processes load pictures; 0: the main process does", at_least=0, affects_result=False
    )
    persistent_data_loader_workers: bool = option(
        False,
        "keep the loading processes between epochs",
        no_effect="they are always kept: one loader serves the whole run",
        affects_result=False,
    )

    @property
    def latents(self) -> bool:
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk
