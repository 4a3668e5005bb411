"""Resuming: bit-equal to a run that was never interrupted, whatever is trained and wherever it stopped; another run's state is refused."""

import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import Script, end_together, processes, wait_until
from messages import mentioning, mentions, shows_caching
from running import QUICK, arguments, assert_bit_equal, tensors_of, train_network, without
from test_state import assert_same, tamper

from library.errors import OptionError, RunError
from library.safetensors_io import load_tensors, write_safetensors
from library.training.optim.optimizer_step import OptimizerStep
from library.training.saving.state import read_state
from library.training.saving.state_folder import read_metadata

EPOCHS_OF_4 = [
    "--gradient_accumulation_steps",
    "2",
    "--max_train_steps",
    "8",
]  # 8 images per epoch: 4 steps
CACHED_ON_DISK = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]


def rows_of(output: Path, after: int = 0) -> list[dict]:
    """The step log after a step, without the values that differ between two runs."""
    rows = [
        json.loads(line)
        for line in (output / "lora-log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in rows
        if row["step"] > after and "saved" not in row
    ]


def state_at(output: Path, step: int) -> Path:
    return output / f"lora-step{step:08d}-state"


def assert_same_end(plain: Path, resumed: Path, step: int) -> None:
    """Of two runs that saved a state at their end: files, log after the step, and all that their states hold."""
    files = sorted(path.name for path in plain.glob("lora*.safetensors"))
    for name in files:
        if "step" not in name:
            assert_bit_equal(tensors_of(plain / name), tensors_of(resumed / name))
    assert rows_of(plain, step) == rows_of(resumed, step)
    one, two = read_state(plain / "lora-state"), read_state(resumed / "lora-state")
    assert_same(
        *(
            replace(state.metadata, saved={}, signature={}, session_id="").to_json()
            for state in (one, two)
        )
    )
    for part in ("weights", "optimizer", "ema"):
        assert_same(dict(getattr(one, part)), dict(getattr(two, part)), part)


NOISY = [
    "--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--ema_decay", "0.9", "--noise_offset", "0.1", "--noise_offset_random_strength",
    "--adaptive_noise_scale", "0.1", "--multires_noise_iterations", "2", "--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength",
    "--network_dropout", "0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.1", "loraplus_lr_ratio=4", "--scale_weight_norms", "1",
    "--flip_aug", "--max_grad_norm", "0.5", "--min_snr_gamma", "5", "--loss_type", "huber", "--huber_schedule", "snr",
]  # fmt: skip
AUGMENTED = [
    "--shuffle_caption", "--caption_dropout_rate", "0.3", "--caption_tag_dropout_rate", "0.3", "--color_aug", "--random_crop",
    "--max_data_loader_n_workers", "2",
]  # fmt: skip
WITH_TEXT = without(QUICK, "--cache_text_encoder_outputs", "--network_train_unet_only")
UNCACHED = without(WITH_TEXT, "--cache_latents")


CASES = {
    "noise and dropouts": (QUICK, NOISY),
    "text encoders": (WITH_TEXT, ["--shuffle_caption", "--caption_dropout_rate", "0.3", "--text_encoder_lr", "1e-4", "3e-4"]),
    "nothing cached": (UNCACHED, [*NOISY, *AUGMENTED]),
    "caches on disk, two workers": (QUICK, [*CACHED_ON_DISK, "--max_data_loader_n_workers", "2"]),
    "text encoders stop": (WITH_TEXT, ["--stop_text_encoder_training", "4"]),
    "validation": (QUICK, ["--validation_split", "0.25", "--validate_every_n_steps", "2", "--early_stop_patience", "2"]),
    "bf16": (QUICK, ["--mixed_precision", "bf16", "--gradient_checkpointing"]),
    "captions dropped by epoch": (WITH_TEXT, ["--caption_dropout_every_n_epochs", "2", "--token_warmup_step", "8"]),
    **{
        f"{name} {' '.join(arguments)}": (QUICK, ["--network_dim", "32", "--optimizer_type", name, *(["--optimizer_args", *arguments] if arguments else []), *extra])
        for name, arguments, extra in [
            ("AdamW8bit", [], ["--lr_scheduler", "cosine_with_restarts", "--lr_scheduler_num_cycles", "2"]),
            ("PagedAdamW8bit", [], []), ("Lion", [], ["--lr_scheduler", "linear"]), ("Lion8bit", [], []), ("Prodigy", ["use_bias_correction=True"], ["--learning_rate", "1"]),
            ("Adafactor", [], []), ("Adafactor", ["relative_step=False", "scale_parameter=False"], ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "0.5"]),
            ("AdamWScheduleFree", ["warmup_steps=3"], []), ("RAdamScheduleFree", [], []), ("SGDNesterov", [], ["--lr_scheduler", "polynomial"]), ("SGDNesterov8bit", [], []),
        ]
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_fault_65_a_resumed_run_is_bit_equal_whatever_is_trained_and_wherever_it_stopped(
    case, golden_model, images, tmp_path
):
    """Resumed after the first step, then that run before an epoch's end, then that one at it, then before the last step."""
    quick, extra = CASES[case]
    words, often = (
        [*EPOCHS_OF_4, "--max_train_steps", "6", *extra],
        ["--save_every_n_steps", "1", "--save_state"],
    )
    plain, latest = tmp_path / "plain", tmp_path / "first"
    train_network(golden_model, images, plain, *words, "--save_state_on_train_end", quick=quick)
    train_network(golden_model, images, latest, *words, *often, quick=quick)
    assert_same_end(plain, latest, 0)  # saving changes nothing
    last = read_metadata(latest / "lora-state").step
    for step in sorted({1, 3, 4, last - 1} & set(range(1, last))):
        output = tmp_path / f"from_{step}"
        train_network(
            golden_model,
            images,
            output,
            *words,
            *often,
            "--resume",
            state_at(latest, step),
            quick=quick,
        )
        assert_same_end(plain, output, step)
        latest = output


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX")
def test_fault_65_a_killed_run_is_resumed_in_a_new_process(golden_model, images, tmp_path):
    """kill -9 somewhere in an accumulation window; dropouts, noise, warm-up and a moving average."""
    output = tmp_path / "output"
    words = [*EPOCHS_OF_4, *NOISY, "--max_train_steps", "6", *CACHED_ON_DISK]
    train_network(golden_model, images, tmp_path / "plain", *words, "--save_state")
    again = arguments(
        golden_model,
        images,
        output,
        *words,
        "--save_every_n_steps",
        "2",
        "--save_state",
        "--auto_resume",
    )
    run = Script("sdxl_train_network.py", *again)
    wait_until(lambda: (output / "lora-log.jsonl").exists() and len(rows_of(output)) >= 3, run)
    run.kill()
    assert run.end()[0] == -signal.SIGKILL
    assert (output / ".lora.lock").exists() and state_at(output, 2).exists()
    assert not (output / "lora.safetensors").exists()
    status, stderr = Script("sdxl_train_network.py", *again).end()
    assert status == 0 and mentions(stderr, "resum", state_at(output, 2)), stderr[-3000:]
    assert_same_end(tmp_path / "plain", output, 0)
    assert [row["step"] for row in rows_of(output)] == list(range(1, 7))
    assert not list(output.glob(".*"))


@pytest.mark.long
def test_fault_65_a_run_that_failed_during_gradient_accumulation_repeats_the_complete_step(golden_model, images, tmp_path, monkeypatch):  # fmt: skip
    """The seed isn't given, so it is drawn once for both parts."""
    quick, output = without(QUICK, "--seed", "7"), tmp_path / "output"
    words = [
        "--gradient_accumulation_steps",
        "3",
        "--max_train_steps",
        "3",
        "--save_state",
        "--save_every_n_steps",
        "1",
    ]
    real, calls = OptimizerStep.backward, []

    def backward(self, losses, place):
        calls.append(place)
        if len(calls) == 8:
            raise RuntimeError("power failure")
        real(self, losses, place)

    monkeypatch.setattr(OptimizerStep, "backward", backward)
    with pytest.raises(RuntimeError, match="power failure"):
        train_network(golden_model, images, output, *words, "--auto_resume", quick=quick)
    steps = [place.step for place in calls]
    # The seed decides which step is the short one.
    assert steps == sorted(steps) and steps[-1] == 2 and steps.count(2) > 1
    monkeypatch.undo()
    train_network(golden_model, images, output, *words, "--auto_resume", quick=quick)
    seed = read_metadata(output / "lora-state").signature["seed"]
    assert load_tensors(output / "lora.safetensors")[1]["ss_seed"] == seed != "7"
    train_network(golden_model, images, tmp_path / "plain", *words, "--seed", seed, quick=quick)
    assert_same_end(tmp_path / "plain", output, 0)


def test_fault_65_a_state_of_an_epochs_last_step_resumes_before_the_epochs_end(
    golden_model, images, tmp_path
):
    """Its step save comes before the epoch's validation, save and count, and after the step's validation."""
    words = [
        "--gradient_accumulation_steps",
        "3",
        "--max_train_steps",
        "3",
        "--validation_split",
        "0.25",
        "--save_state",
    ]
    words += ["--validate_every_n_steps", "1", "--early_stop_patience", "9"]
    words += [
        "--save_every_n_steps",
        "2",
        "--save_every_n_epochs",
        "1",
    ]  # six images per epoch: two steps
    train_network(golden_model, images, tmp_path / "plain", *words)
    train_network(
        golden_model,
        images,
        tmp_path / "output",
        *words,
        "--resume",
        state_at(tmp_path / "plain", 2),
    )
    assert_same_end(tmp_path / "plain", tmp_path / "output", 2)
    assert (tmp_path / "output" / "lora-000001.safetensors").exists()


@pytest.mark.long
def test_fault_65_two_processes_resume_bit_for_bit(golden_model, images, tmp_path):
    def on_two(output: str, *extra: object) -> None:
        words = arguments(
            golden_model,
            images,
            tmp_path / output,
            *NOISY,
            "--max_train_steps",
            "5",
            "--save_state",
            *extra,
        )
        end_together(processes("sdxl_train_network.py", *words, count=2))

    on_two("plain", "--save_every_n_steps", "3")
    on_two("output", "--resume", state_at(tmp_path / "plain", 3))
    assert_same_end(tmp_path / "plain", tmp_path / "output", 3)
    on_two("plain", "--resume", state_at(tmp_path / "plain", 3), "--verify_resume", "5")
    with pytest.raises(OptionError, match=mentioning("processes|ranks|world size", "2", "1")):
        train_network(golden_model, images, tmp_path / "one", *NOISY, "--max_train_steps", "5", "--resume", state_at(tmp_path / "plain", 3))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- --verify_resume


THREE = [
    "--max_train_steps",
    "3",
    "--save_every_n_steps",
    "1",
    "--save_state",
    "--network_dropout",
    "0.1",
]


class Begun(NamedTuple):
    """A run of three steps, with a state of each."""

    images: Path
    output: Path

    def at(self, step: int) -> Path:
        return state_at(self.output, step)


@pytest.fixture(scope="module")
def begun(golden_model, tmp_path_factory) -> Begun:
    """Shared, so nothing may be changed in it."""
    from tools.make_tiny_dataset import make_images

    folder = tmp_path_factory.mktemp("begun")
    make_images(folder / "pictures" / "2_shapes", 4)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "user_cache"))
        train_network(golden_model, folder / "pictures", folder / "output", *THREE)
    AcceleratorState._reset_state(reset_partial_state=True)
    return Begun(folder / "pictures", folder / "output")


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_verify_resume_repeats_steps_and_compares_them_with_the_log(
    begun, golden_model, tmp_path, capsys
):
    before = times_of(begun.output)
    again = [*THREE, "--resume", begun.at(1), "--verify_resume"]
    train_network(golden_model, begun.images, begun.output, *again, "100")
    assert mentions(capsys.readouterr().err, "verified", "2", "step 3")
    assert times_of(begun.output) == before  # nothing was written
    rows = [
        row
        for row in (begun.output / "lora-log.jsonl").read_text(encoding="utf-8").splitlines()
        if "loss" in row
    ]
    changed = json.loads(rows[1])
    changed["loss/current"] *= 1 + 1e-7
    (tmp_path / "lora-log.jsonl").write_text(
        "\n".join([rows[0], json.dumps(changed), rows[2], "{torn"]), encoding="utf-8"
    )
    with pytest.raises(
        RunError, match=mentioning("step 2", "loss/current", changed["loss/current"])
    ):
        train_network(golden_model, begun.images, tmp_path, *again, "1")
    with pytest.raises(RunError, match=mentioning("lora-log.jsonl", "steps", "3")):
        train_network(
            golden_model,
            begun.images,
            begun.output,
            *THREE,
            "--resume",
            begun.at(3),
            "--verify_resume",
            "1",
        )


