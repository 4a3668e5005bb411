"""Faults of what is written: killed writers, full and read-only disks, two runs on one name, numbers that aren't finite. Numbers are trust.md's."""

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import free_port
from messages import lines_mentioning, mentioning, mentions, shows_caching
from running import ROOT, arguments, losses_of, tensors_of, train_network
from states import state_metadata
from test_state import logged, some_state

from library.errors import NotFinite, OptionError, RunError
from library.errors import run as run_script
from library.files import OutputLock, host_name, remove_left_over, temporary_name, write_atomically
from library.safetensors_io import read_header, write_safetensors
from library.training.monitoring.metrics import MetricsLogger
from library.training.monitoring.step_log import saved_files
from library.training.options.output import ResumeOptions, SavingOptions
from library.training.progress import Progress
from library.training.saving.saver import Saver
from library.training.saving.schedule import SaveSchedule
from library.training.saving.state import State, read_state, write_state
from library.training.saving.state_folder import newest_state
from networks.lora_file import write_lora

__all__ = ["logged"]  # a fixture

if sys.platform == "win32":
    pytest.skip("signals, umask and mounts of POSIX", allow_module_level=True)


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A process that does `work` again and again; killed with -9 at the end."""
    child = os.fork()
    if not child:
        try:
            while True:
                work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it had ended by itself"


def seconds_of(write: Callable[[], object]) -> float:
    """How long a write takes on this machine, now: kills must hit before, in and after it."""
    started = time.monotonic()
    write()
    return time.monotonic() - started


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def whole(size: int, value: float) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.full((size,), value) for name in "abcd"}


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_fault_1_kill_9_during_a_write_leaves_the_old_file_or_the_complete_new_one(
    ending, tmp_path
):
    path, draw, torn, value = tmp_path / f"lora{ending}", random.Random(1), 0, 0.0

    def write() -> None:
        nonlocal value
        value += 1.0
        write_lora(path, whole(500_000, value), {}, None)

    took = seconds_of(lambda: write_lora(tmp_path / f"first{ending}", whole(500_000, 0), {}, None))
    for _ in range(20):
        with forked(write):
            time.sleep(0.01 + draw.uniform(0, 3 * took))
        if path.exists():
            tensors = (
                tensors_of(path)
                if ending == ".safetensors"
                else torch.load(path, weights_only=True)
            )
            assert (
                len(
                    {
                        float(number)
                        for tensor in tensors.values()
                        for number in (tensor.min(), tensor.max())
                    }
                )
                == 1
            )
            value = float(tensors["a.lora_down.weight"][0])
        torn += bool(left_over(tmp_path))
        remove_left_over(tmp_path)
        assert not left_over(tmp_path)
    assert torn and path.exists(), "the kills came at the wrong times"


def test_fault_2_kill_9_while_a_state_is_written_leaves_a_complete_state(tmp_path):
    """The same folder again and again, as a name that is saved twice: it is moved aside before the new one gets its name."""
    draw, torn, step = random.Random(1), 0, 0
    weights = {"a": torch.zeros(300_000)}
    write_state(
        tmp_path / "n-state",
        State(state_metadata(0), {"a": weights["a"] * 0}, {"m": weights["a"] * 0}),
    )

    def write() -> None:
        nonlocal step
        step += 1
        tensor = torch.full((300_000,), float(step))
        write_state(tmp_path / "n-state", State(state_metadata(step), {"a": tensor}, {"m": tensor}))

    first = State(state_metadata(0), weights, {"m": weights["a"]})
    took = seconds_of(lambda: write_state(tmp_path / "first-state", first))
    for _ in range(20):
        with forked(write):
            time.sleep(0.01 + draw.uniform(0, 3 * took))
        torn += bool(left_over(tmp_path))
        found = newest_state(tmp_path, ["n"])
        assert found == tmp_path / "n-state"
        state = read_state(found)
        step = state.metadata.step
        for tensor in (state.weights["a"], state.optimizer["m"]):
            assert (tensor == step).all()
        assert not left_over(tmp_path)
    assert torn and step > 0, "the kills came at the wrong times"


def test_fault_2_a_kill_between_the_two_moves_of_a_state_loses_neither(tmp_path, monkeypatch):
    write_state(tmp_path / "n-state", some_state(1))
    real, moves = os.rename, []

    def rename(source, target):
        moves.append(target)
        if len(moves) == 2:
            os._exit(9)
        real(source, target)

    child = os.fork()
    if not child:
        os.rename = rename
        write_state(tmp_path / "n-state", some_state(2))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "n-state").exists() and len(left_over(tmp_path)) == 2
    assert read_state(newest_state(tmp_path, ["n"])).metadata.step == 1
    assert not left_over(tmp_path)


def test_files_of_a_killed_process_with_the_same_pid_are_replaced(tmp_path):
    """Containers start with the same process numbers each time."""
    state = tmp_path / "n-state"
    for _ in range(2):
        for name in (temporary_name(state), temporary_name(state.with_name("n-state-old"))):
            name.mkdir(exist_ok=True)
            (name / "weights.safetensors").write_bytes(b"torn")
        write_state(state, some_state(3))
    assert read_state(state).metadata.step == 3 and [path.name for path in tmp_path.iterdir()] == [
        "n-state"
    ]


# ----------------------------------------------------------------------------------------------------------------- full disks


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own; skips where that takes rights that we don't have."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def status_of(work: Callable[[], object]) -> int:
    """What the script's process would end with."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: work() and None)
    return ended.value.code


