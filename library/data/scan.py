"""Scan: the folders and metadata of the datasets become Samples. Reads directory entries, headers and captions; no pixels.

What was learnt of a picture before is taken from the index (known_files.py) while the file stays as it is.
"""

import dataclasses
import gc
import hashlib
import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from library.data.buckets import Buckets
from library.data.captions import BadCaption, read_caption
from library.data.file_index import FileIndex, FileStamp, file_stamp
from library.data.metadata_file import BadMetadata, read_metadata
from library.data.samples import DatasetConfig, Sample, Subset
from library.data.sidecars import CaptionFolder, ConditioningFolder, MetadataCache, MetadataKeyResolver, some
from library.errors import OptionError
from library.images import PLUGINS, ImageError, is_large, read_image_info, readable_extensions
from library.log import log
from library.size import Size


@dataclass(frozen=True)
class Dataset:
    """What was found for one DatasetPlan: its samples, in folder and name order.

    Attributes:
        validation: samples that are held out, each once.
    """

    plan: DatasetConfig
    samples: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()

    @property
    def num_samples(self) -> int:
        """Pictures of an epoch, repeats counted."""
        return sum(sample.repeats for sample in self.samples)

    def kept(self, left_out: Iterable[Sample]) -> "Dataset":
        """The dataset without these samples."""
        files = {id(sample) for sample in left_out}
        samples, validation = (
            tuple(sample for sample in part if id(sample) not in files) for part in (self.samples, self.validation)
        )
        return dataclasses.replace(self, samples=samples, validation=validation)


def scan(
    plans: Sequence[DatasetConfig],
    known: FileIndex | None = None,
    *,
    skip_bad_images: bool = False,
    allow_missing_captions: bool = False,
    cache_dir: Path | None = None,
    seed: int = 0,
) -> list[Dataset]:
    """Find the pictures and captions of the datasets.

    Args:
        known: what was learnt of the files before; what is learnt now is added.
        cache_dir: where cache files lie; None: beside the pictures.
        seed: chooses the pictures that are held out where a plan has no seed of its own.

    Raises OptionError with all folders, captions and picture headers that can't be used, or if nothing is left.
    """
    scanner = _Scanner(known or FileIndex(), cache_dir, allow_missing_captions=allow_missing_captions)
    with _without_garbage_collection():
        datasets = [scanner.dataset(number, plan, seed) for number, plan in enumerate(plans)]
    scanner.tell(skip_bad_images=skip_bad_images)
    if scanner.mistakes:
        raise OptionError(*scanner.mistakes)
    if not any(dataset.samples for dataset in datasets):
        sources = ", ".join(str(subset.source) for plan in plans for subset in plan.subsets) or "no folder at all"
        raise OptionError(f"no pictures to train on: looked for {' '.join(readable_extensions())} in {sources}")
    return datasets


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Nearly all objects that a scan makes are kept, and looking for garbage among them takes a quarter of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Found(NamedTuple):
    """A picture before its size is known."""

    folder: str
    name: str
    stamp: FileStamp | None
    caption: str
    tags: str
    size: Size | None = None
    aesthetic_score: float | None = None


