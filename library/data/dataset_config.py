"""The dataset definition: --dataset_config, or the folders and metadata that the command line names, to DatasetPlans.

A value is looked up in the subset's table, the dataset's, [general], on the command line, and last is the default; so the
file wins over the command line. Every mistake in the file is told together, with the table it stands in. Torch-free.
Source: contract, dataset_config.md sections 1 and 2.
"""

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from library.data.buckets import BucketPlan
from library.data.captions import CaptionSettings
from library.data.class_folders import implied_tables
from library.data.dataset_keys import ALLOWED, FOLDER_KEYS, LEVELS, SPECS, default_of
from library.data.options import CacheOptions, DatasetOptions, parse_range, parse_resolution
from library.data.samples import PRESERVE_OUTPUT, DatasetConfig, PixelSettings, Subset
from library.errors import Mistake, OptionError
from library.option_types import UNSET, did_you_mean, read_value
from library.options import Options
from library.size import Size

# Command-line options that stand for a key of another name.
_COMMAND_LINE_NAMES = {"batch_size": "train_batch_size"}
# Keys in which empty text says something: class_tokens = "" that pictures have no caption.
_MAY_BE_EMPTY = ("class_tokens", "keep_tokens_separator", "secondary_separator", "caption_prefix", "caption_suffix")
_NOT_CROPPED_ALONG = "can't be used with conditioning_data_dir, whose pictures are not cropped along"
# Options that --dataset_config takes the place of.
_IMPLIED = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


ConditioningKind = Literal["masks", "conditions", "unused"]
"""What the images of conditioning_data_dir are: of the loss, of what is drawn (then each picture needs one), or nothing here."""


class DatasetDefinition:
    """The dataset definition of a run, parsed once: as one of the checks of the options, which report all mistakes together.

    Attributes:
        conditioning_kind: what the images of conditioning_data_dir are.
        configs: the datasets, once `check` has been called.
        notices: what the user should know of them.
    """

    def __init__(self, conditioning_kind: ConditioningKind = "masks"):
        self.conditioning_kind = conditioning_kind
        self.configs: list[DatasetConfig] = []
        self.notices: list[str] = []

    def check(self, options: Options) -> Iterator[Mistake]:
        """Parse the definition. Yields the mistakes in it, and what can't be encoded before training."""
        try:
            self.configs, self.notices = read_datasets(options, self.conditioning_kind)
        except OptionError as error:
            yield from error.mistakes
            return
        yield from _check_caches(self.configs, options[CacheOptions])


def read_datasets(options: Options, conditioning: ConditioningKind = "masks") -> tuple[list[DatasetConfig], list[str]]:
    """The datasets of a run, and what the user should know of them. Raises OptionError with every mistake in them."""
    chosen = options[DatasetOptions]
    if chosen.dataset_config is not None:
        name, tables, notices = str(chosen.dataset_config), _read_file(chosen.dataset_config), []
        if unused := [f"--{option}" for option in _IMPLIED if getattr(chosen, option) is not None]:
            notices = [f"{' and '.join(unused)} not used, as --dataset_config is given"]
    else:
        tables, notices = implied_tables(chosen)
        name = f"--in_json {chosen.in_json}" if chosen.in_json else f"--train_data_dir {chosen.train_data_dir}"
    definition = _Definition(
        name,
        tables,
        conditioning,
        command_line=dict(options.items()),
        caches_latents=options[CacheOptions].latents,
        extension_given=options.given("caption_extension") or options.given("caption_extention"),
    )
    definition.notices += notices
    return definition.plans(), definition.notices


def check_masks_are_used(datasets: Iterable[DatasetConfig]) -> None:
    """Raise OptionError if a subset has masks; for runs that make no use of them."""
    mistakes = []
    for i, dataset in enumerate(datasets, 1):
        for j, subset in enumerate(dataset.subsets, 1):
            if subset.conditioning_data_dir is None or not subset.conditioning_is_mask:
                continue
            text = (
                f"[[datasets]] {i}, subset {j}: conditioning_data_dir {subset.conditioning_data_dir} holds masks, which only "
                "inpainting models see; give --masked_loss to use them, or leave it out"
            )
            mistakes.append(Mistake(text, ("conditioning_data_dir",)))
    if mistakes:
        raise OptionError(*mistakes)


