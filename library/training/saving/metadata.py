"""Metadata of saved files: the `ss_` keys of sd-scripts, and modelspec. All values are text.

Keys and values: contract, formats.md section 4. Values are str() of Python values, or JSON where
the contract says so.
"""

import base64
import datetime
import itertools
import json
import mimetypes
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.options import parse_range, parse_resolution
from library.data.samples import Sample, Subset
from library.data.scan import Dataset
from library.log import log
from library.safetensors_io import file_hashes
from library.training.options.output import MetadataOptions

BASE_MODEL_VERSION = "sdxl_base_v1-0"  # A1111 takes a file for SD 1 unless this starts with sdxl_
ARCHITECTURE = "stable-diffusion-xl-v1-base"
REFINER_ARCHITECTURE = "stable-diffusion-xl-v1-refiner"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
SPEC_VERSION = "1.0.1"

_ABSENT = {"ss_sd_scripts_commit_hash": "(unknown)"}  # sd-scripts records it


@dataclass(frozen=True)
class RunFacts:
    """What the metadata contains in addition to the options, known when the run starts.

    Attributes:
        base_model: gives the names and hashes of the base model and the VAE.
    """

    datasets: Sequence[Dataset]
    seed: int
    optimizer: str
    batches_per_epoch: int
    num_epochs: int
    total_steps: int
    processes: int
    zero_terminal_snr: bool
    base_model: Callable[[], Mapping[str, str]]
    session_id: str
    started_at: float = field(default_factory=time.time)


# Options with the key ss_NAME.
_OPTION_KEYS = (
    "output_name", "learning_rate", "gradient_checkpointing", "gradient_accumulation_steps", "lr_warmup_steps", "lr_scheduler",
    "max_grad_norm", "mixed_precision", "lowram", "v2", "clip_skip", "max_validation_steps", "validate_every_n_epochs",
    "validate_every_n_steps", "max_token_length", "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale",
    "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength", "min_snr_gamma",
    "loss_type", "huber_schedule", "huber_scale", "huber_c", "caption_dropout_rate", "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate", "full_fp16", "fp8_base", "fp8_base_unet",
)  # fmt: skip
# The same for options that sd-scripts does not have. The key is left out if the option has this
# value.
_EXTENSION_KEYS = {"timestep_sampling": "uniform", "base_quant": None, "ema_decay": None}


