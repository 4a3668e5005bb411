"""Measured steps on the largest batch, for --dry_run: the time of a step, and the memory at its peak."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from library.data.batch import Batch
from library.data.batch_sampler import BatchPosition
from library.data.cache.latents import LATENT_CHANNELS
from library.data.options import CacheOptions, DatasetOptions
from library.data.samples import Sample
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText
from library.models.vae import PIXELS_PER_LATENT
from library.size import Size
from library.training.forward import accumulate_gradients
from library.training.setup.open_caches import encodes_images, token_width
from library.training.setup.plan import RunPlan
from library.training.setup.step_plan import Bucket, largest_of, training_samples
from library.training.setup.training_state import build_training_state

_STEPS = 3  # measured, after one that isn't: it makes the optimizer's state


class Measurement(NamedTuple):
    """A step on the largest batch: the most bytes on the device, and seconds."""

    peak: int
    seconds: float


def measure(plan: RunPlan, accelerator: Accelerator) -> Measurement:
    """Load the model, and take some steps on random images in the largest batch. The trained weights are discarded."""
    device = accelerator.device
    optimizer_step = build_training_state(plan, accelerator).optimizer_step
    batch = random_batch(plan, largest_of(plan.buckets))
    started = 0.0
    for i in range(_STEPS + 1):
        if i == 1:
            _wait(device)
            started = time.monotonic()
        accumulate_gradients(optimizer_step, [batch], splits=1, seed=0, device=device)
        optimizer_step.step()
    _wait(device)
    seconds = (time.monotonic() - started) / _STEPS
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measurement(peak, seconds)


def random_batch(plan: RunPlan, bucket: Bucket) -> Batch:
    """Return a batch like the largest of a bucket, of random images with the captions of the bucket's samples."""
    count, (width, height) = bucket.largest, bucket.size
    cache, models = plan.options[CacheOptions], plan.models
    sizes = torch.tensor([(height, width)] * count)
    latent_size = (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    is_inpainting = models.checkpoint.unet.is_inpainting
    has_images = encodes_images(models, cache, are_masked=bucket.are_masked)
    images, masks, cached_channels = None, None, None
    if has_images:
        images = torch.rand(count, 3, height, width) * 2 - 1
    if is_inpainting and has_images:
        masks = torch.ones(count, height, width)
    elif is_inpainting:
        cached_channels = torch.randn(count, 1 + LATENT_CHANNELS, *latent_size)
    return Batch(
        position=BatchPosition(
            epoch=0,
            step=0,
            microbatch_index=0,
            first_sample_index=0,
            global_batch_size=count,
            is_last_microbatch=True,
            is_padding=False,
        ),
        paths=("random",) * count,
        captions=_captions(training_samples(plan.datasets), bucket.size, count),
        images=images,
        latents=torch.randn(count, LATENT_CHANNELS, *latent_size) if cache.latents else None,
        inpaint_masks=masks,
        cached_inpaint_channels=cached_channels,
        text=_random_text(models, count, plan.options[ModelOptions].num_tokens)
        if cache.text
        else None,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        weights=torch.ones(count),
        aesthetic_scores=torch.full((count,), plan.options[DatasetOptions].aesthetic_score),
        attributes=({},) * count,
    )


def _captions(samples: Sequence[Sample], size: Size, count: int) -> tuple[str, ...]:
    captions = [sample.caption for sample in samples if sample.fit.bucket == size] or [""]
    return tuple(captions[i % len(captions)] for i in range(count))


def _random_text(models: SdxlModels, count: int, num_tokens: int) -> EncodedText:
    width_1, width_2 = (token_width(models, f"text_encoder_{number}") for number in (1, 2))
    length = num_tokens + 2  # with the start and end tokens
    return EncodedText(
        torch.randn(count, length, width_1),
        torch.randn(count, length, width_2),
        torch.randn(count, width_2),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
