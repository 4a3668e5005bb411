"""Scripts in processes of their own, forked from one that has torch, transformers and diffusers imported already."""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = (ROOT, ROOT / "tests")


class Script:
    """A script that runs, as far as subprocess.Popen would show it."""

    def __init__(self, script: str, *words: object, env: Mapping[str, str] | None = None):
        """Args: script: its path in the repository. env: what it finds in its environment, beside ours."""
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._told = Path(name)
        argv = [str(ROOT / script), *map(str, words)]
        self._process = _server().Process(
            target=_enter, args=(argv, {**os.environ, **(env or {})}, name)
        )
        self._process.start()
        atexit.register(self.kill)  # a test that fails doesn't leave it running

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def told(self) -> str:
        """All that it has written to stdout and stderr."""
        return self._told.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        with contextlib.suppress(ValueError):  # it is closed
            self._process.kill()

    def end(self, timeout: float = 180) -> tuple[int, str]:
        """(exit status, all that it told), once it has ended; it is killed if it doesn't in time."""
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            self._process.join()
        told = self.told()
        self._told.unlink()
        status = self._process.exitcode
        assert status is not None
        self._process.close()
        return status, told


def free_port() -> int:
    """One that nobody listens at, not even a test beside this one or a process that an earlier run left."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def processes(script: str, *words: object, count: int) -> list[Script]:
    """The script on several processes, which find each other as a launcher would have it."""
    port = free_port()
    places = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(count)
    ]  # fmt: skip
    return [Script(script, *words, env={**place, "ACCELERATE_USE_CPU": "true"}) for place in places]


def end_together(scripts: list[Script]) -> str:
    """Wait until all have ended well; returns what the first told."""
    ended = [script.end() for script in scripts]
    statuses = [status for status, _ in ended]
    assert statuses == [0] * len(scripts), f"{statuses}\n" + "\n".join(
        told[-3000:] for _, told in ended
    )
    return ended[0][1]


def wait_until(is_so, script: Script, timeout: float = 120) -> None:
    """Until something is so that the script does meanwhile."""
    deadline = time.monotonic() + timeout
    while not is_so():
        assert script.is_alive() and time.monotonic() < deadline, script.told()[-3000:]
        time.sleep(0.05)


@cache
def _server() -> BaseContext:
    """Started with the first script; it ends with this process. Windows can't fork: there each script imports for itself."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing.forkserver import ensure_running, set_forkserver_preload

    set_forkserver_preload(["preloaded"])
    changed = {"PYTHONPATH": os.pathsep.join(map(str, _FOLDERS)), "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return multiprocessing.get_context("forkserver")


def _enter(argv: list[str], env: dict[str, str], told: str) -> None:
    """In the new process: be the script."""
    if hasattr(os, "setsid"):
        os.setsid()
    os.environ.clear()
    os.environ.update(env, OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    descriptor = os.open(told, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
