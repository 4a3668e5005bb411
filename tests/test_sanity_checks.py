"""Sanity checks: parameters without gradients, weights that don't change, and ranks that differ end the run."""

import contextlib

import pytest
import torch
from running import QUICK, train_network, without
from torch import nn

from library.errors import RunError
from library.param_group import ParamGroup
from library.training.monitoring import sanity_checks
from library.training.monitoring.sanity_checks import (
    GradientFlowCheck,
    check_ranks_in_sync,
    checksums,
)
from library.training.optim.optimizer_step import gradient_norms


def trained(
    steps: int, *, lr: float, use_both: bool = True, dtype=torch.float32, last_step=None, done=0
) -> GradientFlowCheck:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"used": nn.Linear(2, 2), "other": nn.Linear(2, 2)}).to(dtype)
    groups = [ParamGroup("all", dict(layers.named_parameters()), lr, last_step=last_step)]
    optimizer = torch.optim.SGD(layers.parameters(), lr=lr)
    check = GradientFlowCheck(groups, done)
    for _ in range(steps):
        x = layers["used"](torch.ones(1, 2, dtype=dtype))
        (layers["other"](x) if use_both else x).sum().backward()
        check.note_gradients(gradient_norms(list(layers.parameters()), torch.device("cpu")))
        optimizer.step()
        optimizer.zero_grad()
        check.step_done()
    return check


def test_a_module_without_gradients_is_an_error_after_50_steps():
    trained(49, lr=0.1, use_both=False)
    with pytest.raises(RunError, match=r"^1 .*\(other\).* no gradient in 50 steps"):
        trained(50, lr=0.1, use_both=False)
    trained(60, lr=0.1)


def test_weights_that_do_not_change_are_an_error():
    with pytest.raises(
        RunError,
        match=r"^2 .*not changed after 50 steps.*learning rate",
    ):
        trained(50, lr=1e-6, dtype=torch.bfloat16)


def test_short_runs_are_checked_at_their_end_but_very_short_ones_are_not():
    with pytest.raises(RunError, match=r"other.* received no gradient in 12 steps"):
        trained(12, lr=0.1, use_both=False).run_ended()
    trained(9, lr=0.1, use_both=False).run_ended()


def test_groups_that_stop_early_are_not_checked():
    trained(50, lr=0.1, use_both=False, last_step=20)
    trained(50, lr=0.1, use_both=False, last_step=100, done=50)
    with pytest.raises(RunError, match=r"other.* received no gradient in 50 steps"):
        trained(50, lr=0.1, use_both=False, last_step=101, done=50)


def test_a_run_that_begins_after_the_last_step_of_a_group_is_not_ended_by_it(
    golden_model, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(sanity_checks, "_MIN_STEPS", 2)
    words = ["--max_train_steps", 62, "--stop_text_encoder_training", 60, "--initial_step", 60, "--skip_until_initial_step"]  # fmt: skip
    text_too = without(QUICK, "--cache_text_encoder_outputs", "--network_train_unet_only")
    assert train_network(golden_model, images, tmp_path, *words, quick=text_too).exists()


def test_checksums_depend_on_every_bit_but_not_on_the_order():
    x = torch.arange(6.0)
    assert torch.equal(checksums([x]), checksums([x.flip(0)]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ones = torch.ones(5, dtype=dtype)
        other = ones.clone()
        other[2] = (
            torch.nextafter(other[2].float(), torch.tensor(2.0)) if dtype is torch.float32 else 1.01
        )
        assert not torch.equal(checksums([ones]), checksums([other]))


def test_a_run_whose_masks_make_the_loss_zero_ends_with_an_error(golden_model, images, tmp_path):
    from PIL import Image

    (tmp_path / "masks").mkdir()
    for path in (images / "2_shapes").glob("*.png"):
        Image.new("RGB", Image.open(path).size).save(tmp_path / "masks" / path.name)
    with pytest.raises(RunError, match=r"received no gradient in 12 steps.*masks"):
        train_network(golden_model, images, tmp_path / "out", "--max_train_steps", 12, "--masked_loss", "--conditioning_data_dir", tmp_path / "masks")  # fmt: skip
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("difference, is_error", [(0.0, False), (1e-7, True)])
def test_ranks_with_different_weights_are_an_error(difference, is_error, monkeypatch):
    """Two processes, of which this is one. Tests with real ones call the check at their first step."""
    other = {"a": torch.ones(2), "lora.b": torch.ones(3) + difference}

    def all_gather(gathered, local):
        gathered[0].copy_(local)
        gathered[1].copy_(checksums(other.values()))

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    expected = pytest.raises(RunError, match=r"step 7: .*different weights.* 1 .*\(lora\.b\)")
    with expected if is_error else contextlib.nullcontext():
        check_ranks_in_sync({"a": torch.ones(2), "lora.b": torch.ones(3)}, 2, 7)


def test_a_single_process_compares_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather", None)
    check_ranks_in_sync({"a": torch.ones(1)}, 1, 1)
