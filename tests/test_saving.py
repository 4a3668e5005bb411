"""Saver: names, retention and dtypes by the contract; metadata."""

import json
from pathlib import Path

import pytest
import torch
from messages import mentioning
from states import state_metadata

from library.errors import OptionError
from library.training.options.output import ResumeOptions, SavingOptions
from library.training.progress import Progress
from library.training.saving.saver import Saver
from library.training.saving.schedule import SaveSchedule, saved_state_bytes
from library.training.saving.state import State


class FakeTrainable:
    def __init__(self, size: int = 0):
        self.size = size

    def tensors(self):
        return {}

    def file_bytes(self, dtype):
        return self.size

    def path(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}.safetensors")

    def save(self, stem: Path, dtype, metadata) -> Path:
        path = self.path(stem)
        path.write_text(json.dumps(dict(metadata)))
        return path


def run(folder: Path, *, epochs: int = 5, steps_per_epoch: int = 4, **options) -> list[str]:
    """Save as the loop does in a complete run; returns the files that remain."""
    schedule = SaveSchedule(SavingOptions(output_dir=folder, **options), ResumeOptions(), epochs)
    saver = Saver(
        schedule,
        [FakeTrainable()],
        lambda s, e: {"steps": str(s), "epoch": str(e)},
        None,
        session_id="1",
        is_main=True,
    )
    progress = Progress()
    for step in range(1, epochs * steps_per_epoch + 1):
        progress.step = step
        if schedule.step_is_due(step):
            saver.save("step", progress)
        if step % steps_per_epoch == 0:
            progress.epoch += 1
            if schedule.epoch_is_due(progress.epoch):
                saver.save("epoch", progress)
    saver.save("final", progress)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "options, files",
    [
        ({}, ["last.safetensors"]),
        ({"output_name": "a.b"}, ["a.b.safetensors"]),
        (
            {"save_every_n_epochs": 2},
            ["epoch-000002.safetensors", "epoch-000004.safetensors", "last.safetensors"],
        ),
        (
            {"output_name": "n", "save_every_n_epochs": 1, "save_last_n_epochs": 2},
            ["n-000003.safetensors", "n-000004.safetensors", "n.safetensors"],
        ),
        (
            {"output_name": "n", "save_n_epoch_ratio": 2},
            ["n-000002.safetensors", "n-000004.safetensors", "n.safetensors"],
        ),
        (
            {"save_every_n_steps": 8},
            ["at-step00000008.safetensors", "at-step00000016.safetensors", "last.safetensors"],
        ),
        (
            {"output_name": "n", "save_every_n_steps": 5, "save_last_n_steps": 6},
            ["n-step00000015.safetensors", "n-step00000020.safetensors", "n.safetensors"],
        ),
        ({"save_every_n_epochs": 0, "save_every_n_steps": 0}, ["last.safetensors"]),
    ],
)
def test_names_and_retention_by_the_contract(options, files, tmp_path):
    assert run(tmp_path, **options) == files


def test_step_saves_record_the_running_epoch_and_epoch_saves_the_finished_one(tmp_path):
    run(tmp_path, save_every_n_steps=6, save_every_n_epochs=2)
    found = {
        name: json.loads((tmp_path / f"{name}.safetensors").read_text())
        for name in ("at-step00000006", "epoch-000002", "last")
    }
    assert found == {
        "at-step00000006": {"steps": "6", "epoch": "1"},
        "epoch-000002": {"steps": "8", "epoch": "2"},
        "last": {"steps": "20", "epoch": "5"},
    }


def test_the_final_save_of_a_run_that_stopped_early_records_its_last_epoch(tmp_path):
    options = SavingOptions(output_dir=tmp_path)
    saver = Saver(SaveSchedule(options, ResumeOptions(), 9), [FakeTrainable()], lambda s, e: {"epoch": str(e)}, None, session_id="1", is_main=True)  # fmt: skip
    for step, epoch in ((8, "2"), (36, "9")):
        (path,) = saver.save("final", Progress(epoch=2, step=step), 36)
        assert json.loads(path.read_text()) == {"epoch": epoch}


def test_only_files_of_this_run_are_removed(tmp_path):
    (tmp_path / "n-000001.safetensors").write_text("of an earlier run")
    files = run(tmp_path, output_name="n", save_every_n_epochs=2, save_last_n_epochs=1)
    assert "n-000001.safetensors" in files


