"""The loader: micro-batches in the run's order become Batches, in worker processes if asked for."""

import dataclasses
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from library import images
from library.data.augment import Pixels, load_conditioning, load_pixels
from library.data.batch import Batch
from library.data.batch_sampler import BatchPosition, BucketGroup, MicroBatch
from library.data.cache.latents import LatentCache, TextCache
from library.data.captions import is_dropped, process_caption
from library.data.inpainting_masks import draw_masks
from library.data.samples import Sample
from library.data.scan import Dataset
from library.errors import RunError
from library.images import ImageError
from library.models.text_encoders import EncodedText
from library.models.unet_config import AESTHETIC_SCORE
from library.rng import SampleRng, python_rng
from library.signals import held_back, leave_to_parent

FLIP_PROBABILITY = 0.5


def group_samples(datasets: Sequence[Dataset], samples: Sequence[Sample]) -> tuple[BucketGroup, ...]:
    """The groups that may share a batch: samples (by number) of one bucket in one dataset, repeats included."""
    members: dict[tuple, list[int]] = {}
    for i, sample in enumerate(samples):
        members.setdefault((sample.dataset, sample.fit.bucket), []).extend([i] * sample.repeats)
    return tuple(
        BucketGroup(tuple(numbers), datasets[key[0]].plan.batch_size) for key, numbers in sorted(members.items())
    )


class _Image(NamedTuple):
    """One sample of a batch: its raw latents or its picture, or both, its loss mask, and (top, left) as the model is told.

    And what an inpainting model sees of it, where that is cached.
    """

    latents: Tensor | None
    image: Tensor | None
    mask: Tensor | None
    crop_top_left: tuple[int, int]
    inpainting: Tensor | None = None


@dataclass(frozen=True)
class Batches(TorchDataset):
    """A micro-batch -> its Batch. Pickles, so that workers may be spawned.

    Attributes:
        prior_loss_weight: of regularisation samples.
        aesthetic_score: of samples that have none of their own.
        for_inpainting: the model sees masked pictures beside the latents.
        reads_conditioning: the step asks for the images of conditioning_data_dir, beyond what is to be painted.
    """

    samples: Sequence[Sample]
    latents: LatentCache | None
    text: TextCache | None
    seed: int
    max_train_steps: int
    prior_loss_weight: float = 1.0
    aesthetic_score: float = AESTHETIC_SCORE
    for_inpainting: bool = False
    reads_conditioning: bool = True

    def __getitem__(self, micro: MicroBatch) -> Batch:
        """Raises RunError, naming the file that can't be read any more."""
        place = micro.place
        samples = [self.samples[i] for i in micro.samples]
        flips = [self._is_flipped(sample, place, i) for i, sample in enumerate(samples)]
        bucket = samples[0].fit.bucket
        # What an inpainting model sees is cached where masks are fixed; a batch is encoded as a whole, or not at all.
        shows = self.for_inpainting and (self.latents is None or not all(sample.has_mask for sample in samples))
        images = [
            self._image(sample, place, i, flipped=flip, with_image=shows)
            for i, (sample, flip) in enumerate(zip(samples, flips, strict=True))
        ]
        masks = _masks([image.mask for image in images], (bucket.height, bucket.width))
        conditioning = self._conditioning(samples, flips) if self.reads_conditioning or shows else None
        texts = self.texts(micro)
        weights = [
            0.0 if place.is_padding else self.prior_loss_weight if sample.subset.is_reg else 1.0 for sample in samples
        ]
        return Batch(
            place=place,
            paths=tuple(sample.file for sample in samples),
            captions=texts.captions,
            images=_stacked([image.image for image in images]),
            latents=_stacked([image.latents for image in images]),
            text=texts.encoded,
            original_sizes=torch.tensor([(sample.size.height, sample.size.width) for sample in samples]),
            crop_top_lefts=torch.tensor([image.crop_top_left for image in images]),
            target_sizes=torch.tensor([(bucket.height, bucket.width)] * len(samples)),
            weights=torch.tensor(weights),
            masks=masks,
            conditioning=conditioning,
            aesthetic_scores=torch.tensor(
                [
                    float(self.aesthetic_score if sample.aesthetic_score is None else sample.aesthetic_score)
                    for sample in samples
                ]
            ),
            paint=self._paint(samples, place, masks, conditioning) if shows else None,
            raw_beside=None if shows else _stacked([image.inpainting for image in images]),
            attributes=tuple(sample.subset.custom_attributes for sample in samples),
        )

    def texts(self, micro: MicroBatch) -> "Texts":
        """The captions of a micro-batch, and their encoder outputs where they are cached."""
        place = micro.place
        samples = [self.samples[i] for i in micro.samples]
        if self.text is None:
            return Texts(tuple(self._caption(sample, place, i) for i, sample in enumerate(samples)), None)
        captions, encoded = [], []
        for i, sample in enumerate(samples):
            draw = python_rng(self.seed, "caption", place.epoch, place.first_sample_index + i)
            dropped = is_dropped(sample.subset.captions, draw, epoch=place.epoch + 1)
            number, caption = self.text.texts.choose(sample, draw, dropped=dropped)
            captions.append(caption)
            encoded.append(self.text.read(sample, number))
        return Texts(tuple(captions), EncodedText(*(torch.stack(parts) for parts in zip(*encoded, strict=True))))

    def _is_flipped(self, sample: Sample, place: BatchPosition, i: int) -> bool:
        if not sample.subset.pixels.flip_aug:
            return False
        return python_rng(self.seed, "flip", place.epoch, place.first_sample_index + i).random() < FLIP_PROBABILITY

    def _caption(self, sample: Sample, place: BatchPosition, i: int) -> str:
        draw = python_rng(self.seed, "caption", place.epoch, place.first_sample_index + i)
        return process_caption(
            sample.caption,
            sample.subset.captions,
            draw,
            epoch=place.epoch + 1,
            step=place.step,
            max_train_steps=self.max_train_steps,
        )

    def _image(self, sample: Sample, place: BatchPosition, i: int, *, flipped: bool, with_image: bool) -> _Image:
        if self.latents is not None:
            cached = self.latents.read(sample, flipped=flipped)
            image = _image(_read_pixels(sample, None, flipped=flipped)) if with_image else None
            return _Image(cached.latents, image, cached.mask, sample.crop_top_left(flipped=flipped), cached.inpainting)
        pixels = _read_pixels(
            sample, python_rng(self.seed, "pixels", place.epoch, place.first_sample_index + i), flipped=flipped
        )
        mask = None if pixels.alpha is None else torch.from_numpy(np.ascontiguousarray(pixels.alpha))
        return _Image(None, _image(pixels), mask, pixels.crop_top_left)

    def _paint(
        self, samples: Sequence[Sample], place: BatchPosition, masks: Tensor | None, conditioning: Tensor | None
    ) -> Tensor:
        """What an inpainting model is to paint, [B, H, W] in 0..1: what the samples' own masks say, else a drawn one."""
        width, height = samples[0].fit.bucket
        paint = draw_masks(SampleRng(self.seed, place.epoch, place.first_sample_index, len(samples)), height, width)
        for i, sample in enumerate(samples):
            if sample.has_mask and sample.subset.pixels.alpha_mask:
                assert masks is not None
                paint[i] = masks[i]
            elif sample.has_mask:
                assert conditioning is not None
                paint[i] = conditioning[i, 0] / 2 + 0.5
        return paint

    def _conditioning(self, samples: Sequence[Sample], flips: Sequence[bool]) -> Tensor | None:
        """The conditioning images; samples without one (regularisation) get white, which masks nothing."""
        if all(sample.conditioning is None for sample in samples):
            return None
        bucket = samples[0].fit.bucket
        loaded = []
        for sample, flipped in zip(samples, flips, strict=True):
            if sample.conditioning is None:
                loaded.append(torch.ones(3, bucket.height, bucket.width))
                continue
            try:
                loaded.append(torch.from_numpy(images.normalized(load_conditioning(sample, flipped=flipped))))
            except (OSError, ImageError) as error:
                raise RunError(f"{sample.conditioning}: can't be read any more: {error}") from None
        return torch.stack(loaded)


