"""Files that are complete at any moment (written next to their place, then moved there), and the lock of a run's output."""

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

_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # bytes as they are, on Windows too
_ASIDE = "-old"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems without locks answer
_FORGOTTEN = 24 * 3600  # seconds after which a temporary file of another machine is taken for left over


def host_name() -> str:
    """This machine, in eight digits."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there and isn't this one. On Windows, which can't ask, always."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and another user's
        pass
    return process != os.getpid()


def temporary_name(path: Path) -> Path:
    """A name beside `path` by which what a killed process leaves is found again."""
    return path.with_name(f".{path.name}.{host_name()}-{os.getpid()}.tmp")


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], check: Callable[[Path], object] = lambda temporary: None
) -> None:
    """Call write(binary file) on a temporary file beside `path`, then move it there; the umask decides who may read it.

    Args: check: looks at the written file before it is moved; what it raises leaves `path` as it was.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            _call(write, file)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        os.replace(temporary, path)
    except OSError as error:
        hint = " (is it open in another program?)" if sys.platform == "win32" else ""
        if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None)) and temporary.exists():
            hint = f", after {temporary.stat().st_size:,} bytes; {free_space(path.parent):,} bytes are free"
        raise RunError(f"{path}: can't be written: {error.strerror or error}{hint}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _call(write: Callable[[BinaryIO], object], file: BinaryIO) -> None:
    """torch.save raises an error of its own over the disk's, which is the one to tell."""
    try:
        write(file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """Move a whole folder to its place. One that is there already goes aside first: no system replaces folders. Raises OSError."""
    if not folder.exists():
        os.rename(new, folder)
        return
    aside = temporary_name(folder.with_name(folder.name + _ASIDE))
    shutil.rmtree(aside, ignore_errors=True)  # of a killed process with this one's number
    os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    aside.unlink() if aside.is_symlink() else shutil.rmtree(aside, ignore_errors=True)


def free_space(folder: Path) -> int:
    """Bytes that can still be written in the folder, or in the nearest one above that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def make_writable_folder(folder: Path) -> None:
    """Make the folder and write in it, so that hours of work don't come before the first failure. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()


def read_small_file(path: str | Path) -> bytes:
    """A file's content, in half the time that open() takes: scans read a caption for every picture. Raises OSError."""
    descriptor = os.open(path, _READ)
    try:
        content = part = os.read(descriptor, 1 << 13)
        while part and len(content) >= 1 << 13:
            part = os.read(descriptor, 1 << 20)
            content += part
        return content
    finally:
        os.close(descriptor)


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in `folder`; those of living ones stay.

    A folder that was moved aside, and whose successor isn't there, gets its name back.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(".tmp")]
    for name in names:
        match = re.fullmatch(r"\.(.+)\.([0-9a-f]{8})-(\d+)\.tmp", name)
        path = folder / name
        try:
            if not match or not _is_left_over(path, match[2], int(match[3])):
                continue
            if match[1].endswith(_ASIDE) and not (folder / match[1].removesuffix(_ASIDE)).exists():
                path.rename(folder / match[1].removesuffix(_ASIDE))
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:  # gone already, or on Windows still open
            pass


def _is_left_over(path: Path, host: str, process: int) -> bool:
    if host != host_name():
        return time.time() - path.stat().st_mtime > _FORGOTTEN
    # On Windows a file that is still open can't be removed.
    return sys.platform == "win32" or not (is_alive(process) or process == os.getpid())


class OutputLock:
    """FOLDER/.NAME.lock, locked by the operating system while a run writes NAME in that folder.

    The operating system unlocks it when the process ends, however it ends. So the lock file of a killed run doesn't stop the
    next run, not even on another machine or in another container, where process IDs say nothing. FOLDER/.NAME.owner.json says
    who holds the lock, in a file of its own because Windows doesn't let other processes read a locked file.
    """

    def __init__(self, folder: Path, name: str):
        """Raises OptionError if another run holds the lock, or if its file can't be written."""
        from filelock import FileLock, Timeout  # here, because `--help` doesn't need it

        self._lock = FileLock(folder / f".{name}.lock", thread_local=False, fallback_to_soft=False)
        self._owner = folder / f".{name}.owner.json"
        owner = {"process": os.getpid(), "host": host_name(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            self._acquire()
            self._owner.write_text(json.dumps(owner), encoding="utf-8")
        except Timeout:
            raise OptionError(
                f"--output_name {name}: {self._read_owner()}, has been writing it in {folder}; give another name, or end that run"
            ) from None
        except OSError as error:
            self.release()
            raise OptionError(f"{error.filename or folder}: can't be written: {error.strerror or error}") from None

    def _acquire(self) -> None:
        try:
            # The lock of a run that ends at this moment isn't another run's: its file is already removed.
            self._lock.acquire(timeout=0.1, poll_interval=0.01)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            path = self._lock.lock_file
            log.warning("%s: this disk can't lock files, so nothing stops a second run with the same name", path)

    def _read_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {int(owner['process'])} on {owner['host']!s:.99}, since {owner['since']!s:.99}"
        except (OSError, ValueError, LookupError, TypeError):
            return "another process"

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._owner.unlink(missing_ok=True)
            # On Windows an open file can't be removed; filelock removes it there once it is closed.
            if self._lock.is_locked and sys.platform != "win32":
                os.unlink(self._lock.lock_file)
        self._lock.release()


def format_bytes(size: int) -> str:
    """Return a size for people: "1.23 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
