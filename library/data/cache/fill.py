"""Filling caches before training: the missing samples are decoded, encoded and written.

Decoding, encoding and writing overlap: threads decode ahead, and another thread writes. A sample
that can't be used doesn't stop the others, so that all of them are reported together.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library import images
from library.data.augment import Pixels, load_conditioning, load_pixels
from library.data.cache.audit import RejectedSample, read_error
from library.data.cache.background import background_writer, map_batches
from library.data.cache.disk import SourceStamp, source_stamp
from library.data.cache.latents import LatentCache, Latents
from library.data.cache.text import TextCache
from library.data.samples import Sample
from library.errors import RunError
from library.files import make_writable_folder, remove_left_over
from library.images import ImageError
from library.log import log, progress_bar
from library.models.inpainting import masked_images
from library.models.text_encoders import EncodedText
from library.models.vae import PIXELS_PER_LATENT, finite_samples
from library.rng import generator
from library.size import Size

EncodeImages = Callable[[Tensor, Tensor], Tensor]
"""(images [B, 3, H, W] in -1..1, noise [B, 4, H/8, W/8]) -> raw latents, on the CPU"""

EncodeTexts = Callable[[Sequence[str]], EncodedText]
"""captions -> text encoder outputs, [B, ...], on the CPU"""

TEXTS_PER_BATCH = 64


class _LoadedSample(NamedTuple):
    """A decoded image, and the inputs of the VAE.

    Attributes:
        sample: the sample.
        pixels: its pixels.
        source: its file.
        inputs: by field of Latents: an image [3, H, W], and the noise of its posterior sample
            [4, H/8, W/8].
        masks: by the same names, for inpainting: the latent cells to inpaint, [1, H/8, W/8].
    """

    sample: Sample
    pixels: Pixels
    source: SourceStamp
    inputs: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]


class _EncodedSample(NamedTuple):
    """A sample with its latents."""

    sample: Sample
    latents: Latents
    source: SourceStamp


# --------------------------------------------------------------------------------------- latents


def fill_latents(
    samples: Sequence[Sample],
    cache: LatentCache,
    encode: EncodeImages,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
) -> list[RejectedSample]:
    """Encode the samples whose latents the cache lacks.

    Args:
        samples: all samples.
        cache: the cache to fill.
        encode: the VAE's encoder.
        batch_size: images that are encoded at once, including mirrored ones.
        rank: this process. Processes divide all samples, not the missing ones, which change while
            other processes write.
        world_size: the number of processes.
        overwrite: encode all samples. Each existing file is kept until its new one is complete.

    Returns:
        The samples that can't be encoded.
    """
    missing = samples[rank::world_size]
    if not overwrite:
        missing = _missing(missing, cache, "latents")
    if not missing:
        return []
    if not cache.in_memory:
        _make_writable({sample.latents_file.parent for sample in missing})
    rejected: list[RejectedSample] = []
    load = functools.partial(_load, for_inpainting=cache.for_inpainting)
    batches = batches_by_bucket(missing, batch_size, for_inpainting=cache.for_inpainting)
    with (
        progress_bar("caching latents", len(missing), unit="images") as bar,
        background_writer() as write,
    ):
        for batch, results in map_batches(load, batches):
            loaded = []
            for result in results:
                if isinstance(result, RejectedSample):
                    rejected.append(result)
                else:
                    loaded.append(result)
            encoded, not_finite = _encode(loaded, encode, batch_size)
            rejected += not_finite
            write(_write_latents, cache, encoded)
            bar.update(len(batch))
    return rejected


def batches_by_bucket(
    samples: Iterable[Sample], batch_size: int, *, for_inpainting: bool
) -> list[list[Sample]]:
    """Return batches of one bucket each, with at most `batch_size` inputs of the VAE.

    Mirrored and masked images are inputs of their own.
    """
    groups: dict[tuple[Size, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        num_inputs = 1
        if sample.subset.pixels.flip_aug:
            num_inputs *= 2
        if for_inpainting and sample.has_mask:
            num_inputs *= 2
        groups[sample.fit.bucket, num_inputs].append(sample)
    batches = []
    for (_, num_inputs), group in groups.items():
        size = max(1, batch_size // num_inputs)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def _load(sample: Sample, *, for_inpainting: bool) -> _LoadedSample | RejectedSample:
    mask = None
    try:
        content, source = source_stamp(sample.path)
        pixels = load_pixels(sample, content=content)
        if for_inpainting and sample.has_mask:
            mask = pixels.alpha
            if mask is None:
                mask, mask_source = _load_mask(sample)
                source = source._replace(mask=mask_source)
    except (OSError, ImageError) as error:
        return RejectedSample(sample, read_error(error))
    loaded = _LoadedSample(sample, pixels, source, {}, {})
    _add_inputs(loaded, pixels.rgb, mask, flipped=False)
    if sample.subset.pixels.flip_aug:
        mirrored_mask = None if mask is None else mask[:, ::-1]
        _add_inputs(loaded, pixels.rgb[:, ::-1], mirrored_mask, flipped=True)
    return loaded


def _add_inputs(
    loaded: _LoadedSample, rgb: np.ndarray, mask: np.ndarray | None, *, flipped: bool
) -> None:
    """Add the VAE's inputs for an image, or its mirrored image.

    The noise is a function of the file's content, so that caches that are made again are the same.
    """
    content = loaded.source.content
    suffix = " mirrored" if flipped else ""
    image = torch.from_numpy(images.normalized(rgb))
    loaded.inputs["flipped" if flipped else "latents"] = image, _noise(image, f"{content}{suffix}")
    if mask is None:
        return
    name = "inpainting_flipped" if flipped else "inpainting"
    masked, cells = masked_images(image[None], torch.from_numpy(mask.copy())[None])
    loaded.inputs[name] = masked[0], _noise(image, f"{content} masked{suffix}")
    loaded.masks[name] = cells[0]


def _load_mask(sample: Sample) -> tuple[np.ndarray, SourceStamp]:
    """Return the mask in the sample's conditioning image, [H, W] in 0..1, and the file's stamp.

    Raises:
        ImageError: it can't be read.
    """
    assert sample.conditioning is not None
    try:
        content, source = source_stamp(Path(sample.conditioning))
        pixels = load_conditioning(sample, flipped=False, content=content)
    except (OSError, ImageError) as error:
        reason = read_error(error)
        raise ImageError(f"its conditioning image {sample.conditioning}: {reason}") from None
    return pixels[..., 0].astype(np.float32) / 255, source


def _noise(image: Tensor, content: str) -> Tensor:
    """Return the noise of a posterior sample, [4, H/8, W/8]."""
    height, width = (side // PIXELS_PER_LATENT for side in image.shape[1:])
    return torch.randn(4, height, width, generator=generator("posterior", content, width, height))


def _encode(
    loaded: Sequence[_LoadedSample], encode: EncodeImages, batch_size: int
) -> tuple[list[_EncodedSample], list[RejectedSample]]:
    """Return the samples with their latents, and those whose latents are not finite."""
    # Jobs are sorted by field, not by sample: posterior samples are the same in any batch, but the
    # rounding of a batch may depend on it.
    jobs = []
    for name in Latents._fields:
        for i, sample in enumerate(loaded):
            if name in sample.inputs:
                jobs.append((i, name))
    encoded: list[dict[str, Tensor]] = [{} for _ in loaded]
    not_finite = set()
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        inputs = [loaded[i].inputs[name] for i, name in batch]
        stacked = [torch.stack(tensors) for tensors in zip(*inputs, strict=True)]
        latents = encode(*stacked).cpu().float()
        finite = finite_samples(latents).tolist()
        for (i, name), own, is_finite in zip(batch, latents, finite, strict=True):
            if not is_finite:
                not_finite.add(i)
            mask = loaded[i].masks.get(name)
            encoded[i][name] = own.clone() if mask is None else torch.cat([mask, own])
    good, rejected = [], []
    for i, sample in enumerate(loaded):
        if i in not_finite:
            reason = "the VAE gives latents that aren't finite, in float32 too"
            rejected.append(RejectedSample(sample.sample, reason))
            continue
        alpha = sample.pixels.alpha
        loss_mask = None if alpha is None else torch.from_numpy(alpha.copy())
        latents_of_sample = Latents(**encoded[i], mask=loss_mask)
        good.append(_EncodedSample(sample.sample, latents_of_sample, sample.source))
    return good, rejected


def _write_latents(cache: LatentCache, encoded: Iterable[_EncodedSample]) -> None:
    for sample, latents, source in encoded:
        cache.write(sample, latents, source)


# --------------------------------------------------------------------------------------- text


def fill_text(
    samples: Sequence[Sample],
    cache: TextCache,
    encode: EncodeTexts,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Encode the texts whose outputs the cache lacks.

    Args:
        samples: all samples.
        cache: the cache to fill.
        encode: the text encoders.
        rank: this process.
        world_size: the number of processes, which divide the samples.
    """
    missing = _missing(samples[rank::world_size], cache, "text encoder outputs")
    if not missing:
        return
    if not cache.in_memory:
        _make_writable({sample.text_file.parent for sample in missing})
    pairs = [(cache.variants.texts(sample), sample) for sample in missing]
    # Sorted by length, so that one long text doesn't make a batch of short ones longer, and so that
    # equal texts are next to each other and encoded once.
    pairs.sort(key=lambda pair: (len(pair[0][0]), pair[0]))
    with (
        progress_bar("caching text encoder outputs", len(missing), unit="captions") as bar,
        background_writer() as write,
    ):
        for batch in _text_batches(pairs):
            encoded = _encode_texts(set(chain.from_iterable(texts for texts, _ in batch)), encode)
            write(_write_texts, cache, batch, encoded)
            bar.update(len(batch))