def fill_after(saves: int, folder: Path, monkeypatch) -> None:
    """After this number of saves something else takes all free space."""
    real, count = Saver.save, []

    def save(self, *args):
        paths = real(self, *args)
        count.append(paths)
        if len(count) == saves:
            with open(folder / "other", "wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(1 << 16))
                    except OSError:
                        break
        return paths

    monkeypatch.setattr(Saver, "save", save)


def test_fault_4_a_disk_that_fills_up_costs_only_the_saves_that_do_not_fit(
    golden_model, images, tmp_path, monkeypatch, capsys
):
    emergency = tmp_path / "emergency"
    with mounted(tmp_path / "output", "size=4m") as output:
        fill_after(2, output, monkeypatch)
        words = [
            "--max_train_steps",
            "4",
            "--save_every_n_steps",
            "1",
            "--emergency_dir",
            emergency,
        ]
        assert status_of(lambda: train_network(golden_model, images, output, *words)) == 1
        logged = capsys.readouterr().err
        assert mentions(logged, "ERROR", output, "0.50 MB", "0.00 MB")
        assert mentions(logged, "error:", "3", output) and "Traceback" not in logged
        assert mentions(logged, "4 steps", "loss")  # training went on
        assert sorted(path.name for path in output.glob("*.safetensors")) == [
            f"lora-step0000000{n}.safetensors" for n in (1, 2)
        ]
        for path in output.glob("*.safetensors"):
            assert len(tensors_of(path)) == 576
        assert not left_over(output) and not (output / ".lora.lock").exists()
    saved = sorted(path.name for path in emergency.iterdir())
    assert saved == [
        "lora-step00000003.safetensors",
        "lora-step00000004.safetensors",
        "lora.safetensors",
    ]
    assert read_header(emergency / "lora.safetensors").metadata["ss_steps"] == "4"


def test_fault_4_without_space_for_all_planned_saves_the_run_does_not_start(
    golden_model, images, tmp_path
):
    with mounted(tmp_path / "output", "size=4m") as output:
        words = ["--max_train_steps", "100", "--save_every_n_steps", "1"]
        with pytest.raises(
            OptionError,
            match=mentioning("--output_dir", output, "101", "0.50 MB", "--save_last_n_steps"),
        ):
            train_network(golden_model, images, output, *words)
        assert not list(output.glob("*.safetensors"))


def test_fault_4_a_full_disk_is_an_error_without_a_traceback(
    golden_model, images, tmp_path, capsys
):
    with mounted(tmp_path / "output", "size=64k") as output:
        with (
            open(output / "other", "wb", buffering=0) as file,
            pytest.raises(OSError, match="No space"),
        ):
            while True:
                file.write(bytes(1 << 12))
        assert (
            status_of(lambda: train_network(golden_model, images, output, "--max_train_steps", "1"))
            == 2
        )
        logged = capsys.readouterr().err
        assert (
            mentions(logged, "error", "No space left on device")
            and not shows_caching(logged)
            and "Traceback" not in logged
        )


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes past the limit fail without a warning, as with a quota."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_fault_4_an_interrupted_write_leaves_the_older_file(ending, tmp_path):
    path = tmp_path / f"lora{ending}"
    write_lora(path, whole(10_000, 1.0), {}, None)
    before = path.read_bytes()
    with (
        file_size_limit(100_000),
        pytest.raises(RunError, match=mentioning(path, "File too large", "100,000 bytes")),
    ):
        write_lora(path, whole(10_000, 2.0), {}, None)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_fault_4_an_interrupted_state_leaves_the_older_one(tmp_path):
    write_state(tmp_path / "n-state", some_state(1))
    large = State(state_metadata(2), {"a": torch.zeros(100_000)}, {})
    with (
        file_size_limit(100_000),
        pytest.raises(RunError, match="can't be written: File too large"),
    ):
        write_state(tmp_path / "n-state", large)
    assert read_state(tmp_path / "n-state").metadata.step == 1 and os.listdir(tmp_path) == [
        "n-state"
    ]


def test_fault_4_a_run_over_its_quota_continues_and_ends_with_status_1(
    golden_model, images, tmp_path, capsys
):
    output = tmp_path / "output"
    with file_size_limit(300_000):
        words = ["--max_train_steps", "2", "--save_every_n_steps", "1", "--save_state"]
        assert status_of(lambda: train_network(golden_model, images, output, *words)) == 1
    logged = capsys.readouterr().err
    assert (
        len(lines_mentioning(logged, "ERROR ")) == 6
        and mentions(logged, "error:", "6")
        and len(losses_of(output)) == 2
    )
    assert not [path for path in output.iterdir() if "safetensors" in path.name or path.is_dir()]


# ------------------------------------------------------------------------------------------------- retention and permissions


class Trainable:
    """Saves its tensors, or fails."""

    def __init__(self):
        self.error: Exception | None = None

    def tensors(self):
        return {}

    def file_bytes(self, dtype) -> int:
        return 9

    def path(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}.safetensors")

    def save(self, stem: Path, dtype, metadata) -> Path:
        path = self.path(stem)

        def write(file):
            file.write(b"half")
            if self.error:
                raise self.error
            file.write(b"whole")

        write_atomically(path, write)
        return path


def saver_of(folder: Path, part: Trainable, session: str = "1", **options) -> Saver:
    saving = SavingOptions(output_dir=folder, output_name="n", **options)
    states = ResumeOptions(save_state=True)
    schedule = SaveSchedule(saving, states, 9)
    return Saver(schedule, [part], lambda s, e: {}, None, session_id=session, is_main=True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RunError("no"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_fault_6_an_old_save_is_removed_only_when_the_new_one_is_complete(error, tmp_path, logged):
    part = Trainable()
    saver = saver_of(tmp_path, part, save_every_n_steps=1, save_last_n_steps=1)

    def save(step: int) -> None:
        assert bool(saver.save("step", Progress(step=step))) == (part.error is None)
        saver.save_state("step", Progress(step=step), some_state(step))

    def there() -> list[str]:
        return sorted(path.name.removeprefix("n-step0000000") for path in tmp_path.iterdir())

    save(1)
    save(2)
    assert there() == ["1-state", "1.safetensors", "2-state", "2.safetensors"]
    part.error = error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "library.training.saving.saver.write_state", lambda *_: (_ for _ in ()).throw(error)
        )
        save(3)
    assert (
        there() == ["1-state", "1.safetensors", "2-state", "2.safetensors"]
        and len(saver.failures) == 2
    )
    part.error = None
    save(4)
    assert there() == ["4-state", "4.safetensors"]


def test_fault_6_a_state_that_fits_is_saved_whatever_its_estimated_size(
    tmp_path, logged, monkeypatch
):
    """Nine float32 numbers."""
    saver, progress = saver_of(tmp_path, Trainable()), Progress(step=1)
    for expected, free in ((0, 35), (10**9, 36)):
        saver.schedule = replace(saver.schedule, state_bytes=expected)
        monkeypatch.setattr(
            "library.training.saving.schedule.free_space", lambda folder, size=free: size
        )
        saver.save_state("step", progress, some_state(1))
        assert (tmp_path / "n-step00000001-state").exists() == (free == 36)


@pytest.mark.parametrize(
    "umask, file_mode, folder_mode",
    [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)],
)
def test_fault_7_the_umask_decides_who_may_read(umask, file_mode, folder_mode, tmp_path):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, {})
        write_lora(tmp_path / "a.pt", {"a": torch.zeros(2)}, {}, None)
        write_state(tmp_path / "state", some_state())
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), (
            path
        )


