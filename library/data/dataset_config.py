"""The datasets of a run, from --dataset_config or from the folders and metadata of the command line.

A value is looked up in the subset's table, the dataset's, [general], on the command line, and last
in the defaults, so the dataset file wins over the command line. All mistakes are reported together.
Torch-free. Source: contract, dataset_config.md sections 1 and 2.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from library.data.buckets import BucketSettings
from library.data.captions import CaptionSettings
from library.data.class_folders import command_line_dataset
from library.data.dataset_file import (
    KEYS,
    DatasetTable,
    Problems,
    SubsetTable,
    read_dataset_file,
)
from library.data.options import (
    BucketOptions,
    CacheOptions,
    CaptionKeys,
    DatasetOptions,
    PixelKeys,
    PixelOptions,
    parse_range,
    parse_resolution,
)
from library.data.samples import PRESERVE_OUTPUT, DatasetConfig, PixelSettings, Subset
from library.errors import Mistake, OptionError
from library.options import Options
from library.size import Size

_NOT_CROPPED = (
    "can't be used with conditioning_data_dir, whose images are not cropped in the same way"
)
# Options that --dataset_config replaces.
_REPLACED = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


ConditioningKind = Literal["masks", "conditions", "unused"]
"""What the images of conditioning_data_dir are: masks of the loss, conditions of the generated
images (then each image needs one), or nothing that the run uses."""


class DatasetDefinition:
    """The dataset definition of a run, parsed once, when the options are checked.

    Attributes:
        conditioning_kind: what the images of conditioning_data_dir are.
        configs: the datasets, once `check` has been called.
        notices: what the user should know about them.
    """

    def __init__(self, conditioning_kind: ConditioningKind = "masks"):
        self.conditioning_kind = conditioning_kind
        self.configs: list[DatasetConfig] = []
        self.notices: list[str] = []

    def check(self, options: Options) -> Iterator[Mistake]:
        """Parse the definition, and yield the mistakes in it and what caches can't hold."""
        try:
            self.configs, self.notices = read_datasets(options, self.conditioning_kind)
        except OptionError as error:
            yield from error.mistakes
            return
        yield from _check_caches(self.configs, options[CacheOptions])


def read_datasets(
    options: Options, conditioning: ConditioningKind = "masks"
) -> tuple[list[DatasetConfig], list[str]]:
    """Return the datasets of a run, and what the user should know about them.

    Raises:
        OptionError: with all mistakes in the definition.
    """
    data = options[DatasetOptions]
    general: Mapping[str, Any] = {}
    if data.dataset_config is not None:
        problems = Problems(str(data.dataset_config))
        general, tables = read_dataset_file(data.dataset_config, problems)
        unused = [f"--{option}" for option in _REPLACED if getattr(data, option) is not None]
        if unused:
            names = " and ".join(unused)
            problems.notices.append(f"{names} not used, as --dataset_config is given")
    else:
        table, notices = command_line_dataset(data, alpha_mask=options[PixelOptions].alpha_mask)
        source = f"--train_data_dir {data.train_data_dir}"
        if data.in_json is not None:
            source = f"--in_json {data.in_json}"
        problems, tables = Problems(source, notices=notices), [table]
    builder = _Builder(
        problems,
        general,
        conditioning,
        command_line=_command_line_values(options),
        caches_latents=options[CacheOptions].latents,
        is_extension_given=options.given("caption_extension") or options.given("caption_extention"),
    )
    configs = [builder.dataset(table) for table in tables]
    if problems.mistakes:
        raise OptionError(*problems.mistakes)
    return [config for config in configs if config is not None], problems.notices


def _command_line_values(options: Options) -> dict[str, Any]:
    """Return the values of options by name, with the types of the dataset file's keys."""
    values = dict(options.items())
    if values["caption_extention"]:
        values["caption_extension"] = values["caption_extention"]
    if values["face_crop_aug_range"]:
        values["face_crop_aug_range"] = parse_range(values["face_crop_aug_range"])
    return values


