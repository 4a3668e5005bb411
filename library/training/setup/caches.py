"""Caches: they are filled, or images audited, before the first step."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from library.data.cache.audit import RejectedSample, audit, refuse_or_skip
from library.data.cache.fill import fill_latents, fill_text
from library.data.cache.latents import LatentCache, LatentsOnDisk
from library.data.cache.text import TextCache, TextOnDisk
from library.data.file_index import FileIndex
from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.data.samples import Sample
from library.data.scan import Dataset
from library.errors import RunError
from library.generation.sample_prompts import SamplePrompt
from library.log import log
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText, TextConditioning
from library.training.monitoring.preview import encode_prompts, read_prompts
from library.training.options.objective import LossOptions
from library.training.options.output import PreviewOptions
from library.training.setup.open_caches import encodes_images, latent_cache, text_cache
from library.training.setup.plan import RunPlan
from library.training.setup.step_plan import all_samples, training_samples

_TEXT_ENCODERS = ("text_encoder_1", "text_encoder_2")


@dataclass(frozen=True)
class CachedData:
    """What a run reads while it trains.

    Attributes:
        datasets: the datasets without images that can't be used.
        latents: the complete cache of latents, if latents are cached.
        text: the complete cache of text-encoder outputs, if they are cached.
        prompts: the prompts of samples during training.
        prompt_texts: the conditioning of these prompts, if the text encoders have been released.
        keeps_vae: the VAE is needed in training steps, and hasn't been released.
    """

    datasets: Sequence[Dataset]
    latents: LatentCache | None
    text: TextCache | None
    prompts: Sequence[SamplePrompt] = ()
    prompt_texts: Mapping[str, TextConditioning] | None = None
    keeps_vae: bool = True


def fill_caches(plan: RunPlan, accelerator: Accelerator) -> CachedData:
    """Fill the caches, encode the prompts of samples, and release the models that the run doesn't need.

    Args:
        plan: the plan of the run.
        accelerator: this process.

    Raises:
        RunError: images can't be used, unless they may be skipped.
    """
    options, models, datasets = plan.options, plan.models, plan.datasets
    cache, num_tokens = options[CacheOptions], options[ModelOptions].num_tokens
    prompts = read_prompts(
        options[PreviewOptions],
        datasets[0].config.buckets.resolution,
        takes_conditions=plan.kind.conditioning_kind == "conditions",
    )
    cached = fill_dataset_caches(
        datasets,
        models,
        cache,
        accelerator,
        plan.inputs.file_index,
        num_tokens=num_tokens,
        weighted_captions=options[CaptionOptions].weighted_captions,
        skip_bad_images=options[DatasetOptions].skip_bad_images,
    )
    if options[LossOptions].masked_loss:
        _warn_without_masks(cached.datasets)
    # The text encoders are released once captions are encoded, so prompts are encoded before.
    prompt_texts = None
    if cached.text is not None and prompts:
        prompt_texts = encode_prompts(models, prompts, num_tokens)
    are_masked = all(sample.has_mask for sample in all_samples(cached.datasets))
    keeps_vae = encodes_images(models, cache, are_masked=are_masked)
    if not keeps_vae:
        models.release("vae")
    if cached.text is not None:
        models.release("text_encoders")
    return dataclasses.replace(
        cached, prompts=prompts, prompt_texts=prompt_texts, keeps_vae=keeps_vae
    )


def _warn_without_masks(datasets: Sequence[Dataset]) -> None:
    for sample in training_samples(datasets):
        if sample.conditioning or sample.subset.pixels.alpha_mask:
            return
    log.warning("--masked_loss changes nothing: no image has a mask; give conditioning_data_dir")


def fill_dataset_caches(
    datasets: Sequence[Dataset],
    models: SdxlModels,
    options: CacheOptions,
    accelerator: Accelerator,
    file_index: FileIndex,
    *,
    num_tokens: int,
    weighted_captions: bool,
    skip_bad_images: bool,
    audits: bool = True,
) -> CachedData:
    """Fill the caches that the options ask for, on all processes, and check that they are complete.

    Args:
        datasets: the datasets.
        models: the base model.
        options: what is cached, and where.
        accelerator: this process.
        file_index: what is known of files from earlier runs.
        num_tokens: tokens at which captions are truncated.
        weighted_captions: read (word:1.2) in captions as weights.
        skip_bad_images: leave images out that can't be used.
        audits: decode the images that no cache decodes once, to find damaged ones before training does.

    Raises:
        RunError: images can't be used, unless they may be skipped.
    """
    rank_and_size = (accelerator.process_index, accelerator.num_processes)
    kept = list(datasets)
    samples = all_samples(kept)
    latents: LatentCache | None = None
    text: TextCache | None = None
    rejected: list[RejectedSample] = []
    if options.latents:
        latents, rejected = cache_latents(samples, models, options, file_index, rank_and_size)
    elif audits:
        rank, world_size = rank_and_size
        rejected = audit(samples, file_index, rank=rank, world_size=world_size)
    kept = without_bad(kept, _of_all_processes(rejected, samples), skip=skip_bad_images)
    if options.text:
        text = cache_text(
            all_samples(kept),
            models,
            options,
            file_index,
            rank_and_size,
            num_tokens=num_tokens,
            weighted=weighted_captions,
        )
    finish_caches(all_samples(kept), (latents, text), accelerator, file_index)
    return CachedData(kept, latents, text)


def without_bad(
    datasets: Sequence[Dataset], rejected: Sequence[RejectedSample], *, skip: bool
) -> list[Dataset]:
    """Return the datasets without rejected samples.

    Args:
        datasets: the datasets.
        rejected: the samples that can't be used.
        skip: leave them out.

    Raises:
        RunError: samples can't be used and may not be skipped, or none is left.
    """
    refuse_or_skip(rejected, skip=skip)
    kept = [dataset.without([bad.sample for bad in rejected]) for dataset in datasets]
    if not any(dataset.samples for dataset in kept):
        raise RunError("none of the images can be used")
    return kept


def cache_latents(
    samples: Sequence[Sample],
    models: SdxlModels,
    options: CacheOptions,
    file_index: FileIndex,
    rank_and_size: tuple[int, int],
) -> tuple[LatentCache, list[RejectedSample]]:
    """Fill the cache of latents, and return it with the samples that it can't hold."""
    cache = latent_cache(models, options, file_index)
    rank, world_size = _rank_and_size(rank_and_size, cache)
    rejected = fill_latents(
        samples,
        cache,
        models.encode_images,
        options.vae_batch_size,
        rank=rank,
        world_size=world_size,
    )
    return cache, rejected


