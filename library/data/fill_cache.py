"""Fill caches: decode and encode what they lack, before training. And the audit of pictures that no cache will decode.

The one pass that decodes runs to its end and tells all pictures that can't be used.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from library.data import images
from library.data.cache import LatentCache, Latents, TextCache
from library.data.images import BadImage
from library.data.sample import Sample
from library.draws import generator
from library.errors import RunError
from library.log import log, progress_bar
from library.models.text_encoders import EncodedText
from library.models.vae import finite_samples

EncodeImages = Callable[[Tensor, Tensor], Tensor]
"""(images [B, 3, H, W] in -1..1, noise [B, 4, H/8, W/8]) -> raw latents, on the CPU"""

EncodeTexts = Callable[[Sequence[str]], EncodedText]
"""captions -> their encoder outputs, [B, ...], on the CPU"""

TEXTS_AT_ONCE = 16
_THREADS = 4

T = TypeVar("T")
R = TypeVar("R")


class Bad(NamedTuple):
    """A sample that can't be trained on, and why."""

    sample: Sample
    reason: str


def load_pixels(sample: Sample) -> np.ndarray:
    """The sample's picture in its bucket: [H, W, 3], uint8. Raises BadImage."""
    pixels = images.load_rgb(sample.path)
    if (pixels.shape[1], pixels.shape[0]) != sample.size:
        raise BadImage(
            f"it was {sample.size} when the dataset was read, and is {pixels.shape[1]}x{pixels.shape[0]} now"
        )
    pixels = images.resize(pixels, sample.fit.resized, sample.subset.resize_interpolation)
    return images.center_crop(pixels, sample.fit.bucket)


def fill_latents(
    samples: Sequence[Sample],
    cache: LatentCache,
    encode: EncodeImages,
    batch_size: int,
    *,
    share: tuple[int, int] = (0, 1),
) -> list[Bad]:
    """Encode the samples whose latents the cache lacks; returns those that can't be.

    Args:
        share: (rank, processes): encode every so many-th of the missing ones.
    """
    missing = _missing(samples, cache, "latents")
    rank, processes = share
    mine = [sample for i, sample in enumerate(missing) if i % processes == rank]
    batches = _batches_by_bucket(mine, batch_size)
    bad: list[Bad] = []
    with progress_bar("caching latents", len(mine)) as bar:
        for batch, loaded in zip(batches, _ahead(_load_batch, batches), strict=True):
            good = [
                (sample, pixels) for sample, pixels in zip(batch, loaded, strict=True) if isinstance(pixels, np.ndarray)
            ]
            bad += [
                Bad(sample, str(pixels))
                for sample, pixels in zip(batch, loaded, strict=True)
                if isinstance(pixels, BadImage)
            ]
            if good:
                bad += _encode_and_write(good, cache, encode)
            bar.update(len(batch))
    return bad


def _encode_and_write(batch: list[tuple[Sample, np.ndarray]], cache: LatentCache, encode: EncodeImages) -> list[Bad]:
    latents = encode(*_inputs([pixels for _, pixels in batch]))
    mirrored = {i for i, (sample, _) in enumerate(batch) if sample.subset.flip_aug}
    flipped = encode(*_inputs([batch[i][1][:, ::-1] for i in sorted(mirrored)])) if mirrored else latents[:0]
    flipped_of = dict(zip(sorted(mirrored), flipped, strict=True))
    bad = []
    for i, (sample, _) in enumerate(batch):
        pair = Latents(latents[i].clone(), flipped_of[i].clone() if i in mirrored else None)
        if all(finite_samples(part[None]).all() for part in pair if part is not None):
            cache.write(sample, pair)
        else:
            bad.append(Bad(sample, "the VAE gives latents that aren't finite, in float32 too"))
    return bad


def _inputs(pixels: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The pictures as the VAE takes them, and the noise of their posterior samples: a function of each picture's pixels."""
    stacked = torch.from_numpy(np.stack([images.normalised(array) for array in pixels]))
    shape = (4, stacked.shape[2] // 8, stacked.shape[3] // 8)
    contents = [hashlib.blake2b(np.ascontiguousarray(array).data).hexdigest() for array in pixels]
    return stacked, torch.stack([torch.randn(shape, generator=generator("posterior", content)) for content in contents])


def _load_batch(batch: Sequence[Sample]) -> list[np.ndarray | BadImage]:
    return [_load_or_error(sample) for sample in batch]


def _load_or_error(sample: Sample) -> np.ndarray | BadImage:
    try:
        return load_pixels(sample)
    except BadImage as error:
        return error


def _batches_by_bucket(samples: Iterable[Sample], batch_size: int) -> list[list[Sample]]:
    by_bucket: dict[object, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_bucket[sample.fit.bucket].append(sample)
    return [group[i : i + batch_size] for group in by_bucket.values() for i in range(0, len(group), batch_size)]


def audit(samples: Sequence[Sample]) -> list[Bad]:
    """Decode every picture once, to find those that can't be used before training starts."""
    with progress_bar("checking pictures", len(samples)) as bar:
        found = []
        for sample, pixels in zip(samples, _ahead(_load_or_error, samples), strict=True):
            if isinstance(pixels, BadImage):
                found.append(Bad(sample, str(pixels)))
            bar.update()
        return found


def fill_text(
    samples: Sequence[Sample], cache: TextCache, encode: EncodeTexts, *, share: tuple[int, int] = (0, 1)
) -> None:
    """Encode the captions whose outputs the cache lacks; each different caption once."""
    by_caption: dict[str, list[Sample]] = defaultdict(list)
    for sample in _missing(samples, cache, "text-encoder outputs"):
        by_caption[sample.settled_caption].append(sample)
    rank, processes = share
    captions = list(by_caption)[rank::processes]
    with progress_bar("caching text-encoder outputs", len(captions)) as bar:
        for start in range(0, len(captions), TEXTS_AT_ONCE):
            batch = captions[start : start + TEXTS_AT_ONCE]
            encoded = encode(batch)
            for i, caption in enumerate(batch):
                for sample in by_caption[caption]:
                    cache.write(sample, EncodedText(*(part[i].clone() for part in encoded)))
            bar.update(len(batch))


def _missing(samples: Sequence[Sample], cache: LatentCache | TextCache, what: str) -> list[Sample]:
    """The samples whose cache isn't valid; how many, and why, is told."""
    reasons: dict[str, int] = defaultdict(int)
    missing = []
    for sample in samples:
        if reason := cache.problem(sample):
            missing.append(sample)
            reasons[reason] += 1
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    log.info(
        "%s: %d of %d are cached%s",
        what,
        len(samples) - len(missing),
        len(samples),
        f"; to encode: {told}" if told else "",
    )
    return missing


def refuse_or_skip(bad: Sequence[Bad], *, skip: bool) -> set[Sample]:
    """Tell all pictures that can't be used; raises RunError unless they may be left out, else returns them."""
    told = "\n  ".join(f"{sample.path}: {reason}" for sample, reason in bad)
    if bad and not skip:
        raise RunError(
            f"{len(bad)} pictures can't be used; mend or remove them, or go on without them by --skip_bad_images:\n  {told}"
        )
    if bad:
        log.warning("%d pictures can't be used and are left out (--skip_bad_images):\n  %s", len(bad), told)
    return {sample for sample, _ in bad}


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) of each item in order, computed a few ahead by threads (decoding releases the interpreter lock)."""
    items = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = [pool.submit(function, item) for item in islice(items, 2 * _THREADS)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(items, 1)]