class _Scanner:
    def __init__(self, known: FileIndex, cache_dir: Path | None, *, allow_missing_captions: bool):
        self.known = known
        self.cache_dir = cache_dir
        self.allow_missing_captions = allow_missing_captions
        self.extensions = readable_extensions()
        self.mistakes: list[str] = []
        self.bad_images: list[str] = []
        self.without_caption: list[str] = []
        self.empty_captions: list[str] = []
        self.cache_stems: set[str] = set()
        self._real_folders: dict[str, str] = {}
        self.looks: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------------------- datasets

    def dataset(self, number: int, plan: DatasetConfig, seed: int) -> Dataset:
        buckets = Buckets(plan.buckets)
        training: list[Sample] = []
        validation: list[Sample] = []
        regularisation: list[Sample] = []
        for subset in plan.subsets:
            samples = list(self._samples(subset, number, buckets))
            if subset.is_reg:
                regularisation += samples
                continue
            kept, held_out = split(samples, plan.validation_split, seed if plan.validation_seed is None else plan.validation_seed)  # fmt: skip
            training += kept
            validation += held_out
        if regularisation:
            training += self._balanced(regularisation, sum(sample.repeats for sample in training))
        return Dataset(plan, tuple(training), tuple(validation))

    def _balanced(self, samples: Sequence[Sample], wanted: int) -> list[Sample]:
        kept = balance(samples, wanted)
        if len(kept) < len(samples):
            log.warning("%d of %d regularisation pictures are not used: there are more than training pictures", len(samples) - len(kept), len(samples))  # fmt: skip
        return kept

    def _samples(self, subset: Subset, number: int, buckets: Buckets) -> Iterator[Sample]:
        found = self._in_metadata(subset) if subset.metadata_file else self._in_folders(subset)
        conditioning = ConditioningFolder(subset, self.extensions) if subset.conditioning_data_dir else None
        smallest = buckets.plan.step
        for folder, name, stamp, caption, tags, size, score in found:
            file = f"{folder}{os.sep}{name}"
            try:
                size = size or self._size(folder, name, stamp, file)
                fit = buckets.fit(size)
                if 0 in fit.bucket:
                    raise ImageError(f"its size {size} is below one bucket step of {smallest} pixels")
                partner = conditioning.of(name, size) if conditioning else None
            except ImageError as error:
                self.bad_images.append(f"{file}: {error}")
                continue
            stem = self._cache_stem(subset, folder, name, number, fit.bucket)
            yield Sample(file, caption, tags, subset, number, size, fit, stem, subset.num_repeats, partner, score)
        if conditioning:
            conditioning.tell()

    def _size(self, folder: str, name: str, stamp: FileStamp | None, file: str) -> Size:
        kept = self.known.get(folder, name, stamp).get("look") if stamp else None
        if kept is None:
            look = read_image_info(file)
            kept = [*look.size, look.is_turned, look.is_animated]
            if stamp:
                self.known.learn(folder, name, stamp, look=kept)
        width, height, is_turned, is_animated = kept
        size = Size(width, height)
        if is_turned or is_animated or is_large(size):
            self.looks["turned"] += is_turned
            self.looks["animated"] += is_animated
            self.looks["large"] += is_large(size)
        return size

    def _cache_stem(self, subset: Subset, folder: str, name: str, number: int, bucket: Size) -> str:
        """Where the sample's caches lie, without endings: the picture's path without its own, made longer where another
        sample has that already (docs/differences.md)."""
        base = f"{folder if self.cache_dir is None else self._cache_folder(folder)}{os.sep}{name}"
        stem = base.rpartition(".")[0]
        return next(free for free in self._stems(stem, base, bucket, number) if self._take(free))

    def _take(self, stem: str) -> bool:
        """Whether no sample has this stem yet, however its folder was spelled; now one has."""
        folder, _, name = stem.rpartition(os.sep)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        key = os.path.normcase(f"{self._real_folders[folder]}{os.sep}{name}")
        is_free = key not in self.cache_stems
        self.cache_stems.add(key)
        return is_free

    def _stems(self, stem: str, base: str, bucket: Size, number: int) -> Iterator[str]:
        yield stem
        if number > 0:
            yield f"{stem}_{bucket}"
        yield base
        yield f"{base}_{bucket}"
        yield from (f"{base}_{count}" for count in itertools.count(2))

    def _cache_folder(self, folder: str) -> str:
        assert self.cache_dir is not None
        full = os.path.abspath(folder)
        digest = hashlib.blake2b(full.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        return os.path.join(self.cache_dir, f"{os.path.basename(full)}-{digest}")

    # -------------------------------------------------------------------------------------------------------- folders

    def _in_folders(self, subset: Subset) -> Iterator[_Found]:
        assert subset.image_dir is not None
        any_image = False
        for folder in _folders(subset.image_dir) if subset.recursive else [str(subset.image_dir)]:
            try:
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=attrgetter("name"))
            except OSError as error:
                self.mistakes.append(f"{folder}: can't be read: {error.strerror}")
                continue
            images = [entry for entry in entries if entry.name.lower().endswith(self.extensions)]
            any_image = any_image or bool(images)
            self._tell_missing_plugins(folder, entries)
            if images:
                yield from self._in_folder(subset, folder, images, {entry.name: entry for entry in entries})
        if not any_image:
            names = sorted(os.listdir(subset.image_dir))
            log.warning("%s: no pictures in it (%s)", subset.image_dir, some(names) or "empty")

    def _in_folder(
        self, subset: Subset, folder: str, images: Sequence[os.DirEntry], entries: Mapping[str, os.DirEntry]
    ) -> Iterator[_Found]:
        captions = CaptionFolder(subset, folder, [entry.name for entry in images], entries)
        if captions.problem and not self.allow_missing_captions:
            self.mistakes.append(captions.problem)
        info = MetadataCache(folder) if subset.cache_info else None
        for entry in images:
            own = self._caption(subset, captions, entry.name, info)
            caption = (subset.class_tokens or "") if own is None else own
            try:
                stamp = file_stamp(entry)
            except OSError:
                self.bad_images.append(f"{entry.path}: the link leads nowhere")
                continue
            size = None
            if info:
                with suppress(ImageError):  # _samples tells
                    size = self._size(folder, entry.name, stamp, entry.path)
            yield _Found(folder, entry.name, stamp, caption, caption, size)
            if info and size:
                info.add(entry.name, own or "", size)  # without the class tokens, which may be others next time
        if info:
            info.save()

    def _caption(
        self, subset: Subset, captions: "CaptionFolder", name: str, info: "MetadataCache | None"
    ) -> str | None:
        """The picture's own caption; None if it has none."""
        file = captions.file_of(name.rpartition(".")[0])
        if file is None:
            remembered = info.caption(name) if info else None
            if remembered is None and subset.class_tokens is None:
                self.without_caption.append(os.path.join(captions.folder, name))
            return remembered
        entry = captions.entries[file]
        try:
            caption = self._lines(captions.folder, entry)
        except (OSError, BadCaption) as error:
            reason = str(error) if isinstance(error, BadCaption) else f"can't be read: {error.strerror}"
            self.mistakes.append(f"{entry.path}: {reason}")
            return ""
        if not caption:
            self.empty_captions.append(entry.path)
        return caption if subset.captions.enable_wildcard else caption.partition("\n")[0]

    def _lines(self, folder: str, entry: os.DirEntry) -> str:
        """All lines of a caption file. Raises OSError, BadCaption."""
        stamp = file_stamp(entry)
        lines = self.known.get(folder, entry.name, stamp).get("lines")
        if lines is None:
            lines = read_caption(entry.path, all_lines=True)
            self.known.learn(folder, entry.name, stamp, lines=lines)
        return lines

    def _tell_missing_plugins(self, folder: str, entries: Sequence[os.DirEntry]) -> None:
        missing = tuple(ending for ending in PLUGINS if ending not in self.extensions)
        names = [entry.name.lower() for entry in entries if entry.name.lower().endswith(missing)]
        for ending in missing:
            if count := sum(name.endswith(ending) for name in names):
                _, package = PLUGINS[ending]
                log.warning("%s: %d %s pictures are not used; they need: pip install %s", folder, count, ending, package)  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- metadata

    def _in_metadata(self, subset: Subset) -> Iterator[_Found]:
        assert subset.metadata_file is not None
        relative: list[str] = []
        missing: list[str] = []
        stems = MetadataKeyResolver(self.extensions)
        try:
            for entry in read_metadata(subset.metadata_file, subset.captions):
                if os.path.isabs(entry.key):
                    base = ""
                elif subset.image_dir is None:
                    relative.append(entry.key)
                    continue
                else:
                    base = str(subset.image_dir)
                path = stems.resolve(os.path.join(base, entry.key), trusted=entry.size is not None)
                if path is None:
                    missing.append(entry.key)
                    continue
                folder, name = os.path.split(path)
                if not entry.caption:
                    self.without_caption.append(path)
                yield _Found(
                    folder, name, stems.stamp(path), entry.caption, entry.tags, entry.size, entry.aesthetic_score
                )
        except BadMetadata as error:
            self.mistakes += str(error).splitlines()
        if relative:
            self.mistakes.append(f"{subset.metadata_file}: {len(relative)} pictures have relative paths, which need image_dir: {some(relative)}")  # fmt: skip
        if missing:
            self.bad_images += [f"{key}: no such picture in {subset.image_dir or 'any folder'} ({subset.metadata_file})" for key in missing]  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- told

    def tell(self, *, skip_bad_images: bool) -> None:
        """Say what was found odd; what stops the run becomes mistakes."""
        if self.bad_images and skip_bad_images:
            listed = "\n  ".join(self.bad_images)
            log.warning("%d pictures can't be read and are left out (--skip_bad_images):\n  %s", len(self.bad_images), listed)  # fmt: skip
        elif self.bad_images:
            self.mistakes += [*self.bad_images, "mend or remove these pictures, or go on without them by --skip_bad_images"]  # fmt: skip
        if self.without_caption:
            shown = some(self.without_caption)
            log.warning("%d pictures have no caption and are trained with an empty one: %s", len(self.without_caption), shown)  # fmt: skip
        if self.empty_captions:
            log.warning("%d caption files are empty: %s", len(self.empty_captions), some(self.empty_captions))
        for kind, words in (
            ("turned", "pictures are turned upright as their EXIF says"),
            ("animated", "pictures are animated; their first frame is used"),
            ("large", "pictures have more than 89 million pixels; decoding them takes long and much memory"),
        ):
            if self.looks[kind]:
                (log.info if kind == "turned" else log.warning)("%d %s", self.looks[kind], words)


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """The samples that are trained and those held out, `share` of them, each in the given order; held out ones once."""
    count = len(samples) - math.ceil(len(samples) * (1 - share))
    if not count:
        return list(samples), []
    shuffled = list(range(len(samples)))
    random.Random(seed).shuffle(shuffled)
    held_out = set(shuffled[len(samples) - count :])
    return (
        [sample for i, sample in enumerate(samples) if i not in held_out],
        [dataclasses.replace(samples[i], repeats=1) for i in sorted(held_out)],
    )


def balance(samples: Sequence[Sample], wanted: int) -> list[Sample]:
    """Regularisation samples, as many as `wanted` with repeats: first ones first, all once more often if they are too few."""
    kept: list[Sample] = []
    count = 0
    for sample in samples:
        if count >= wanted:
            break
        kept.append(sample)
        count += sample.repeats
    more, rest = divmod(max(0, wanted - count), len(kept)) if kept else (0, 0)
    return [dataclasses.replace(sample, repeats=sample.repeats + more + (i < rest)) for i, sample in enumerate(kept)]


def _folders(top: Path) -> Iterator[str]:
    """`top` and all folders in it, sorted; links are followed, each folder is visited once."""
    visited: set[str] = set()
    for folder, below, _ in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            below.clear()
            continue
        visited.add(real)
        below.sort()
        yield folder