def cache_text(
    samples: Sequence[Sample],
    models: SdxlModels,
    options: CacheOptions,
    file_index: FileIndex,
    rank_and_size: tuple[int, int],
    *,
    num_tokens: int,
    weighted: bool,
) -> TextCache:
    """Fill the cache of text-encoder outputs, and return it."""

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> EncodedText:
        encoded = models.encode_texts(captions, num_tokens, weighted=weighted)
        return EncodedText(*(tensor.cpu() for tensor in encoded))

    cache = text_cache(models, options, file_index, num_tokens=num_tokens, weighted=weighted)
    rank, world_size = _rank_and_size(rank_and_size, cache)
    fill_text(samples, cache, encode, rank=rank, world_size=world_size)
    return cache


def finish_caches(
    samples: Sequence[Sample],
    caches: Sequence[LatentCache | TextCache | None],
    accelerator: Accelerator,
    file_index: FileIndex,
) -> None:
    """Wait for all processes, check that the caches are complete, and save the file index.

    Raises:
        RunError: a sample isn't cached.
    """
    accelerator.wait_for_everyone()
    for cache in caches:
        if cache is None:
            continue
        missing = [sample.file for sample in samples if not cache.has(sample)]
        if missing:
            raise RunError(
                f"{len(missing)} images have no cache after caching: {', '.join(missing[:5])}"
            )
        if isinstance(cache, LatentsOnDisk | TextOnDisk):
            cache.record_written()
    if accelerator.is_main_process:
        file_index.save()
    file_index.forget()


def _rank_and_size(
    rank_and_size: tuple[int, int], cache: LatentCache | TextCache
) -> tuple[int, int]:
    """Return rank and world size for filling a cache: processes divide files, and each fills its own memory."""
    return (0, 1) if cache.in_memory else rank_and_size


def _of_all_processes(
    rejected: Sequence[RejectedSample], samples: Sequence[Sample]
) -> list[RejectedSample]:
    """Return the samples that any process rejected, once each."""
    index = {id(sample): i for i, sample in enumerate(samples)}
    local = [(index[id(bad.sample)], bad.reason) for bad in rejected]
    reasons = dict(gather_object(local))
    return [RejectedSample(samples[i], reason) for i, reason in sorted(reasons.items())]
