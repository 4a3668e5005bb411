"""Metadata of saved files: the reference's `ss_` keys, and modelspec. Everything is text.

Keys and values: contract, formats.md section 4. Values are str() of Python values, or JSON where the contract says so.
"""

import base64
import datetime
import mimetypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.options import CacheOptions, CaptionOptions, DatasetOptions, parse_resolution
from library.data.subsets import Dataset
from library.log import log
from library.models.options import ModelOptions
from library.options import Options
from library.safetensors_io import file_hashes
from library.training.dataset_metadata import dataset_metadata
from library.training.memory_options import MemoryOptions
from library.training.options import (
    EmaOptions,
    LossOptions,
    NoiseOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    ValidationOptions,
)
from library.training.output_options import MetadataOptions, SavingOptions
from library.training.update_options import UpdateOptions

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
