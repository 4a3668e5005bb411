"""Metadata of saved files: the reference's `ss_` keys, and modelspec. Everything is text.

Keys and values: contract, formats.md section 4. Values are str() of Python values, or JSON where the contract says so.
"""

import base64
import datetime
import json
import mimetypes
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.options import (
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    DatasetOptions,
    PixelOptions,
    parse_range,
    parse_resolution,
)
from library.data.samples import Sample, Subset
from library.data.scan import Dataset
from library.log import log
from library.models.options import ModelOptions
from library.options import Options
from library.safetensors_io import file_hashes
from library.training.options.memory import MemoryOptions
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import EmaOptions, OptimizerOptions, ScheduleOptions, UpdateOptions
from library.training.options.output import MetadataOptions, SavingOptions
from library.training.options.run import RunOptions, ValidationOptions

BASE_MODEL_VERSION = "sdxl_base_v1-0"  # A1111 takes a file for SD 1 unless this starts with sdxl_
ARCHITECTURE = "stable-diffusion-xl-v1-base"
REFINER_ARCHITECTURE = "stable-diffusion-xl-v1-refiner"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
SPEC_VERSION = "1.0.1"

_ABSENT = {"ss_sd_scripts_commit_hash": "(unknown)"}  # what the reference records and nobody here knows


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run when it starts, beyond its options. `base_model` gives the model's names and hashes."""

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


def training_metadata(options: Options, facts: RunFacts) -> dict[str, str]:
    """The ss_ keys that every training script writes, as far as they don't change while it runs."""
    model, cache, run = options[ModelOptions], options[CacheOptions], options[RunOptions]
    noise, loss, caption = options[NoiseOptions], options[LossOptions], options[CaptionOptions]
    optimizer, schedule = options[OptimizerOptions], options[ScheduleOptions]
    validation = options[ValidationOptions]
    values: dict[str, Any] = {
        **_ABSENT,
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": options[SavingOptions].output_name,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_gradient_checkpointing": options[MemoryOptions].gradient_checkpointing,
        "ss_gradient_accumulation_steps": run.gradient_accumulation_steps,
        "ss_lr_warmup_steps": schedule.lr_warmup_steps,
        "ss_lr_scheduler": schedule.lr_scheduler,
        "ss_optimizer": facts.optimizer,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_mixed_precision": run.mixed_precision,
        "ss_lowram": model.lowram,
        "ss_v2": model.v2,
        "ss_base_model_version": BASE_MODEL_VERSION,
        "ss_clip_skip": model.clip_skip,
        "ss_max_validation_steps": validation.max_validation_steps,
        "ss_validate_every_n_epochs": validation.validate_every_n_epochs,
        "ss_validate_every_n_steps": validation.validate_every_n_steps,
        "ss_max_token_length": model.max_token_length,
        "ss_cache_latents": cache.latents,
        "ss_seed": facts.seed,
        "ss_noise_offset": noise.noise_offset,
        "ss_noise_offset_random_strength": noise.noise_offset_random_strength,
        "ss_adaptive_noise_scale": noise.adaptive_noise_scale,
        "ss_multires_noise_iterations": noise.multires_noise_iterations,
        "ss_multires_noise_discount": noise.multires_noise_discount,
        "ss_ip_noise_gamma": noise.ip_noise_gamma,
        "ss_ip_noise_gamma_random_strength": noise.ip_noise_gamma_random_strength,
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
        "ss_min_snr_gamma": loss.min_snr_gamma,
        "ss_debiased_estimation": loss.debiased_estimation_loss,
        "ss_loss_type": loss.loss_type,
        "ss_huber_schedule": loss.huber_schedule,
        "ss_huber_scale": loss.huber_scale,
        "ss_huber_c": loss.huber_c,
        "ss_caption_dropout_rate": caption.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": caption.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": caption.caption_tag_dropout_rate,
    }
    if noise.timestep_sampling != "uniform":  # the reference has no key for these
        values["ss_timestep_sampling"] = noise.timestep_sampling
    memory = options[MemoryOptions]
    values["ss_full_fp16"] = options[UpdateOptions].full_fp16
    values |= {"ss_fp8_base": memory.fp8_base, "ss_fp8_base_unet": memory.fp8_base_unet}
    if memory.base_quant is not None:
        values["ss_base_quant"] = memory.base_quant
    if options[EmaOptions].ema_decay is not None:
        values["ss_ema_decay"] = options[EmaOptions].ema_decay
    described = dataset_metadata(
        options, facts.datasets, processes=facts.processes, per_process=run.gradient_accumulation_steps
    )
    return {key: str(value) for key, value in {**values, **described, **facts.base_model()}.items()}


