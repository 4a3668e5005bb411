"""Prepare: the caches that a run uses are filled, or its pictures audited, before the first step."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from library.data.cache.audit import RejectedSample, audit, refuse_or_skip
from library.data.cache.fill import fill_latents, fill_text
from library.data.cache.latents import LatentCache, LatentsInMemory, LatentsOnDisk
from library.data.cache.text import CaptionVariants, TextCache, TextInMemory, TextOnDisk
from library.data.file_index import FileIndex
from library.data.options import CacheOptions
from library.data.samples import Sample
from library.data.scan import Dataset
from library.errors import RunError
from library.models.checkpoint.weights_hash import weights_hash
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText


class CachedData(NamedTuple):
    """What training reads: the samples that can be used, by dataset, and the caches, complete."""

    datasets: list[Dataset]
    latents: LatentCache | None
    text: TextCache | None

    @property
    def samples(self) -> list[Sample]:
        return [sample for dataset in self.datasets for sample in dataset.samples]

    @property
    def validation(self) -> list[Sample]:
        return [sample for dataset in self.datasets for sample in dataset.validation]


def fill_caches(
    datasets: Sequence[Dataset],
    models: SdxlModels,
    options: CacheOptions,
    accelerator: Accelerator,
    known: FileIndex,
    *,
    num_tokens: int,
    weighted_captions: bool,
    skip_bad_images: bool,
    audits: bool = True,
) -> CachedData:
    """Fill the caches that the options ask for, on all processes, and see that they are complete.

    Args:
        audits: decode pictures that no cache decodes once, to find damaged ones before training does.

    Raises RunError with all pictures that can't be used, unless they may be skipped.
    """
    share = (accelerator.process_index, accelerator.num_processes)
    kept = list(datasets)
    samples = all_samples(kept)
    latents: LatentCache | None = None
    text: TextCache | None = None
    found: list[RejectedSample] = []
    if options.latents:
        latents, found = cache_latents(samples, models, options, known, share)
    elif audits:
        found = audit(samples, known, rank=share[0], world_size=share[1])
    kept = without_bad(kept, _of_all_processes(found, samples), skip=skip_bad_images)
    if options.text:
        text = cache_text(
            all_samples(kept), models, options, known, share, num_tokens=num_tokens, weighted=weighted_captions
        )
    finish_caches(all_samples(kept), (latents, text), accelerator, known)
    return CachedData(kept, latents, text)


def all_samples(datasets: Sequence[Dataset]) -> list[Sample]:
    """All samples, those held out too: their caches are filled, and they are looked at, like the others'."""
    return [sample for dataset in datasets for sample in (*dataset.samples, *dataset.validation)]


def without_bad(datasets: Sequence[Dataset], bad: Sequence[RejectedSample], *, skip: bool) -> list[Dataset]:
    """The datasets without their bad samples, if those may be left out. Raises RunError if not, or if nothing is left."""
    refuse_or_skip(bad, skip=skip)
    kept = [dataset.without([one.sample for one in bad]) for dataset in datasets]
    if not any(dataset.samples for dataset in kept):
        raise RunError("none of the pictures can be used")
    return kept


def cache_latents(
    samples: Sequence[Sample], models: SdxlModels, options: CacheOptions, known: FileIndex, share: tuple[int, int]
) -> tuple[LatentCache, list[RejectedSample]]:
    """The filled cache, and the samples that can't be in it. Args: share: (rank, processes)."""
    cache = latent_cache(models, options, known)
    rank, world_size = _share(share, cache)
    return cache, fill_latents(
        samples,
        cache,
        models.encode_images,
        options.vae_batch_size,
        rank=rank,
        world_size=world_size,
    )


def latent_cache(models: SdxlModels, options: CacheOptions, known: FileIndex) -> LatentCache:
    """The cache that the options mean, as it is."""
    for_inpainting = models.checkpoint.unet.is_inpainting
    if not options.cache_latents_to_disk:
        return LatentsInMemory(for_inpainting=for_inpainting)
    identity = "" if options.skip_cache_check else _identity(models, ["vae"], models.precision.vae, known)
    return LatentsOnDisk(identity, known, trusted=options.skip_cache_check, for_inpainting=for_inpainting)


