"""The loader: turns micro-batches into Batches, in worker processes if asked for."""

import dataclasses
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from library import images
from library.data.augment import Pixels, load_conditioning, load_pixels
from library.data.batch import Batch
from library.data.batch_sampler import BatchPosition, BucketGroup, MicroBatch
from library.data.cache.latents import LatentCache
from library.data.cache.text import TextCache
from library.data.captions import is_dropped, process_caption
from library.data.inpainting_masks import random_masks
from library.data.samples import Sample
from library.data.scan import Dataset
from library.errors import RunError
from library.images import ImageError
from library.models.text_encoders import EncodedText
from library.models.unet_config import AESTHETIC_SCORE
from library.rng import SampleRng, python_rng
from library.signals import held_back, leave_to_parent

FLIP_PROBABILITY = 0.5


def group_samples(
    datasets: Sequence[Dataset], samples: Sequence[Sample]
) -> tuple[BucketGroup, ...]:
    """Return the samples of each bucket of each dataset, by index and with repeats."""
    members: dict[tuple, list[int]] = {}
    for i, sample in enumerate(samples):
        key = (sample.dataset, sample.fit.bucket)
        members.setdefault(key, []).extend([i] * sample.repeats)
    groups = []
    for (dataset, _), indices in sorted(members.items()):
        groups.append(BucketGroup(tuple(indices), datasets[dataset].config.batch_size))
    return tuple(groups)


class _LoadedImage(NamedTuple):
    """The image of one sample of a batch.

    Attributes:
        latents: cached latents.
        image: the image, if the model needs its pixels.
        mask: the loss mask.
        crop_top_left: (top, left) for the model's size conditioning.
        inpainting: cached inputs of an inpainting model.
    """

    latents: Tensor | None
    image: Tensor | None
    mask: Tensor | None
    crop_top_left: tuple[int, int]
    inpainting: Tensor | None = None


class BatchTexts(NamedTuple):
    """The captions of a batch, and their text encoder outputs if they are cached."""

    captions: tuple[str, ...]
    encoded: EncodedText | None


