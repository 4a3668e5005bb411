"""OutputLock: two runs must not write the same files."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO

from library.errors import OptionError
from library.files import host_name
from library.log import log

if sys.platform == "win32":
    import msvcrt
else:
    import errno
    import fcntl

_FAR = 1 << 30  # of the file only one byte is locked, behind its text: on Windows the text couldn't be read otherwise


class OutputLock:
    """FOLDER/.NAME.lock, locked by the system while a run writes NAME in that folder.

    The system unlocks it when the process ends, however it ends: what a killed run left doesn't stop the next one, be it on
    another machine or in another container, where process numbers say nothing.
    """

    def __init__(self, folder: Path, name: str):
        """Raises OptionError if another run has it, or if it can't be written."""
        self._path = folder / f".{name}.lock"
        owner = {"process": os.getpid(), "host": host_name(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            self._file = self._open()
            self._file.truncate(0)
            self._file.write(json.dumps(owner))
            self._file.flush()
        except BlockingIOError:
            raise OptionError(
                f"--output_name {name}: {self._owner()}, has been writing it in {folder}; give another name, or end that run"
            ) from None
        except OSError as error:
            raise OptionError(f"{self._path}: can't be written: {error.strerror or error}") from None

    def _open(self) -> IO[str]:
        """The file, locked. Raises BlockingIOError if another process has locked it."""
        while True:
            file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run goes
            try:
                _lock(file.fileno(), self._path)
                if _is_at(file.fileno(), self._path):
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # whoever had it has just removed it

    def _owner(self) -> str:
        try:
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            return f"process {int(owner['process'])} on {owner['host']!s:.99}, since {owner['since']!s:.99}"
        except (OSError, ValueError, LookupError, TypeError):
            return "another process"

    def release(self) -> None:
        if sys.platform == "win32":  # what is open can't be removed there
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._file.close()


def _lock(descriptor: int, path: Path) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError from None
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _FAR)  # forked workers don't inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from None
        log.warning("%s: this disk can't lock files, so nothing stops a second run of that name", path)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still is that file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