def test_saves_because_of_a_signal_are_removed_when_they_are_old(tmp_path):
    """Ended at steps 3 and 5; what else the run has saved stays."""
    options = SavingOptions(
        output_dir=tmp_path, output_name="n", save_every_n_steps=2, save_last_n_steps=2
    )
    saver = Saver(
        SaveSchedule(options, ResumeOptions(), 2),
        [FakeTrainable()],
        lambda s, e: {},
        None,
        session_id="1",
        is_main=True,
    )
    saver.save("epoch", Progress(epoch=1))
    saver.save("best", Progress())
    for step in (0, 2, 3, 4, 5, 6, 8, 10):
        saver.save("step", Progress(step=step))
        saver.save_state("step", Progress(step=step), State(state_metadata(), {}, {}))
    saver.save("final", Progress(step=10))
    left = {path.name.removesuffix(".safetensors") for path in tmp_path.iterdir()}
    steps = {f"n-step{step:08d}{ending}" for step in (8, 10) for ending in ("", "-state")}
    assert left == {"n", "n-best", "n-000001", *steps}


@pytest.mark.parametrize(
    "name", ["a/b", "..", "../x", "a\\b", "nul\0", "x" * 300, "a:b", "", "con?"]
)
def test_fault_8_an_output_name_that_leaves_its_folder_is_refused(name, tmp_path):
    with pytest.raises(OptionError, match=mentioning("--output_name", repr(name))):
        SavingOptions(output_dir=tmp_path, output_name=name)


def test_other_processes_write_nothing(tmp_path):
    options = SavingOptions(output_dir=tmp_path / "new")
    saver = Saver(
        SaveSchedule(options, ResumeOptions(), 1),
        [FakeTrainable()],
        lambda s, e: {},
        None,
        session_id="1",
        is_main=False,
    )
    assert saver.save("final", Progress()) == [] and not (tmp_path / "new").exists()


def test_the_planned_disk_space_includes_the_best_model_and_saves_about_to_be_removed(
    tmp_path,
):
    """Steps 2 and 4 of the last 2, the one that is being saved, the best and the final one."""
    options = SavingOptions(output_dir=tmp_path, save_every_n_steps=2, save_last_n_steps=2)
    for keeps_best, models in ((False, 4), (True, 5)):
        schedule = SaveSchedule(options, ResumeOptions(), 1, keeps_best=keeps_best)
        assert schedule.disk_space(100).models == models


@pytest.mark.parametrize(
    "options, done, models",
    [
        ({"save_every_n_steps": 2}, Progress(), 6),
        ({"save_every_n_steps": 2}, Progress(step=8), 2),  # 10 and the final one
        ({"save_every_n_steps": 2, "save_last_n_steps": 2}, Progress(), 4),
        ({"save_every_n_steps": 2, "save_last_n_steps": 2}, Progress(step=2), 4),  # 4, 6, 8 for a moment, and the final one
        ({"save_every_n_steps": 2, "save_last_n_steps": 2}, Progress(step=8), 2),
        ({"save_every_n_epochs": 1}, Progress(epoch=3), 2),  # of five epochs; the last one is the final one
        ({"save_every_n_epochs": 1, "save_last_n_epochs": 2}, Progress(epoch=3), 2),
        ({"save_every_n_epochs": 1}, Progress(epoch=5), 1),
    ],
)  # fmt: skip
def test_a_resumed_run_needs_space_for_its_remaining_saves(
    options, done, models, tmp_path, monkeypatch
):
    saving, states = SavingOptions(output_dir=tmp_path, **options), ResumeOptions()
    schedule = SaveSchedule(saving, states, 5, model_bytes=1000)
    assert schedule.disk_space(10, done).models == models
    monkeypatch.setattr("library.training.saving.schedule.free_space", lambda folder: models * 1000)
    schedule.check_space(10, done)
    monkeypatch.setattr(
        "library.training.saving.schedule.free_space", lambda folder: models * 1000 - 1
    )
    with pytest.raises(OptionError, match=f"but {models} models of 0.00 MB"):
        schedule.check_space(10, done)


def test_the_space_of_states_follows_their_own_retention(tmp_path):
    saving = SavingOptions(output_dir=tmp_path, save_every_n_steps=2, save_every_n_epochs=1)
    states = ResumeOptions(save_state=True, save_last_n_steps_state=2, save_last_n_epochs_state=1)
    schedule = SaveSchedule(saving, states, 5)
    assert schedule.disk_space(100)[::2] == (50 + 4 + 1, 3 + 2 + 1)


def test_the_size_of_a_state_is_weights_optimizer_state_and_moving_average():
    part = FakeTrainable()
    part.tensors = lambda: {"a": torch.zeros(10, dtype=torch.bfloat16).requires_grad_()}
    assert saved_state_bytes([part], 7, has_ema=True) == 20 + 7 + 40
    assert saved_state_bytes([part], 7, has_ema=False) == 20 + 7