# --------------------------------------------------------------------------------------------------------- what isn't the same


def test_fault_66_settings_that_affect_the_result_must_be_the_same(
    begun, golden_model, tmp_path, monkeypatch
):
    output, images = tmp_path / "output", tmp_path / "pictures"
    shutil.copytree(begun.images, images)
    words = [*THREE, "--resume", begun.at(2)]

    def refused(tokens: list[str], *extra: object) -> None:
        with pytest.raises(OptionError, match=mentioning("--resume", "settings")) as error:
            train_network(golden_model, images, output, *words, *extra)
        assert mentions(str(error.value), *tokens) and mentions(str(error.value), "--resume_anyway")
        assert not output.exists()

    for tokens, *extra in [
        (["train_batch_size", "1", "2"], "--train_batch_size", "2"),
        (["gradient_accumulation_steps", "1", "4"], "--gradient_accumulation_steps", "4"),
        (["learning_rate", "0.001", "0.002"], "--learning_rate", "2e-3"),
        (["optimizer_type", "Lion"], "--optimizer_type", "Lion"),
        (["seed", "7", "8"], "--seed", "8"),
        (["network_dim", "2", "4"], "--network_dim", "4"),
        (["max_train_steps", "3", "4"], "--max_train_steps", "4"),
        (["noise_offset", "None", "0.1"], "--noise_offset", "0.1"),
        (["files", "sizes", "captions"], "--resolution", "96"),
    ]:
        refused(tokens, *extra)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(["processes|ranks|world size", "1", "2"])
    monkeypatch.delenv("WORLD_SIZE")
    folder = images / "2_shapes"
    caption = (folder / "picture1.txt").read_text()
    (folder / "picture1.txt").write_text("something else")
    refused(["files", "sizes", "captions"])
    (folder / "picture1.txt").write_text(caption)
    shutil.copy(folder / "picture0.png", folder / "picture9.png")
    shutil.copy(folder / "picture0.txt", folder / "picture9.txt")
    refused(["images", "4", "8", "5", "10"])
    train_network(golden_model, images, output, *words, "--resume_anyway")
    assert [row["step"] for row in rows_of(output)] == [3]


