"""States: bits in and out for every optimizer and schedule, torn folders, and folders made to do harm."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from states import state_metadata
from torch import nn

from library.data.batch_sampler import BatchPosition
from library.errors import OptionError, RunError
from library.log import log
from library.param_group import ParamGroup
from library.safetensors_io import load_tensors, write_safetensors
from library.training.optim.lr_schedules import make_scheduler
from library.training.optim.master_weights import MasterWeightOptimizer
from library.training.optim.optimizer_state import restore_optimizer
from library.training.optim.optimizer_step import OptimizerStep, StandardStep
from library.training.optim.optimizers import find_optimizer, make_optimizer, start_training
from library.training.options.optimizer import SCHEDULERS, ScheduleOptions
from library.training.saving.state import State, read_state, write_state
from library.training.saving.state_folder import find_state, newest_state

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same(one: object, two: object, place: str = "") -> None:
    """Bit by bit, types too."""
    assert type(one) is type(two), place
    if isinstance(one, torch.Tensor):
        assert one.dtype is two.dtype and one.shape == two.shape, place
        assert torch.equal(one.contiguous().view(BITS[one.element_size()]), two.contiguous().view(BITS[two.element_size()])), place  # fmt: skip
    elif isinstance(one, dict):
        assert list(one) == list(two), place
        for key in one:
            assert_same(one[key], two[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), place
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{place}/{i}")
    else:
        assert one == two or one != one, place


def some_state(step: int = 5, value: float = 0.5, **values: object) -> State:
    optimizer = {"groups": [{"lr": 0.1}], "moment": torch.full((3,), value)}
    return State(state_metadata(step, **values), {"a.weight": torch.full((2, 3), value)}, optimizer)


def tamper(folder: Path, **changes: object) -> None:
    """Write other facts, and sha256 and sizes that are right: nothing but the content is wrong."""
    facts = {**json.loads((folder / "state.json").read_text()), **changes}
    if "files" not in changes:
        for name in facts["files"]:
            raw = (folder / name).read_bytes()
            facts["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    (folder / "state.json").write_text(json.dumps(facts))


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    """The lines of the log."""
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [listener])
    return lines


@pytest.fixture
def folder(tmp_path) -> Path:
    write_state(tmp_path / "n-step00000005-state", some_state())
    return tmp_path / "n-step00000005-state"


# --------------------------------------------------------------------------------------------------------- bits in and out


def test_everything_that_an_optimizer_may_hold_is_restored_bit_for_bit(tmp_path):
    tree = {
        "numbers": [0, -1, 2**70, 0.1, 1e-320, float("inf"), float("nan"), True, None, "text"],
        "tuple": (1, (2.5, ())),
        "by number": {0: "a", 7: {"deep": [{}]}},
        "dtype": torch.bfloat16,
        "tensors": [
            torch.tensor([0.1, -0.0, float("inf")]), torch.tensor(3.5), torch.zeros(0, 4), torch.arange(6).view(2, 3).t(),
            torch.tensor([1, 255], dtype=torch.uint8), torch.randn(3, dtype=torch.float64), torch.randn(5).bfloat16(),
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.tensor([True, False]), torch.randn(4).half(),
        ],
    }  # fmt: skip
    weights = {"x": torch.randn(7, 3), "y.z": torch.randn(2, 2).bfloat16()}
    write_state(
        tmp_path / "state",
        State(
            state_metadata(3, metrics={"any": [1, {"b": "ü"}]}),
            weights,
            tree,
            {"x": torch.randn(7, 3)},
        ),
    )
    found = read_state(tmp_path / "state")
    assert_same(tree, found.optimizer)
    assert_same(weights, {name: found.weights[name] for name in weights})
    assert (
        found.metadata.step == 3
        and found.metadata.metrics["any"] == [1, {"b": "ü"}]
        and list(found.ema) == ["x"]
    )
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "ema.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip


def test_an_optimizer_that_a_state_cannot_hold_is_an_error_and_leaves_no_files(tmp_path):
    with pytest.raises(
        RunError, match=r"optimizer's /a/0 is a OrderedDict_?|optimizer's /a/0 is a object"
    ):
        write_state(tmp_path / "state", State(state_metadata(1), {}, {"a": [object()]}))
    assert not list(tmp_path.iterdir())


class Small(nn.Module):
    """Parameters of the kinds that training has: matrices (large enough for 8 bits, and not), a vector, a convolution."""

    def __init__(self, seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        shapes = OrderedDict(large=(80, 70), small=(6, 9), vector=(40,), convolution=(8, 4, 3, 3))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw)))
        self.convolution.data = self.convolution.data.to(memory_format=torch.channels_last)


PLACE = BatchPosition(
    epoch=0,
    step=0,
    microbatch_index=0,
    first_sample_index=0,
    global_batch_size=2,
    is_last_microbatch=True,
    is_padding=False,
)


def make(name: str, arguments: dict, schedule: ScheduleOptions, seed: int) -> OptimizerStep:
    model = Small(seed)
    lr = 1.0 if name.lower().startswith(("prodigy", "dadapt")) else 0.01
    names = dict(model.named_parameters())
    vector = {"vector": names.pop("vector")}
    groups = [ParamGroup("a", names, lr), ParamGroup("b", vector, lr if lr == 1 else 2 * lr)]
    optimizer = make_optimizer(name, arguments, groups, lr)
    start_training(optimizer)
    scheduler = make_scheduler(optimizer, schedule, 8, lr)
    return OptimizerStep(
        model,
        groups,
        StandardStep(MasterWeightOptimizer(optimizer, groups), max_grad_norm=1, scales_loss=False),
        scheduler,
    )


def train(update: OptimizerStep, first: int, last: int) -> None:
    """Steps first..last; the gradients are a function of step and weights."""
    for step in range(first, last + 1):
        draw = torch.Generator().manual_seed(step)
        losses = 0
        for parameter in update.loss_module.parameters():
            wanted = torch.randn(parameter.shape, generator=draw)
            losses = losses + ((parameter - wanted) ** 2).mean() * torch.ones(2)
        update.backward(losses, PLACE)
        update.step()


def names_of(update: OptimizerStep) -> dict[int, str]:
    return {id(parameter): name for name, parameter in update.loss_module.named_parameters()}


def continued(
    name: str, arguments: dict, schedule: ScheduleOptions, folder: Path
) -> tuple[OptimizerStep, OptimizerStep]:
    """One that did 8 steps, and one that took over after 3 and after 5 of them, each time through a folder."""
    whole = make(name, arguments, schedule, seed=1)
    train(whole, 1, 8)
    part = make(name, arguments, schedule, seed=1)
    done = 0
    for stop in (3, 5, 8):
        train(part, done + 1, stop)
        done = stop
        if stop == 8:
            break
        weights = {key: tensor.detach() for key, tensor in part.loss_module.named_parameters()}
        write_state(
            folder / str(stop), State(state_metadata(stop), weights, part.state(names_of(part)))
        )
        found = read_state(folder / str(stop))
        part = make(name, arguments, schedule, seed=2)
        with torch.no_grad():
            for key, tensor in part.loss_module.named_parameters():
                tensor.copy_(found.weights[key])
        part.restore(found.optimizer, names_of(part), same_options=True)
    return whole, part


OPTIMIZERS = [
    ("AdamW", {}), ("AdamW", {"fused": False, "amsgrad": True}), ("AdamW8bit", {}), ("PagedAdamW8bit", {}), ("Lion", {}), ("Lion8bit", {}),
    ("PagedLion8bit", {}), ("SGDNesterov", {}), ("SGDNesterov8bit", {}), ("Prodigy", {}), ("Prodigy", {"slice_p": 11, "use_bias_correction": True}),
    ("Adafactor", {}), ("Adafactor", {"relative_step": False, "scale_parameter": False}), ("Adafactor", {"warmup_init": True, "beta1": 0.9}),
    ("AdamWScheduleFree", {"warmup_steps": 4}), ("RAdamScheduleFree", {}), ("SGDScheduleFree", {}), ("DAdaptation", {}), ("DAdaptLion", {}),
    ("torch.optim.NAdam", {}), ("torch.optim.Adagrad", {}), ("RMSprop", {"momentum": 0.5}), ("torch.optim.Adafactor", {}),
    ("bitsandbytes.optim.AdEMAMix8bit", {}), ("bitsandbytes.optim.AdamW", {}),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments", OPTIMIZERS, ids=lambda value: str(value)[:40])
def test_fault_65_an_optimizer_continues_bit_for_bit(name, arguments, tmp_path):
    try:
        find_optimizer(name)
    except OptionError as error:
        pytest.skip(str(error))
    schedule = ScheduleOptions(lr_scheduler="adafactor" if name == "Adafactor" and "relative_step" not in arguments else "constant")  # fmt: skip
    with contextlib.suppress(UserWarning):
        whole, part = continued(name, arguments, schedule, tmp_path)
    assert_same(
        dict(whole.loss_module.named_parameters()), dict(part.loss_module.named_parameters())
    )
    assert_same(whole.state(names_of(whole)), part.state(names_of(part)))
    for parameter, other in zip(
        whole.loss_module.parameters(), part.loss_module.parameters(), strict=True
    ):
        for key, value in whole.optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == part.optimizer.state[other][key].stride(), key


@pytest.mark.parametrize(
    "schedule", [*SCHEDULERS, "piecewise_constant", "torch.optim.lr_scheduler.ExponentialLR"]
)
def test_fault_65_a_schedule_continues_bit_for_bit(schedule, tmp_path):
    own = {
        "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
        "cosine_with_restarts": {"lr_scheduler_num_cycles": 2},
        "warmup_stable_decay": {"lr_decay_steps": 3},
        "piecewise_constant": {
            "lr_scheduler_args": ("step_rules='1:2,0.1:6,0.01'",),
            "lr_warmup_steps": 0,
        },
    }
    options = {"lr_scheduler": schedule, "lr_warmup_steps": 4, **own.get(schedule, {})}
    if "." in schedule:
        options = {"lr_scheduler_type": schedule, "lr_scheduler_args": ("gamma=0.7",)}
    if schedule == "constant":
        options["lr_warmup_steps"] = 0
    whole, part = continued("AdamW", {}, ScheduleOptions(**options), tmp_path)
    assert_same(
        dict(whole.loss_module.named_parameters()), dict(part.loss_module.named_parameters())
    )
    assert whole.learning_rates() == part.learning_rates()


def test_the_loss_scale_of_float16_is_restored(tmp_path):
    def scaled() -> OptimizerStep:
        model = Small(1)
        groups = [ParamGroup("a", dict(model.named_parameters()), 0.1)]
        master_weights = MasterWeightOptimizer(make_optimizer("AdamW", {}, groups, 0.1), groups)
        return OptimizerStep(
            model, groups, StandardStep(master_weights, max_grad_norm=1, scales_loss=True), None
        )

    one, two = scaled(), scaled()
    for overflowed in (False, False, True, True):
        one.gradient_step.scale.record(overflowed=overflowed)
    write_state(tmp_path / "s", State(state_metadata(1), {}, one.state(names_of(one))))
    two.restore(read_state(tmp_path / "s").optimizer, names_of(two), same_options=True)
    assert two.gradient_step.scale.state() == {"value": 2.0**14, "good": 0, "overflows": 2}


def test_with_other_options_the_learning_rate_and_schedule_are_new_and_the_moments_are_restored():
    """--resume_anyway with a tenth of the learning rate, linear to step 8."""
    before = make("AdamW", {}, ScheduleOptions(lr_scheduler="linear"), 1)
    train(before, 1, 4)
    state = before.state(names_of(before))
    for group in state["optimizer"]["groups"]:
        group["lr"], group["initial_lr"], group["weight_decay"] = (
            group["lr"] * 10,
            group["initial_lr"] * 10,
            0.5,
        )
    state["schedule"]["base_lrs"] = [rate * 10 for rate in state["schedule"]["base_lrs"]]
    after = make("AdamW", {}, ScheduleOptions(lr_scheduler="linear"), 1)
    after.restore(state, names_of(after), same_options=False)
    assert (
        after.learning_rates() == before.learning_rates() == pytest.approx({"a": 0.005, "b": 0.01})
    )
    assert {group["weight_decay"] for group in after.optimizer.param_groups} == {0.01}
    assert_same(after.state(names_of(after))["optimizer"]["state"], state["optimizer"]["state"])


def test_another_optimizer_starts_from_scratch_and_other_groups_are_an_error(logged):
    lion, adam = make("Lion", {}, ScheduleOptions(), 1), make("AdamW", {}, ScheduleOptions(), 1)
    train(lion, 1, 2)
    state = lion.state(names_of(lion))["optimizer"]
    restore_optimizer(adam.optimizer, state, names_of(adam), same_options=False)
    assert not adam.optimizer.state and "reset for torch.optim.adamw.AdamW" in "\n".join(logged)
    state["groups"].pop()
    with pytest.raises(RunError, match="the state has 1 groups of learning rates, this run has 2"):
        restore_optimizer(
            make("Lion", {}, ScheduleOptions(), 1).optimizer, state, {}, same_options=False
        )


def test_paged_optimizer_state_is_paged_again():
    """bitsandbytes keeps such tensors in RAM while the parameters are in VRAM, and marks them."""
    update = make("PagedAdamW8bit", {}, ScheduleOptions(), 1)
    train(update, 1, 2)
    state = update.state(names_of(update))["optimizer"]
    for entry in state["state"]["large"].values():
        entry["beside"] = False
    other, paged = make("PagedAdamW8bit", {}, ScheduleOptions(), 1), []

    def buffer(parameter, dtype):
        paged.append(torch.zeros_like(parameter, dtype=dtype))
        return paged[-1]

    other.optimizer.get_state_buffer = buffer
    restore_optimizer(other.optimizer, state, names_of(other))
    found = other.optimizer.state[other.loss_module.large]
    assert found["state1"] is paged[0] and found["state2"] is paged[1]
    assert_same(paged[0].detach(), state["state"]["large"]["state1"]["value"])


# ---------------------------------------------------------------------------------------- whole, torn, the newest, foreign


def test_state_json_is_written_last_and_the_folder_is_renamed_after_it(tmp_path, monkeypatch):
    """Broken off at each of its writes and moves: the older state stays, and is what is found."""
    write_state(tmp_path / "n-state", some_state(1))
    real, calls = os.replace, []
    for number in range(3):
        calls.clear()

        def replace(source, target, number=number):
            calls.append(Path(target).name)
            if len(calls) > number:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with contextlib.suppress(KeyboardInterrupt):
            write_state(tmp_path / "n-state", some_state(2))
        monkeypatch.setattr(os, "replace", real)
        expected = 1 if number < 2 else 2
        assert read_state(newest_state(tmp_path, ["n"])).metadata.step == expected
    assert calls == [
        "weights.safetensors",
        "optimizer.safetensors",
    ]  # without state.json, which is written after them
    assert [path.name for path in tmp_path.iterdir()] == ["n-state"]


@pytest.mark.parametrize("damaged", ["state.json", "weights.safetensors", "optimizer.safetensors"])
def test_fault_2_an_incomplete_state_is_logged_and_never_used(damaged, tmp_path, logged):
    for step in (2, 4):
        write_state(tmp_path / f"n-step{step:08d}-state", some_state(step))
    last = tmp_path / "n-step00000004-state"
    if damaged == "weights.safetensors":
        os.truncate(last / damaged, 10)
    else:
        (last / damaged).unlink()
    assert newest_state(tmp_path, ["n"]) == tmp_path / "n-step00000002-state"
    assert f"{last}: incomplete state: " in "\n".join(logged) and damaged in "\n".join(logged)
    assert find_state("latest", tmp_path, ["n"]) == tmp_path / "n-step00000002-state"
    with pytest.raises(OptionError, match=r"incomplete state.*step00000002-state"):
        find_state(str(last), tmp_path, ["n"])


def test_the_newest_state_is_the_one_written_last_whatever_its_step(tmp_path):
    """A run of 100 steps lies there; another of that name has been killed after 4."""
    for name in ("n-step00000100-state", "n-state", "n-step00000004-state", "n-000001-state"):
        write_state(tmp_path / name, some_state(4))
    assert newest_state(tmp_path, ["n"]) == tmp_path / "n-000001-state"
    later = time.time() + 1000
    os.utime(tmp_path / "n-state" / "state.json", (later, later))  # a copy's time says nothing
    assert newest_state(tmp_path, ["n"]) == tmp_path / "n-000001-state"


def test_names_that_only_begin_alike_belong_to_other_runs(tmp_path):
    for name in ("n-2", "n2", "n-step5", "n-best", "n-step00000001-state-old", "[ab]", "an"):
        write_state(tmp_path / f"{name}-state", some_state())
    (tmp_path / "n-state").write_text("a file")
    assert newest_state(tmp_path, ["n"]) is None
    with pytest.raises(OptionError, match=r"--resume latest: .* state of n"):
        find_state("latest", tmp_path, ["n"])
    assert newest_state(tmp_path, ["[ab]"]) == tmp_path / "[ab]-state"
    assert newest_state(tmp_path / "not there", ["n"]) is None


@pytest.mark.parametrize(
    "files", [["optimizer.bin", "random_states_0.pkl", "train_state.json"], ["scheduler.bin"], ["model.safetensors", "random_states_0.pkl"]]
)  # fmt: skip
def test_a_state_of_sd_scripts_or_accelerate_is_recognized(files, tmp_path):
    (tmp_path / "at-state").mkdir()
    for name in files:
        (tmp_path / "at-state" / name).write_bytes(b"\x80\x04.")
    with pytest.raises(OptionError, match=r"sd-scripts or accelerate.*--network_weights"):  # fmt: skip
        find_state(str(tmp_path / "at-state"), tmp_path, ["at"])
    with pytest.raises(OptionError, match="no such state folder"):
        find_state(str(tmp_path / "nowhere"), tmp_path, ["at"])


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
def test_fault_16_a_flipped_bit_in_a_state_is_an_error(file, folder):
    raw = bytearray((folder / file).read_bytes())
    raw[-2] ^= 1
    (folder / file).write_bytes(raw)
    with pytest.raises(RunError, match=rf"{file}: damaged: .*sha256.*state\.json"):
        read_state(folder)


# ------------------------------------------------------------------------------------------------- folders that mean harm


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_fault_18_pickles_in_a_state_are_never_read(folder, tmp_path):
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "pytorch_model.bin", "sampler.bin"):  # fmt: skip
        torch.save(Evil(tmp_path / "evil"), folder / name)
    assert read_state(folder).metadata.step == 5
    assert not (tmp_path / "evil").exists()
    torch.save(Evil(tmp_path / "evil"), folder / "optimizer.safetensors")
    tamper(folder)
    with pytest.raises(RunError, match=r"optimizer\.safetensors: not a"):
        read_state(folder)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../victim.safetensors",
        "/etc/hostname",
        "..",
        "a\\b",
        "C:x",
        "nul\0",
        "sub/weights.safetensors",
    ],
)
def test_fault_18_files_outside_of_the_state_are_refused(name, folder):
    (folder.parent / "victim.safetensors").write_bytes(
        (folder / "weights.safetensors").read_bytes()
    )
    entry = {"sha256": "0" * 64, "bytes": (folder / "weights.safetensors").stat().st_size}
    files = json.loads((folder / "state.json").read_text())["files"]
    tamper(folder, files={**files, name: entry})
    with pytest.raises(RunError, match=r"state\.json: damaged"):
        read_state(folder)
    assert newest_state(folder.parent, ["n"]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []}, {"files": {}}, {"files": {"weights.safetensors": 5}}, {"files": None}, {"format": "other"}, {"format": None}, {"version": "x"},
        {"version": 99}, {"step": None}, {"step": [1]}, {"step": "five"}, {"step": 1e400}, {"written": {}}, {"optimizer": {"tensor": "nowhere"}},
        {"optimizer": {"dict": 5}}, {"optimizer": {"dict": [[["list"], 1]]}}, {"optimizer": {"dtype": "load"}}, {"optimizer": {"dtype": "__name__"}},
        {"optimizer": {"a": 1, "b": 2}}, {"optimizer": {}}, {"optimizer": {"tuple": None}},
    ],
    ids=str,
)  # fmt: skip
def test_fault_18_invalid_metadata_is_an_error(changes, folder):
    tamper(folder, **changes)
    with pytest.raises(RunError, match=r"damaged|another program or a newer version"):
        read_state(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "5", '"text"', "[" * 200_000, '{"a":' * 200_000, '{"optimizer":' + '{"list":[' * 50_000, "\x00", "NaN"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_fault_18_invalid_json_is_an_error(text, folder):
    (folder / "state.json").write_text(text)
    with pytest.raises(RunError, match=r"state\.json: damaged"):
        read_state(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_61_a_state_with_nan_or_inf_in_its_weights_is_refused(value, folder):
    write_safetensors(folder / "weights.safetensors", {"a.weight": torch.tensor([1.0, value])}, {})
    tamper(folder)
    with pytest.raises(RunError, match=r"a\.weight .*NaN"):
        read_state(folder)


@pytest.mark.parametrize(
    "optimizer", ["AdamW", "SGDNesterov", "AdamW8bit", "Lion8bit", "torch.optim.Adagrad"]
)
def test_fault_18_tensors_that_would_make_a_kernel_read_out_of_bounds_are_refused(
    optimizer, tmp_path
):
    """The fused AdamW writes past the end of a tensor that is too short."""
    update = make(optimizer, {}, ScheduleOptions(), 1)
    train(update, 1, 1)
    saved = update.state(names_of(update))["optimizer"]
    other, tried = make(optimizer, {}, ScheduleOptions(), 1), 0
    for key, entry in saved["state"]["large"].items():
        for shape in ((3,), (80, 69), (), (1,)):
            if not isinstance(entry["value"], torch.Tensor) or key == "step":
                continue
            wrong = {**entry, "value": torch.zeros(shape, dtype=entry["value"].dtype)}
            changed = {**saved, "state": {"large": {**saved["state"]["large"], key: wrong}}}
            with pytest.raises(RunError, match="doesn't fit"):
                restore_optimizer(other.optimizer, changed, names_of(other))
            tried += 1
    assert tried


def test_fault_18_a_state_cannot_put_other_parameters_into_a_group():
    update = make("AdamW", {}, ScheduleOptions(), 1)
    saved = update.state(names_of(update))["optimizer"]
    saved["groups"][0]["params"] = [torch.zeros(3)]
    before = [
        id(parameter) for group in update.optimizer.param_groups for parameter in group["params"]
    ]
    restore_optimizer(update.optimizer, saved, names_of(update))
    assert before == [
        id(parameter) for group in update.optimizer.param_groups for parameter in group["params"]
    ]


def test_a_state_is_plain_safetensors_and_json(folder):
    """What others may rely on: any program reads it."""
    from safetensors.torch import load_file

    assert_same(
        load_file(folder / "weights.safetensors"), load_tensors(folder / "weights.safetensors")[0]
    )
    facts = json.loads((folder / "state.json").read_text())
    assert (facts["format"], facts["version"]) == ("sdxl-training-state", 1)
    for name, entry in facts["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]


WRITTEN_BEFORE = {
    "step": 4, "epoch": 1, "samples": 8, "splits": 2, "finished": True, "total_steps": 6, "session_id": "792077645",
    "run": {
        "train_batch_size": "1", "seed": "7", "processes": "1", "latents are cached": "True", "captions are cached": "True",
        "base model": "sdxl.safetensors", "pictures": "4, 8 with repeats", "batch sizes": "1", "files, sizes and captions": "30f2829971b17f5a",
    },
    "report": {"recent": [1.25, 1.5], "epoch_losses": [1.5], "overflows": 0},
    "best": {"loss": None, "waited": 0, "step": -1},
    "saved": {"lora": ["output/lora.safetensors"]},
}  # fmt: skip
"""Keys and values of a state.json of the first release, apart from the files and the optimizer."""


def test_a_state_written_before_loads_and_its_keys_have_not_changed(folder, tmp_path):
    tamper(folder, **WRITTEN_BEFORE)
    state = read_state(folder)
    assert (
        state.metadata.step,
        state.metadata.epoch,
        state.metadata.samples,
        state.metadata.splits,
    ) == (4, 1, 8, 2)
    assert state.metadata.seed == 7 and state.metadata.signature["pictures"] == "4, 8 with repeats"
    write_state(tmp_path / "again", state)
    before, after = (
        json.loads((path / "state.json").read_text()) for path in (folder, tmp_path / "again")
    )
    assert after == {**before, "written": after["written"]}
    assert {name: after[name] for name in WRITTEN_BEFORE} == WRITTEN_BEFORE
    assert after.keys() - WRITTEN_BEFORE.keys() == {
        "format",
        "version",
        "written",
        "optimizer",
        "files",
    }
