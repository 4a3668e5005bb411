"""Signals: real ones, sent to real processes; and the job script of docs/slurm.md, run as Slurm would."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest
from messages import lines_mentioning, mentions

from library.signals import SAME_REQUEST, SET_BY_LAUNCHERS, Signals, exit_status, leave_to_parent

if sys.platform == "win32":
    pytest.skip("no signal but Ctrl-C can be sent there", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own")


def assert_logged(err: str, *asked: signal.Signals) -> None:
    """Check that the lines are those of requests to save and end: one line each."""
    lines = err.splitlines()
    assert len(lines) == len(asked), lines
    assert all(
        mentions(line, number.name, "saving|save")
        for line, number in zip(lines, asked, strict=True)
    ), lines


LATER = SAME_REQUEST + 0.1

BEGIN = """
import ctypes, os, signal, sys, time
from library.signals import Signals, end_with_parent, exit_status, held_back, leave_to_parent

def say(*words):
    # One write, so that two processes' lines stay whole: print does several where a launcher has Python unbuffered.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""
FINISHES = """
before = [signal.getsignal(n) for n in (2, 10, 15)]
with Signals() as signals:
    say("ready")
    while signals.asked is None:
        time.sleep(0.01)
    say("asked", signals.asked)
    time.sleep(float(sys.argv[1]) if sys.argv[1:] else 0.2)
    say("finished", signals.asked)
assert before == [signal.getsignal(n) for n in (2, 10, 15)]
raise SystemExit(exit_status(signals.asked))
"""
# The main thread waits in C for a lock that nobody frees, as for a device or another process: no handler in Python runs.
IS_STUCK = """
with Signals() as signals:
    mutex = ctypes.create_string_buffer(64)
    say("ready")
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


class Running(subprocess.Popen):
    """A process with a session of its own."""

    def __init__(self, *words: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT):
        whole = {name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHERS}
        whole |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        super().__init__(
            [str(word) for word in words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=whole, cwd=cwd, start_new_session=True,
        )  # fmt: skip

    def line(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().strip()

    def until(self, start: str) -> str:
        """The next line that begins so."""
        while not (line := self.line()).startswith(start):
            assert line or self.poll() is None, self.communicate()
        return line

    def end(self, timeout: float = 30) -> tuple[int, str, str]:
        """(status, stdout, stderr), once all that have its pipes open have ended."""
        out, err = self.communicate(timeout=timeout)
        return self.returncode, out, err


@pytest.fixture
def running() -> Iterator[list[Running]]:
    """What is put there is ended with the test."""
    started: list[Running] = []
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start(tmp_path, running):
    """Start Python on some code, after the words of a launcher."""

    def start_code(code: str, *words: object, launcher=(sys.executable,), env=None) -> Running:
        script = tmp_path / "script.py"
        script.write_text(BEGIN + textwrap.dedent(code))
        running.append(Running(*launcher, script, *words, env=env))
        return running[-1]

    return start_code


# -------------------------------------------------------------------------------------------------- one and two requests


@pytest.mark.parametrize("number, status", [(SIGINT, 130), (SIGTERM, 143), (SIGUSR1, 0)])
def test_the_first_signal_is_logged_and_the_work_continues(start, number, status):
    process = start(FINISHES)
    assert process.line() == "ready"
    process.send_signal(number)
    code, out, err = process.end()
    assert out.splitlines() == [f"asked {int(number)}", f"finished {int(number)}"]
    assert_logged(err, number)
    assert code == status == exit_status(number)


@pytest.mark.parametrize("number, status", [(SIGINT, 130), (SIGTERM, 143), (SIGUSR1, 138)])
def test_a_second_signal_ends_the_process_even_if_the_main_thread_is_stuck(start, number, status):
    process = start(IS_STUCK)
    process.until("ready")
    process.send_signal(number)
    time.sleep(LATER)
    assert process.poll() is None
    process.send_signal(number)
    code, _, err = process.end()
    assert code == status
    first, second = err.splitlines()
    assert_logged(first, number)
    assert mentions(second, number.name) and not mentions(second, "saving|save")


def test_a_request_that_arrives_twice_counts_once(start):
    """As from `timeout`, which signals its process, then the group."""
    process = start(FINISHES, 0.8)
    process.until("ready")
    for _ in range(3):
        process.send_signal(SIGTERM)
        time.sleep(0.2)
    assert process.end()[:2] == (143, "asked 15\nfinished 15\n")


@pytest.mark.skipif(not shutil.which("timeout"), reason="no timeout")
def test_timeout_lets_the_work_finish(start):
    process = start(FINISHES, 0.5, launcher=("timeout", "2.5", sys.executable))
    code, out, err = process.end()
    assert (code, out.splitlines()[1:]) == (124, ["asked 15", "finished 15"]), err


def test_a_schedulers_sigterm_after_its_sigusr1_is_a_first_request(start):
    process = start(FINISHES, 2 * LATER)
    process.until("ready")
    process.send_signal(SIGUSR1)
    time.sleep(LATER)
    process.send_signal(SIGTERM)
    code, out, err = process.end()
    assert (code, out) == (143, "asked 10\nfinished 15\n")
    assert_logged(err, SIGUSR1, SIGTERM)


def test_a_signal_that_was_ignored_stays_ignored():
    """A shell's background job ignores Ctrl-C."""
    before = signal.signal(SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), SIGINT)
            assert signals.asked is None
        assert signal.getsignal(SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(SIGINT, before)


def test_the_handlers_of_before_are_restored():
    """In this process, in which no training may leave handlers: also after an error."""
    before = [signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1)]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), Signals() as signals:
            os.kill(os.getpid(), SIGUSR1)
            assert signals.asked == SIGUSR1
            raise ZeroDivisionError
    assert before == [signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1)]
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_other_threads_do_not_handle_signals():
    before = signal.getsignal(SIGTERM)

    def work():
        with Signals() as signals:
            found.append((signals.asked, signal.getsignal(SIGTERM)))

    found: list = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


