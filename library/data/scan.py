"""Scan: turns the folders and metadata files of datasets into Samples.

It reads directory entries, image headers and captions, but no pixels. Facts about files that are
unchanged since an earlier scan come from the file index (file_index.py).
"""

import dataclasses
import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from library.data.buckets import Buckets
from library.data.cache.stems import CacheStems
from library.data.captions import CaptionError, read_caption
from library.data.file_index import FileIndex, FileStamp, file_stamp
from library.data.metadata_file import MetadataError, read_entries
from library.data.samples import DatasetConfig, Sample, Subset, balance, split
from library.data.sidecars import (
    CaptionFolder,
    ConditioningFolder,
    MetadataCache,
    MetadataKeyResolver,
    some,
)
from library.errors import OptionError
from library.images import PLUGINS, ImageError, is_large, read_image_info, readable_extensions
from library.log import log
from library.size import Size


@dataclass(frozen=True)
class Dataset:
    """The samples of one DatasetConfig, sorted by folder and name.

    Attributes:
        config: the dataset's settings.
        samples: the samples to train on.
        validation: samples that are held out, each once.
    """

    config: DatasetConfig
    samples: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()

    @property
    def num_samples(self) -> int:
        """The number of samples per epoch, with repeats."""
        return sum(sample.repeats for sample in self.samples)

    def without(self, rejected: Iterable[Sample]) -> "Dataset":
        """Return the dataset without these samples."""
        ids = {id(sample) for sample in rejected}
        return dataclasses.replace(
            self,
            samples=tuple(sample for sample in self.samples if id(sample) not in ids),
            validation=tuple(sample for sample in self.validation if id(sample) not in ids),
        )


def scan(
    configs: Sequence[DatasetConfig],
    file_index: FileIndex | None = None,
    *,
    skip_bad_images: bool = False,
    allow_missing_captions: bool = False,
    cache_dir: Path | None = None,
    seed: int = 0,
) -> list[Dataset]:
    """Find the images and captions of datasets.

    Args:
        configs: the datasets' settings.
        file_index: what is known of files from earlier scans. New facts are added.
        skip_bad_images: skip images whose header can't be read.
        allow_missing_captions: use empty captions where a folder has no file of the extension that
            the user gave.
        cache_dir: folder of all cache files. None means next to the images.
        seed: for choosing the images that are held out, where a dataset has no seed of its own.

    Raises:
        OptionError: folders, captions or images can't be used, or there are no images. It names
            all of them.
    """
    scanner = _Scanner(
        file_index or FileIndex(), cache_dir, allow_missing_captions=allow_missing_captions
    )
    with _without_garbage_collection():
        datasets = [scanner.dataset(i, config, seed) for i, config in enumerate(configs)]
    scanner.report(skip_bad_images=skip_bad_images)
    if scanner.mistakes:
        raise OptionError(*scanner.mistakes)
    if not any(dataset.samples for dataset in datasets):
        sources = [str(subset.source) for config in configs for subset in config.subsets]
        raise OptionError(
            f"no images to train on: looked for {' '.join(readable_extensions())} in "
            f"{', '.join(sources) or 'no folder at all'}"
        )
    return datasets


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Context manager: turns garbage collection off.

    Nearly all objects that a scan makes are kept, and searching them takes a quarter of its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _FoundImage(NamedTuple):
    """An image whose header may not have been read yet."""

    folder: str
    name: str
    stamp: FileStamp | None
    caption: str
    tags: str
    size: Size | None = None
    aesthetic_score: float | None = None

    @property
    def file(self) -> str:
        return f"{self.folder}{os.sep}{self.name}"