def _check_caches(configs: Iterable[DatasetConfig], cache: CacheOptions) -> Iterator[Mistake]:
    """Yield what changes from step to step and so can't be encoded before training."""
    for subset in (subset for config in configs for subset in config.subsets):
        if cache.text:
            yield from _against_text_cache(subset, variants=cache.text_cache_variants)
        if cache.latents:
            for name in subset.pixels.random_parts():
                text = (
                    f"{name} changes pixels from step to step, which --cache_latents rules out; leave one of them out"
                )
                yield Mistake(f"{subset.source}: {text}", (name,))
    if cache.text_cache_variants and not cache.text:
        text = "--text_cache_variants: there is no cache of text-encoder outputs; give --cache_text_encoder_outputs too"
        yield Mistake(text, ("text_cache_variants", "cache_text_encoder_outputs"))


def _against_text_cache(subset: Subset, *, variants: int | None) -> Iterator[Mistake]:
    for name in subset.captions.random_parts():
        if name == "token_warmup_step":
            text = f"{name} changes captions by the step, which --cache_text_encoder_outputs rules out; leave one of them out"
            yield Mistake(f"{subset.source}: {text}", (name,))
        elif variants is None:
            text = (
                f"{name} changes captions from step to step, which --cache_text_encoder_outputs rules out; leave one of them "
                "out, or give --text_cache_variants 8 to cache so many drawn captions of each picture"
            )
            yield Mistake(f"{subset.source}: {text}", (name,))


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
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"--dataset_config {path}: can't be read: {error}") from None
    raise OptionError(f"--dataset_config {path}: expected a .toml or .json file")


def _missing(folder: Path) -> str:
    return "is a file; a folder is needed" if folder.exists() else "no such folder"


Tables = tuple[Mapping[str, Any], ...]


