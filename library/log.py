"""Logging: to stderr or a file. The main process logs everything, the others only errors."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import OptionError
from library.options import OptionGroup, Options, option

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("library")

SECONDS_BETWEEN_LINES = 15.0  # of a progress bar that is written to a file


@dataclass(frozen=True)
class LogOptions(OptionGroup, affects_result=False, stored_in_image=False):
    """Console."""

    console_log_level: str | None = option(
        None,
        "lowest level of the records that are shown; INFO when unset",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: Path | None = option(
        None,
        "write log records to this file instead of the console; it is emptied at the start",
        private=True,
    )
    console_log_simple: bool = option(False, "plain lines on stdout, without time and level")


def is_main_process() -> bool:
    """Return whether this is the process that logs and saves (by torchrun's variables)."""
    return int(os.environ.get("RANK", "0")) == 0


def start_logging(options: Options) -> None:
    """Send our log records where the options say, and log the notices about the options."""
    log_options = options[LogOptions]
    handler: logging.Handler
    if log_options.console_log_file is not None:
        handler = _file_handler(log_options.console_log_file)
    else:
        handler = _ConsoleHandler(sys.stdout if log_options.console_log_simple else sys.stderr)
    is_simple = log_options.console_log_simple and log_options.console_log_file is None
    form = "%(message)s" if is_simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    level = log_options.console_log_level or "INFO"
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level if is_main_process() else logging.ERROR)
    for notice in options.notices:
        log.warning(notice)


@contextmanager
def silence_logging() -> Iterator[None]:
    """Context manager: silence our logger, for work that is repeated."""
    was_disabled = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = was_disabled


def _file_handler(path: Path) -> logging.Handler:
    """Open the log file: the main process empties it, the others append their errors.

    Raises:
        OptionError: it can't be written.
    """
    try:
        if is_main_process():
            return logging.FileHandler(path, mode="w", encoding="utf-8")
        return logging.FileHandler(path, mode="a", encoding="utf-8", delay=True)
    except OSError as error:
        raise OptionError(
            f"--console_log_file {path}: can't be written: {error.strerror}"
        ) from None


def progress_bar(what: str, total: int, unit: str = "it") -> "tqdm":
    """Return a progress bar on the main process's stderr; a line now and then if that is a file.

    Args:
        what: its label.
        total: number of units; 0: no bar.
        unit: name of the unit.
    """
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        disable=not is_main_process() or total == 0,
        dynamic_ncols=is_terminal,
        mininterval=0.1 if is_terminal else SECONDS_BETWEEN_LINES,
    )


class _ConsoleHandler(logging.StreamHandler):
    """Writes above a progress bar instead of through it, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")
        if bars is None:
            super().emit(record)
        else:
            bars.tqdm.write(self.format(record), file=self.stream)