# ------------------------------------------------------------------------------------------------------- other processes


def test_a_forked_process_does_not_handle_signals(start):
    process = start("""
        with Signals() as signals:
            child = os.fork()
            if not child:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGUSR1)
                say("in the child", signals.asked)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            time.sleep(0.1)
            say("the child", status, "asked", signals.asked)
        """)
    assert process.end() == (0, "in the child None\nthe child -15 asked None\n", "")


def _work(ready) -> None:
    leave_to_parent()
    ready.set()
    time.sleep(30)


@ON_LINUX
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_only_the_sigterm_of_its_parent_ends_a_worker(method):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=_work, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(30)
    for name in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


LOADS = """
    from torch.utils.data import DataLoader

    loader = DataLoader(range(1000), batch_size=None, num_workers=2, worker_init_fn=leave_to_parent, multiprocessing_context="fork")
    with Signals() as signals:
        after = 0
        with held_back():
            batches = iter(loader)
        for batch in batches:
            if batch == 0:
                say("ready")
            time.sleep(0.05)
            after += signals.asked is not None
            if after == 20:
                break
    say("finished", signals.asked)
    """


@ON_LINUX
@pytest.mark.parametrize("number", [SIGINT, pytest.param(SIGTERM, marks=pytest.mark.long)])
def test_workers_continue_after_a_signal_to_the_process_group(start, number):
    """Ctrl-C in a terminal; torchrun's SIGTERM. After it 20 batches more are loaded than lie ready."""
    process = start(LOADS)
    process.until("ready")
    os.killpg(process.pid, number)
    code, out, err = process.end()
    assert (code, out) == (0, f"finished {int(number)}\n")
    assert_logged(err, number)


# ------------------------------------------------------------------------------------------------------------- launchers


UNDER_A_LAUNCHER = "end_with_parent()\nlauncher = os.getppid()\n" + FINISHES.replace(
    "time.sleep(float",
    "\n    while os.getppid() == launcher:\n        time.sleep(0.01)\n    time.sleep(float",
)
ACCELERATE = (
    sys.executable,
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
    "--cpu",
    "--num_processes",
    "1",
)


@ON_LINUX
@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_fault_63_the_end_of_accelerate_is_logged_and_is_not_a_second_request(
    start, tmp_path, number
):
    """SIGTERM goes to the launcher alone. Ctrl-C goes to both: the launcher ends later, and its end is not a second request."""
    process = start(UNDER_A_LAUNCHER, 0.2, launcher=ACCELERATE, env={"HF_HOME": str(tmp_path)})
    process.until("ready")
    os.kill(process.pid, SIGTERM) if number == SIGTERM else os.killpg(process.pid, number)
    _, out, err = process.end()
    assert out.splitlines() == [f"asked {int(number)}", f"finished {int(number)}"]
    assert len(lines_mentioning(err, number.name, "saving|save")) == 1


@ON_LINUX
def test_a_parent_that_ends_during_the_call_is_noticed(start):
    code = "parents = iter([7, 1])\nos.getppid = lambda: next(parents)\nend_with_parent()\ntime.sleep(30)"
    assert start(code, env={"TORCHELASTIC_RUN_ID": "none"}).end()[0] == -SIGTERM


@ON_LINUX
def test_without_a_launcher_the_end_of_the_parent_has_no_effect(start):
    code = """
    end_with_parent()
    with Signals() as signals:
        shell = os.getppid()
        say("ready")
        while os.getppid() == shell:
            time.sleep(0.01)
        time.sleep(0.3)
        say("asked", signals.asked)
    """
    process = start(code, launcher=("bash", "-c", '"$@" & wait', "-", sys.executable))
    process.until("ready")
    process.kill()
    assert process.end()[1] == "asked None\n"


