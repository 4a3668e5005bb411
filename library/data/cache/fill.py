"""Fill caches: decode and encode what they lack, before training. And the audit of pictures that no cache will decode.

The one pass that decodes runs to its end and tells all pictures that can't be used. Decoding, encoding and writing go on at
the same time: threads decode ahead, another writes behind.
"""

import functools
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from library import images
from library.data.augment import Pixels, load_conditioning, load_pixels
from library.data.cache.latents import LatentCache, Latents, SourceStamp, TextCache, source_stamp
from library.data.file_index import FileIndex, file_stamp
from library.data.samples import Sample
from library.errors import RunError
from library.files import make_writable_folder, remove_left_over
from library.images import ImageError
from library.log import log, progress_bar
from library.models.inpainting import masked_images
from library.models.text_encoders import EncodedText
from library.models.vae import finite_samples
from library.rng import generator
from library.size import Size

EncodeImages = Callable[[Tensor, Tensor], Tensor]
"""(images [B, 3, H, W] in -1..1, noise [B, 4, H/8, W/8]) -> raw latents, on the CPU"""

EncodeTexts = Callable[[Sequence[str]], EncodedText]
"""captions -> their encoder outputs, [B, ...], on the CPU"""

TEXTS_AT_ONCE = 64
_THREADS = max(2, min(8, os.cpu_count() or 1))
_WRITES_AHEAD = 4  # batches

T = TypeVar("T")
R = TypeVar("R")


class RejectedSample(NamedTuple):
    """A sample that can't be trained on, and why."""

    sample: Sample
    reason: str


class _Loaded(NamedTuple):
    """A decoded picture, what is to be encoded of it, and what to remember of its file.

    Attributes:
        inputs: of the VAE, by the names of Latents: an image [3, H, W] and the noise of its posterior sample [4, H/8, W/8].
        cells: what an inpainting model is to paint, [1, H/8, W/8], for those of the inputs that it sees.
    """

    sample: Sample
    pixels: Pixels
    origin: SourceStamp
    inputs: dict[str, tuple[Tensor, Tensor]]
    cells: dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------------- latents


def fill_latents(
    samples: Sequence[Sample],
    cache: LatentCache,
    encode: EncodeImages,
    batch_size: int,
    *,
    share: tuple[int, int] = (0, 1),
    anew: bool = False,
) -> list[RejectedSample]:
    """Encode the samples whose latents the cache lacks; returns those that can't be.

    Args:
        batch_size: pictures that are encoded at once, mirrored ones counted.
        anew: encode those that it has, too; each is kept until its new one is whole.
        share: (rank, processes): look after every so many-th sample. Shares are cut from all samples, not from the missing
            ones, which change while other processes write.
    """
    rank, processes = share
    mine = samples[rank::processes]
    missing = list(mine) if anew else _missing(mine, cache, "latents")
    if not missing:
        return []
    _try_folders(sample.latents_file.parent for sample in missing if not cache.in_memory)
    bad: list[RejectedSample] = []
    with progress_bar("caching latents", len(missing), unit="pictures") as bar, _background_writer() as write:
        load = functools.partial(_load, for_inpainting=cache.for_inpainting)
        batches = _batches_by_bucket(missing, batch_size, for_inpainting=cache.for_inpainting)
        for batch, loaded in _ahead_in_batches(load, batches):
            good = [one for one in loaded if isinstance(one, _Loaded)]
            bad += [one for one in loaded if isinstance(one, RejectedSample)]
            if good:
                found, encoded = _encode(good, encode, batch_size)
                bad += found
                write(_write_latents, cache, encoded)
            bar.update(len(batch))
    return bad


def _load(sample: Sample, *, for_inpainting: bool) -> _Loaded | RejectedSample:
    mask = None
    try:
        raw, origin = source_stamp(sample.path)
        pixels = load_pixels(sample, content=raw)
        if for_inpainting and sample.has_mask:
            mask = pixels.alpha
            if mask is None:
                origin, mask = _with_mask(sample, origin)
    except (OSError, ImageError) as error:
        return RejectedSample(
            sample, str(error) if isinstance(error, ImageError) else f"can't be read: {error.strerror}"
        )
    inputs, cells = {}, {}
    for name, how, turned in (("plain", "", slice(None)), ("flipped", " mirrored", slice(None, None, -1))):
        if name == "flipped" and not sample.subset.pixels.flip_aug:
            continue
        image = torch.from_numpy(images.normalized(pixels.rgb[:, turned]))
        inputs[name] = image, _noise(image, f"{origin.content}{how}")
        if mask is not None:
            seen = "inpainting" if name == "plain" else "inpainting_flipped"
            shown, hidden = masked_images(image[None], torch.from_numpy(mask[:, turned].copy())[None])
            inputs[seen] = shown[0], _noise(image, f"{origin.content} masked{how}")
            cells[seen] = hidden[0]
    return _Loaded(sample, pixels, origin, inputs, cells)