def training_metadata(options: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
    """Return the ss_ keys that every training script writes and that don't change while it runs.

    Args:
        options: the value of every option by name.
        facts: the rest.
    """
    values: dict[str, Any] = {
        **_ABSENT,
        **{f"ss_{name}": options[name] for name in _OPTION_KEYS},
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_optimizer": facts.optimizer,
        "ss_base_model_version": BASE_MODEL_VERSION,
        "ss_cache_latents": options["cache_latents"] or options["cache_latents_to_disk"],
        "ss_seed": facts.seed,
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
        "ss_debiased_estimation": options["debiased_estimation_loss"],
    }
    for name, left_out in _EXTENSION_KEYS.items():
        if options[name] != left_out:
            values[f"ss_{name}"] = options[name]
    values |= dataset_metadata(options, facts.datasets, processes=facts.processes)
    values |= facts.base_model()
    return {key: str(value) for key, value in values.items()}


def at_save(steps: int, epoch: int) -> dict[str, str]:
    """Return the keys whose values are known only when a file is saved."""
    return {
        "ss_steps": str(steps),
        "ss_epoch": str(epoch),
        "ss_training_finished_at": str(time.time()),
    }


# The models


def model_metadata(model: str, vae: str | None) -> dict[str, str]:
    """Return the names and hashes of the base model and the VAE.

    Reads both files completely, which takes seconds.
    """
    values = _hashes("ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", model)
    if vae:
        values |= _hashes("ss_vae_name", "ss_vae_hash", "ss_new_vae_hash", vae)
    return values


def _hashes(name_key: str, legacy_key: str, hash_key: str, name: str) -> dict[str, str]:
    path = Path(name)
    if path.is_dir():
        return {name_key: path.name, legacy_key: "IsADirectory", hash_key: "IsADirectory"}
    if not path.is_file():
        return {name_key: name}
    sha256, legacy = file_hashes(path)
    return {name_key: path.name, legacy_key: legacy, hash_key: sha256}


# modelspec


def modelspec(
    metadata: MetadataOptions,
    options: Mapping[str, Any],
    kind: str,
    *,
    v_prediction: bool,
    default_title: str,
    is_refiner: bool = False,
) -> dict[str, str]:
    """Return the modelspec keys of a file.

    Args:
        metadata: the --metadata_ options.
        options: the value of every option by name.
        kind: added to the architecture, for example "/lora".
        v_prediction: the model predicts velocity.
        default_title: the start of the title of files without a name; the time follows.
        is_refiner: the model is an SDXL refiner.
    """
    resolution = parse_resolution(options["resolution"] or "1024")
    assert resolution is not None
    architecture = REFINER_ARCHITECTURE if is_refiner else ARCHITECTURE
    title = metadata.metadata_title or options["output_name"]
    if not title:
        title = f"{default_title}@{int(time.time())}"
    spec = {
        "sai_model_spec": SPEC_VERSION,
        "architecture": architecture + kind,
        "implementation": IMPLEMENTATION,
        "title": title,
        "resolution": f"{resolution.width}x{resolution.height}",
        "date": datetime.datetime.now().replace(microsecond=0).isoformat(),
        "prediction_type": "v" if v_prediction else "epsilon",
        "implementation_version": "sd-scripts/unknown",
        "author": metadata.metadata_author,
        "description": metadata.metadata_description,
        "license": metadata.metadata_license,
        "tags": metadata.metadata_tags,
        "usage_hint": metadata.metadata_usage_hint,
        "thumbnail": _thumbnail(metadata.metadata_thumbnail),
        "merged_from": metadata.metadata_merged_from,
        "trigger_phrase": metadata.metadata_trigger_phrase,
        "preprocessor": metadata.metadata_preprocessor,
        "is_negative_embedding": metadata.metadata_is_negative_embedding,
    }
    first, last, clip_skip = options["min_timestep"], options["max_timestep"], options["clip_skip"]
    if first is not None or last is not None:
        spec["timestep_range"] = f"{first or 0},{last or 1000}"
    if clip_skip is not None:
        spec["encoder_layer"] = str(clip_skip)
    return {f"modelspec.{key}": value for key, value in spec.items() if value is not None}


def _thumbnail(value: str | None) -> str | None:
    """Return the thumbnail as a data URL.

    A data URL is returned unchanged. A missing file is logged and left out.
    """
    if value is None or value.startswith("data:"):
        return value
    path = Path(value)
    if not path.is_file():
        log.warning("--metadata_thumbnail %s: no such file; the thumbnail is left out", path)
        return None
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def dataset_metadata(
    options: Mapping[str, Any], datasets: Sequence[Dataset], *, processes: int
) -> dict[str, Any]:
    """Return the keys that describe the data.

    Args:
        options: the value of every option by name.
        datasets: the datasets.
        processes: the world size.
    """
    num_train = sum(_count_samples(dataset.samples, is_reg=False) for dataset in datasets)
    num_reg = sum(_count_samples(dataset.samples, is_reg=True) for dataset in datasets)
    face_crop = options["face_crop_aug_range"]
    values: dict[str, Any] = {
        "ss_num_train_images": num_train,
        "ss_num_reg_images": num_reg,
        "ss_num_validation_images": sum(len(dataset.validation) for dataset in datasets),
        "ss_validation_split": options["validation_split"],
        "ss_validation_seed": options["validation_seed"],
        "ss_prior_loss_weight": options["prior_loss_weight"],
        "ss_face_crop_aug_range": parse_range(face_crop) if face_crop else None,
        "ss_resize_interpolation": options["resize_interpolation"],
    }
    if options["dataset_config"]:
        return values | _datasets(datasets)
    per_step = processes * options["gradient_accumulation_steps"]
    values["ss_total_batch_size"] = options["train_batch_size"] * per_step
    return values | _folders(options, datasets[0])


def _count_samples(samples: Sequence[Sample], *, is_reg: bool) -> int:
    return sum(sample.repeats for sample in samples if sample.subset.is_reg == is_reg)


def tag_frequency(subset: Subset, dataset: Dataset) -> dict[str, int]:
    """Return how many captions of the subset contain each tag."""
    tags: Counter[str] = Counter()
    for sample in dataset.samples:
        if sample.subset is subset:
            tags.update(tag.strip().lower() for tag in sample.tags.split(",") if tag.strip())
    return dict(tags)


def _datasets(datasets: Sequence[Dataset]) -> dict[str, str]:
    frequencies: dict[str, Any] = {}
    folders: dict[str, Any] = {}
    described = []
    for dataset in datasets:
        plan = dataset.config
        frequencies_here = {}
        for subset in plan.subsets:
            name = _unused_name(subset.source.name, frequencies)
            frequencies[name] = tag_frequency(subset, dataset)
            frequencies_here[name] = frequencies[name]
            if not subset.is_reg:
                folders[_unused_name(subset.source.name, folders)] = _folder(subset, dataset)
        described.append(
            {
                "is_dreambooth": not any(subset.metadata_file for subset in plan.subsets),
                "batch_size_per_device": plan.batch_size,
                "num_train_images": _count_samples(dataset.samples, is_reg=False),
                "num_reg_images": _count_samples(dataset.samples, is_reg=True),
                "resolution": list(plan.buckets.resolution),
                "enable_bucket": plan.buckets.enable_bucket,
                "min_bucket_reso": plan.buckets.min_bucket_reso,
                "max_bucket_reso": plan.buckets.max_bucket_reso,
                "tag_frequency": frequencies_here,
                "bucket_info": bucket_info(dataset),
                "resize_interpolation": None,
                "subsets": [_subset(subset, dataset) for subset in plan.subsets],
            }
        )
    return {
        "ss_datasets": json.dumps(described),
        "ss_tag_frequency": json.dumps(frequencies),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _subset(subset: Subset, dataset: Dataset) -> dict[str, Any]:
    captions, pixels = subset.captions, subset.pixels
    described: dict[str, Any] = {
        "img_count": _count(subset, dataset),
        "num_repeats": subset.num_repeats,
        "color_aug": pixels.color_aug,
        "flip_aug": pixels.flip_aug,
        "random_crop": pixels.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator or "",
        "secondary_separator": captions.secondary_separator,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix,
        "caption_suffix": captions.caption_suffix,
        "resize_interpolation": pixels.resize_interpolation,
    }
    if subset.image_dir is not None:
        described["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return described | {"metadata_file": subset.metadata_file.name}
    return described | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def _folder(subset: Subset, dataset: Dataset) -> dict[str, int]:
    return {"n_repeats": subset.num_repeats, "img_count": _count(subset, dataset)}


_DATASET_KEYS = (
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "enable_bucket",
    "bucket_no_upscale",
    "keep_tokens",
)


def _folders(options: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Return the keys of a run without --dataset_config, which has one dataset."""
    resolution = parse_resolution(options["resolution"] or "")
    subsets = dataset.config.subsets
    values = {f"ss_{name}": options[name] for name in _DATASET_KEYS}
    folders = {
        subset.source.name: _folder(subset, dataset) for subset in subsets if not subset.is_reg
    }
    reg_folders = {
        subset.source.name: _folder(subset, dataset) for subset in subsets if subset.is_reg
    }
    frequencies = {subset.source.name: tag_frequency(subset, dataset) for subset in subsets}
    return values | {
        "ss_batch_size_per_device": options["train_batch_size"],
        "ss_resolution": tuple(resolution or dataset.config.buckets.resolution),
        "ss_min_bucket_reso": dataset.config.buckets.min_bucket_reso,
        "ss_max_bucket_reso": dataset.config.buckets.max_bucket_reso,
        "ss_dataset_dirs": json.dumps(folders),
        "ss_reg_dataset_dirs": json.dumps(reg_folders),
        "ss_tag_frequency": json.dumps(frequencies),
        "ss_bucket_info": json.dumps(bucket_info(dataset)),
    }


def bucket_info(dataset: Dataset) -> dict[str, Any] | None:
    """Return the samples per bucket and the mean aspect error; None without bucketing."""
    if not dataset.config.buckets.enable_bucket:
        return None
    counts: Counter = Counter()
    for sample in dataset.samples:
        counts[sample.fit.bucket] += sample.repeats
    errors = [abs(sample.fit.bucket.aspect - sample.size.aspect) for sample in dataset.samples]
    buckets = {
        i: {"resolution": list(bucket), "count": counts[bucket]}
        for i, bucket in enumerate(sorted(counts))
    }
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def _count(subset: Subset, dataset: Dataset) -> int:
    return sum(sample.subset is subset for sample in dataset.samples)


def _unused_name(name: str, taken: Mapping[str, object]) -> str:
    unused = name
    for count in itertools.count(2):
        if unused not in taken:
            break
        unused = f"{name} ({count})"
    return unused