class Texts(NamedTuple):
    """The captions of a batch, and their encoder outputs if they are cached."""

    captions: tuple[str, ...]
    encoded: EncodedText | None


def _read_pixels(sample: Sample, draw: random.Random | None, *, flipped: bool) -> Pixels:
    """Args: draw: None: as for the cache. Raises RunError."""
    try:
        return load_pixels(sample, draw, flipped=flipped)
    except (OSError, ImageError) as error:
        raise RunError(f"{sample.file}: can't be read any more: {error}") from None


def _image(pixels: Pixels) -> Tensor:
    return torch.from_numpy(images.normalized(pixels.rgb))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None


def _masks(masks: Sequence[Tensor | None], shape: tuple[int, int]) -> Tensor | None:
    """The batch's loss masks, [B, H, W]; samples without one get ones."""
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones(shape) if mask is None else mask for mask in masks])


def load_batches(
    batches: Batches,
    order: Iterable[MicroBatch],
    *,
    num_workers: int,
    pin_memory: bool,
    start_method: str | None = None,
) -> Iterator[Batch]:
    """The batches of `order`, loaded ahead by worker processes where there are pictures to decode or files to read.

    What is cached in memory stays in this process: workers would each need a copy.

    Args:
        start_method: how workers start ("fork", "spawn"); None: the platform's own way.
    """
    workers = 0 if batches.latents is not None and batches.latents.in_memory else num_workers
    text_stays_here = workers > 0 and batches.text is not None and batches.text.in_memory
    loaded = dataclasses.replace(batches, text=None) if text_stays_here else batches
    context = multiprocessing.get_context(start_method) if workers else None
    here, there = tee(order)
    loader = DataLoader(
        _Told(loaded), batch_size=None, sampler=_Sampler(there), num_workers=workers, multiprocessing_context=context, pin_memory=pin_memory,
        worker_init_fn=leave_to_parent,
    )  # fmt: skip
    with held_back():  # workers start here
        loading = iter(loader)
    for batch, micro in zip(loading, here, strict=False):  # neither has an end
        if isinstance(batch, RunError):
            raise batch
        if text_stays_here:
            texts = batches.texts(micro)
            batch = dataclasses.replace(batch, captions=texts.captions, text=texts.encoded)
        yield batch


@dataclass(frozen=True)
class _Told(TorchDataset):
    """Batches whose errors are values: DataLoader would wrap one from a worker in that process's traceback."""

    batches: Batches

    def __getitem__(self, micro: MicroBatch) -> Batch | RunError:
        try:
            return self.batches[micro]
        except RunError as error:
            return error


@dataclass(frozen=True)
class _Sampler:
    """DataLoader wants to iterate it once; the order has no end."""

    order: Iterable[MicroBatch]

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.order)
