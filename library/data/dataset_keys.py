"""Keys of the dataset file: their types, defaults, and the tables in which they may stand. Torch-free.

Source: contract, dataset_config.md section 1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.options import DEFAULT_CAPTION_EXTENSION
from library.option_types import Spec, specs_of
from library.options import OptionGroup, option
from library.size import INTERPOLATIONS


@dataclass(frozen=True)
class _DatasetKeys(OptionGroup):
    """Keys of [[datasets]] and [general]."""

    batch_size: int = option(1, "", at_least=1)
    resolution: tuple[int, ...] | None = option(None, "", at_least=32)
    enable_bucket: bool = option(False, "")
    min_bucket_reso: int = option(256, "", at_least=32)
    max_bucket_reso: int = option(1024, "", at_least=32)
    bucket_reso_steps: int = option(64, "", at_least=32)
    bucket_no_upscale: bool = option(False, "")
    network_multiplier: float = option(1.0, "")
    validation_split: float = option(0.0, "", at_least=0, at_most=1)
    validation_seed: int | None = option(None, "")


@dataclass(frozen=True)
class _SubsetKeys(OptionGroup):
    """Keys of [[datasets.subsets]], and defaults for them in [[datasets]] and [general]."""

    num_repeats: int = option(1, "")
    shuffle_caption: bool = option(False, "")
    caption_separator: str = option(",", "")
    keep_tokens: int = option(0, "", at_least=0)
    keep_tokens_separator: str | None = option(None, "")
    secondary_separator: str | None = option(None, "")
    enable_wildcard: bool = option(False, "")
    caption_prefix: str | None = option(None, "")
    caption_suffix: str | None = option(None, "")
    caption_dropout_rate: float = option(0.0, "", at_least=0, at_most=1)
    caption_dropout_every_n_epochs: int = option(0, "", at_least=0)
    caption_tag_dropout_rate: float = option(0.0, "", at_least=0, at_most=1)
    token_warmup_min: int = option(1, "", at_least=1)
    token_warmup_step: float = option(0.0, "", at_least=0)
    color_aug: bool = option(False, "")
    flip_aug: bool = option(False, "")
    random_crop: bool = option(False, "")
    face_crop_aug_range: tuple[float, ...] | None = option(None, "", above=0)
    resize_interpolation: str | None = option(None, "", choices=INTERPOLATIONS)
    custom_attributes: dict | None = option(None, "")
    recursive: bool = option(False, "")


@dataclass(frozen=True)
class _FolderKeys(OptionGroup):
    """The same, of datasets whose captions lie beside the pictures; metadata knows its own captions."""

    caption_extension: str = option(DEFAULT_CAPTION_EXTENSION, "")
    class_tokens: str | None = option(None, "")
    cache_info: bool = option(False, "")


@dataclass(frozen=True)
class _OwnKeys(OptionGroup):
    """Keys of [[datasets.subsets]] alone."""

    image_dir: Path | None = option(None, "")
    is_reg: bool = option(False, "")
    alpha_mask: bool = option(False, "")
    metadata_file: Path | None = option(None, "")
    conditioning_data_dir: Path | None = option(None, "")


_GROUPS = {
    _DatasetKeys: ("general", "dataset"),
    _SubsetKeys: ("general", "dataset", "subset"),
    _FolderKeys: ("general", "dataset", "subset"),
    _OwnKeys: ("subset",),
}
SPECS: dict[str, Spec] = {spec.name: spec for group in _GROUPS for spec in specs_of(group)}
ALLOWED = {spec.name: levels for group, levels in _GROUPS.items() for spec in specs_of(group)}
FOLDER_KEYS = tuple(spec.name for spec in specs_of(_FolderKeys))
LEVELS = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}


def default_of(key: str) -> Any:
    return SPECS[key].default