class _Scanner:
    def __init__(
        self, file_index: FileIndex, cache_dir: Path | None, *, allow_missing_captions: bool
    ):
        self.file_index = file_index
        self.allow_missing_captions = allow_missing_captions
        self.extensions = readable_extensions()
        self.mistakes: list[str] = []
        self.bad_images: list[str] = []
        self.without_caption: list[str] = []
        self.empty_captions: list[str] = []
        self.num_turned = self.num_animated = self.num_large = 0
        self.cache_stems = CacheStems(cache_dir)

    # ----------------------------------------------------------------------------------- datasets

    def dataset(self, index: int, config: DatasetConfig, seed: int) -> Dataset:
        """Scan one dataset."""
        buckets = Buckets(config.buckets)
        if config.validation_seed is not None:
            seed = config.validation_seed
        training: list[Sample] = []
        validation: list[Sample] = []
        regularization: list[Sample] = []
        for subset in config.subsets:
            samples = list(self._samples(subset, index, buckets))
            if subset.is_reg:
                regularization += samples
            else:
                kept, held_out = split(samples, config.validation_split, seed)
                training += kept
                validation += held_out
        if regularization:
            num_training = sum(sample.repeats for sample in training)
            training += self._balanced(regularization, num_training)
        return Dataset(config, tuple(training), tuple(validation))

    def _balanced(self, samples: Sequence[Sample], wanted: int) -> list[Sample]:
        kept = balance(samples, wanted)
        num_unused = len(samples) - len(kept)
        if num_unused:
            log.warning(
                "%d of %d regularization images are not used: there are more than training images",
                num_unused,
                len(samples),
            )
        return kept

    def _samples(self, subset: Subset, index: int, buckets: Buckets) -> Iterator[Sample]:
        images = self._in_metadata(subset) if subset.metadata_file else self._in_folders(subset)
        conditioning = None
        if subset.conditioning_data_dir:
            conditioning = ConditioningFolder(subset, self.extensions)
        for image in images:
            file = image.file
            try:
                size = image.size or self._size(image.folder, image.name, image.stamp)
                fit = buckets.fit(size)
                if 0 in fit.bucket:
                    step = buckets.settings.bucket_reso_steps
                    raise ImageError(f"its size {size} is below one bucket step of {step} pixels")
                conditioning_file = None
                if conditioning is not None:
                    conditioning_file = conditioning.path_of(image.name, size)
            except ImageError as error:
                self.bad_images.append(f"{file}: {error}")
                continue
            yield Sample(
                file,
                image.caption,
                image.tags,
                subset,
                index,
                size,
                fit,
                self.cache_stems.unique(image.folder, image.name, fit.bucket, index),
                subset.num_repeats,
                conditioning_file,
                image.aesthetic_score,
            )
        if conditioning is not None:
            conditioning.log_unused()

    def _size(self, folder: str, name: str, stamp: FileStamp | None) -> Size:
        """Return the size of an image, from the file index or its header."""
        facts = self.file_index.get(folder, name, stamp).get("look") if stamp else None
        if facts is None:
            info = read_image_info(f"{folder}{os.sep}{name}")
            facts = [*info.size, info.is_turned, info.is_animated]
            if stamp:
                self.file_index.record(folder, name, stamp, look=facts)
        width, height, is_turned, is_animated = facts
        size = Size(width, height)
        if is_turned:
            self.num_turned += 1
        if is_animated:
            self.num_animated += 1
        if is_large(size):
            self.num_large += 1
        return size

    # ------------------------------------------------------------------------------------ folders

    def _in_folders(self, subset: Subset) -> Iterator[_FoundImage]:
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
            self._warn_of_missing_plugins(folder, entries)
            if images:
                any_image = True
                by_name = {entry.name: entry for entry in entries}
                yield from self._in_folder(subset, folder, images, by_name)
        if not any_image:
            names = sorted(os.listdir(subset.image_dir))
            log.warning("%s: no images in it (%s)", subset.image_dir, some(names) or "empty")

    def _in_folder(
        self,
        subset: Subset,
        folder: str,
        images: Sequence[os.DirEntry],
        entries: Mapping[str, os.DirEntry],
    ) -> Iterator[_FoundImage]:
        captions = CaptionFolder(subset, folder, [entry.name for entry in images], entries)
        if captions.problem and not self.allow_missing_captions:
            self.mistakes.append(captions.problem)
        cache = MetadataCache(folder) if subset.cache_info else None
        for entry in images:
            own_caption = self._caption(subset, captions, entry.name, cache)
            caption = (subset.class_tokens or "") if own_caption is None else own_caption
            try:
                stamp = file_stamp(entry)
            except OSError:
                self.bad_images.append(f"{entry.path}: the link points to no file")
                continue
            size = None
            if cache is not None:
                with suppress(ImageError):  # _samples reports it
                    size = self._size(folder, entry.name, stamp)
            yield _FoundImage(folder, entry.name, stamp, caption, caption, size)
            if cache is not None and size is not None:
                # Without the class tokens, which may be different next time.
                cache.add(entry.name, own_caption or "", size)
        if cache is not None:
            cache.save()

    def _caption(
        self, subset: Subset, captions: CaptionFolder, name: str, cache: MetadataCache | None
    ) -> str | None:
        """Return the image's own caption; None if it has none."""
        file = captions.file_of(name.rpartition(".")[0])
        if file is None:
            cached = cache.caption(name) if cache else None
            if cached is None and subset.class_tokens is None:
                self.without_caption.append(os.path.join(captions.folder, name))
            return cached
        entry = captions.entries[file]
        try:
            caption = self._lines(captions.folder, entry)
        except CaptionError as error:
            self.mistakes.append(f"{entry.path}: {error}")
            return ""
        except OSError as error:
            self.mistakes.append(f"{entry.path}: can't be read: {error.strerror}")
            return ""
        if not caption:
            self.empty_captions.append(entry.path)
        return caption if subset.captions.enable_wildcard else caption.partition("\n")[0]

    def _lines(self, folder: str, entry: os.DirEntry) -> str:
        """Return all lines of a caption file. Raises OSError and CaptionError."""
        stamp = file_stamp(entry)
        lines = self.file_index.get(folder, entry.name, stamp).get("lines")
        if lines is None:
            lines = read_caption(entry.path, all_lines=True)
            self.file_index.record(folder, entry.name, stamp, lines=lines)
        return lines

    def _warn_of_missing_plugins(self, folder: str, entries: Sequence[os.DirEntry]) -> None:
        for extension, (_, package) in PLUGINS.items():
            if extension in self.extensions:
                continue
            count = sum(entry.name.lower().endswith(extension) for entry in entries)
            if count:
                log.warning(
                    "%s: %d %s images are not used; they need: pip install %s",
                    folder,
                    count,
                    extension,
                    package,
                )

    # ----------------------------------------------------------------------------------- metadata

    def _in_metadata(self, subset: Subset) -> Iterator[_FoundImage]:
        assert subset.metadata_file is not None
        relative: list[str] = []
        missing: list[str] = []
        resolver = MetadataKeyResolver(self.extensions)
        try:
            for entry in read_entries(subset.metadata_file, subset.captions):
                key = entry.key
                if not os.path.isabs(key):
                    if subset.image_dir is None:
                        relative.append(key)
                        continue
                    key = os.path.join(subset.image_dir, key)
                path = resolver.resolve(key, trusted=entry.size is not None)
                if path is None:
                    missing.append(entry.key)
                    continue
                if not entry.caption:
                    self.without_caption.append(path)
                folder, name = os.path.split(path)
                yield _FoundImage(
                    folder,
                    name,
                    resolver.stamp(path),
                    entry.caption,
                    entry.tags,
                    entry.size,
                    entry.aesthetic_score,
                )
        except MetadataError as error:
            self.mistakes += str(error).splitlines()
        if relative:
            self.mistakes.append(
                f"{subset.metadata_file}: {len(relative)} images have relative paths, which need "
                f"image_dir: {some(relative)}"
            )
        where = f"{subset.image_dir or 'any folder'} ({subset.metadata_file})"
        self.bad_images += [f"{key}: no such image in {where}" for key in missing]

    # ------------------------------------------------------------------------------------- report

    def report(self, *, skip_bad_images: bool) -> None:
        """Log warnings about what was found. What stops the run is added to the mistakes."""
        if self.bad_images and skip_bad_images:
            listed = "\n  ".join(self.bad_images)
            count = len(self.bad_images)
            log.warning(
                "%d images can't be read and are skipped (--skip_bad_images):\n  %s", count, listed
            )
        elif self.bad_images:
            self.mistakes += self.bad_images
            self.mistakes.append("fix or remove these images, or skip them with --skip_bad_images")
        if self.without_caption:
            log.warning(
                "%d images have no caption and are trained with an empty one: %s",
                len(self.without_caption),
                some(self.without_caption),
            )
        if self.empty_captions:
            count, listed = len(self.empty_captions), some(self.empty_captions)
            log.warning("%d caption files are empty: %s", count, listed)
        if self.num_turned:
            log.info("%d images are rotated or mirrored as their EXIF says", self.num_turned)
        if self.num_animated:
            log.warning("%d images are animated; their first frame is used", self.num_animated)
        if self.num_large:
            log.warning(
                "%d images have more than 89 million pixels; decoding them takes long and a lot "
                "of RAM",
                self.num_large,
            )


def _folders(top: Path) -> Iterator[str]:
    """Yield `top` and all folders in it, sorted. Links are followed; each folder is visited once."""
    visited: set[str] = set()
    for folder, subfolders, _ in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        yield folder
