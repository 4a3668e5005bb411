"""FileIndex: facts about files (sizes, contents, verified caches), valid while a file is unchanged.

It is stored as one JSON file per folder, in --cache_dir or in the user's cache folder. Losing one
costs time, never correctness, so a file that can't be read or written is not an error.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from library.errors import RunError
from library.files import write_atomically
from library.log import log

_VERSION = 1
# Nanoseconds. A file that was changed more recently may change again within its time stamp.
_SETTLED = 2_000_000_000

FileStamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds. While both stay, a file counts as unchanged."""


def file_stamp(path: str | Path | os.DirEntry) -> FileStamp:
    """Return the file's stamp. Raises OSError."""
    stat = os.stat(path) if isinstance(path, str | Path) else path.stat()
    return stat.st_size, stat.st_mtime_ns


def user_cache_folder() -> Path:
    """Return the folder for files that programs can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdxl-training-suite"


class FileIndex:
    """Facts about files, by folder and name."""

    def __init__(self, home: Path | None = None):
        """Open an index.

        Args:
            home: its folder. None means one in the user's cache folder.
        """
        self._home = home or user_cache_folder() / "index"
        self._folders: dict[str, dict[str, list]] = {}  # folder -> name -> [size, time, facts]
        self._changed: set[str] = set()
        self._settled_before = 0  # files that were changed before this time have settled

    def get(self, folder: str, name: str, stamp: FileStamp) -> dict[str, Any]:
        """Return the facts about a file; none if it has changed since they were recorded."""
        row = (self._folders.get(folder) or self._folder(folder)).get(name)
        if row is not None and row[0] == stamp[0] and row[1] == stamp[1]:
            return row[2]
        return {}

    def record(self, folder: str, name: str, stamp: FileStamp, **facts: Any) -> None:
        """Add facts about a file that had this stamp when they were found."""
        if stamp[1] > self._settled_before:
            self._settled_before = time.time_ns() - _SETTLED
            if stamp[1] > self._settled_before:
                return
        self._folder(folder)[name] = [*stamp, {**self.get(folder, name, stamp), **facts}]
        self._changed.add(folder)

    def save(self) -> None:
        """Write the folders that have new facts."""
        for folder in sorted(self._changed):
            index = {"version": _VERSION, "folder": folder, "files": self._folders[folder]}
            content = json.dumps(index).encode("utf-8", "surrogatepass")
            path = self._path(folder)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, content)
            except (OSError, RunError) as error:
                log.debug("the index of %s can't be saved: %s", folder, error)
        self._changed.clear()

    def forget(self, folders: Iterable[str] | None = None) -> None:
        """Free the memory of these folders, or of all. They are read again when they are needed."""
        for folder in list(self._folders if folders is None else folders):
            self._folders.pop(folder, None)

    def _folder(self, folder: str) -> dict[str, list]:
        if folder not in self._folders:
            self._folders[folder] = self._read(folder)
        return self._folders[folder]

    def _read(self, folder: str) -> dict[str, list]:
        rows = {}
        try:
            content = json.loads(self._path(folder).read_bytes())
            if content["version"] == _VERSION and content["folder"] == folder:
                for name, row in content["files"].items():
                    if len(row) == 3 and isinstance(row[2], dict):
                        rows[name] = row
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # there is none yet, or it is damaged
        return rows

    def _path(self, folder: str) -> Path:
        digest = hashlib.blake2b(folder.encode("utf-8", "surrogatepass"), digest_size=12)
        return self._home / f"{digest.hexdigest()}.json"


def _write(path: Path, content: bytes) -> None:
    def write(file: BinaryIO) -> None:
        file.write(content)

    write_atomically(path, write)
