"""The dataset definition: --dataset_config, or --train_data_dir with its N_class folders, to DatasetPlans.

A value is looked up in the subset's table, the dataset's, [general], on the command line, and last is the default; so the
file wins over the command line. Every mistake in the file is told together, with the table it stands in.
Source: contract, dataset_config.md sections 1 and 2.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.buckets import BucketPlan
from library.data.captions import CaptionSettings
from library.data.options import CacheOptions, DatasetOptions, parse_resolution
from library.data.sample import DatasetPlan, Subset
from library.data.size import INTERPOLATIONS, Size
from library.errors import Mistake, OptionError
from library.option_values import UNSET, Spec, did_you_mean, read_value, specs_of
from library.options import OptionGroup, Options, option


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
    flip_aug: bool = option(False, "")
    caption_extension: str = option(".caption", "")
    class_tokens: str | None = option(None, "")
    resize_interpolation: str | None = option(None, "", choices=INTERPOLATIONS)


@dataclass(frozen=True)
class _OwnKeys(OptionGroup):
    """Keys of [[datasets.subsets]] alone."""

    image_dir: Path | None = option(None, "")


_LEVELS = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
_SPECS: dict[str, Spec] = {
    spec.name: spec for group in (_DatasetKeys, _SubsetKeys, _OwnKeys) for spec in specs_of(group)
}
_ALLOWED = {
    **{spec.name: ("general", "dataset") for spec in specs_of(_DatasetKeys)},
    **{spec.name: ("general", "dataset", "subset") for spec in specs_of(_SubsetKeys)},
    **{spec.name: ("subset",) for spec in specs_of(_OwnKeys)},
}
_NOT_YET = [
    "color_aug",
    "random_crop",
    "face_crop_aug_range",
    "metadata_file",
    "conditioning_data_dir",
    "is_reg",
    "alpha_mask",
    "validation_split",
    "validation_seed",
    "cache_info",
    "custom_attributes",
    "network_multiplier",
]

# Command-line options that stand for a key of another name.
_COMMAND_LINE_NAMES = {"batch_size": "train_batch_size"}


def read_datasets(options: Options) -> tuple[list[DatasetPlan], list[str]]:
    """The datasets of a run, and what the user should know of them. Raises OptionError with every mistake in them."""
    chosen = options[DatasetOptions]
    if chosen.dataset_config is not None:
        definition = _Definition(str(chosen.dataset_config), _read_file(chosen.dataset_config), options)
        if chosen.train_data_dir is not None:
            definition.notices.append("--train_data_dir is not used, as --dataset_config is given")
    elif chosen.train_data_dir is not None:
        folders, notices = class_folders(chosen.train_data_dir)
        subsets = [
            {"image_dir": str(folder), "num_repeats": n, **({} if tokens is None else {"class_tokens": tokens})}
            for folder, n, tokens in folders
        ]
        definition = _Definition(
            f"--train_data_dir {chosen.train_data_dir}", {"datasets": [{"subsets": subsets}]}, options
        )
        definition.notices += notices
    else:
        missing = Mistake(
            "no dataset: give --dataset_config, or --train_data_dir with its N_class folders",
            ("train_data_dir", "dataset_config"),
        )
        raise OptionError(missing)
    return definition.plans(), definition.notices


def check_datasets(options: Options) -> Iterator[Mistake]:
    """The mistakes in the datasets' definition, and captions that can't be encoded once and for all."""
    try:
        plans, _ = read_datasets(options)
    except OptionError as error:
        yield from error.mistakes
        return
    if options[CacheOptions].text:
        for subset in (subset for plan in plans for subset in plan.subsets):
            for name in subset.captions.random_parts():
                text = f"{name} changes captions from step to step, which --cache_text_encoder_outputs rules out; leave one of them out"
                yield Mistake(f"{subset.image_dir}: {text}", (name,))


def _read_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".toml":
                return tomllib.loads(text)
            case ".json":
                return json.loads(text)
    except FileNotFoundError:
        raise OptionError(f"--dataset_config {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise OptionError(f"--dataset_config {path}: can't be read: {error}") from None
    raise OptionError(f"--dataset_config {path}: expected a .toml or .json file")


def class_folders(parent: Path) -> tuple[list[tuple[Path, int, str | None]], list[str]]:
    """The picture folders of --train_data_dir: (folder, repeats, class tokens), sorted by name; and what to tell."""
    if not parent.is_dir():
        raise OptionError(f"--train_data_dir {parent}: no such folder")
    found, other = [], []
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        match = re.match(r"(\d+)(?:_(.*))?$", folder.name)
        if match and int(match[1]) >= 1:
            found.append((folder, int(match[1]), match[2] or ""))
        else:
            other.append(folder.name)
    if other and found:
        return found, [f"--train_data_dir {parent}: not named N_class, so not used: {', '.join(other)}"]
    if not found and any(path.is_file() for path in parent.iterdir()):
        return [(parent, 1, None)], [
            f"--train_data_dir {parent}: has no N_class folders; its own pictures are used, once each an epoch"
        ]
    if not found:
        there = ", ".join(other) or "nothing"
        raise OptionError(
            f"--train_data_dir {parent}: expected folders named N_class (say 10_cat: shown ten times an epoch) with pictures; found {there}"
        )
    return found, []


class _Definition:
    """One definition being read: its tables, and the mistakes found in them."""

    def __init__(self, name: str, tables: Any, options: Options):
        self.name = name
        self.tables = tables
        self.mistakes: list[Mistake] = []
        self.notices: list[str] = []
        self.command_line = dict(options.items())
        self.extension_given = options.given("caption_extension") or options.given("caption_extention")
        if self.command_line["caption_extention"]:
            self.command_line["caption_extension"] = self.command_line["caption_extention"]

    def plans(self) -> list[DatasetPlan]:
        tables = self.tables if isinstance(self.tables, dict) else {}
        for key in tables.keys() - {"general", "datasets"}:
            self._mistake("top level", f"{key!r} is unknown{did_you_mean(key, ('general', 'datasets'))}")
        general = self._read("general", "[general]", tables.get("general", {}))
        datasets = self._list(tables.get("datasets", []), "datasets")
        if not datasets:
            self._mistake("top level", "it defines no [[datasets]]")
        plans = [self._dataset(general, table, number) for number, table in enumerate(datasets, 1)]
        if self.mistakes:
            raise OptionError(*self.mistakes)
        return [plan for plan in plans if plan is not None]

    def _dataset(self, general: Mapping[str, Any], table: dict, number: int) -> DatasetPlan | None:
        where = f"[[datasets]] {number}"
        subset_tables = self._list(table.get("subsets", []), f"{where}: subsets")
        own = self._read("dataset", where, {key: value for key, value in table.items() if key != "subsets"})
        if not subset_tables:
            self._mistake(where, "it has no [[datasets.subsets]]")
        subsets = [
            self._subset((own, general), subset, f"{where}, subset {i}") for i, subset in enumerate(subset_tables, 1)
        ]
        buckets = self._buckets(where, (own, general))
        kept = tuple(self._without_duplicates([subset for subset in subsets if subset is not None]))
        if buckets is None:
            return None
        return DatasetPlan(self._value("batch_size", (own, general)), buckets, kept)

    def _buckets(self, where: str, tables: tuple[Mapping[str, Any], ...]) -> BucketPlan | None:
        resolution = self._value("resolution", tables)
        size = parse_resolution(resolution) if isinstance(resolution, str) else None
        if isinstance(resolution, tuple):
            size = Size(resolution[0], resolution[-1]) if len(resolution) <= 2 else None
        step, smallest, largest = (
            self._value(key, tables) for key in ("bucket_reso_steps", "min_bucket_reso", "max_bucket_reso")
        )
        plan_enabled, no_upscale = self._value("enable_bucket", tables), self._value("bucket_no_upscale", tables)
        if size is None:
            if resolution is None or isinstance(resolution, tuple):
                self._mistake(
                    where,
                    "resolution is missing: give it here or as --resolution, as 1024 or [832, 1216]",
                    about=("resolution",),
                )
            return None
        if plan_enabled and step % 32:
            self._mistake(where, f"bucket_reso_steps {step}: SDXL needs a multiple of 32")
            return None
        if plan_enabled:
            smallest, largest = smallest // step * step, -(-largest // step) * step
            if min(size) < smallest and not no_upscale:
                self._mistake(where, f"min_bucket_reso {smallest} is above the resolution's shorter side {min(size)}")
            if max(size) > largest:
                self._mistake(
                    where,
                    f"max_bucket_reso {largest} is below the resolution's longer side {max(size)}; raise it, say to {max(size) * 2}",
                )
        elif size.width % 8 or size.height % 8:
            self._mistake(where, f"resolution {size}: without buckets both sides must be multiples of 8")
        return BucketPlan(size, plan_enabled, smallest, largest, step, no_upscale)

    def _subset(self, defaults: tuple[Mapping[str, Any], ...], table: dict, where: str) -> Subset | None:
        own = self._read("subset", where, table)
        tables = (own, *defaults)
        folder = own.get("image_dir")
        if folder is None:
            self._mistake(where, "image_dir is missing")
            return None
        if not folder.is_dir():
            self._mistake(where, f"image_dir {folder}: no such folder")
        repeats = self._value("num_repeats", tables)
        if repeats < 1:
            self.notices.append(f"{self.name}, {where}: num_repeats is {repeats}, so {folder} is not used")
            return None
        captions = {field.name: self._value(field.name, tables) for field in dataclasses.fields(CaptionSettings)}
        captions["keep_tokens_separator"] = captions["keep_tokens_separator"] or None
        extension = self._value("caption_extension", tables)
        return Subset(
            image_dir=folder,
            num_repeats=repeats,
            class_tokens=self._value("class_tokens", tables),
            caption_extension=extension if extension.startswith(".") else f".{extension}",
            extension_was_chosen=self.extension_given or any("caption_extension" in table for table in tables),
            captions=CaptionSettings(**captions),
            flip_aug=self._value("flip_aug", tables),
            resize_interpolation=self._value("resize_interpolation", tables),
        )

    def _without_duplicates(self, subsets: list[Subset]) -> Iterator[Subset]:
        seen = set()
        for subset in subsets:
            if subset.image_dir in seen:
                self.notices.append(f"{self.name}: {subset.image_dir} is there twice in one dataset; the first is used")
            else:
                yield subset
            seen.add(subset.image_dir)

    def _value(self, key: str, tables: tuple[Mapping[str, Any], ...]) -> Any:
        for table in tables:
            if key in table:
                return table[key]
        return self.command_line.get(_COMMAND_LINE_NAMES.get(key, key), _SPECS[key].default)

    def _read(self, level: str, where: str, table: Any) -> dict[str, Any]:
        """The checked values of one table."""
        if not isinstance(table, dict):
            self._mistake(where, f"expected a table, got {table!r}")
            return {}
        values = {}
        for key, raw in table.items():
            if key in _NOT_YET:
                if raw not in (False, 0, "", [], {}):
                    self._mistake(where, f"{key!r} can't be used yet in this version; leave it out")
            elif key not in _SPECS:
                self._mistake(where, f"{key!r} is unknown{did_you_mean(key, _SPECS)}")
            elif level not in _ALLOWED[key]:
                places = " or ".join(_LEVELS[allowed] for allowed in _ALLOWED[key])
                self._mistake(where, f"{key!r} belongs in {places}")
            else:
                # Text may be empty here on purpose: class_tokens = "" says that pictures have no caption.
                is_empty_text = raw == "" and _SPECS[key].kinds == (str,)
                try:
                    value = "" if is_empty_text else read_value(raw, _SPECS[key])
                except ValueError as error:
                    self._mistake(where, f"{key}: {error}, got {raw!r}")
                    continue
                if value is not UNSET:
                    values[key] = value
        return values

    def _list(self, value: Any, where: str) -> list[dict]:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._mistake(
                where, "expected a list of tables: write [[datasets]] and [[datasets.subsets]] with double brackets"
            )
            return []
        return value

    def _mistake(self, where: str, text: str, about: tuple[str, ...] = ()) -> None:
        self.mistakes.append(Mistake(f"{self.name}, {where}: {text}", about))
