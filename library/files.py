"""Files that are whole at any moment: written beside their place, then moved there."""

import os
import platform
import re
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from library.errors import RunError

_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # bytes as they are, on Windows too
_FORGOTTEN = 24 * 3600  # seconds after which a temporary file of another machine is taken for left over


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(binary file) on a temporary file beside `path`, then move it there; the umask decides who may read it."""
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        hint = " (is it open in another program?)" if sys.platform == "win32" else ""
        raise RunError(f"{path}: can't be written: {error.strerror or error}{hint}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    """Remove the temporary files that killed processes left in `folder`; those of living ones stay."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(".tmp")]
    for name in names:
        match = re.fullmatch(r"\..+\.([0-9a-f]{8})-(\d+)\.tmp", name)
        path = folder / name
        try:
            if match and _is_left_over(path, match[1], int(match[2])):
                path.unlink()
        except OSError:  # gone already, or on Windows still open
            pass


def _is_left_over(path: Path, host: str, process: int) -> bool:
    if host != _host():
        return time.time() - path.stat().st_mtime > _FORGOTTEN
    if sys.platform == "win32":
        return True  # a file that is still open can't be removed there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
