"""Companions of pictures: which caption file, conditioning image or metadata key belongs to which picture."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from library.data.file_index import FileStamp, file_stamp
from library.data.samples import Subset
from library.errors import RunError
from library.files import write_atomically
from library.images import ImageError, read_image_info
from library.log import log
from library.size import Size

SHOWN = 5  # names shown of a long list, where the rest is a count


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


class CaptionFolder:
    """Which caption file belongs to which picture of one folder.

    Attributes:
        problem: what is wrong when the ending that the user gave isn't there at all.
    """

    def __init__(self, subset: Subset, folder: str, images: Sequence[str], entries: Mapping[str, os.DirEntry]):
        """Args: entries: all that lies in the folder, by name."""
        self.folder = folder
        self.entries = entries
        self.extension = subset.caption_extension
        self.problem: str | None = None
        if any(self.file_of(name.rpartition(".")[0]) for name in images):
            return
        there = Counter(self._companions(images))
        if not subset.extension_was_chosen and there[".txt"]:
            log.info("%s: no *%s, so captions are read from the %d *.txt", folder, self.extension, there[".txt"])
            self.extension = ".txt"
        elif subset.extension_was_chosen and subset.class_tokens is None and not subset.cache_info:
            lies = ", ".join(f"{count} *{ending}" for ending, count in there.most_common()) or "no other files of the pictures' names"  # fmt: skip
            self.problem = (
                f"{folder}: no *{self.extension} for its {len(images)} pictures; there are {lies}. Give their ending as "
                "--caption_extension, or train with empty captions by --allow_missing_captions"
            )

    def file_of(self, stem: str) -> str | None:
        """The caption file of a picture: of its own stem, else of its stem without the face that it ends in (_x_y_w_h)."""
        name = stem + self.extension
        if name not in self.entries and stem.count("_") >= 4:
            name = stem.rsplit("_", 4)[0] + self.extension
        return name if name in self.entries else None

    def _companions(self, images: Sequence[str]) -> Iterator[str]:
        """The endings of files that are called like a picture, and are no picture themselves."""
        stems = {name.rpartition(".")[0] for name in images}
        shown = set(images)
        for name in self.entries:
            stem, _, ending = name.rpartition(".")
            if stem in stems and name not in shown and ending != "npz":
                yield f".{ending}"


class ConditioningFolder:
    """Which conditioning image or mask belongs to which picture: the one of its stem."""

    def __init__(self, subset: Subset, extensions: Sequence[str]):
        assert subset.conditioning_data_dir is not None
        self.folder = str(subset.conditioning_data_dir)
        self.by_stem: dict[str, list[str]] = {}
        for name in sorted(os.listdir(self.folder)):
            stem, ending = os.path.splitext(name)
            if ending.lower() in extensions:
                self.by_stem.setdefault(stem, []).append(name)
        self.unused = set(self.by_stem)

    def of(self, name: str, size: Size) -> str:
        """The partner of a picture. Raises BadImage if there is none, several, or one of another shape."""
        stem = os.path.splitext(name)[0]
        self.unused.discard(stem)
        names = self.by_stem.get(stem, [])
        if len(names) != 1:
            raise ImageError(f"{len(names) or 'no'} conditioning images of its name in {self.folder}: {', '.join(names) or 'one is needed'}")  # fmt: skip
        path = os.path.join(self.folder, names[0])
        try:
            own = read_image_info(path).size
        except ImageError as error:
            raise ImageError(f"its conditioning image {path}: {error}") from None
        if abs(own.width * size.height / own.height - size.width) > max(1, size.width / own.width):
            raise ImageError(f"its conditioning image {path} is {own}, of another shape than the picture's {size}")
        return path

    def tell(self) -> None:
        if self.unused:
            log.info("%s: %d conditioning images have no picture: %s", self.folder, len(self.unused), some(sorted(self.unused)))  # fmt: skip


class MetadataKeyResolver:
    """The picture that a metadata key means: keys of sd-scripts' tools may lack the ending."""

    def __init__(self, extensions: Sequence[str]):
        self.extensions = extensions
        self._listed: dict[str, dict[str, os.DirEntry]] = {}

    def resolve(self, path: str, *, trusted: bool) -> str | None:
        """The picture's path; None if there is none. A whole path is believed where its size is known too (`trusted`)."""
        folder, name = os.path.split(path)
        if trusted and os.path.splitext(name)[1].lower() in self.extensions:
            return path
        names = self._names(folder)
        if name in names:
            return path
        endings = (*sorted(self.extensions), *sorted(map(str.upper, self.extensions)))
        return next((path + ending for ending in endings if name + ending in names), None)

    def stamp(self, path: str) -> FileStamp | None:
        """The picture's size and time, where its folder was looked at; None if not."""
        folder, name = os.path.split(path)
        entry = self._listed.get(folder, {}).get(name)
        try:
            return file_stamp(entry) if entry else None
        except OSError:
            return None

    def _names(self, folder: str) -> dict[str, os.DirEntry]:
        if folder not in self._listed:
            try:
                with os.scandir(folder) as entries:
                    self._listed[folder] = {entry.name: entry for entry in entries}
            except OSError:
                self._listed[folder] = {}
        return self._listed[folder]


class MetadataCache:
    """A folder's metadata_cache.json (cache_info): captions and sizes by picture.

    Its sizes are written for sd-scripts, and never believed: those that sd-scripts wrote are from before the EXIF orientation.
    """

    NAME = "metadata_cache.json"

    def __init__(self, folder: str):
        self.path = Path(folder) / self.NAME
        self.kept: dict[str, tuple[str, Size]] = {}
        self.new: dict[str, tuple[str, Size]] = {}
        try:
            for file, row in json.loads(self.path.read_text(encoding="utf-8-sig")).items():
                width, height = row["resolution"]
                self.kept[os.path.basename(file.replace("\\", "/"))] = (
                    str(row["caption"]),
                    Size(int(width), int(height)),
                )
        except FileNotFoundError:  # there is none yet
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: can't be used and is written anew: %s", self.path, error)

    def caption(self, name: str) -> str | None:
        """What it keeps of a picture; None for nothing or an empty caption."""
        row = self.kept.get(name)
        return row[0] or None if row else None

    def add(self, name: str, caption: str, size: Size) -> None:
        self.new[name] = (caption, size)

    def save(self) -> None:
        if self.new == self.kept:
            return
        rows = {str(self.path.with_name(name)): {"caption": caption, "resolution": list(size)} for name, (caption, size) in self.new.items()}  # fmt: skip
        content = json.dumps(rows, ensure_ascii=False, indent=2)
        try:
            write_atomically(self.path, lambda file: file.write(content.encode()))
        except RunError as error:
            log.warning("%s", error)
