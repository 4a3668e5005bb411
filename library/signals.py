"""Signals: a request to end is noted, so that the step is finished and saved; a second request ends the process at once."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from library.log import is_main_process, log

# One request often comes twice: `timeout` signals a process and then its group, a launcher passes on what the terminal has sent to all.
SAME_REQUEST = 1.0  # seconds

_NAMES = ("SIGINT", "SIGBREAK") if sys.platform == "win32" else ("SIGINT", "SIGTERM", "SIGUSR1")
NOTED = tuple(signal.Signals[name] for name in _NAMES)
_USR1: int | None = getattr(signal, "SIGUSR1", None)
_CLOSED = 0  # no signal has this number

# What `accelerate launch` sets for its processes (any number of them), and torchrun for its own. Not LOCAL_RANK or
# ACCELERATE_MIXED_PRECISION: people export those in shells, whose end must not end what was started in them.
SET_BY_LAUNCHERS = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def exit_status(number: int) -> int:
    """Of a run that has saved and ended early. SIGUSR1 is a scheduler's, which starts the run again: nothing has failed."""
    return 0 if number == _USR1 else 128 + number


class Signals:
    """While it is open, a request to end is noted in `asked` and told; a second one ends the process at once.

    Requests are SIGTERM, SIGINT and SIGUSR1 (Windows: Ctrl-C and Ctrl-Break), unless they were ignored: a shell's background job
    ignores Ctrl-C. A second request comes a second or more after the first and isn't the kernel's word that the launcher has
    ended (end_with_parent); SIGTERM or SIGINT after SIGUSR1 is a first one, as the scheduler sends both. The handlers only note. A
    thread tells, and ends the process even if the main thread waits for a device or for another process. What is being written
    then lies beside the final files, and worker processes end when they miss their parent.

    Outside of the main thread, where Python can't handle signals, it does nothing.

    Attributes:
        asked: the number of the signal that asks to end.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}  # handlers
        self._is_open = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._arrivals, self._ours = socket.socketpair()
        self._ours.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._ours.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(os.getppid(),), name="signals", daemon=True)
        self._listener.start()
        self._is_open = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)
        for number in NOTED:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL  # None: set in C
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._ours.send(bytes([_CLOSED]))  # closing isn't enough: forked workers have it open too
        self._listener.join()
        self._ours.close()
        self._arrivals.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler. Runs between two instructions of the main thread, which may hold any lock."""
        if self.asked is None or self.asked == _USR1:
            self.asked = number

    def _listen(self, parent: int) -> None:
        """Tell the first request, and end the process at the second. The C handler of each signal sends its number here."""
        first, since = None, 0.0
        while (number := self._arrivals.recv(1)[0]) != _CLOSED:
            if number not in self._before:
                continue
            now, parent_before, parent = time.monotonic(), parent, os.getppid()
            name = signal.Signals(number).name
            if first is None or (first == _USR1 and number != _USR1):
                first, since = number, now
                log.warning("%s: finishing the step, then saving; a second one ends at once", name)
            elif now - since >= SAME_REQUEST and parent == parent_before:
                if is_main_process():
                    os.write(2, f"{name} again: ended at once\n".encode())
                os._exit(128 + number)

    def _after_fork(self) -> None:
        """In a forked process: its signals aren't requests to the training."""
        if not self._is_open:
            return
        signal.set_wakeup_fd(-1)
        for number in self._before:
            is_end = number == getattr(signal, "SIGTERM", None)  # multiprocessing's terminate() and join() rely on it
            signal.signal(number, signal.SIG_DFL if is_end else _pass_over)


def _pass_over(number: int, frame: FrameType | None) -> None:
    """Ctrl-C goes to all processes of a terminal: the training decides for its workers."""


@contextmanager
def held_back() -> Iterator[None]:
    """Processes that are started meanwhile get no signal until they let it: for DataLoader's workers, which then leave_to_parent.

    Spawned ones only where Python has gh-127586 (December 2024): before, multiprocessing unblocks signals with the first of them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(worker: int = 0) -> None:
    """For DataLoader's worker_init_fn: no signal but its training's own SIGTERM ends this worker process, on Linux.

    What goes to all processes of a run (Ctrl-C, torchrun's, Slurm's or systemd's SIGTERM) would end the workers while the training
    finishes its step, which fails it. A worker whose training is gone ends by itself, within 5 seconds. Start workers held_back():
    here it is too late for a signal that comes while they start, and for threads that libraries have started.
    """
    for name in ("SIGINT", "SIGBREAK", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_by_parent() -> None:
    training = multiprocessing.parent_process()
    parent = os.getppid() if training is None else training.pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def end_with_parent() -> None:
    """Let the kernel send SIGTERM when a launcher ends: `accelerate launch` passes signals on to nobody. Linux only.

    Without a launcher (SET_BY_LAUNCHERS) nothing is done: a training that was started in a shell outlives it as the shell says.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in SET_BY_LAUNCHERS):
        return
    parent = os.getppid()
    try:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended meanwhile, so the kernel won't tell
        os.kill(os.getpid(), signal.SIGTERM)
