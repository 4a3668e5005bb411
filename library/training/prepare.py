"""Prepare: the caches that a run uses are filled, or its pictures audited, before the first step."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from library.data.cache import LatentCache, LatentsInMemory, LatentsOnDisk, TextCache, TextInMemory, TextOnDisk
from library.data.fill_cache import Bad, audit, fill_latents, fill_text, refuse_or_skip
from library.data.options import CacheOptions
from library.data.sample import Sample
from library.data.subsets import Dataset
from library.errors import RunError
from library.models import vae
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText


class Prepared(NamedTuple):
    """What training reads: the samples that can be used, by dataset, and the caches, complete."""

    datasets: list[Dataset]
    latents: LatentCache | None
    text: TextCache | None

    @property
    def samples(self) -> list[Sample]:
        return [sample for dataset in self.datasets for sample in dataset.samples]


def prepare(
    datasets: Sequence[Dataset],
    models: SdxlModels,
    options: CacheOptions,
    accelerator: Accelerator,
    *,
    num_tokens: int,
    skip_bad_images: bool,
) -> Prepared:
    """Fill the caches that the options ask for. Pictures that no cache decodes are decoded once, to find damaged ones.

    Raises RunError with all pictures that can't be used, unless they may be skipped.
    """
    samples = [sample for dataset in datasets for sample in dataset.samples]
    share = (accelerator.process_index, accelerator.num_processes)
    latents: LatentCache | None = None
    if options.latents:
        latents = LatentsOnDisk() if options.cache_latents_to_disk else LatentsInMemory()
        found = fill_latents(
            samples,
            latents,
            lambda *inputs: vae.encode(models.vae, *inputs).cpu(),
            options.vae_batch_size,
            share=_share(share, latents),
        )
    else:
        found = audit(samples[share[0] :: share[1]])
    left_out = refuse_or_skip(_of_all_processes(found, samples), skip=skip_bad_images)
    kept = [
        dataclasses.replace(dataset, samples=tuple(s for s in dataset.samples if s not in left_out))
        for dataset in datasets
    ]
    samples = [sample for dataset in kept for sample in dataset.samples]
    if not samples:
        raise RunError("none of the pictures can be used")

    text: TextCache | None = None
    if options.text:

        @torch.no_grad()
        def encode_texts(captions: Sequence[str]) -> EncodedText:
            return EncodedText(*(part.cpu() for part in models.encode_texts(captions, num_tokens)))

        text = TextOnDisk(num_tokens + 2) if options.cache_text_encoder_outputs_to_disk else TextInMemory()
        fill_text(samples, text, encode_texts, share=_share(share, text))
    accelerator.wait_for_everyone()
    for cache in (latents, text):
        holes = [f"{sample.path}: {problem}" for sample in samples if cache and (problem := cache.problem(sample))]
        if holes:
            raise RunError(f"{len(holes)} pictures have no valid cache after caching: {'; '.join(holes[:5])}")
    return Prepared(kept, latents, text)


def _share(share: tuple[int, int], cache: LatentCache | TextCache) -> tuple[int, int]:
    """Processes divide what goes to the disk; what stays in memory each makes for itself."""
    return (0, 1) if cache.in_memory else share


def _of_all_processes(found: Sequence[Bad], samples: Sequence[Sample]) -> list[Bad]:
    """The bad samples that any process found, once each."""
    number = {sample.cache_stem: i for i, sample in enumerate(samples)}
    reasons = dict(gather_object([(number[bad.sample.cache_stem], bad.reason) for bad in found]))
    return [Bad(samples[i], reason) for i, reason in sorted(reasons.items())]