def test_the_signature_of_a_run_is_that_of_states_written_before(begun):
    """The first release wrote these values for the same images and settings; with others its states would be refused."""
    signature = read_metadata(begun.at(3)).signature
    before = {
        "seed": "7", "processes": "1", "latents are cached": "True", "captions are cached": "True", "base model": "tiny_sdxl.safetensors",
        "pictures": "4, 8 with repeats", "batch sizes": "1", "files, sizes and captions": "2caf61c703d33351",
    }  # fmt: skip
    assert {name: signature[name] for name in before} == before


def test_paths_logging_and_saves_may_change(begun, golden_model, tmp_path):
    output, images, model = (
        tmp_path / "output",
        tmp_path / "moved",
        tmp_path / "elsewhere" / golden_model.name,
    )
    shutil.copytree(begun.images, images)
    model.parent.mkdir()
    shutil.copy(golden_model, model)
    changes = [
        "--max_data_loader_n_workers",
        "1",
        "--save_every_n_steps",
        "2",
        "--training_comment",
        "x",
        "--logging_dir",
        tmp_path / "logs",
    ]
    changes += [
        "--cache_latents_to_disk",
        "--save_precision",
        "fp16",
        "--console_log_level",
        "INFO",
    ]
    train_network(model, images, output, *THREE, *changes, "--resume", begun.at(2))
    assert rows_of(output) == rows_of(begun.output, 2)