def check_masks_are_used(configs: Iterable[DatasetConfig]) -> None:
    """Raise OptionError if a subset has masks, for runs that don't use them."""
    mistakes = []
    for config in configs:
        for subset in config.subsets:
            if subset.conditioning_data_dir is not None and subset.conditioning_is_mask:
                text = (
                    f"{subset.source}: conditioning_data_dir {subset.conditioning_data_dir} "
                    "contains masks, which only inpainting models use; give --masked_loss to use "
                    "them, or leave it out"
                )
                mistakes.append(Mistake(text, ("conditioning_data_dir",)))
    if mistakes:
        raise OptionError(*mistakes)


def _check_caches(configs: Iterable[DatasetConfig], cache: CacheOptions) -> Iterator[Mistake]:
    """Yield the settings that vary from step to step, so that caches can't hold their results."""
    for config in configs:
        for subset in config.subsets:
            if cache.text:
                yield from _check_text_cache(subset, variants=cache.text_cache_variants)
            if cache.latents:
                yield from _check_latent_cache(subset)
    if cache.text_cache_variants and not cache.text:
        yield Mistake(
            "--text_cache_variants: text encoder outputs are not cached; give "
            "--cache_text_encoder_outputs too",
            ("text_cache_variants", "cache_text_encoder_outputs"),
        )


def _check_latent_cache(subset: Subset) -> Iterator[Mistake]:
    for name in subset.pixels.random_settings():
        text = f"{name} changes pixels from step to step, which --cache_latents rules out"
        yield Mistake(f"{subset.source}: {text}; leave one of them out", (name,))


def _check_text_cache(subset: Subset, *, variants: int | None) -> Iterator[Mistake]:
    for name in subset.captions.random_settings():
        rules_out = "which --cache_text_encoder_outputs rules out; leave one of them out"
        if name == "token_warmup_step":
            text = f"{name} changes captions by the step, {rules_out}"
        elif variants is None:
            text = (
                f"{name} changes captions from step to step, {rules_out}, or give "
                "--text_cache_variants 8 to cache 8 random variants of each caption"
            )
        else:
            continue
        yield Mistake(f"{subset.source}: {text}", (name,))


Tables = tuple[Mapping[str, Any], ...]