def test_fault_8_a_link_is_replaced_and_its_target_is_not_touched(tmp_path):
    outside, output = tmp_path / "outside", tmp_path / "output"
    output.mkdir()
    outside.mkdir()
    (outside / "kept").write_text("as it was")
    (output / "lora.safetensors").symlink_to(outside / "kept")
    (output / "n-state").symlink_to(outside)
    write_lora(output / "lora.safetensors", whole(10, 1.0), {}, None)
    write_state(output / "n-state", some_state())
    assert (outside / "kept").read_text() == "as it was" and os.listdir(outside) == ["kept"]
    assert sorted(path.name for path in output.iterdir()) == ["lora.safetensors", "n-state"]
    assert (
        not any(path.is_symlink() for path in output.iterdir())
        and read_state(output / "n-state").metadata.step == 5
    )


# ------------------------------------------------------------------------------------------------------- what another run wrote


def session_of(path: Path) -> str:
    return read_header(path).metadata["ss_session_id"]


def test_fault_9_files_of_another_run_are_renamed_and_those_of_this_run_are_not(
    golden_model, images, tmp_path, capsys
):
    words = [
        "--max_train_steps",
        "2",
        "--save_every_n_steps",
        "1",
        "--ema_decay",
        "0.9",
        "--save_state",
    ]
    final = train_network(golden_model, images, tmp_path, *words)
    first, before = (
        session_of(final),
        {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")},
    )
    assert len(before) == 6 and not [name for name in before if first in name]
    state = tmp_path / "lora-step00000001-state"
    train_network(golden_model, images, tmp_path, *words, "--resume", state)  # the same run
    assert session_of(final) == first and before.keys() == {
        path.name for path in tmp_path.glob("*.safetensors")
    }
    capsys.readouterr()
    train_network(golden_model, images, tmp_path, *words[:-1], "--learning_rate", "2e-3")
    second = session_of(final)
    assert second != first
    for name in before:
        aside = tmp_path / f"{name.removesuffix('.safetensors')}.{first}.safetensors"
        assert session_of(aside) == first and session_of(tmp_path / name) == second
    assert (
        f"{final} was saved by another run; it is renamed to lora.{first}.safetensors"
        in capsys.readouterr().err
    )


def test_fault_9_files_without_metadata_are_recognized_by_the_log(golden_model, images, tmp_path):
    """Killed between the save of its model and that of its state, so the step is repeated."""
    words = ["--no_metadata", "--max_train_steps", "2", "--save_every_n_steps", "1", "--save_state"]
    train_network(golden_model, images, tmp_path, *words)
    before = {path.name for path in tmp_path.glob("*.safetensors")}
    for name in ("lora-step00000002-state", "lora-state"):
        shutil.rmtree(tmp_path / name)
    train_network(golden_model, images, tmp_path, *words, "--auto_resume")
    assert {path.name for path in tmp_path.glob("*.safetensors")} == before and len(
        losses_of(tmp_path)
    ) == 2


def test_fault_9_the_log_records_which_run_saved_a_file_last(tmp_path, logged):
    log_file = tmp_path / "n-log.jsonl"

    def save(session: str, step: int, done: int) -> None:
        report = MetricsLogger(9, 9, is_main=True, trackers=None, log_file=log_file, done=done)
        saver = saver_of(tmp_path, Trainable(), session)
        report.log_saved(saver.save("step", Progress(step=step)), step, session)
        report.close()

    save("1", 3, done=0)
    os.utime(tmp_path / "n-step00000003.safetensors", (1000, 1000))
    save("1", 2, done=1)  # broken off before step 3
    save("1", 3, done=1)
    assert not list(tmp_path.glob("*.1000.*"))
    os.utime(tmp_path / "n-step00000003.safetensors", (1000, 1000))
    (tmp_path / "n-step00000003.1000.safetensors").write_text("of a third run")
    save("2", 3, done=1)
    assert saved_files(log_file, "1") == {tmp_path / "n-step00000002.safetensors"}
    assert (tmp_path / "n-step00000003.1000.safetensors").read_text() == "of a third run"
    assert (tmp_path / "n-step00000003.1000-2.safetensors").read_text() == "halfwhole"


@pytest.mark.parametrize("session", ["../../x", "a/b", "", "x" * 300, "1\n2"])
def test_fault_9_a_strange_session_id_is_not_used_in_a_name(session, tmp_path, logged):
    output = tmp_path / "output"
    output.mkdir()
    write_safetensors(output / "n.safetensors", {"a": torch.zeros(1)}, {"ss_session_id": session})
    os.utime(output / "n.safetensors", (1000, 1000))
    assert saver_of(output, Trainable()).save("final", Progress(step=1))
    assert sorted(path.name for path in output.iterdir()) == ["n.1000.safetensors", "n.safetensors"]
    assert os.listdir(tmp_path) == ["output"]


def test_fault_9_folders_and_files_with_a_suffix_are_renamed_too(tmp_path, logged):
    """A Diffusers model of another run; a placeholder token next to a network."""

    class Folder(Trainable):
        def path(self, stem):
            return stem

        def save(self, stem, dtype, metadata):
            stem.mkdir()
            return stem

    class Word(Trainable):
        def path(self, stem):
            return stem.with_name(f"{stem.name}-zyx.safetensors")

    for name in ("n", "n-zyx.safetensors"):
        (tmp_path / name).mkdir() if name == "n" else (tmp_path / name).write_text("another run's")
        os.utime(tmp_path / name, (1000, 1000))
    for part in (Folder(), Word()):
        assert saver_of(tmp_path, part).save("final", Progress(step=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n", "n-zyx.1000.safetensors", "n-zyx.safetensors", "n.1000"]  # fmt: skip
    assert (tmp_path / "n-zyx.1000.safetensors").read_text() == "another run's"


def test_fault_9_another_runs_model_remains_if_the_new_one_cannot_be_written(tmp_path, logged):
    write_safetensors(tmp_path / "n.safetensors", {"a": torch.zeros(1)}, {"ss_session_id": "5"})
    part = Trainable()
    part.error = OSError(28, "No space left on device")
    assert not saver_of(tmp_path, part).save("final", Progress(step=1))
    (kept,) = tmp_path.glob("*.safetensors")
    assert session_of(kept) == "5"


# --------------------------------------------------------------------------------------------------------- two runs at a time


def test_fault_10_a_second_run_of_a_name_is_refused_and_names_the_first(
    golden_model, images, tmp_path, capsys
):
    reading, writing = os.pipe()

    def hold() -> None:
        lock = OutputLock(tmp_path, "lora")
        os.write(writing, b"x")
        time.sleep(60)
        lock.release()

    with forked(hold) as owner:
        os.read(reading, 1)
        assert (
            status_of(
                lambda: train_network(golden_model, images, tmp_path, "--max_train_steps", "1")
            )
            == 2
        )
        logged = capsys.readouterr().err
        assert (
            f"error: --output_name lora: another run (PID {owner} on {host_name()}, started "
            in logged
            and "another name" in logged
        )
        assert "caching" not in logged and not (tmp_path / "lora.safetensors").exists()
        OutputLock(tmp_path, "other").release()
    assert list(tmp_path.glob(".lora.*"))  # killed, so it couldn't tidy up
    train_network(golden_model, images, tmp_path, "--max_train_steps", "1")
    assert (tmp_path / "lora.safetensors").exists() and not list(tmp_path.glob(".lora.*"))


@pytest.mark.parametrize("content", ["", "junk", "[]", '{"process": 1}', None])
def test_fault_10_a_second_run_is_refused_whatever_the_owner_file_contains(content, tmp_path):
    lock = OutputLock(tmp_path, "n")
    owner_file = tmp_path / ".n.owner.json"
    owner_file.unlink() if content is None else owner_file.write_text(content)
    with pytest.raises(OptionError, match="--output_name n: another run"):
        OutputLock(tmp_path, "n")
    lock.release()
    OutputLock(tmp_path, "n").release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    ["", "junk", "[]", '{"process": 1}', json.dumps({"process": 1, "host": "another machine", "since": "yesterday"}), json.dumps({"process": os.getpid(), "host": host_name(), "since": ""})],
    ids=["empty", "junk", "a list", "torn", "another machine's", "this process's"],
)  # fmt: skip
def test_fault_10_the_lock_of_a_killed_run_is_taken_over_whatever_it_contains(content, tmp_path):
    """Process 1 lives, here; the run that wrote this doesn't, be it on a node that was taken away."""
    for name in (".n.lock", ".n.owner.json"):
        (tmp_path / name).write_text(content)
    lock = OutputLock(tmp_path, "n")
    assert json.loads((tmp_path / ".n.owner.json").read_text())["process"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_fault_10_one_of_many_runs_that_start_together_gets_the_name(tmp_path):
    """Each takes it, looks that it is alone, and gives it back."""

    def work() -> None:
        try:
            lock = OutputLock(tmp_path, "n")
        except OptionError:
            return
        with open(tmp_path / "alone", "x"):
            time.sleep(0.001)
        (tmp_path / "alone").unlink()
        lock.release()
        with open(tmp_path / f"done.{os.getpid()}", "a") as file:
            file.write("x")

    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            try:
                for _ in range(150):
                    work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [
        0,
        0,
        0,
        0,
    ]
    assert sum(path.stat().st_size for path in tmp_path.glob("done.*")) > 10
    assert not list(tmp_path.glob(".n.*"))


def test_fault_10_a_disk_without_locks_is_logged_and_the_run_continues(
    tmp_path, monkeypatch, logged
):
    import fcntl

    def refuse(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    OutputLock(tmp_path, "n").release()
    assert mentions(logged, ".n.lock", "lock")


def test_fault_10_a_lock_that_cannot_be_written_is_an_error_in_one_line(tmp_path):
    (tmp_path / ".n.lock").mkdir()
    with pytest.raises(OptionError, match=r"\.n\.lock: can't be written: "):
        OutputLock(tmp_path, "n")


def test_fault_10_workers_do_not_hold_the_lock_of_a_killed_run(tmp_path):
    """A forked worker may outlive its run for a moment."""
    reading, writing = os.pipe()

    def hold() -> None:
        lock = OutputLock(tmp_path, "n")
        worker = os.fork()
        if worker:
            os.write(writing, worker.to_bytes(4, "little"))
        time.sleep(60)
        lock.release()

    with forked(hold):
        worker = int.from_bytes(os.read(reading, 4), "little")
        time.sleep(0.1)
    try:
        OutputLock(tmp_path, "n").release()
    finally:
        os.kill(worker, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------- read-only, links


@pytest.mark.parametrize("way", ["mount", "file", "dangling link"])
def test_fault_11_an_output_folder_that_is_not_writable_is_an_error_before_caching(
    way, golden_model, images, tmp_path, capsys
):
    output = tmp_path / "output"

    def logged() -> str:
        assert (
            status_of(lambda: train_network(golden_model, images, output, "--max_train_steps", "1"))
            == 2
        )
        return capsys.readouterr().err

    if way == "mount":
        with mounted(output, "size=4m,ro"):
            text = logged()
    else:
        output.write_text("") if way == "file" else output.symlink_to(
            tmp_path / "nowhere" / "at all"
        )
        text = logged()
    assert (
        f"--output_dir {output}: can't be created or written to" in text and "caching" not in text
    )
    assert not list(images.rglob("*.npz"))


# --------------------------------------------------------------------------------------------------- numbers that aren't finite


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "value, dtype", [(float("nan"), None), (float("inf"), None), (70_000.0, torch.float16)]
)
def test_fault_61_weights_with_nan_or_inf_are_never_written(value, dtype, ending, tmp_path):
    """70,000 is finite, but not in float16, in which it would be saved."""
    path = tmp_path / f"lora{ending}"
    write_lora(path, whole(10, 1.0), {}, None)
    before = path.read_bytes()
    bad = {**whole(10, 2.0), "c.lora_down.weight": torch.tensor([1.0, value])}
    with pytest.raises(
        NotFinite, match=mentioning(path, "1", "finite|NaN|Inf", "c.lora_down.weight")
    ):
        write_lora(path, bad, {}, dtype)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_fault_61_a_run_whose_weights_become_nan_keeps_its_earlier_saves(
    golden_model, images, tmp_path, monkeypatch
):
    real, saves = Saver.save, []

    def save(self, *args):
        saves.append(args)
        if len(saves) == 2:
            next(iter(self.trainables[0].tensors().values())).data[0] = float("inf")
        return real(self, *args)

    monkeypatch.setattr(Saver, "save", save)
    words = [
        "--max_train_steps",
        "3",
        "--save_every_n_steps",
        "1",
        "--save_state",
        "--emergency_dir",
        tmp_path / "emergency",
    ]
    assert status_of(lambda: train_network(golden_model, images, tmp_path / "output", *words)) == 1
    saved = sorted(
        path.name
        for path in (tmp_path / "output").glob("lora*")
        if path.suffix in ("", ".safetensors")
    )
    assert (
        saved == ["lora-step00000001-state", "lora-step00000001.safetensors"]
        and not (tmp_path / "emergency").exists()
    )


# --------------------------------------------------------------------------------------------------------- one of two processes


BREAKS_DOWN = """
import os, sys
import torch
from library.training.optim.optimizer_step import OptimizerStep
from library.errors import run
import sdxl_train_network
real, calls = OptimizerStep.backward, []

def backward(self, *args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        if sys.argv[1] == "0":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        os.kill(os.getpid(), int(sys.argv[1]))
    return real(self, *args)

OptimizerStep.backward = backward
run(lambda: sdxl_train_network.main(sys.argv[2:]) and None)
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, 0])
def test_fault_72_if_one_process_dies_or_hangs_the_other_ends_with_an_error(
    number, golden_model, images, tmp_path
):
    """Without a launcher, which would end it: at once, or after --ddp_timeout. The last state is whole.

    0: it has no memory, says so, and ends.
    """
    output, processes, port = tmp_path / "output", [], str(free_port())
    extra = [
        "--max_train_steps",
        "50",
        "--save_every_n_steps",
        "1",
        "--save_state",
        "--ddp_timeout",
        "1",
    ]
    for rank in ("0", "1"):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = {
            **os.environ,
            **place,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        words = [str(int(number)), *arguments(golden_model, images, output, *extra)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", BREAKS_DOWN, *words],
                env=env,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
    try:
        logged = processes[0].communicate(timeout=240)[1]
        if number == signal.SIGKILL:
            assert processes[1].wait(10) == -number
        if number == 0:
            assert mentions(
                processes[1].communicate(timeout=10)[1], "error", "1", "step 3", "out of memory"
            )
            assert processes[1].returncode == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1, logged[-3000:]
    assert read_state(newest_state(output, ["lora"])).metadata.step == 2
    assert not (output / "lora.safetensors").exists() and not left_over(output)