# ----------------------------------------------------------------------------------------------------------------- Slurm


# It trains until step 3; 0.1 s of a step has been seen by the time of the signal. Its state is a file.
TRAINS = """
from pathlib import Path

words, rank, state = sys.argv[1:], os.environ.get("RANK", "0"), Path("state")
assert words == ["--config_file", "run.toml", "--save_state", "--auto_resume"], words
end_with_parent()
with Signals() as signals:
    say("rank", rank, "goes on from", state.read_text()) if state.exists() else say("rank", rank, "begins")
    while signals.asked is None and not state.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    if signals.asked and Path("fails").exists():
        raise SystemExit(1)
    if signals.asked:
        state.write_text("step 3")
        say("rank", rank, "saved after", signals.asked)
        raise SystemExit(exit_status(signals.asked))
say("rank", rank, "done")
"""


@pytest.fixture
def job(tmp_path, running):
    """Start the page's script: HOME has the suite, PATH a scontrol that records its arguments."""
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    script, *_ = re.findall(r"^```shell\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    suite, programs = tmp_path / "sdxl-training-suite", tmp_path / "programs"
    (suite / ".venv" / "bin").mkdir(parents=True)
    programs.mkdir()
    (tmp_path / "job.sh").write_text(script)
    (suite / ".venv" / "bin" / "activate").write_text(
        f'PATH="{Path(sys.executable).parent}:$PATH"\n'
    )
    (suite / "sdxl_train_network.py").write_text(BEGIN + TRAINS)
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/scontrol_calls"\n')
    scontrol.chmod(0o755)

    def start_job(**env: str) -> Running:
        slurm = {
            "HOME": str(tmp_path),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            **env,
        }
        running.append(Running("bash", tmp_path / "job.sh", env=slurm, cwd=tmp_path))
        return running[-1]

    return start_job


def scontrol_calls(folder: Path) -> list[str]:
    """The recorded arguments of scontrol."""
    path = folder / "scontrol_calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "env, queued",
    [({}, "4711"), ({"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "2"}, "4700_2")],
    ids=["job", "array"],
)
def test_the_job_saves_requeues_itself_and_resumes(job, tmp_path, env, queued):
    first = job(**env)
    first.until("rank 0 begins")
    first.send_signal(SIGUSR1)
    code, out, err = first.end()
    assert (code, out) == (0, "rank 0 saved after 10\n")
    assert_logged(err, SIGUSR1)
    assert scontrol_calls(tmp_path) == [f"requeue {queued}"]

    second = job(**env)
    assert second.end() == (0, "rank 0 goes on from step 3\nrank 0 done\n", "")
    assert scontrol_calls(tmp_path) == [f"requeue {queued}"]


@pytest.mark.parametrize("to_all", [False, True], ids=["shell", "all"])
def test_sigterm_is_forwarded_and_does_not_requeue(job, tmp_path, to_all):
    """scancel's goes to all processes of the job: the training gets it twice."""
    process = job()
    process.until("rank 0 begins")
    os.killpg(process.pid, SIGTERM) if to_all else process.send_signal(SIGTERM)
    code, out, err = process.end()
    assert (code, out) == (143, "rank 0 saved after 15\n")
    assert_logged(err, SIGTERM)
    assert scontrol_calls(tmp_path) == []


def test_a_failed_training_is_not_requeued(job, tmp_path):
    (tmp_path / "sdxl-training-suite" / "fails").touch()
    process = job()
    process.until("rank 0 begins")
    process.send_signal(SIGUSR1)
    assert process.end()[0] == 1
    assert scontrol_calls(tmp_path) == []


@pytest.mark.parametrize("number", [SIGUSR1, pytest.param(SIGTERM, marks=pytest.mark.long)])
def test_all_processes_of_several_gpus_save(job, tmp_path, number):
    """By torchrun itself. scancel's SIGTERM reaches it too, and it forwards it to its processes, which the shell signals as well."""
    process = job(SLURM_GPUS_ON_NODE="2")
    assert {process.until("rank"), process.until("rank")} == {"rank 0 begins", "rank 1 begins"}
    process.send_signal(number) if number == SIGUSR1 else os.killpg(process.pid, number)
    code, out, err = process.end()
    assert set(out.splitlines()) == {f"rank {rank} saved after {int(number)}" for rank in (0, 1)}, (
        err
    )
    assert (code == 0) == (number == SIGUSR1), err
    assert scontrol_calls(tmp_path) == (["requeue 4711"] if number == SIGUSR1 else [])