class _Builder:
    """Makes the datasets from the values that are given for them, and collects the mistakes."""

    def __init__(
        self,
        problems: Problems,
        general: Mapping[str, Any],
        conditioning: ConditioningKind,
        *,
        command_line: Mapping[str, Any],
        caches_latents: bool,
        is_extension_given: bool,
    ):
        self.problems = problems
        self.general = general
        self.conditioning = conditioning
        self.command_line = command_line
        self.caches_latents = caches_latents
        self.is_extension_given = is_extension_given

    def dataset(self, table: DatasetTable) -> DatasetConfig | None:
        """Return the dataset; None if it can't be made."""
        where, tables = table.where, (table.values, self.general)
        subsets = []
        for subset_table in table.subsets:
            subset = self._subset(subset_table, tables)
            if subset is not None:
                subsets.append(subset)
        buckets = self._buckets(where, tables)
        subsets = self._without_duplicates(subsets)
        if buckets is None:
            return None
        if buckets.enable_bucket and any(subset.pixels.face_crop_aug_range for subset in subsets):
            self.problems.notice(where, "face_crop_aug_range is not used with enable_bucket")
            subsets = [_without_face_crops(subset) for subset in subsets]
        for subset in subsets:
            if subset.conditioning_data_dir and subset.pixels.face_crop_aug_range:
                self.problems.mistake(where, f"face_crop_aug_range {_NOT_CROPPED}")
                break
        if self._value("network_multiplier", tables) != 1.0:
            self.problems.notice(where, "network_multiplier changes nothing in SDXL training")
        return DatasetConfig(
            self._value("batch_size", tables),
            buckets,
            tuple(subsets),
            validation_split=self._value("validation_split", tables),
            validation_seed=self._value("validation_seed", tables),
        )

    # ------------------------------------------------------------------------------------- buckets

    def _buckets(self, where: str, tables: Tables) -> BucketSettings | None:
        resolution = self._value("resolution", tables)
        size = parse_resolution(resolution) if isinstance(resolution, str) else None
        if isinstance(resolution, tuple) and len(resolution) <= 2:
            size = Size(resolution[0], resolution[-1])
        if size is None:
            # A wrong text is a mistake of the option's own.
            if not isinstance(resolution, str):
                self.problems.mistake(
                    where,
                    "resolution is missing: give it here or as --resolution, as 1024 or [832, 1216]",
                    about=("resolution",),
                )
            return None
        values = self._values(BucketOptions, tables)
        settings = BucketSettings(**values, resolution=size)
        if settings.enable_bucket:
            return self._rounded_buckets(where, settings)
        side = 32 if self.conditioning == "conditions" else 8
        if size.width % side or size.height % side:
            text = f"resolution {size}: without buckets both sides must be multiples of {side}"
            self.problems.mistake(where, text)
        return settings

    def _rounded_buckets(self, where: str, settings: BucketSettings) -> BucketSettings | None:
        """Return the settings with shortest and longest sides that are multiples of the step."""
        size, step = settings.resolution, settings.bucket_reso_steps
        smallest, largest = settings.min_bucket_reso, settings.max_bucket_reso
        if step % 32:
            text = f"bucket_reso_steps {step}: SDXL needs a multiple of 32"
            self.problems.mistake(where, text)
            return None
        if smallest > largest:
            text = f"min_bucket_reso {smallest} is above max_bucket_reso {largest}"
            self.problems.mistake(where, text)
            return None
        smallest, largest = max(smallest // step, 1) * step, -(-largest // step) * step
        if min(size) < smallest and not settings.bucket_no_upscale:
            text = f"min_bucket_reso {smallest} is above the resolution's shorter side {min(size)}"
            self.problems.mistake(where, text)
        if max(size) > largest:
            text = f"max_bucket_reso {largest} is below the resolution's longer side {max(size)}"
            self.problems.mistake(where, f"{text}; raise it, for example to {max(size) * 2}")
        return dataclasses.replace(settings, min_bucket_reso=smallest, max_bucket_reso=largest)

    # ------------------------------------------------------------------------------------- subsets

    def _subset(self, table: SubsetTable, dataset_tables: Tables) -> Subset | None:
        where, own = table.where, table.values
        tables = (own, *dataset_tables)
        folder, metadata = own.get("image_dir"), own.get("metadata_file")
        if not self._sources_exist(table):
            return None
        repeats = self._repeats(tables)
        if repeats < 1:
            text = f"num_repeats is {repeats}, so {metadata or folder} is not used"
            self.problems.notice(where, text)
            return None
        captions = self._values(CaptionKeys, tables)
        captions["keep_tokens_separator"] = captions["keep_tokens_separator"] or None
        pixels = self._pixels(table, tables)
        if own.get("conditioning_data_dir") and pixels.random_crop:
            self.problems.mistake(where, f"random_crop {_NOT_CROPPED}")
        attributes = self._value("custom_attributes", tables) or {}
        unused = sorted(attributes.keys() - {PRESERVE_OUTPUT})
        if unused:
            names = ", ".join(unused)
            self.problems.notice(where, f"custom_attributes {names} change nothing in training")
        extension = self._value("caption_extension", tables)
        return Subset(
            image_dir=folder,
            num_repeats=repeats,
            captions=CaptionSettings(**captions),
            pixels=pixels,
            caption_extension=extension if extension.startswith(".") else f".{extension}",
            is_extension_given=self.is_extension_given
            or any("caption_extension" in values for values in tables),
            class_tokens=self._value("class_tokens", tables) if metadata is None else None,
            metadata_file=metadata,
            conditioning_data_dir=own.get("conditioning_data_dir"),
            conditioning_is_mask=self.conditioning != "conditions",
            is_reg=own.get("is_reg", False),
            recursive=self._value("recursive", tables),
            cache_info=metadata is None and self._value("cache_info", tables),
            custom_attributes=attributes,
        )

    def _sources_exist(self, table: SubsetTable) -> bool:
        """Return whether the files and folders of a subset exist and go together."""
        num_mistakes = len(self.problems.mistakes)
        own, mistake = table.values, self.problems.mistake
        folder, metadata = own.get("image_dir"), own.get("metadata_file")
        if folder is None and metadata is None:
            mistake(table.where, "image_dir is missing")
        if folder is not None and not folder.is_dir():
            mistake(table.where, f"image_dir {folder}: {_not_a_folder(folder)}")
        if metadata is not None and not metadata.is_file():
            mistake(table.where, f"metadata_file {metadata}: no such file")
        if metadata is not None and own.get("is_reg"):
            mistake(table.where, "is_reg is for folders and can't be used with metadata_file")
        self._check_conditioning(table)
        return len(self.problems.mistakes) == num_mistakes

    def _check_conditioning(self, table: SubsetTable) -> None:
        own, mistake = table.values, self.problems.mistake
        folder, has_metadata = own.get("conditioning_data_dir"), "metadata_file" in own
        if folder is None:
            if self.conditioning == "conditions":
                reason = "each image needs a condition of the same name"
                if has_metadata:
                    reason = "it is for folders and can't be used with metadata_file"
                text = f"conditioning_data_dir is missing: {reason}"
                mistake(table.where, text, ("conditioning_data_dir",))
            return
        if not folder.is_dir():
            mistake(table.where, f"conditioning_data_dir {folder}: {_not_a_folder(folder)}")
        if has_metadata:
            text = "conditioning_data_dir is for folders and can't be used with metadata_file"
            mistake(table.where, text)
        if own.get("alpha_mask") and self.conditioning == "masks":
            text = "alpha_mask and conditioning_data_dir both give masks; leave one of them out"
            mistake(table.where, text)

    def _repeats(self, tables: Tables) -> int:
        is_given = any("num_repeats" in values for values in tables)
        if "metadata_file" in tables[0] and not is_given:
            return self.command_line["dataset_repeats"]
        return self._value("num_repeats", tables)

    def _pixels(self, table: SubsetTable, tables: Tables) -> PixelSettings:
        values = self._values(PixelKeys, tables)
        if self.conditioning == "masks" and table.values.get("conditioning_data_dir"):
            values["alpha_mask"] = False
        face_range = self._value("face_crop_aug_range", tables)
        if face_range is not None:
            if len(face_range) != 2 or face_range[0] > face_range[1]:
                text = f"face_crop_aug_range {list(face_range)}: expected two numbers, [smallest, largest]"
                self.problems.mistake(table.where, text)
            elif self.caches_latents:
                text = "face_crop_aug_range is not used with --cache_latents"
                self.problems.notice(table.where, text)
                face_range = None
        return PixelSettings(**values, face_crop_aug_range=face_range)

    def _without_duplicates(self, subsets: Iterable[Subset]) -> list[Subset]:
        seen, kept = set(), []
        for subset in subsets:
            key = (subset.source.resolve(), subset.conditioning_data_dir)
            if key in seen:
                self.problems.notice(
                    "", f"{subset.source} is there twice in one dataset; the first is used"
                )
            else:
                kept.append(subset)
            seen.add(key)
        return kept

    # -------------------------------------------------------------------------------------- values

    def _values(self, group: type, tables: Tables) -> dict[str, Any]:
        """Return the values of all settings that a group of options declares."""
        return {field.name: self._value(field.name, tables) for field in dataclasses.fields(group)}

    def _value(self, name: str, tables: Tables) -> Any:
        for values in tables:
            if name in values:
                return values[name]
        key = KEYS[name]
        return self.command_line.get(key.option, key.spec.default)


def _not_a_folder(path: Path) -> str:
    return "is a file; a folder is needed" if path.exists() else "no such folder"


def _without_face_crops(subset: Subset) -> Subset:
    return dataclasses.replace(
        subset, pixels=dataclasses.replace(subset.pixels, face_crop_aug_range=None)
    )