TextsOfSample = tuple[tuple[str, ...], Sample]


def _text_batches(pairs: Iterable[TextsOfSample]) -> Iterator[list[TextsOfSample]]:
    """Yield the samples in lists that have about a batch of different texts."""
    batch: list[TextsOfSample] = []
    different: set[str] = set()
    for texts, sample in pairs:
        batch.append((texts, sample))
        different.update(texts)
        if len(different) >= TEXTS_PER_BATCH:
            yield batch
            batch, different = [], set()
    if batch:
        yield batch


def _encode_texts(texts: Iterable[str], encode: EncodeTexts) -> dict[str, EncodedText]:
    """Return the outputs of each text."""
    ordered = sorted(texts)
    encoded: dict[str, EncodedText] = {}
    for start in range(0, len(ordered), TEXTS_PER_BATCH):
        batch = ordered[start : start + TEXTS_PER_BATCH]
        outputs = encode(batch)
        for i, text in enumerate(batch):
            encoded[text] = EncodedText(*(tensor[i].clone() for tensor in outputs))
    return encoded


def _write_texts(
    cache: TextCache, batch: Iterable[TextsOfSample], encoded: Mapping[str, EncodedText]
) -> None:
    for texts, sample in batch:
        cache.write(sample, [encoded[text] for text in texts])


# --------------------------------------------------------------------------------------- common


def _missing(samples: Sequence[Sample], cache: LatentCache | TextCache, what: str) -> list[Sample]:
    """Return the samples whose cache isn't valid, and log how many they are and why."""
    reasons: Counter[str] = Counter()
    missing = []
    for sample in samples:
        reason = cache.invalid_reason(sample)
        if reason is not None:
            missing.append(sample)
            reasons[reason] += 1
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    to_encode = f"; to encode: {counts}" if missing else ""
    num_cached = len(samples) - len(missing)
    log.info("%s: %d of %d are cached%s", what, num_cached, len(samples), to_encode)
    return missing


def _make_writable(folders: Iterable[Path]) -> None:
    """Create folders and test writing to them, before anything is encoded.

    Temporary files that killed processes have left there are removed.
    """
    for folder in folders:
        try:
            make_writable_folder(folder)
        except OSError as error:
            raise RunError(
                f"{folder}: caches can't be written here ({error.strerror}); choose a writable "
                "folder with --cache_dir"
            ) from None
        remove_left_over(folder)