def at_save(steps: int, epoch: int) -> dict[str, str]:
    """The keys that are known only when a file is saved."""
    return {"ss_steps": str(steps), "ss_epoch": str(epoch), "ss_training_finished_at": str(time.time())}


# --------------------------------------------------------------------------------------------------------------- model


def model_metadata(model: str, vae: str | None) -> dict[str, str]:
    """The base model's and the VAE's names and hashes. Reads both files whole: seconds for a full model."""
    found = _hashes("ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", model)
    return found | (_hashes("ss_vae_name", "ss_vae_hash", "ss_new_vae_hash", vae) if vae else {})


def _hashes(name_key: str, legacy_key: str, hash_key: str, name: str) -> dict[str, str]:
    path = Path(name)
    if path.is_dir():
        return {name_key: path.name, legacy_key: "IsADirectory", hash_key: "IsADirectory"}
    if not path.is_file():
        return {name_key: name}
    whole, legacy = file_hashes(path)
    return {name_key: path.name, legacy_key: legacy, hash_key: whole}


# ----------------------------------------------------------------------------------------------------------- modelspec


def modelspec(
    options: Options, kind: str, *, v_prediction: bool, default_title: str, is_refiner: bool = False
) -> dict[str, str]:
    """The modelspec keys of a file.

    Args:
        kind: what follows the architecture, "/lora".
    """
    chosen, noise = options[MetadataOptions], options[NoiseOptions]
    resolution = parse_resolution(options[DatasetOptions].resolution or "1024")
    assert resolution is not None
    spec = {
        "sai_model_spec": SPEC_VERSION,
        "architecture": (REFINER_ARCHITECTURE if is_refiner else ARCHITECTURE) + kind,
        "implementation": IMPLEMENTATION,
        "title": chosen.metadata_title or options[SavingOptions].output_name or f"{default_title}@{int(time.time())}",
        "resolution": f"{resolution.width}x{resolution.height}",
        "date": datetime.datetime.now().replace(microsecond=0).isoformat(),
        "prediction_type": "v" if v_prediction else "epsilon",
        "implementation_version": "sd-scripts/unknown",
        "author": chosen.metadata_author,
        "description": chosen.metadata_description,
        "license": chosen.metadata_license,
        "tags": chosen.metadata_tags,
        "usage_hint": chosen.metadata_usage_hint,
        "thumbnail": _thumbnail(chosen.metadata_thumbnail),
        "merged_from": chosen.metadata_merged_from,
        "trigger_phrase": chosen.metadata_trigger_phrase,
        "preprocessor": chosen.metadata_preprocessor,
        "is_negative_embedding": chosen.metadata_is_negative_embedding,
    }
    if noise.min_timestep is not None or noise.max_timestep is not None:
        spec["timestep_range"] = f"{noise.min_timestep or 0},{noise.max_timestep or 1000}"
    if options[ModelOptions].clip_skip is not None:
        spec["encoder_layer"] = str(options[ModelOptions].clip_skip)
    return {f"modelspec.{key}": value for key, value in spec.items() if value is not None}


def _thumbnail(value: str | None) -> str | None:
    """A data: URL as it is, a picture file as one; a missing file is told and left out."""
    if value is None or value.startswith("data:"):
        return value
    path = Path(value)
    if not path.is_file():
        log.warning("--metadata_thumbnail %s: no such file; the thumbnail is left out", path)
        return None
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def dataset_metadata(
    options: Options, datasets: Sequence[Dataset], *, processes: int, per_process: int
) -> dict[str, Any]:
    """The keys that describe the data.

    Args:
        per_process: micro-batches of an optimizer step on each process.
    """
    data, pixels = options[DatasetOptions], options[PixelOptions]
    values: dict[str, Any] = {
        "ss_num_train_images": sum(_count_shown(dataset.samples, is_reg=False) for dataset in datasets),
        "ss_num_reg_images": sum(_count_shown(dataset.samples, is_reg=True) for dataset in datasets),
        "ss_num_validation_images": sum(len(dataset.validation) for dataset in datasets),
        "ss_validation_split": data.validation_split,
        "ss_validation_seed": data.validation_seed,
        "ss_prior_loss_weight": data.prior_loss_weight,
        "ss_face_crop_aug_range": parse_range(pixels.face_crop_aug_range) if pixels.face_crop_aug_range else None,
        "ss_resize_interpolation": pixels.resize_interpolation,
    }
    described: dict[str, Any] = _datasets(datasets) if data.dataset_config else _folders(options, datasets[0])
    if not data.dataset_config:
        described["ss_total_batch_size"] = data.train_batch_size * processes * per_process
    return values | described


