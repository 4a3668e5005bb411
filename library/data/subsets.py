"""Scan: the folders of the datasets become Samples. Reads directory entries, picture headers and captions; no pixels."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.buckets import Buckets
from library.data.captions import BadCaption, read_caption
from library.data.images import EXTENSIONS, BadImage, read_size
from library.data.sample import DatasetPlan, Sample, Subset
from library.data.size import Size
from library.errors import OptionError
from library.log import log

SHOWN = 5  # names shown of a long list, where the rest is a count


@dataclass(frozen=True)
class Dataset:
    """What was found for one DatasetPlan: its samples, in folder and name order."""

    plan: DatasetPlan
    samples: tuple[Sample, ...]

    @property
    def num_samples(self) -> int:
        """Pictures of an epoch, repeats counted."""
        return sum(sample.subset.num_repeats for sample in self.samples)


def scan(plans: Sequence[DatasetPlan], *, skip_bad_images: bool) -> list[Dataset]:
    """Find the pictures and captions of the datasets.

    Raises OptionError with all folders, captions and picture headers that can't be used, or if nothing is left.
    """
    scanner = _Scanner(skip_bad_images)
    datasets = [Dataset(plan, tuple(scanner.samples(number, plan))) for number, plan in enumerate(plans)]
    scanner.tell()
    if scanner.mistakes:
        raise OptionError(*scanner.mistakes)
    if not any(dataset.samples for dataset in datasets):
        folders = ", ".join(str(subset.image_dir) for plan in plans for subset in plan.subsets) or "no folder at all"
        raise OptionError(f"no pictures to train on: looked for {' '.join(EXTENSIONS)} in {folders}")
    return datasets


class _Scanner:
    def __init__(self, skip_bad_images: bool):
        self.skip_bad_images = skip_bad_images
        self.mistakes: list[str] = []
        self.bad_images: list[str] = []
        self.without_caption: list[Path] = []
        self.cache_stems: set[Path] = set()

    def samples(self, number: int, plan: DatasetPlan) -> Iterable[Sample]:
        buckets = Buckets(plan.buckets)
        for subset in plan.subsets:
            names = sorted(entry.name for entry in subset.image_dir.iterdir())
            pictures = [name for name in names if Path(name).suffix.lower() in EXTENSIONS]
            if not pictures:
                log.warning("%s: no pictures in it (%s)", subset.image_dir, _some(names) or "empty")
            captions = _CaptionFolder(subset, names, pictures)
            for name in pictures:
                path = subset.image_dir / name
                try:
                    size = read_size(path)
                except BadImage as error:
                    self.bad_images.append(f"{path}: {error}")
                    continue
                caption = self._caption(captions, path)
                fit = buckets.fit(size)
                if 0 in fit.bucket:
                    self.bad_images.append(
                        f"{path}: its size {size} is below one bucket step of {plan.buckets.step} pixels"
                    )
                    continue
                yield Sample(path, caption, subset, number, size, fit, self._cache_stem(path, number, fit.bucket))

    def _caption(self, captions: "_CaptionFolder", path: Path) -> str:
        file = captions.file_of(path)
        class_tokens = captions.subset.class_tokens
        if file is None:
            if class_tokens is None:
                self.without_caption.append(path)
            return class_tokens or ""
        try:
            return read_caption(file, all_lines=captions.subset.captions.enable_wildcard)
        except BadCaption as error:
            self.mistakes.append(f"{file}: {error}")
            return ""

    def _cache_stem(self, path: Path, number: int, bucket: Size) -> Path:
        """The picture's path without its ending; made longer where another sample has it already (docs/differences.md)."""
        stem = path.with_suffix("")
        if stem in self.cache_stems and number > 0:
            stem = stem.with_name(f"{stem.name}_{bucket}")
        if stem in self.cache_stems:
            stem = path
        self.cache_stems.add(stem)
        return stem

    def tell(self) -> None:
        if self.bad_images and self.skip_bad_images:
            log.warning(
                "%d pictures can't be read and are left out (--skip_bad_images):\n  %s",
                len(self.bad_images),
                "\n  ".join(self.bad_images),
            )
        elif self.bad_images:
            self.mistakes += [
                *self.bad_images,
                "mend or remove these pictures, or go on without them by --skip_bad_images",
            ]
        if self.without_caption:
            shown = ", ".join(str(path) for path in self.without_caption[:SHOWN])
            log.warning(
                "%d pictures have no caption and are trained with an empty one: %s", len(self.without_caption), shown
            )


class _CaptionFolder:
    """Which caption file belongs to which picture of one folder."""

    def __init__(self, subset: Subset, names: Sequence[str], pictures: Sequence[str]):
        self.subset = subset
        self.names = set(names)
        self.extension = subset.caption_extension
        stems = [Path(name).stem for name in pictures]
        there = Counter(
            extension for extension in (self.extension, ".txt") for stem in stems if stem + extension in self.names
        )
        if not subset.extension_was_chosen and not there[self.extension] and there[".txt"]:
            log.info(
                "%s: no *%s, so captions are read from the %d *.txt", subset.image_dir, self.extension, there[".txt"]
            )
            self.extension = ".txt"

    def file_of(self, path: Path) -> Path | None:
        name = path.stem + self.extension
        return path.with_name(name) if name in self.names else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