@dataclass(frozen=True)
class Batches(TorchDataset):
    """Maps a micro-batch to its Batch. It can be pickled, so that workers can be spawned.

    Attributes:
        samples: the samples, to which the indices in micro-batches refer.
        latents: the cache of latents, if there is one.
        text: the cache of text encoder outputs, if there is one.
        seed: the seed of all random numbers.
        max_train_steps: number of optimizer steps of the run, for token warm-up.
        prior_loss_weight: loss weight of regularization samples.
        aesthetic_score: the score of samples that have none of their own.
        for_inpainting: the model has inputs for the area to inpaint and the masked image.
        reads_conditioning: the training forward uses the images of conditioning_data_dir.
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

    def __getitem__(self, microbatch: MicroBatch) -> Batch:
        """Load a batch.

        Raises:
            RunError: a file can't be read any more. The text names it.
        """
        position = microbatch.position
        samples = [self.samples[i] for i in microbatch.samples]
        height, width = samples[0].fit.bucket.height, samples[0].fit.bucket.width
        masks_images = self._masks_images(samples)
        loaded, flips = [], []
        original_sizes, weights, scores = [], [], []
        for i, sample in enumerate(samples):
            flipped = self._is_flipped(sample, position, i)
            flips.append(flipped)
            image = self._load(sample, position, i, flipped=flipped, with_pixels=masks_images)
            loaded.append(image)
            original_sizes.append((sample.size.height, sample.size.width))
            weights.append(self._weight(sample, position))
            has_score = sample.aesthetic_score is not None
            scores.append(sample.aesthetic_score if has_score else self.aesthetic_score)
        masks = _stack_masks([image.mask for image in loaded], height, width)
        conditioning = inpaint_masks = inpaint_channels = None
        if self.reads_conditioning or masks_images:
            conditioning = _load_conditioning(samples, flips)
        if masks_images:
            inpaint_masks = self._inpaint_masks(samples, position, masks, conditioning)
        else:
            inpaint_channels = _stack([image.inpainting for image in loaded])
        texts = self.texts(microbatch)
        return Batch(
            position=position,
            paths=tuple(sample.file for sample in samples),
            captions=texts.captions,
            images=_stack([image.image for image in loaded]),
            latents=_stack([image.latents for image in loaded]),
            text=texts.encoded,
            original_sizes=torch.tensor(original_sizes),
            crop_top_lefts=torch.tensor([image.crop_top_left for image in loaded]),
            target_sizes=torch.tensor([(height, width)] * len(samples)),
            weights=torch.tensor(weights),
            masks=masks,
            conditioning=conditioning,
            aesthetic_scores=torch.tensor(scores, dtype=torch.float32),
            inpaint_masks=inpaint_masks,
            cached_inpaint_channels=inpaint_channels,
            attributes=tuple(sample.subset.custom_attributes for sample in samples),
        )

    def texts(self, microbatch: MicroBatch) -> BatchTexts:
        """Return the captions of a micro-batch, and their cached encoder outputs."""
        position, cache = microbatch.position, self.text
        captions, encoded = [], []
        for i, index in enumerate(microbatch.samples):
            sample = self.samples[index]
            rng = self._python_rng("caption", position, i)
            if cache is None:
                captions.append(self._caption(sample, position, rng))
                continue
            dropped = is_dropped(sample.subset.captions, rng, epoch=position.epoch + 1)
            text_index, caption = cache.variants.pick(sample, rng, dropped=dropped)
            captions.append(caption)
            encoded.append(cache.read(sample, text_index))
        if cache is None:
            return BatchTexts(tuple(captions), None)
        outputs = map(torch.stack, zip(*encoded, strict=True))
        return BatchTexts(tuple(captions), EncodedText(*outputs))

    def _python_rng(self, purpose: str, position: BatchPosition, i: int) -> random.Random:
        """Return a random number generator of the batch's sample `i`."""
        return python_rng(self.seed, purpose, position.epoch, position.first_sample_index + i)

    def _is_flipped(self, sample: Sample, position: BatchPosition, i: int) -> bool:
        if not sample.subset.pixels.flip_aug:
            return False
        return self._python_rng("flip", position, i).random() < FLIP_PROBABILITY

    def _caption(self, sample: Sample, position: BatchPosition, rng: random.Random) -> str:
        return process_caption(
            sample.caption,
            sample.subset.captions,
            rng,
            epoch=position.epoch + 1,
            step=position.step,
            max_train_steps=self.max_train_steps,
        )

    def _weight(self, sample: Sample, position: BatchPosition) -> float:
        if position.is_padding:
            return 0.0
        return self.prior_loss_weight if sample.subset.is_reg else 1.0

    def _masks_images(self, samples: Sequence[Sample]) -> bool:
        """Return whether images are masked for an inpainting model in the training step.

        Inputs with masks that don't vary are cached. A batch is encoded completely, or not at all.
        """
        is_cached = self.latents is not None and all(sample.has_mask for sample in samples)
        return self.for_inpainting and not is_cached

    def _load(
        self, sample: Sample, position: BatchPosition, i: int, *, flipped: bool, with_pixels: bool
    ) -> _LoadedImage:
        if self.latents is None:
            rng = self._python_rng("pixels", position, i)
            pixels = _read_pixels(sample, rng, flipped=flipped)
            mask = None if pixels.alpha is None else torch.from_numpy(pixels.alpha.copy())
            return _LoadedImage(None, _image(pixels), mask, pixels.crop_top_left)
        cached = self.latents.read(sample, flipped=flipped)
        image = None
        if with_pixels:
            image = _image(_read_pixels(sample, None, flipped=flipped))
        crop_top_left = sample.crop_top_left(flipped=flipped)
        return _LoadedImage(cached.latents, image, cached.mask, crop_top_left, cached.inpainting)

    def _inpaint_masks(
        self,
        samples: Sequence[Sample],
        position: BatchPosition,
        masks: Tensor | None,
        conditioning: Tensor | None,
    ) -> Tensor:
        """Return the areas to inpaint, [B, H, W] in 0..1: the samples' own masks, or random ones."""
        width, height = samples[0].fit.bucket
        rng = SampleRng(self.seed, position.epoch, position.first_sample_index, len(samples))
        areas = random_masks(rng, height, width)
        for i, sample in enumerate(samples):
            if sample.has_mask and sample.subset.pixels.alpha_mask:
                assert masks is not None
                areas[i] = masks[i]
            elif sample.has_mask:
                assert conditioning is not None
                areas[i] = conditioning[i, 0] / 2 + 0.5
        return areas


