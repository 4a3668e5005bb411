"""Watch and Pace: what isn't trained, differs between processes, or becomes slow, is told."""

import contextlib

import pytest
import torch
from messages import mentioning, mentions
from running import QUICK, train_network, without
from torch import nn

from library.data.batch import Batch
from library.data.batch_sampler import BatchPosition
from library.errors import RunError
from library.param_group import ParamGroup
from library.training.monitoring import sanity_checks as watching
from library.training.monitoring import slowdown as pacing
from library.training.monitoring.sanity_checks import GradientFlowCheck, check_equal, checksums
from library.training.monitoring.slowdown import SlowdownDetector
from library.training.optim.optimizer_step import gradient_norms


def trained(
    steps: int, *, lr: float, use_both: bool = True, dtype=torch.float32, last_step=None, done=0
) -> GradientFlowCheck:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"used": nn.Linear(2, 2), "other": nn.Linear(2, 2)}).to(dtype)
    groups = [ParamGroup("all", dict(layers.named_parameters()), lr, last_step=last_step)]
    optimizer = torch.optim.SGD(layers.parameters(), lr=lr)
    watch = GradientFlowCheck(groups, done)
    for _ in range(steps):
        x = layers["used"](torch.ones(1, 2, dtype=dtype))
        (layers["other"](x) if use_both else x).sum().backward()
        watch.note_gradients(gradient_norms(list(layers.parameters()), torch.device("cpu")))
        optimizer.step()
        optimizer.zero_grad()
        watch.stepped()
    return watch


def test_what_never_gets_a_gradient_is_an_error_after_50_steps():
    trained(49, lr=0.1, use_both=False)
    with pytest.raises(RunError, match=mentioning("1", "other", "gradient", "50 steps")):
        trained(50, lr=0.1, use_both=False)
    trained(60, lr=0.1)


def test_what_stays_as_it_is_is_an_error_too():
    with pytest.raises(RunError, match=mentioning("2", "used", "other", "50 steps", "learning rate", "--rounding")):
        trained(50, lr=1e-6, dtype=torch.bfloat16)


def test_short_runs_are_checked_at_their_end_and_very_short_ones_not():
    with pytest.raises(RunError, match=mentioning("1", "other", "gradient", "12 steps")):
        trained(12, lr=0.1, use_both=False).run_ended()
    trained(9, lr=0.1, use_both=False).run_ended()


def test_what_stops_early_isnt_watched():
    trained(50, lr=0.1, use_both=False, last_step=20)
    trained(50, lr=0.1, use_both=False, last_step=100, done=50)
    with pytest.raises(RunError, match=r"other.* got no gradient in 50 steps"):
        trained(50, lr=0.1, use_both=False, last_step=101, done=50)


def test_a_run_that_begins_behind_what_stops_isnt_ended_by_it(golden_model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "_LEAST", 2)
    words = ["--max_train_steps", 62, "--stop_text_encoder_training", 60, "--initial_step", 60, "--skip_until_initial_step"]  # fmt: skip
    text_too = without(QUICK, "--cache_text_encoder_outputs", "--network_train_unet_only")
    assert train_network(golden_model, images, tmp_path, *words, quick=text_too).exists()


def test_checksums_see_every_bit_and_not_the_order():
    x = torch.arange(6.0)
    assert torch.equal(checksums([x]), checksums([x.flip(0)]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        one = torch.ones(5, dtype=dtype)
        other = one.clone()
        other[2] = torch.nextafter(other[2].float(), torch.tensor(2.0)) if dtype is torch.float32 else 1.01
        assert not torch.equal(checksums([one]), checksums([other]))


def test_a_run_whose_loss_is_masked_away_ends_with_an_error(golden_model, images, tmp_path):
    from PIL import Image

    (tmp_path / "masks").mkdir()
    for path in (images / "2_shapes").glob("*.png"):
        Image.new("RGB", Image.open(path).size).save(tmp_path / "masks" / path.name)
    with pytest.raises(
        RunError, match=mentioning("384", "lora_unet_input_blocks_4_1_proj_in", "gradient", "12 steps", "masks")
    ):
        train_network(golden_model, images, tmp_path / "out", "--max_train_steps", 12, "--masked_loss", "--conditioning_data_dir", tmp_path / "masks")  # fmt: skip
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("difference, is_told", [(0.0, False), (1e-7, True)])
def test_processes_with_different_weights_are_told(difference, is_told, monkeypatch):
    """Two processes, of which this is one; tests of real ones pass through it at their first step."""
    other = {"a": torch.ones(2), "lora.b": torch.ones(3) + difference}

    def all_gather(gathered, own):
        gathered[0].copy_(own)
        gathered[1].copy_(checksums(other.values()))

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    expected = pytest.raises(RunError, match=mentioning("step 7", "1", "lora.b"))
    with expected if is_told else contextlib.nullcontext():
        check_equal({"a": torch.ones(2), "lora.b": torch.ones(3)}, 2, 7)


def test_one_process_compares_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather", None)
    check_equal({"a": torch.ones(1)}, 1, 1)


# ---------------------------------------------------------------------------------------------------------------- pace


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


def batches(clock, waits):
    size = torch.zeros(1, 2, dtype=torch.int64)
    for wait in waits:
        clock.now += wait
        yield Batch(BatchPosition(0, 0, 0, 0, 1, True, False), ("a",), ("",), None, torch.zeros(1, 4, 8, 8), None, size, size, size, torch.ones(1))  # fmt: skip


def run_pace(monkeypatch, steps, *, pause_at=None):
    """What is told of steps given as (seconds waited for the batch, seconds computed)."""
    clock, told = Clock(), []
    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.setattr(pacing.log, "warning", lambda text, *args: told.append(text % args))
    pace = SlowdownDetector(torch.device("cpu"))
    for i, _ in enumerate(pace.batches(batches(clock, [wait for wait, _ in steps]))):
        clock.now += steps[i][1]
        pace.step()
        if i == pause_at:
            clock.now += 1000
            pace.paused()
    return told


def test_steps_twice_as_slow_are_told_once_with_the_cause(monkeypatch):
    usual = [(0.1, 0.9)] * 30
    (told,) = run_pace(monkeypatch, [*usual, *[(0.1, 2.9)] * 10])
    assert mentions(told, "3.0") and not mentions(told, "--cache_latents")
    (told,) = run_pace(monkeypatch, [*usual, *[(2.5, 0.5)] * 10])
    assert mentions(told, "3.0", "--cache_latents")


def test_a_single_slow_step_a_pause_and_a_slow_start_are_not_told(monkeypatch):
    usual = [(0.1, 0.9)] * 30
    assert run_pace(monkeypatch, [(0, 60), (0, 5), *usual, (0.1, 20), *usual], pause_at=20) == []
