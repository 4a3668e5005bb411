"""Signals: after a first request to end, the step is finished and saved; a second ends at once."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from library.log import is_main_process, log

# One request often arrives twice: `timeout` signals a process and then its group, and a launcher
# passes on what the terminal has sent to all processes.
SAME_REQUEST = 1.0  # seconds

_NAMES = ("SIGINT", "SIGBREAK") if sys.platform == "win32" else ("SIGINT", "SIGTERM", "SIGUSR1")
NOTED = tuple(signal.Signals[name] for name in _NAMES)
_USR1: int | None = getattr(signal, "SIGUSR1", None)
_CLOSED = 0  # no signal has this number

# Variables that `accelerate launch` and torchrun set for their processes. LOCAL_RANK and
# ACCELERATE_MIXED_PRECISION are not among them: users export these in shells, and the end of a
# shell must not end what was started in it.
SET_BY_LAUNCHERS = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def exit_status(number: int) -> int:
    """Return the exit status of a run that this signal ended early, after a save.

    A scheduler sends SIGUSR1 and starts the run again, so nothing has failed.
    """
    return 0 if number == _USR1 else 128 + number


class Signals:
    """A context in which a first request to end sets `asked`, and a second ends the process.

    Requests are SIGTERM, SIGINT and SIGUSR1 (on Windows Ctrl-C and Ctrl-Break), except those that
    were ignored before, as Ctrl-C is in a shell's background job. A second request comes at least a
    second after the first one. These are not second requests: SIGTERM or SIGINT after SIGUSR1,
    since schedulers send both, and the signal that the kernel sends when the launcher ends
    (end_with_parent).

    The handlers only set `asked`. A thread logs the request, and ends the process even while the
    main thread waits for a device or for another process. Files that are being written then remain
    next to the final ones, and worker processes end when they miss their parent. Python handles
    signals in the main thread only; elsewhere this does nothing.

    Attributes:
        asked: the number of the signal that asks to end, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._handlers_before: dict[int, Any] = {}
        self._is_open = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._arrivals, self._sender = socket.socketpair()  # Windows accepts sockets, but no pipes
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(
            target=self._listen, args=(os.getppid(),), name="signals", daemon=True
        )
        self._listener.start()
        self._is_open = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)
        for number in NOTED:
            if signal.getsignal(number) != signal.SIG_IGN:
                before = signal.signal(number, self._note)
                self._handlers_before[number] = before or signal.SIG_DFL  # None: C code has set it
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        # Closing the socket is not enough, as forked workers have it too.
        self._sender.send(bytes([_CLOSED]))
        self._listener.join()
        self._sender.close()
        self._arrivals.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, between two instructions of the main thread, which may hold any lock."""
        if self.asked is None or self.asked == _USR1:
            self.asked = number

    def _listen(self, parent: int) -> None:
        """Log the first request, and end the process at the second.

        The interpreter sends each signal's number here.
        """
        first, since = None, 0.0
        while (number := self._arrivals.recv(1)[0]) != _CLOSED:
            if number not in self._handlers_before:
                continue
            now = time.monotonic()
            parent_before, parent = parent, os.getppid()
            name = signal.Signals(number).name
            if first is None or (first == _USR1 and number != _USR1):
                first, since = number, now
                log.warning("%s: finishing the step, then saving; a second one ends at once", name)
            elif now - since >= SAME_REQUEST and parent == parent_before:
                if is_main_process():
                    os.write(2, f"{name} again: ended at once\n".encode())
                os._exit(128 + number)

    def _after_fork(self) -> None:
        """In a forked process, signals are not requests to the training."""
        if not self._is_open:
            return
        signal.set_wakeup_fd(-1)
        # A terminal sends Ctrl-C to all processes, but the training decides for its workers.
        for number in self._handlers_before:
            signal.signal(number, signal.SIG_IGN)
        # multiprocessing's terminate() and join() rely on SIGTERM.
        if signal.SIGTERM in self._handlers_before:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """Block the signals of the DataLoader workers that are started in this context.

    They are blocked until leave_to_parent.

    Spawned processes are covered only where Python has gh-127586 (December 2024); before it,
    multiprocessing unblocks signals when it starts the first of them.
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
    """Ignore all signals but the training's own SIGTERM (on Linux).

    This is the worker_init_fn of DataLoader.

    A signal to all processes of a run (Ctrl-C, or SIGTERM of torchrun, Slurm or systemd) would end
    the workers while the training finishes its step, and the step would fail. A worker ends within
    5 seconds after its training. Start workers in held_back(): this function is too late for
    signals during their start, and for threads that libraries have started.
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
    """Let the kernel send SIGTERM when the launcher ends. Linux only.

    `accelerate launch` passes no signal on. Without a launcher (SET_BY_LAUNCHERS) this does
    nothing: a training that a shell started may outlive the shell.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in SET_BY_LAUNCHERS):
        return
    parent = os.getppid()
    try:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        return
    if os.getppid() != parent:  # the launcher ended before the call, so the kernel sends nothing
        os.kill(os.getpid(), signal.SIGTERM)