def _with_mask(sample: Sample, origin: SourceStamp) -> tuple[SourceStamp, np.ndarray]:
    """The mask of the sample's conditioning image, and what to remember of both files. Raises OSError, BadImage."""
    assert sample.conditioning is not None
    try:
        raw, own = source_stamp(Path(sample.conditioning))
        mask = load_conditioning(sample, flipped=False, content=raw)[..., 0].astype(np.float32) / 255
    except (OSError, ImageError) as error:
        reason = f"can't be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise ImageError(f"its conditioning image {sample.conditioning}: {reason}") from None
    return origin._replace(mask=own), mask


def _noise(image: Tensor, content: str) -> Tensor:
    """The noise of a posterior sample: a function of the picture's content."""
    height, width = image.shape[1] // 8, image.shape[2] // 8
    return torch.randn(4, height, width, generator=generator("posterior", content, width, height))


def _encode(loaded: Sequence[_Loaded], encode: EncodeImages, batch_size: int) -> tuple[list[RejectedSample], list[tuple[Sample, Latents, SourceStamp]]]:  # fmt: skip
    jobs = [(one, name) for name in Latents._fields for one in loaded if name in one.inputs]
    inputs = [one.inputs[name] for one, name in jobs]
    encoded = [
        encode(*map(torch.stack, zip(*inputs[i : i + batch_size], strict=True)))
        for i in range(0, len(inputs), batch_size)
    ]
    latents = torch.cat(encoded).cpu().float()
    finite = finite_samples(latents).tolist()
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    are_finite = dict.fromkeys(map(id, loaded), True)
    for (one, name), own, is_finite in zip(jobs, latents, finite, strict=True):
        found[id(one)][name] = torch.cat([one.cells[name], own]) if name in one.cells else own.clone()
        are_finite[id(one)] &= is_finite
    bad, good = [], []
    for one in loaded:
        if are_finite[id(one)]:
            mask = None if one.pixels.alpha is None else torch.from_numpy(one.pixels.alpha.copy())
            good.append((one.sample, Latents(**found[id(one)], mask=mask), one.origin))
        else:
            bad.append(RejectedSample(one.sample, "the VAE gives latents that aren't finite, in float32 too"))
    return bad, good


def _write_latents(cache: LatentCache, encoded: Iterable[tuple[Sample, Latents, SourceStamp]]) -> None:
    for sample, latents, origin in encoded:
        cache.write(sample, latents, origin)