def _load_conditioning(samples: Sequence[Sample], flips: Sequence[bool]) -> Tensor | None:
    """Return the conditioning images; None if no sample has one.

    Samples without one (regularization) get a white image, which masks nothing.
    """
    if all(sample.conditioning is None for sample in samples):
        return None
    bucket = samples[0].fit.bucket
    loaded = []
    for sample, flipped in zip(samples, flips, strict=True):
        if sample.conditioning is None:
            loaded.append(torch.ones(3, bucket.height, bucket.width))
            continue
        try:
            pixels = load_conditioning(sample, flipped=flipped)
        except (OSError, ImageError) as error:
            raise RunError(f"{sample.conditioning}: can't be read any more: {error}") from None
        loaded.append(torch.from_numpy(images.normalized(pixels)))
    return torch.stack(loaded)


def _read_pixels(sample: Sample, rng: random.Random | None, *, flipped: bool) -> Pixels:
    """Return the sample's pixels, without augmentation if there is no random number generator."""
    try:
        return load_pixels(sample, rng, flipped=flipped)
    except (OSError, ImageError) as error:
        raise RunError(f"{sample.file}: can't be read any more: {error}") from None


def _image(pixels: Pixels) -> Tensor:
    return torch.from_numpy(images.normalized(pixels.rgb))


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return the tensors as a batch; None if there are none."""
    existing = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(existing) if existing else None


def _stack_masks(masks: Sequence[Tensor | None], height: int, width: int) -> Tensor | None:
    """Return the loss masks, [B, H, W]; None if there are none. Samples without one get ones."""
    if all(mask is None for mask in masks):
        return None
    ones = torch.ones(height, width)
    return torch.stack([ones if mask is None else mask for mask in masks])


# --------------------------------------------------------------------------------------- workers


def load_batches(
    batches: Batches,
    order: Iterable[MicroBatch],
    *,
    num_workers: int,
    pin_memory: bool,
    start_method: str | None = None,
) -> Iterator[Batch]:
    """Yield the batches of an endless order, loaded ahead by worker processes.

    There are no workers where everything is cached in RAM. What is cached in RAM stays in this
    process, as each worker would need a copy.

    Args:
        batches: maps micro-batches to batches.
        order: the micro-batches.
        num_workers: number of worker processes. 0 loads in this process.
        pin_memory: load into page-locked memory.
        start_method: how workers start ("fork", "spawn"). None means the platform's default.

    Raises:
        RunError: a file can't be read any more.
    """
    if batches.latents is not None and batches.latents.in_memory:
        num_workers = 0
    text_stays_here = num_workers > 0 and batches.text is not None and batches.text.in_memory
    for_workers = dataclasses.replace(batches, text=None) if text_stays_here else batches
    loader_order, own_order = tee(order)
    loader = DataLoader(
        _CatchErrors(for_workers),
        batch_size=None,
        sampler=_Sampler(loader_order),
        num_workers=num_workers,
        multiprocessing_context=multiprocessing.get_context(start_method) if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_to_parent,
    )
    with held_back():  # workers start here
        loading = iter(loader)
    for batch, microbatch in zip(loading, own_order, strict=False):
        if isinstance(batch, RunError):
            raise batch
        if text_stays_here:
            texts = batches.texts(microbatch)
            batch = dataclasses.replace(batch, captions=texts.captions, text=texts.encoded)
        yield batch


@dataclass(frozen=True)
class _CatchErrors(TorchDataset):
    """Returns errors as values. DataLoader would wrap an error of a worker in its traceback."""

    batches: Batches

    def __getitem__(self, microbatch: MicroBatch) -> Batch | RunError:
        try:
            return self.batches[microbatch]
        except RunError as error:
            return error


@dataclass(frozen=True)
class _Sampler:
    """Wraps the order for DataLoader, which iterates over it once."""

    order: Iterable[MicroBatch]

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.order)