def _count_shown(samples: Sequence[Sample], *, is_reg: bool) -> int:
    return sum(sample.repeats for sample in samples if sample.subset.is_reg == is_reg)


def tag_frequency(subset: Subset, dataset: Dataset) -> dict[str, int]:
    """How many of the subset's captions hold each tag."""
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
        own_frequencies = {}
        for subset in plan.subsets:
            name = _free_name(subset.source.name, frequencies)
            frequencies[name] = own_frequencies[name] = tag_frequency(subset, dataset)
            if not subset.is_reg:
                folders[_free_name(subset.source.name, folders)] = _folder(subset, dataset)
        described.append({
            "is_dreambooth": not any(subset.metadata_file for subset in plan.subsets),
            "batch_size_per_device": plan.batch_size,
            "num_train_images": _count_shown(dataset.samples, is_reg=False),
            "num_reg_images": _count_shown(dataset.samples, is_reg=True),
            "resolution": list(plan.buckets.resolution),
            "enable_bucket": plan.buckets.enable_bucket,
            "min_bucket_reso": plan.buckets.min_bucket_reso,
            "max_bucket_reso": plan.buckets.max_bucket_reso,
            "tag_frequency": own_frequencies,
            "bucket_info": bucket_info(dataset),
            "resize_interpolation": None,
            "subsets": [_subset(subset, dataset) for subset in plan.subsets],
        })  # fmt: skip
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


def _folders(options: Options, dataset: Dataset) -> dict[str, Any]:
    """The keys of a run without --dataset_config: one dataset, its numbers one by one."""
    data, captions = options[DatasetOptions], options[CaptionOptions]
    buckets, pixels = options[BucketOptions], options[PixelOptions]
    resolution = parse_resolution(data.resolution or "")
    subsets = dataset.config.subsets
    return {
        "ss_batch_size_per_device": data.train_batch_size,
        "ss_resolution": tuple(resolution or dataset.config.buckets.resolution),
        "ss_color_aug": pixels.color_aug,
        "ss_flip_aug": pixels.flip_aug,
        "ss_random_crop": pixels.random_crop,
        "ss_shuffle_caption": captions.shuffle_caption,
        "ss_enable_bucket": buckets.enable_bucket,
        "ss_bucket_no_upscale": buckets.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.config.buckets.min_bucket_reso,
        "ss_max_bucket_reso": dataset.config.buckets.max_bucket_reso,
        "ss_keep_tokens": captions.keep_tokens,
        "ss_dataset_dirs": json.dumps({s.source.name: _folder(s, dataset) for s in subsets if not s.is_reg}),
        "ss_reg_dataset_dirs": json.dumps({s.source.name: _folder(s, dataset) for s in subsets if s.is_reg}),
        "ss_tag_frequency": json.dumps({s.source.name: tag_frequency(s, dataset) for s in subsets}),
        "ss_bucket_info": json.dumps(bucket_info(dataset)),
    }


def bucket_info(dataset: Dataset) -> dict[str, Any] | None:
    """Pictures per bucket, repeats counted, and the mean aspect error of pictures; None where bucketing is off."""
    if not dataset.config.buckets.enable_bucket:
        return None
    counts: Counter = Counter()
    for sample in dataset.samples:
        counts[sample.fit.bucket] += sample.repeats
    errors = [abs(sample.fit.bucket.aspect - sample.size.aspect) for sample in dataset.samples]
    buckets = {i: {"resolution": list(bucket), "count": counts[bucket]} for i, bucket in enumerate(sorted(counts))}
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def _count(subset: Subset, dataset: Dataset) -> int:
    return sum(sample.subset is subset for sample in dataset.samples)


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free
