"""Atomic writes, temporary files, disk space, and the lock of a run's output."""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from library.errors import OptionError, RunError
from library.log import log

_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # without O_BINARY, Windows would change line ends
_ASIDE = "-old"
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
# The errors of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_MAX_AGE = 24 * 3600  # seconds after which a temporary file of another machine counts as left over


def host_name() -> str:
    """Return eight hexadecimal digits that identify this machine."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def is_alive(process: int) -> bool:
    """Return whether a process with this PID exists on this machine and is not this one.

    On Windows, always True.
    """
    if sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and belongs to another user
        pass
    return process != os.getpid()


def temporary_name(path: Path) -> Path:
    """Return a name in the folder of `path` that names this process, for remove_left_over()."""
    return path.with_name(f".{path.name}.{host_name()}-{os.getpid()}.tmp")


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], check: Callable[[Path], object] | None = None
) -> None:
    """Write a temporary file in the folder of `path`, then rename it to `path`.

    The umask decides who may read it.

    Args:
        path: the file. It does not change if anything fails.
        write: writes the content to a binary file.
        check: checks the temporary file, and raises if it is wrong.

    Raises:
        RunError: the disk refuses.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            _call(write, file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except OSError as error:
        hint = ""
        if error.errno in _DISK_FULL and temporary.exists():
            written, free = temporary.stat().st_size, free_space(path.parent)
            hint = f", after {written:,} bytes; {free:,} bytes are free"
        elif sys.platform == "win32":
            hint = " (is it open in another program?)"
        raise RunError(f"{path}: can't be written: {error.strerror or error}{hint}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _call(write: Callable[[BinaryIO], object], file: BinaryIO) -> None:
    """Call `write`, and raise the disk's error where torch.save raises one of its own."""
    try:
        write(file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """Rename a complete folder.

    A folder that exists is renamed first, as no system replaces folders. Raises OSError.
    """
    if not folder.exists():
        os.rename(new, folder)
        return
    aside = temporary_name(folder.with_name(folder.name + _ASIDE))
    shutil.rmtree(aside, ignore_errors=True)  # left by a killed process that had the same PID
    os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, or of its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def make_writable_folder(folder: Path) -> None:
    """Create the folder and write to it, so that a failure comes before hours of work.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()


def read_small_file(path: str | Path) -> bytes:
    """Return a file's content, in half the time of open(): a scan reads a caption for every image.

    Raises OSError.
    """
    descriptor = os.open(path, _READ)
    try:
        content = os.read(descriptor, 1 << 13)
        if len(content) < 1 << 13:
            return content
        while chunk := os.read(descriptor, 1 << 20):
            content += chunk
        return content
    finally:
        os.close(descriptor)


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in `folder`.

    A folder whose replacement was interrupted gets its name back.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(".tmp")]
    for name in names:
        match = re.fullmatch(r"\.(.+)\.([0-9a-f]{8})-(\d+)\.tmp", name)
        path = folder / name
        try:
            if not match or not _is_left_over(path, match[2], int(match[3])):
                continue
            replaced = folder / match[1].removesuffix(_ASIDE)
            if match[1].endswith(_ASIDE) and not replaced.exists():
                path.rename(replaced)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:  # removed by another process, or on Windows still open
            pass


def _is_left_over(path: Path, host: str, process: int) -> bool:
    if host != host_name():
        return time.time() - path.stat().st_mtime > _MAX_AGE
    if sys.platform == "win32":  # a file that is still open can't be removed there
        return True
    return not is_alive(process) and process != os.getpid()


class OutputLock:
    """FOLDER/.NAME.lock, locked by the operating system while a run writes NAME in that folder.

    The operating system unlocks it when the process ends, however it ends. So the lock file of a
    killed run doesn't stop the next run, not even on another machine or in another container, whose
    PIDs are different. FOLDER/.NAME.owner.json says which run holds the lock; it is a separate file
    because Windows doesn't let other processes read a locked file.
    """

    def __init__(self, folder: Path, name: str):
        """Lock the output.

        Raises OptionError if another run holds the lock, or if its file can't be written.
        """
        from filelock import FileLock, Timeout  # here, because `--help` doesn't need it

        self._lock = FileLock(folder / f".{name}.lock", thread_local=False, fallback_to_soft=False)
        self._owner = folder / f".{name}.owner.json"
        owner = {
            "process": os.getpid(),
            "host": host_name(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            self._acquire()
            self._owner.write_text(json.dumps(owner), encoding="utf-8")
        except Timeout:
            raise OptionError(
                f"--output_name {name}: another run ({self._read_owner()}) is writing to {folder}; "
                "choose another name or stop that run"
            ) from None
        except OSError as error:
            self.release()
            raise OptionError(
                f"{error.filename or folder}: can't be written: {error.strerror or error}"
            ) from None

    def _acquire(self) -> None:
        try:
            # The lock of a run that ends at this moment isn't another run's: its file is already
            # removed.
            self._lock.acquire(timeout=0.1, poll_interval=0.01)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            path = self._lock.lock_file
            log.warning(
                "%s: this disk can't lock files, so nothing stops a second run with the same name",
                path,
            )

    def _read_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            host, since = str(owner["host"])[:99], str(owner["since"])[:99]
            return f"PID {int(owner['process'])} on {host}, started {since}"
        except (OSError, ValueError, LookupError, TypeError):
            return "its process is unknown"

    def release(self) -> None:
        """Unlock the output."""
        with contextlib.suppress(OSError):
            self._owner.unlink(missing_ok=True)
            # On Windows an open file can't be removed; filelock removes it there once it is closed.
            if self._lock.is_locked and sys.platform != "win32":
                os.unlink(self._lock.lock_file)
        self._lock.release()


def format_bytes(size: int) -> str:
    """Return a size for people: "1.23 GB"."""
    if size >= 1e8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB"