def test_fault_66_with_resume_anyway_the_new_options_apply(begun, golden_model, tmp_path, capsys):
    """Of a run that had ended: more steps, at a tenth of the learning rate, with batches of two and a moving average."""
    words = [
        "--max_train_steps",
        "6",
        "--lr_scheduler",
        "linear",
        "--learning_rate",
        "1e-4",
        "--train_batch_size",
        "2",
        "--ema_decay",
        "0.9",
    ]
    words += ["--save_state", "--resume", begun.output / "lora-state", "--resume_anyway"]
    train_network(golden_model, begun.images, tmp_path, *words)
    stderr = capsys.readouterr().err
    assert mentions(stderr, "learning_rate", "0.001", "0.0001") and mentions(
        stderr, "max_train_steps", "3", "6"
    )
    rows = rows_of(tmp_path)
    assert [(row["step"], row["epoch"]) for row in rows] == [
        (4, 1),
        (5, 2),
        (6, 2),
    ]  # four steps an epoch now
    assert [row["lr/unet"] for row in rows] == pytest.approx(
        [1e-4 * left / 6 for left in (3, 2, 1)]
    )
    assert read_metadata(tmp_path / "lora-state").epoch == 1
    average, trained = (
        tensors_of(tmp_path / "lora-ema.safetensors"),
        tensors_of(begun.output / "lora.safetensors"),
    )
    ups = [
        name
        for name in trained
        if name.endswith("lora_up.weight") and trained[name].abs().max() > 0
    ]
    # It began with the state's weights; the new run's are zero there, and three steps wouldn't bring it so near.
    assert len(ups) > 100 and all(
        (average[name] - trained[name]).norm() < 0.3 * trained[name].norm() for name in ups
    )


