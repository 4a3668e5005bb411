"""Fault 64: memory that runs out in a step, in samples and in validation."""

from types import SimpleNamespace

import pytest
import torch
from running import QUICK, losses_of, tensors_of, train_network
from tolerance import assert_trained

from library.data.batch import Batch
from library.errors import RunError
from library.signals import Signals
from library.training import loop
from library.training.forward import DiffusionLoss
from library.training.progress import Progress

TWO = ["--train_batch_size", "2", "--max_train_steps", "4", "--gradient_accumulation_steps", "2"]


@pytest.fixture
def small_memory(monkeypatch):
    """Batches larger than this find no memory, as long as gradients are taken."""
    limit = {"most": 1, "training": True}
    forward = DiffusionLoss.forward

    def limited(self, batch, *args):
        if len(batch) > limit["most"] and self.training == limit["training"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        return forward(self, batch, *args)

    monkeypatch.setattr(DiffusionLoss, "forward", limited)
    return limit


@pytest.mark.numeric
def test_fault_64_a_step_starts_again_in_smaller_parts_with_the_same_result(golden_model, images, tmp_path, small_memory, capsys):  # fmt: skip
    small_memory["most"] = 99
    whole = train_network(golden_model, images, tmp_path / "whole", *TWO)
    small_memory["most"] = 1
    capsys.readouterr()
    parts = train_network(golden_model, images, tmp_path / "parts", *TWO, "--save_state")
    assert (
        capsys.readouterr().err.count(
            "out of memory: from now on each batch is computed in 2 parts"
        )
        == 1
    )
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
    one, two = tensors_of(whole), tensors_of(parts)
    assert_trained(two, one)
    from library.training.saving.state_folder import read_metadata

    assert read_metadata(tmp_path / "parts" / "lora-state").splits == 2


def test_fault_64_where_nothing_can_be_halved_the_run_is_saved_and_ends_with_advice(golden_model, images, tmp_path, small_memory):  # fmt: skip
    small_memory["most"] = 0
    with pytest.raises(
        RunError,
        match=r"step 1: out of memory .*Tried to allocate 2.00 GiB.*--gradient_checkpointing",
    ):
        train_network(golden_model, images, tmp_path / "out", *TWO, "--save_state")
    assert (tmp_path / "out" / "lora-step00000000-state" / "state.json").exists()


def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")


def test_fault_64_of_several_processes_the_one_without_memory_ends_at_once(monkeypatch):
    """The others wait for its gradients: neither a save nor smaller parts, which take all processes, would ever end."""
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    run = SimpleNamespace(
        optimizer_step=SimpleNamespace(is_partly_taken=False), accelerator=accelerator, seed=0
    )
    monkeypatch.setattr(loop, "accumulate_gradients", no_memory)
    monkeypatch.setattr(
        loop, "save", lambda *_, **__: pytest.fail("saved, which takes all processes")
    )
    expected = r"step 4: out of memory .*2.00 GiB\).*nothing is saved; the last saved state is whole.*--gradient_checkpointing"
    with pytest.raises(RunError, match=expected):
        loop.gradients(run, Progress(step=3), [range(4)])


def test_fault_64_memory_that_runs_out_when_the_optimizer_steps_ends_the_run_unsaved_with_advice():
    """AdamW makes its state in its first step."""
    run = SimpleNamespace(optimizer_step=SimpleNamespace(step=no_memory))
    with pytest.raises(
        RunError, match=r"step 1: out of memory .*nothing is saved.*--optimizer_offload, an 8-bit"
    ) as told:
        loop.step(run, Progress(), Signals())
    assert "--fused_backward_pass" in str(told.value) and "--gradient_checkpointing" in str(
        told.value
    )


def test_fault_64_a_validation_without_memory_is_left_out(
    golden_model, images, tmp_path, small_memory, capsys
):
    small_memory.update(most=0, training=False)
    split = ["--validation_split", "0.5", "--validation_seed", "3", "--validate_every_n_steps", "2"]
    final = train_network(golden_model, images, tmp_path / "out", *split, "--max_train_steps", "4")
    assert final.exists() and "step 2: no memory to validate" in capsys.readouterr().err


def test_a_batch_in_parts_has_every_sample_at_its_place(
    golden_model, images, tmp_path, monkeypatch
):
    seen = []
    parts = Batch.split

    def noted(self, count):
        found = parts(self, 3)
        seen.append((self, found))
        return found

    monkeypatch.setattr(Batch, "split", noted)
    train_network(golden_model, images, tmp_path / "out", "--train_batch_size", "4", "--max_train_steps", "1", quick=QUICK)  # fmt: skip
    whole, found = seen[0]
    assert (
        sum(map(len, found)) == len(whole)
        and found[0].position.first_sample_index == whole.position.first_sample_index
    )
    assert tuple(path for part in found for path in part.paths) == whole.paths
    assert torch.equal(torch.cat([part.latents for part in found]), whole.latents)
    assert torch.equal(torch.cat([part.text.pooled for part in found]), whole.text.pooled)
