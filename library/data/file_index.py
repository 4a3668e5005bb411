"""Known files: what was learnt of files (sizes, contents, verified caches), good while their size and time don't change.

Kept as one JSON file per folder, in --cache_dir or the user's cache folder. Losing one costs time, never correctness; so a
file that can't be read or written is no error.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from library.errors import RunError
from library.files import write_atomically
from library.log import log

_VERSION = 1
_SETTLED = (
    2_000_000_000  # nanoseconds; a file changed later than this before now may change again within its time stamp
)

FileStamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: while both stay, a file is taken to be the same."""


def file_stamp(path: str | Path | os.DirEntry) -> FileStamp:
    """The file's stamp. Raises OSError."""
    found = os.stat(path) if isinstance(path, str | Path) else path.stat()
    return found.st_size, found.st_mtime_ns


def user_cache_folder() -> Path:
    """Where programs keep what they can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdxl-training-suite"


def _write(file: BinaryIO, *, content: str) -> None:
    file.write(content.encode("utf-8", "surrogatepass"))


class FileIndex:
    """Facts by file."""

    def __init__(self, home: Path | None = None):
        """Args: home: the folder of the index; None: in the user's cache folder."""
        self._home = home or user_cache_folder() / "index"
        self._folders: dict[str, dict[str, list]] = {}  # folder -> name -> [size, time, facts]
        self._changed: set[str] = set()
        self._youngest = 0  # time before which a file that is as it was has settled

    def get(self, folder: str, name: str, stamp: FileStamp) -> dict[str, Any]:
        """What is known of a file; nothing if it has changed since."""
        row = (self._folders.get(folder) or self._folder(folder)).get(name)
        return row[2] if row is not None and row[0] == stamp[0] and row[1] == stamp[1] else {}

    def learn(self, folder: str, name: str, stamp: FileStamp, **facts: Any) -> None:
        """Add to what is known of a file, as it is at `stamp`."""
        if stamp[1] > self._youngest:
            self._youngest = time.time_ns() - _SETTLED
            if stamp[1] > self._youngest:
                return
        self._folder(folder)[name] = [*stamp, {**self.get(folder, name, stamp), **facts}]
        self._changed.add(folder)

    def save(self) -> None:
        """Write what was learnt."""
        for folder in sorted(self._changed):
            content = json.dumps({"version": _VERSION, "folder": folder, "files": self._folders[folder]})
            path = self._path(folder)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, partial(_write, content=content))
            except (OSError, RunError) as error:
                log.debug("the index of %s isn't kept: %s", folder, error)
        self._changed.clear()

    def forget(self, folders: Iterable[str] | None = None) -> None:
        """Free the memory of these folders, or all; they are read again when asked for."""
        for folder in list(self._folders if folders is None else folders):
            self._folders.pop(folder, None)

    def _folder(self, folder: str) -> dict[str, list]:
        if folder not in self._folders:
            self._folders[folder] = self._read(folder)
        return self._folders[folder]

    def _read(self, folder: str) -> dict[str, list]:
        try:
            content = json.loads(self._path(folder).read_bytes())
            if content["version"] == _VERSION and content["folder"] == folder:
                return {
                    name: row for name, row in content["files"].items() if len(row) == 3 and isinstance(row[2], dict)
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or spoilt: learnt anew
            pass
        return {}

    def _path(self, folder: str) -> Path:
        return (
            self._home / f"{hashlib.blake2b(folder.encode('utf-8', 'surrogatepass'), digest_size=12).hexdigest()}.json"
        )