def cache_text(
    samples: Sequence[Sample],
    models: SdxlModels,
    options: CacheOptions,
    known: FileIndex,
    share: tuple[int, int],
    *,
    num_tokens: int,
    weighted: bool,
) -> TextCache:
    """The filled cache. Args: share: (rank, processes)."""

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> EncodedText:
        return EncodedText(*(part.cpu() for part in models.encode_texts(captions, num_tokens, weighted=weighted)))

    cache = text_cache(models, options, known, num_tokens=num_tokens, weighted=weighted)
    rank, world_size = _share(share, cache)
    fill_text(samples, cache, encode, rank=rank, world_size=world_size)
    return cache


def text_cache(
    models: SdxlModels, options: CacheOptions, known: FileIndex, *, num_tokens: int, weighted: bool
) -> TextCache:
    """The cache that the options mean, as it is."""
    texts = CaptionVariants(options.text_cache_variants)
    if not options.cache_text_encoder_outputs_to_disk:
        return TextInMemory(texts)
    parts = [part for part in models.checkpoint.parts if part.startswith("text_encoder")]
    identity = "" if options.skip_cache_check else _identity(models, parts, models.precision.compute, known)
    identity += ", captions weighted" if weighted else ""
    change = models.change.text_identity() if models.change is not None else ""
    identity += f", with {change}" if change else ""
    one, two = (token_width(models, part) for part in ("text_encoder_1", "text_encoder_2"))
    return TextOnDisk(num_tokens + 2, (one, two), identity, texts, known, trusted=options.skip_cache_check)


def finish_caches(
    samples: Sequence[Sample],
    caches: Sequence[LatentCache | TextCache | None],
    accelerator: Accelerator,
    known: FileIndex,
) -> None:
    """Wait for all processes; see that nothing is missing, and keep what was learnt. Raises RunError for holes."""
    accelerator.wait_for_everyone()
    for cache in caches:
        holes = [sample.file for sample in samples if cache and not cache.has(sample)]
        if holes:
            raise RunError(f"{len(holes)} pictures have no cache after caching: {', '.join(holes[:5])}")
        if isinstance(cache, LatentsOnDisk | TextOnDisk):
            cache.record_written()
    if accelerator.is_main_process:
        known.save()
    known.forget()


def _identity(models: SdxlModels, parts: Sequence[str], dtype: torch.dtype, known: FileIndex) -> str:
    """What tells these parts and their dtype from others: a hash of the weights, remembered by file."""
    hashes = []
    for part in parts:
        source = models.source(part)
        folder, name = os.path.split(os.path.abspath(source))
        stamp = _stamp_of(source)
        fact = f"hash of {part}"
        found = known.get(folder, name, stamp).get(fact)
        if found is None:
            found = weights_hash(models.stored(part))
            known.record(folder, name, stamp, **{fact: found})
        hashes.append(found)
    return f"{' '.join(hashes)} in {str(dtype).removeprefix('torch.')}"


def _stamp_of(source: Path) -> tuple[int, int]:
    """Size and time of a file, or of all files in a folder together."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    found = [path.stat() for path in files]
    return sum(one.st_size for one in found), max((one.st_mtime_ns for one in found), default=0)


def token_width(models: SdxlModels, part: str) -> int:
    """Numbers per token of an encoder's hidden states; 0 where the model hasn't it."""
    tensors = models.checkpoint.tensors(part)
    return tensors["text_model.embeddings.token_embedding.weight"].shape[1] if tensors else 0


def _share(share: tuple[int, int], cache: LatentCache | TextCache) -> tuple[int, int]:
    """Processes divide what goes to the disk; what stays in memory each makes for itself."""
    return (0, 1) if cache.in_memory else share


def _of_all_processes(found: Sequence[RejectedSample], samples: Sequence[Sample]) -> list[RejectedSample]:
    """The bad samples that any process found, once each."""
    number = {id(sample): i for i, sample in enumerate(samples)}
    reasons = dict(gather_object([(number[id(bad.sample)], bad.reason) for bad in found]))
    return [RejectedSample(samples[i], reason) for i, reason in sorted(reasons.items())]
