"""Errors that the user can fix, shown without a traceback; run() exits with their status."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class RunError(Exception):
    """Something outside our code is wrong, such as a disk: no traceback, exit status 1."""


class NotFinite(RunError):
    """What is to be saved contains NaN or Inf: not the disk's fault, so the run ends."""


@dataclass(frozen=True)
class Mistake:
    """One thing to fix in the user's options.

    Attributes:
        text: what is wrong, and what to do.
        about: names of the options that it is about.
    """

    text: str
    about: tuple[str, ...] = ()


class OptionError(ValueError):
    """The options or the dataset can't work: no traceback, all mistakes at once, exit status 2."""

    def __init__(self, *mistakes: Mistake | str):
        self.mistakes = [Mistake(m) if isinstance(m, str) else m for m in mistakes]
        super().__init__("\n".join(m.text for m in self.mistakes))


class MistakeCollector:
    """Collects mistakes instead of raising them, so that --dry_run reports all of them.

    Attributes:
        mistakes: those found so far.
    """

    def __init__(self, *, raises: bool):
        """Initialize the collector.

        Args:
            raises: raise errors as they come, and collect nothing.
        """
        self.mistakes: list[Mistake] = []
        self._raises = raises

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Context manager: an OptionError or RunError inside ends the block, and is collected."""
        try:
            yield
        except OptionError as error:
            if self._raises:
                raise
            self.mistakes += error.mistakes
        except RunError as error:
            if self._raises:
                raise
            self.mistakes.append(Mistake(str(error)))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that isn't blank, or its type."""
    for line in str(error).splitlines():
        if line.strip():
            return line
    return type(error).__name__


def run(main: Callable[[], None]) -> None:
    """Call an entry script's main; print the user's mistakes on stderr, and exit with a status.

    All processes find the same mistakes in the options; only the first one prints them.

    Status: 0 done, 1 the run failed, 2 wrong options or dataset, 130 interrupted.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        main()
    except OptionError as error:
        if rank == 0:
            for mistake in error.mistakes:
                print(f"error: {mistake.text}", file=sys.stderr)
        raise SystemExit(2) from None
    except RunError as error:
        prefix = "error" if rank == 0 else f"error on process {rank}"
        print(f"{prefix}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