def test_fault_66_another_network_can_never_be_resumed(begun, golden_model, tmp_path):
    words = [*THREE, "--network_dim", "3", "--resume", begun.at(2), "--resume_anyway"]
    with pytest.raises(
        OptionError,
        match=mentioning("--resume", "384", "lora_unet_input_blocks_4_1_proj_in.lora_down.weight"),
    ):
        train_network(golden_model, begun.images, tmp_path, *words)


def test_fault_67_a_finished_run_logs_it_and_changes_nothing(begun, golden_model, capsys):
    before = times_of(begun.output)
    for extra in (
        ["--auto_resume"],
        ["--resume", "latest"],
        ["--resume", begun.output / "lora-state"],
    ):
        capsys.readouterr()
        train_network(golden_model, begun.images, begun.output, *THREE, *extra)
        assert mentions(capsys.readouterr().err, "finished|complete", "3")
    assert times_of(begun.output) == before


def test_fault_67_a_run_killed_between_its_last_step_and_its_final_save_still_saves(
    begun, golden_model, tmp_path
):
    train_network(golden_model, begun.images, tmp_path, *THREE, "--resume", begun.at(3))
    assert_bit_equal(
        tensors_of(begun.output / "lora.safetensors"), tensors_of(tmp_path / "lora.safetensors")
    )
    assert (
        read_metadata(tmp_path / "lora-state").finished and not read_metadata(begun.at(3)).finished
    )


def test_latest_requires_a_state_and_auto_resume_does_not(begun, golden_model, tmp_path):
    output = tmp_path / "output"
    with pytest.raises(OptionError, match=r"--resume latest: .* state of lora"):
        train_network(golden_model, begun.images, output, "--resume", "latest")
    with pytest.raises(OptionError, match=mentioning("--resume", tmp_path / "nowhere", "folder")):
        train_network(golden_model, begun.images, output, "--resume", tmp_path / "nowhere")
    assert not output.exists()
    train_network(golden_model, begun.images, output, "--auto_resume", "--max_train_steps", "1")
    assert len(rows_of(output)) == 1


def test_retention_continues_after_a_resume(golden_model, begun, tmp_path):
    words = [
        "--max_train_steps",
        "5",
        "--save_every_n_steps",
        "1",
        "--save_state",
        "--save_last_n_steps",
        "2",
        "--save_last_n_steps_state",
        "1",
    ]
    words += ["--network_dropout", "0.1", "--resume_anyway"]
    kept = {f"lora-step{step:08d}.safetensors" for step in (3, 4, 5)}
    kept |= {
        f"lora-step{step:08d}-state" for step in (4, 5)
    }  # 1, which the old rule kept, is too old by the new one
    shutil.copytree(begun.output, tmp_path / "output")
    train_network(
        golden_model,
        begun.images,
        tmp_path / "output",
        *words,
        "--resume",
        state_at(tmp_path / "output", 3),
    )
    assert {path.name for path in (tmp_path / "output").glob("lora-step*")} == kept


# ----------------------------------------------------------------------------------------------------- states that mean harm


