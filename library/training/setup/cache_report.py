"""What --dry_run finds out about images and caches. Nothing is encoded or written."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from library.data.cache.audit import audit
from library.data.cache.latents import LATENT_CHANNELS
from library.data.cache.text import CaptionVariants
from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.data.samples import Sample
from library.data.scan import Dataset
from library.errors import MistakeCollector
from library.files import format_bytes
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.vae import PIXELS_PER_LATENT
from library.training.setup.caches import without_bad
from library.training.setup.open_caches import latent_cache, text_cache, token_width
from library.training.setup.plan import RunPlan
from library.training.setup.step_plan import all_samples

Rows = list[tuple[str, str]]
"""(label, text)"""

Problem = Callable[[Sample], str | None]
"""Why a cache has nothing valid for a sample; None if it has."""

_FLOAT32_BYTES = 4
_MISSING = "not there"


class ImageReport(NamedTuple):
    """The datasets without images that would be left out, and the page's rows about images and caches."""

    datasets: Sequence[Dataset]
    images: Rows
    caches: Rows


def report_images(plan: RunPlan, collector: MistakeCollector) -> ImageReport:
    """Decode the images that no valid cache covers, and check every cache file.

    Args:
        plan: the plan of the run.
        collector: collects what keeps the run from starting.
    """
    cache, samples = plan.options[CacheOptions], all_samples(plan.datasets)
    datasets, caches, to_decode = plan.datasets, Rows(), samples
    if cache.latents:
        with collector.collected():
            size = _latent_bytes(for_inpainting=plan.models.checkpoint.unet.is_inpainting)
            to_decode = _check_cache(caches, "latents", samples, _latent_problem(plan), size)
    rejected = audit(to_decode, plan.inputs.file_index)
    with collector.collected():
        datasets = without_bad(
            datasets, rejected, skip=plan.options[DatasetOptions].skip_bad_images
        )
    if cache.text:
        with collector.collected():
            num_tokens = plan.options[ModelOptions].num_tokens
            size = _text_bytes(CaptionVariants(cache.text_cache_variants), num_tokens, plan.models)
            _check_cache(caches, "text", all_samples(datasets), _text_problem(plan), size)
    num_empty = sum(not sample.caption for sample in samples)
    num_held_out = sum(len(dataset.validation) for dataset in plan.datasets)
    sources = dict.fromkeys(
        str(subset.source) for dataset in plan.datasets for subset in dataset.config.subsets
    )
    images = [
        ("from", ", ".join(sources)),
        ("images", f"{len(samples)}, {num_held_out} of them held out for validation"),
        ("captions", f"{len(samples) - num_empty}; {num_empty} are missing or empty"),
        ("decoded", f"{len({sample.file for sample in to_decode})}; {len(rejected)} can't be used"),
    ]
    return ImageReport(datasets, images, caches)


def _check_cache(
    rows: Rows,
    name: str,
    samples: Sequence[Sample],
    problem: Problem,
    size: Callable[[Sample], int],
) -> list[Sample]:
    """Add a row about a cache, and return the samples that it lacks.

    Args:
        rows: the page's rows about caches.
        name: the cache's name on the page.
        samples: all samples.
        problem: why the cache has nothing valid for a sample.
        size: bytes of a sample in the cache.
    """
    missing, reasons = [], Counter[str]()
    for sample in samples:
        reason = problem(sample)
        if reason is not None:
            missing.append(sample)
            reasons[reason] += 1
    text = f"{len(samples) - len(missing)} of {len(samples)} are there and valid"
    if missing:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        text += f"; to encode: {counts}; {format_bytes(sum(map(size, missing)))}"
    rows.append((name, text))
    return missing


def _latent_problem(plan: RunPlan) -> Problem:
    cache = _checked_cache(plan)
    # Without files there is nothing to compare with the model, whose hash takes time.
    if cache.cache_latents_to_disk and not _any_latents_file(plan.datasets):
        return lambda sample: _MISSING
    return latent_cache(plan.models, cache, plan.inputs.file_index).invalid_reason


def _any_latents_file(datasets: Sequence[Dataset]) -> bool:
    samples = all_samples(datasets)
    return any(
        sample.latents_file.exists() or sample.old_latents_file.exists() for sample in samples
    )


def _text_problem(plan: RunPlan) -> Problem:
    cache, options = _checked_cache(plan), plan.options
    has_files = any(sample.text_file.exists() for sample in all_samples(plan.datasets))
    if cache.cache_text_encoder_outputs_to_disk and not has_files:
        return lambda sample: _MISSING
    return text_cache(
        plan.models,
        cache,
        plan.inputs.file_index,
        num_tokens=options[ModelOptions].num_tokens,
        weighted=options[CaptionOptions].weighted_captions,
    ).invalid_reason


def _checked_cache(plan: RunPlan) -> CacheOptions:
    """Return the cache options. Without a model, files can't be compared with it."""
    cache = plan.options[CacheOptions]
    if plan.inputs.model_mistakes:
        return dataclasses.replace(cache, skip_cache_check=True)
    return cache


def _latent_bytes(*, for_inpainting: bool) -> Callable[[Sample], int]:
    def size(sample: Sample) -> int:
        pixels, area = sample.subset.pixels, sample.fit.bucket.area
        channels = LATENT_CHANNELS
        if for_inpainting and sample.has_mask:
            channels += 1 + LATENT_CHANNELS
        numel = channels * area // PIXELS_PER_LATENT**2
        if pixels.flip_aug:
            numel *= 2
        if pixels.alpha_mask:
            numel += area
        return _FLOAT32_BYTES * numel

    return size


def _text_bytes(
    variants: CaptionVariants, num_tokens: int, models: SdxlModels
) -> Callable[[Sample], int]:
    width_1, width_2 = (token_width(models, f"text_encoder_{number}") for number in (1, 2))
    numel = (num_tokens + 2) * (width_1 + width_2) + width_2
    return lambda sample: _FLOAT32_BYTES * len(variants.texts(sample)) * numel
