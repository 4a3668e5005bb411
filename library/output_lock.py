"""OutputLock: two runs must not write the same files."""

import json
import os
import sys
import time
from pathlib import Path

from library.errors import OptionError
from library.files import host_name, is_alive


class OutputLock:
    """FOLDER/.NAME.lock, there while a run writes NAME in that folder. One that a killed run left is taken over."""

    def __init__(self, folder: Path, name: str):
        """Raises OptionError if another run has it."""
        self._path = folder / f".{name}.lock"
        content = json.dumps({"process": os.getpid(), "host": host_name(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        for _ in range(2):
            try:
                self._file = open(self._path, "x", encoding="utf-8")  # noqa: SIM115 - open as long as the run goes
                break
            except FileExistsError:
                self._refuse_unless_left_over(folder, name)
        else:
            raise OptionError(f"{self._path}: another run has just taken this output; give another --output_name")
        self._file.write(content)
        self._file.flush()

    def _refuse_unless_left_over(self, folder: Path, name: str) -> None:
        try:
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            process, host, since = int(owner["process"]), str(owner["host"]), str(owner["since"])
        except (OSError, ValueError, KeyError, TypeError):
            process, host, since = 0, "an unknown machine", "an unknown time"
        if host == host_name() and not is_alive(process):
            self._path.unlink(missing_ok=True)
            return
        if sys.platform == "win32" and host == host_name():
            try:  # it can't be removed there while a run has it open
                self._path.unlink(missing_ok=True)
                return
            except OSError:
                pass
        raise OptionError(
            f"--output_name {name}: process {process} on {host} has been writing it in {folder} since {since}; give another name, "
            f"or remove {self._path} if that run is gone"
        )

    def release(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
