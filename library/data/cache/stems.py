"""CacheStems: the names of cache files."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from library.size import Size


class CacheStems:
    """Paths of samples' cache files, without endings. No two samples share one."""

    def __init__(self, cache_dir: Path | None):
        """Start without samples.

        Args:
            cache_dir: folder of all cache files. None means next to the images.
        """
        self._cache_dir = cache_dir
        self._taken: set[str] = set()
        self._real_folders: dict[str, str] = {}

    def unique(self, folder: str, name: str, bucket: Size, dataset: int) -> str:
        """Return the path of a sample's cache files, which no other sample has.

        It is the image's path without its extension, and longer where another sample has that path
        (docs/differences.md).

        Args:
            folder: folder of the image.
            name: name of the image.
            bucket: size of the sample's bucket.
            dataset: index of the dataset.
        """
        if self._cache_dir is not None:
            folder = self._folder_in_cache_dir(self._cache_dir, folder)
        stems = _stems(f"{folder}{os.sep}{name}", bucket, dataset)
        return next(stem for stem in stems if self._take(stem))

    def _take(self, stem: str) -> bool:
        """Reserve a stem. Return False if a sample has it already, however its folder is spelled."""
        folder, _, name = stem.rpartition(os.sep)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        key = os.path.normcase(f"{self._real_folders[folder]}{os.sep}{name}")
        if key in self._taken:
            return False
        self._taken.add(key)
        return True

    def _folder_in_cache_dir(self, cache_dir: Path, folder: str) -> str:
        full = os.path.abspath(folder)
        digest = hashlib.blake2b(full.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        return os.path.join(cache_dir, f"{os.path.basename(full)}-{digest}")


def _stems(path: str, bucket: Size, dataset: int) -> Iterator[str]:
    """Yield possible paths of an image's cache files, best first and without end."""
    stem = path.rpartition(".")[0]
    yield stem
    if dataset > 0:
        yield f"{stem}_{bucket}"
    yield path
    yield f"{path}_{bucket}"
    for i in itertools.count(2):
        yield f"{path}_{i}"
