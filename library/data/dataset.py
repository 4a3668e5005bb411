"""The loader: micro-batches in the run's order become Batches, in worker processes if asked for."""

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from library.data import images
from library.data.batch import Batch
from library.data.cache import LatentCache, TextCache
from library.data.captions import process_caption
from library.data.fill_cache import load_pixels
from library.data.order import Group, MicroBatch, Place
from library.data.sample import Sample
from library.data.subsets import Dataset
from library.draws import python_draw
from library.models.text_encoders import EncodedText

FLIP_PROBABILITY = 0.5


def group_samples(datasets: Sequence[Dataset], samples: Sequence[Sample]) -> tuple[Group, ...]:
    """The groups that may share a batch: samples (by number) of one bucket in one dataset, repeats included."""
    members: dict[tuple, list[int]] = {}
    for i, sample in enumerate(samples):
        members.setdefault((sample.dataset, sample.fit.bucket), []).extend([i] * sample.subset.num_repeats)
    return tuple(Group(tuple(numbers), datasets[key[0]].plan.batch_size) for key, numbers in sorted(members.items()))


@dataclass(frozen=True)
class Batches(TorchDataset):
    """A micro-batch -> its Batch. Pickles, so that workers may be spawned."""

    samples: Sequence[Sample]
    latents: LatentCache | None
    text: TextCache | None
    seed: int
    max_train_steps: int

    def __getitem__(self, micro: MicroBatch) -> Batch:
        place = micro.place
        samples = [self.samples[i] for i in micro.samples]
        flips = [self._is_flipped(sample, place, i) for i, sample in enumerate(samples)]
        bucket = samples[0].fit.bucket
        return Batch(
            place=place,
            paths=tuple(str(sample.path) for sample in samples),
            captions=tuple(self._caption(sample, place, i) for i, sample in enumerate(samples)),
            images=None if self.latents else self._images(samples, flips),
            latents=self._latents(samples, flips) if self.latents else None,
            text=self._text(samples) if self.text else None,
            original_sizes=torch.tensor([(sample.size.height, sample.size.width) for sample in samples]),
            crop_top_lefts=torch.tensor(
                [sample.crop_top_left(flipped=flip) for sample, flip in zip(samples, flips, strict=True)]
            ),
            target_sizes=torch.tensor([(bucket.height, bucket.width)] * len(samples)),
            weights=torch.full((len(samples),), 0.0 if place.is_idle else 1.0),
        )

    def _is_flipped(self, sample: Sample, place: Place, i: int) -> bool:
        if not sample.subset.flip_aug:
            return False
        return python_draw(self.seed, "flip", place.epoch, place.first + i).random() < FLIP_PROBABILITY

    def _caption(self, sample: Sample, place: Place, i: int) -> str:
        draw = python_draw(self.seed, "caption", place.epoch, place.first + i)
        return process_caption(
            sample.caption,
            sample.subset.captions,
            draw,
            epoch=place.epoch + 1,
            step=place.step,
            max_train_steps=self.max_train_steps,
        )

    def _images(self, samples: Sequence[Sample], flips: Sequence[bool]) -> Tensor:
        pixels = [load_pixels(sample)[:, :: -1 if flip else 1] for sample, flip in zip(samples, flips, strict=True)]
        return torch.from_numpy(np.stack([images.normalised(array) for array in pixels]))

    def _latents(self, samples: Sequence[Sample], flips: Sequence[bool]) -> Tensor:
        assert self.latents is not None
        read = [self.latents.read(sample) for sample in samples]
        chosen = [pair.flipped if flip else pair.plain for pair, flip in zip(read, flips, strict=True)]
        return torch.stack([latents for latents in chosen if latents is not None])

    def _text(self, samples: Sequence[Sample]) -> EncodedText:
        assert self.text is not None
        read = [self.text.read(sample) for sample in samples]
        return EncodedText(*(torch.stack(parts) for parts in zip(*read, strict=True)))


def load_batches(
    batches: Batches,
    order: Iterable[MicroBatch],
    *,
    num_workers: int,
    pin_memory: bool,
    start_method: str | None = None,
) -> Iterator[Batch]:
    """The batches of `order`, loaded ahead by worker processes where there is something to decode or read from disk.

    Args:
        start_method: how workers start ("fork", "spawn"); None: the platform's own way.
    """
    kept_in_memory = (
        batches.latents is not None and batches.latents.in_memory and (batches.text is None or batches.text.in_memory)
    )
    workers = 0 if kept_in_memory else num_workers
    context = multiprocessing.get_context(start_method) if workers else None
    loader = DataLoader(
        batches, batch_size=None, sampler=_Sampler(order), num_workers=workers, multiprocessing_context=context, pin_memory=pin_memory
    )  # fmt: skip
    return iter(loader)


@dataclass(frozen=True)
class _Sampler:
    """DataLoader wants to iterate it once; the order has no end."""

    order: Iterable[MicroBatch]

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.order)