def _batches_by_bucket(samples: Iterable[Sample], batch_size: int, *, for_inpainting: bool) -> list[list[Sample]]:
    """Batches of one bucket each, of at most `batch_size` inputs of the VAE: mirrored and masked pictures count, too."""
    by_bucket: dict[tuple[Size, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        views = (2 if sample.subset.pixels.flip_aug else 1) * (2 if for_inpainting and sample.has_mask else 1)
        by_bucket[sample.fit.bucket, views].append(sample)
    batches = []
    for (_, views), group in by_bucket.items():
        size = max(1, batch_size // views)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


# --------------------------------------------------------------------------------------------------------------- audit


def audit(samples: Sequence[Sample], known: FileIndex, *, share: tuple[int, int] = (0, 1)) -> list[RejectedSample]:
    """Decode every picture once, to find those that can't be used before training starts.

    What was decoded whole before, and hasn't changed since, isn't decoded again.
    """
    rank, processes = share
    wanted: dict[str, Size | None] = {}
    for sample in samples[rank::processes]:
        wanted[sample.file] = sample.size
        if sample.conditioning is not None:
            wanted.setdefault(sample.conditioning, None)
    unseen = [(file, size) for file, size in wanted.items() if not _was_decoded(file, known)]
    reasons: dict[str, str] = {}
    with progress_bar("checking pictures", len(unseen), unit="pictures") as bar:
        for (file, _), found in _ahead(_decode_once, unseen):
            if isinstance(found, SourceStamp):
                known.learn(*os.path.split(file), found.stamp, decoded=True, content=found.content)
            else:
                reasons[file] = found
            bar.update()
    return [
        RejectedSample(
            sample, reasons[file] if file == sample.file else f"its conditioning image {file}: {reasons[file]}"
        )
        for sample in samples
        for file in (sample.file, sample.conditioning)
        if file in reasons
    ]


def _was_decoded(file: str, known: FileIndex) -> bool:
    try:
        return "decoded" in known.get(*os.path.split(file), file_stamp(file))
    except OSError:
        return False


def _decode_once(wanted: tuple[str, Size | None]) -> SourceStamp | str:
    """What to remember of the file, or why it can't be used."""
    file, size = wanted
    try:
        raw, origin = source_stamp(Path(file))
        pixels = images.decode(raw, file)
    except (OSError, ImageError) as error:
        return str(error) if isinstance(error, ImageError) else f"can't be read: {error.strerror}"
    found = Size(pixels.shape[1], pixels.shape[0])
    return origin if size in (None, found) else f"it was {size} when the dataset was read, and is {found} now"


def refuse_or_skip(bad: Sequence[RejectedSample], *, skip: bool) -> None:
    """Tell all pictures that can't be used; raises RunError unless they may be left out."""
    told = "\n  ".join(f"{sample.path}: {reason}" for sample, reason in bad)
    if bad and not skip:
        raise RunError(
            f"{len(bad)} pictures can't be used; mend or remove them, or go on without them by --skip_bad_images:\n  {told}"
        )
    if bad:
        log.warning("%d pictures can't be used and are left out (--skip_bad_images):\n  %s", len(bad), told)


# ---------------------------------------------------------------------------------------------------------------- text


def fill_text(
    samples: Sequence[Sample], cache: TextCache, encode: EncodeTexts, *, share: tuple[int, int] = (0, 1)
) -> None:
    """Encode the texts whose outputs the cache lacks; each different one once, as far as they stand near each other."""
    rank, processes = share
    missing = _missing(samples[rank::processes], cache, "text-encoder outputs")
    if not missing:
        return
    _try_folders(sample.text_file.parent for sample in missing if not cache.in_memory)
    texts = {id(sample): cache.texts.of(sample) for sample in missing}
    # By length, so that a batch isn't as long as one odd text in it; equal captions stand beside each other.
    missing.sort(key=lambda sample: (len(texts[id(sample)][0]), texts[id(sample)]))
    with (
        progress_bar("caching text-encoder outputs", len(missing), unit="captions") as bar,
        _background_writer() as write,
    ):
        for some in _windows(missing, lambda sample: texts[id(sample)]):
            encoded = _encode_texts({text for sample in some for text in texts[id(sample)]}, encode)
            rows = [(sample, [encoded[text] for text in texts[id(sample)]]) for sample in some]
            write(_write_texts, cache, rows)
            bar.update(len(some))


def _windows(samples: Sequence[Sample], texts_of: Callable[[Sample], Sequence[str]]) -> Iterator[list[Sample]]:
    """Runs of samples with a batch's worth of different texts."""
    window: list[Sample] = []
    different: set[str] = set()
    for sample in samples:
        window.append(sample)
        different.update(texts_of(sample))
        if len(different) >= TEXTS_AT_ONCE:
            yield window
            window, different = [], set()
    if window:
        yield window


def _encode_texts(texts: Iterable[str], encode: EncodeTexts) -> dict[str, EncodedText]:
    ordered = sorted(texts)
    encoded: dict[str, EncodedText] = {}
    for start in range(0, len(ordered), TEXTS_AT_ONCE):
        batch = ordered[start : start + TEXTS_AT_ONCE]
        outputs = encode(batch)
        for i, text in enumerate(batch):
            encoded[text] = EncodedText(*(part[i].clone() for part in outputs))
    return encoded


def _write_texts(cache: TextCache, rows: Iterable[tuple[Sample, Sequence[EncodedText]]]) -> None:
    for sample, encoded in rows:
        cache.write(sample, encoded)


# -------------------------------------------------------------------------------------------------------------- common


def _missing(samples: Sequence[Sample], cache: LatentCache | TextCache, what: str) -> list[Sample]:
    """The samples whose cache isn't valid; how many, and why, is told."""
    reasons: Counter[str] = Counter()
    missing = []
    for sample in samples:
        if reason := cache.problem(sample):
            missing.append(sample)
            reasons[reason] += 1
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    log.info("%s: %d of %d are cached%s", what, len(samples) - len(missing), len(samples), f"; to encode: {told}" if told else "")  # fmt: skip
    return missing


def _try_folders(folders: Iterable[Path]) -> None:
    """Make the folders and write in them, before anything is encoded; what killed processes left there is removed."""
    for folder in set(folders):
        try:
            make_writable_folder(folder)
        except OSError as error:
            raise RunError(
                f"{folder}: caches can't be written here ({error.strerror}); give --cache_dir a folder where they can"
            ) from None
        remove_left_over(folder)


@contextmanager
def _background_writer() -> Iterator[Callable[..., None]]:
    """Calls functions one after the other on a thread, a few behind; what one raises is raised at a later call or the end."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1) as pool:

        def call(function: Callable[..., None], *arguments: object) -> None:
            while waiting and (len(waiting) >= _WRITES_AHEAD or waiting[0].done()):
                waiting.popleft().result()
            waiting.append(pool.submit(function, *arguments))

        yield call
        while waiting:
            waiting.popleft().result()


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """(item, function(item)) in order, computed a few ahead by threads (decoding releases the interpreter lock)."""
    items = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = deque((item, pool.submit(function, item)) for item in islice(items, 2 * _THREADS))
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
            waiting.extend((item, pool.submit(function, item)) for item in islice(items, 1))


def _ahead_in_batches(function: Callable[[T], R], batches: Sequence[Sequence[T]]) -> Iterator[tuple[Sequence[T], list[R]]]:  # fmt: skip
    """(batch, [function(item) of each]), the items computed ahead across batches."""
    results = _ahead(function, (item for batch in batches for item in batch))
    for batch in batches:
        yield batch, [result for _, result in islice(results, len(batch))]
