"""Sidecar files: which caption, conditioning image or metadata belongs to which image."""

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

_NUM_SHOWN = 5  # names of a long list that messages show


def some(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    shown = ", ".join(names[:_NUM_SHOWN])
    num_more = len(names) - _NUM_SHOWN
    return f"{shown} and {num_more} more" if num_more > 0 else shown


class CaptionFolder:
    """Which caption file belongs to which image of one folder.

    Attributes:
        folder: the folder.
        entries: everything in it, by name.
        extension: the extension of its caption files.
        problem: what is wrong, if the extension that the user gave doesn't occur.
    """

    def __init__(
        self,
        subset: Subset,
        folder: str,
        images: Sequence[str],
        entries: Mapping[str, os.DirEntry],
    ):
        self.folder = folder
        self.entries = entries
        self.extension = subset.caption_extension
        self.problem: str | None = None
        if any(self.file_of(_stem(name)) for name in images):
            return
        found = Counter(self._sidecar_extensions(images))
        if not subset.is_extension_given and found[".txt"]:
            log.info(
                "%s: no *%s, so captions are read from the %d *.txt",
                folder,
                self.extension,
                found[".txt"],
            )
            self.extension = ".txt"
        elif subset.is_extension_given and subset.class_tokens is None and not subset.cache_info:
            counts = ", ".join(f"{count} *{extension}" for extension, count in found.most_common())
            self.problem = (
                f"{folder}: no *{self.extension} for its {len(images)} images; there are "
                f"{counts or 'no other files of the same names'}. Give the extension of the "
                "captions as --caption_extension, or train with empty captions "
                "(--allow_missing_captions)"
            )

    def file_of(self, stem: str) -> str | None:
        """Return the name of an image's caption file; None if it has none.

        It has the image's stem, or that without the face that it ends in (_x_y_width_height).
        """
        name = stem + self.extension
        if name not in self.entries and stem.count("_") >= 4:
            name = stem.rsplit("_", 4)[0] + self.extension
        return name if name in self.entries else None

    def _sidecar_extensions(self, images: Sequence[str]) -> Iterator[str]:
        """Yield the extensions of files that are named like an image, and are none."""
        stems, names = {_stem(name) for name in images}, set(images)
        for name in self.entries:
            stem, _, extension = name.rpartition(".")
            if stem in stems and name not in names and extension != "npz":
                yield f".{extension}"


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


class ConditioningFolder:
    """Which conditioning image or mask belongs to which image: the one of the same stem."""

    def __init__(self, subset: Subset, extensions: Sequence[str]):
        assert subset.conditioning_data_dir is not None
        self.folder = str(subset.conditioning_data_dir)
        self.by_stem: dict[str, list[str]] = {}
        for name in sorted(os.listdir(self.folder)):
            stem, extension = os.path.splitext(name)
            if extension.lower() in extensions:
                self.by_stem.setdefault(stem, []).append(name)
        self.unused = set(self.by_stem)

    def path_of(self, name: str, size: Size) -> str:
        """Return the path of an image's conditioning image.

        Raises:
            ImageError: there is none, or there are several, or it has another aspect ratio.
        """
        stem = os.path.splitext(name)[0]
        self.unused.discard(stem)
        names = self.by_stem.get(stem, [])
        if not names:
            raise ImageError(f"no conditioning image of the same name in {self.folder}")
        if len(names) > 1:
            raise ImageError(
                f"{len(names)} conditioning images of the same name in {self.folder}: "
                f"{', '.join(names)}"
            )
        path = os.path.join(self.folder, names[0])
        try:
            own = read_image_info(path).size
        except ImageError as error:
            raise ImageError(f"its conditioning image {path}: {error}") from None
        width_at_height = own.width * size.height / own.height
        if abs(width_at_height - size.width) > max(1, size.width / own.width):
            raise ImageError(
                f"its conditioning image {path} is {own}, of another aspect ratio than the image "
                f"({size})"
            )
        return path

    def log_unused(self) -> None:
        if self.unused:
            log.info(
                "%s: %d conditioning images have no image: %s",
                self.folder,
                len(self.unused),
                some(sorted(self.unused)),
            )


class MetadataKeyResolver:
    """Finds the image of a metadata key. Keys of sd-scripts' tools may lack the extension."""

    def __init__(self, extensions: Sequence[str]):
        self.extensions = extensions
        self._listed: dict[str, dict[str, os.DirEntry]] = {}

    def resolve(self, path: str, *, trusted: bool) -> str | None:
        """Return the image's path; None if there is none.

        Args:
            path: the key, with its folder.
            trusted: don't check that a path with an extension exists, as its size is known too.
        """
        folder, name = os.path.split(path)
        if trusted and os.path.splitext(name)[1].lower() in self.extensions:
            return path
        names = self._names(folder)
        if name in names:
            return path
        upper = [extension.upper() for extension in self.extensions]
        for extension in (*sorted(self.extensions), *sorted(upper)):
            if name + extension in names:
                return path + extension
        return None

    def stamp(self, path: str) -> FileStamp | None:
        """Return the image's stamp, if its folder was listed."""
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
    """A folder's metadata_cache.json (cache_info): captions and sizes by image.

    Its sizes are written for sd-scripts and never used: those that sd-scripts wrote don't consider
    the EXIF orientation.
    """

    NAME = "metadata_cache.json"

    def __init__(self, folder: str):
        self.path = Path(folder) / self.NAME
        self.stored: dict[str, tuple[str, Size]] = {}
        self.new: dict[str, tuple[str, Size]] = {}
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8-sig"))
            for file, row in rows.items():
                width, height = row["resolution"]
                name = os.path.basename(file.replace("\\", "/"))
                self.stored[name] = (str(row["caption"]), Size(int(width), int(height)))
        except FileNotFoundError:  # there is none yet
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: can't be used and is replaced: %s", self.path, error)

    def caption(self, name: str) -> str | None:
        """Return an image's stored caption; None if there is none or it is empty."""
        caption, _ = self.stored.get(name, ("", None))
        return caption or None

    def add(self, name: str, caption: str, size: Size) -> None:
        self.new[name] = (caption, size)

    def save(self) -> None:
        if self.new == self.stored:
            return
        rows = {}
        for name, (caption, size) in self.new.items():
            rows[str(self.path.with_name(name))] = {"caption": caption, "resolution": list(size)}
        content = json.dumps(rows, ensure_ascii=False, indent=2).encode()
        try:
            write_atomically(self.path, lambda file: file.write(content))
        except RunError as error:
            log.warning("%s", error)