class _Definition:
    """One definition being read: its tables, and the mistakes found in them."""

    def __init__(
        self,
        name: str,
        tables: Any,
        conditioning: ConditioningKind,
        *,
        command_line: dict[str, Any],
        caches_latents: bool,
        extension_given: bool,
    ):
        self.name = name
        self.tables = tables
        self.mistakes: list[Mistake] = []
        self.notices: list[str] = []
        self.command_line = command_line
        self.conditioning = conditioning
        self.caches_latents = caches_latents
        self.extension_given = extension_given
        if self.command_line["caption_extention"]:
            self.command_line["caption_extension"] = self.command_line["caption_extention"]
        if self.command_line["face_crop_aug_range"]:
            self.command_line["face_crop_aug_range"] = parse_range(self.command_line["face_crop_aug_range"])

    def plans(self) -> list[DatasetConfig]:
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

    def _dataset(self, general: Mapping[str, Any], table: dict, number: int) -> DatasetConfig | None:
        where = f"[[datasets]] {number}"
        subset_tables = self._list(table.get("subsets", []), f"{where}: subsets")
        own = self._read("dataset", where, {key: value for key, value in table.items() if key != "subsets"})
        if not subset_tables:
            self._mistake(where, "it has no [[datasets.subsets]]")
        has_metadata = self._kind(where, subset_tables)
        if has_metadata:
            self._refuse_folder_keys(where, own)
        subsets = [
            self._subset((own, general), subset, f"{where}, subset {i}", in_metadata=has_metadata)
            for i, subset in enumerate(subset_tables, 1)
        ]
        buckets = self._buckets(where, (own, general))
        kept = tuple(self._without_duplicates([subset for subset in subsets if subset is not None]))
        if buckets is None:
            return None
        if buckets.enabled and any(subset.pixels.face_crop_aug_range for subset in kept):
            self.notices.append(f"{self.name}, {where}: face_crop_aug_range is not used with enable_bucket")
            kept = tuple(_without_face_crops(subset) for subset in kept)
        if any(subset.conditioning_data_dir and subset.pixels.face_crop_aug_range for subset in kept):
            self._mistake(where, f"face_crop_aug_range {_NOT_CROPPED_ALONG}")
        if self._value("network_multiplier", (own, general)) != 1.0:
            self.notices.append(f"{self.name}, {where}: network_multiplier changes nothing in SDXL training")
        return DatasetConfig(
            self._value("batch_size", (own, general)),
            buckets,
            kept,
            validation_split=self._value("validation_split", (own, general)),
            validation_seed=self._value("validation_seed", (own, general)),
        )

    def _kind(self, where: str, subsets: list[dict]) -> bool:
        """Whether the dataset's captions come from metadata; a dataset can't mix."""
        with_metadata = sum("metadata_file" in subset for subset in subsets)
        if 0 < with_metadata < len(subsets):
            self._mistake(where, "some subsets have metadata_file and some haven't; put them into two [[datasets]]")
        return with_metadata > 0

    def _buckets(self, where: str, tables: Tables) -> BucketPlan | None:
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
            if smallest > largest:
                self._mistake(where, f"min_bucket_reso {smallest} is above max_bucket_reso {largest}")
                return None
            smallest, largest = max(smallest // step, 1) * step, -(-largest // step) * step
            if min(size) < smallest and not no_upscale:
                self._mistake(where, f"min_bucket_reso {smallest} is above the resolution's shorter side {min(size)}")
            if max(size) > largest:
                self._mistake(
                    where,
                    f"max_bucket_reso {largest} is below the resolution's longer side {max(size)}; raise it, say to {max(size) * 2}",
                )
        elif size.width % (side := 32 if self.conditioning == "conditions" else 8) or size.height % side:
            self._mistake(where, f"resolution {size}: without buckets both sides must be multiples of {side}")
        return BucketPlan(size, plan_enabled, smallest, largest, step, no_upscale)

    def _subset(self, defaults: Tables, table: dict, where: str, *, in_metadata: bool) -> Subset | None:
        own = self._read("subset", where, table)
        if in_metadata:
            self._refuse_folder_keys(where, own)
        tables = (own, *defaults)
        folder, metadata = own.get("image_dir"), own.get("metadata_file")
        if not self._sources_exist(own, where, in_metadata=in_metadata):
            return None
        repeats = self._repeats(tables, in_metadata=in_metadata)
        if repeats < 1:
            self.notices.append(f"{self.name}, {where}: num_repeats is {repeats}, so {metadata or folder} is not used")
            return None
        captions = {
            field.name: self._value(field.name, tables)
            for field in dataclasses.fields(CaptionSettings)
            if field.name in SPECS
        }
        captions["keep_tokens_separator"] = captions["keep_tokens_separator"] or None
        extension = self._value("caption_extension", tables)
        pixels = self._pixels(tables, where)
        if own.get("conditioning_data_dir") and pixels.random_crop:
            self._mistake(where, f"random_crop {_NOT_CROPPED_ALONG}")
        attributes = self._value("custom_attributes", tables) or {}
        if idle := sorted(set(attributes) - {PRESERVE_OUTPUT}):
            self.notices.append(f"{self.name}, {where}: custom_attributes {', '.join(idle)} change nothing in training")
        return Subset(
            image_dir=folder,
            num_repeats=repeats,
            captions=CaptionSettings(**captions),
            pixels=pixels,
            caption_extension=extension if extension.startswith(".") else f".{extension}",
            extension_was_chosen=self.extension_given or any("caption_extension" in table for table in tables),
            class_tokens=None if in_metadata else self._value("class_tokens", tables),
            metadata_file=metadata,
            conditioning_data_dir=own.get("conditioning_data_dir"),
            conditioning_is_mask=self.conditioning != "conditions",
            is_reg=own.get("is_reg", False),
            recursive=self._value("recursive", tables),
            cache_info=not in_metadata and self._value("cache_info", tables),
            custom_attributes=attributes,
        )

    def _sources_exist(self, own: Mapping[str, Any], where: str, *, in_metadata: bool) -> bool:
        """Whether the folders and files that the subset names are there; mistakes otherwise."""
        before = len(self.mistakes)
        folder, metadata, conditioning = (
            own.get(key) for key in ("image_dir", "metadata_file", "conditioning_data_dir")
        )
        if folder is None and not in_metadata:
            self._mistake(where, "image_dir is missing")
        if folder is not None and not folder.is_dir():
            self._mistake(where, f"image_dir {folder}: {_missing(folder)}")
        if metadata is not None and not metadata.is_file():
            self._mistake(where, f"metadata_file {metadata}: no such file")
        if in_metadata and own.get("is_reg"):
            self._mistake(where, "is_reg is for folders, not for metadata_file")
        if conditioning is None and self.conditioning == "conditions":
            what = (
                "it is for folders, not for metadata_file"
                if in_metadata
                else "a condition for each picture, of its name"
            )
            self._mistake(where, f"conditioning_data_dir is missing: {what}", ("conditioning_data_dir",))
        if conditioning is not None:
            if not conditioning.is_dir():
                self._mistake(where, f"conditioning_data_dir {conditioning}: {_missing(conditioning)}")
            if in_metadata:
                self._mistake(where, "conditioning_data_dir is for folders, not for metadata_file")
            if own.get("alpha_mask") and self.conditioning == "masks":
                self._mistake(where, "alpha_mask and conditioning_data_dir both give masks; leave one of them out")
        return len(self.mistakes) == before

    def _repeats(self, tables: Tables, *, in_metadata: bool) -> int:
        if in_metadata and not any("num_repeats" in table for table in tables):
            return self.command_line["dataset_repeats"]
        return self._value("num_repeats", tables)

    def _pixels(self, tables: Tables, where: str) -> PixelSettings:
        values = {field.name: self._value(field.name, tables) for field in dataclasses.fields(PixelSettings)}
        own = tables[0]
        gives_masks = self.conditioning == "masks" and own.get("conditioning_data_dir")
        values["alpha_mask"] = own.get("alpha_mask", self.command_line["alpha_mask"]) and not gives_masks
        range_ = values["face_crop_aug_range"]
        if range_ is not None and not (len(range_) == 2 and range_[0] <= range_[1]):
            self._mistake(where, f"face_crop_aug_range {list(range_)}: expected two numbers, [smallest, largest]")
        elif range_ is not None and self.caches_latents:
            self.notices.append(f"{self.name}, {where}: face_crop_aug_range is not used with --cache_latents")
            values["face_crop_aug_range"] = None
        return PixelSettings(**values)

    def _without_duplicates(self, subsets: list[Subset]) -> Iterator[Subset]:
        seen = set()
        for subset in subsets:
            key = (subset.source.resolve(), subset.conditioning_data_dir)
            if key in seen:
                self.notices.append(f"{self.name}: {subset.source} is there twice in one dataset; the first is used")
            else:
                yield subset
            seen.add(key)

    def _value(self, key: str, tables: Tables) -> Any:
        for table in tables:
            if key in table:
                return table[key]
        return self.command_line.get(_COMMAND_LINE_NAMES.get(key, key), default_of(key))

    def _read(self, level: str, where: str, table: Any) -> dict[str, Any]:
        """The checked values of one table."""
        if not isinstance(table, dict):
            self._mistake(where, f"expected a table, got {table!r}")
            return {}
        values = {}
        for key, raw in table.items():
            if key not in SPECS:
                self._mistake(where, f"{key!r} is unknown{did_you_mean(key, SPECS)}")
            elif level not in ALLOWED[key]:
                places = " or ".join(LEVELS[allowed] for allowed in ALLOWED[key])
                self._mistake(where, f"{key!r} belongs in {places}")
            else:
                try:
                    value = "" if raw == "" and key in _MAY_BE_EMPTY else read_value(raw, SPECS[key])
                except ValueError as error:
                    self._mistake(where, f"{key}: {error}, got {raw!r}")
                    continue
                if value is not UNSET:
                    values[key] = value
        return values

    def _refuse_folder_keys(self, where: str, table: Mapping[str, Any]) -> None:
        for key in FOLDER_KEYS:
            if key in table:
                self._mistake(where, f"{key!r} is for folders of pictures, not for metadata_file")

    def _list(self, value: Any, where: str) -> list[dict]:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._mistake(
                where, "expected a list of tables: write [[datasets]] and [[datasets.subsets]] with double brackets"
            )
            return []
        return value

    def _mistake(self, where: str, text: str, about: tuple[str, ...] = ()) -> None:
        self.mistakes.append(Mistake(f"{self.name}, {where}: {text}", about))


def _without_face_crops(subset: Subset) -> Subset:
    return dataclasses.replace(subset, pixels=dataclasses.replace(subset.pixels, face_crop_aug_range=None))