def test_fault_18_a_state_can_neither_remove_nor_write_files_of_others(
    begun, golden_model, tmp_path
):
    """Retention believes what a state says was saved; here it names other files."""
    output, victim = tmp_path / "output", tmp_path / "victim"
    shutil.copytree(begun.output, output)
    (output / "lora-state" / "state.json").unlink()
    victim.mkdir()
    (victim / "kept").write_text("")
    (output / "kept.txt").write_text("")
    state, elsewhere = (
        state_at(output, 2),
        [str(victim), str(output / "kept.txt"), "../victim", "", ".", "..", str(output)],
    )
    stems = [f"lora-step{step:08d}{ending}" for step in range(4) for ending in ("", "-state")]
    tamper(state, saved=dict.fromkeys([*stems, "lora", ""], elsewhere), session_id="../../victim/x")
    torch.save({}, state / "custom_checkpoint_0.pkl")
    train_network(
        golden_model, begun.images, output, *THREE, "--save_last_n_steps", "1", "--resume", state
    )
    assert (
        (victim / "kept").exists()
        and (output / "kept.txt").exists()
        and (output / "lora.safetensors").exists()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "victim"]


def test_fault_18_metadata_and_tensors_that_do_not_fit_are_an_error(begun, golden_model, tmp_path):
    state = tmp_path / "lora-step00000002-state"

    def check_error(error: type[Exception], *tokens: object, **changes: object) -> None:
        tamper(state, **changes)
        with pytest.raises(error, match=mentioning(*tokens)):
            train_network(
                golden_model, begun.images, tmp_path / "output", *THREE, "--resume", state
            )
        shutil.rmtree(state)
        shutil.copytree(begun.at(2), state)

    shutil.copytree(begun.at(2), state)
    for name, value in {
        "step": -1, "epoch": "0", "samples": None, "splits": 0, "total_steps": 0.5, "finished": 1, "session_id": 5, "run": [], "report": None, "best": 3, "saved": [],
    }.items():  # fmt: skip
        check_error(RunError, state, "damaged", f"{name} is", **{name: value})
    check_error(RunError, state, "damaged", "run", "seed", run={"seed": "seven"})
    check_error(RunError, state, "damaged", optimizer={"dict": []})
    check_error(RunError, state, "damaged", saved={"lora": 5})
    weights = load_tensors(state / "weights.safetensors")[0]
    (first, *_) = weights
    write_safetensors(state / "weights.safetensors", {**weights, first: torch.zeros(3)}, {})
    check_error(OptionError, "--resume", "1", first)
    optimizer = load_tensors(state / "optimizer.safetensors")[0]
    (moment, *_) = (name for name in optimizer if "exp_avg/" in name)
    write_safetensors(state / "optimizer.safetensors", {**optimizer, moment: torch.zeros(3)}, {})
    check_error(RunError, "exp_avg", "lora_unet_input_blocks", "[3]")


# ----------------------------------------------------------------------------------------------------------- without a state


def test_a_run_that_starts_in_the_middle_has_that_steps_images_and_learning_rates(
    begun, golden_model, tmp_path
):
    """With learning rates that change nothing, its losses are those of the complete run."""
    words = [
        "--max_train_steps",
        "10",
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        "2",
        "--learning_rate",
        "1e-30",
    ]
    train_network(golden_model, begun.images, tmp_path / "plain", *words)
    # An epoch has eight steps.
    for start, first in ((["--initial_step", "6"], 6), (["--initial_epoch", "2"], 8)):
        train_network(
            golden_model,
            begun.images,
            tmp_path / start[0],
            *words,
            *start,
            "--skip_until_initial_step",
        )
        late, plain = rows_of(tmp_path / start[0]), rows_of(tmp_path / "plain", first)
        for name in ("step", "epoch", "loss/current", "lr/unet"):
            assert [row[name] for row in late] == [row[name] for row in plain], name


@pytest.mark.parametrize(
    "given, tokens",
    [
        (["--initial_step", "10"], ["--initial_step", "10"]),
        (["--initial_epoch", "3"], ["--initial_epoch", "3", "16", "10"]),
    ],
)
def test_a_start_after_the_runs_end_is_an_error_before_caching(
    given, tokens, begun, golden_model, tmp_path, capsys
):
    words = ["--max_train_steps", "10", *given, "--skip_until_initial_step"]
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        train_network(golden_model, begun.images, tmp_path, *words)
    assert not shows_caching(capsys.readouterr().err)
