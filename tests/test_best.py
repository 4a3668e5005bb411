"""The best validation loss: what is saved, and when patience is over. And schedule-free weights as they are used."""

from contextlib import nullcontext

import pytest
import torch
from messages import mentions
from running import assert_bit_equal, losses_of, tensors_of, train_network

from library.training.monitoring.validation import Best

SPLIT = ["--validation_split", "0.5", "--validation_seed", "3", "--validate_every_n_steps", "1"]


def test_patience_counts_validations_without_a_lower_loss():
    best = Best(2)
    losses = [1.0, 0.9, 0.95, 0.9, 0.8]
    found = []
    for step, loss in enumerate(losses, 1):
        found.append((best.is_new(loss, step), best.patience_is_over))
    assert found == [(True, False), (True, False), (False, False), (False, True), (True, False)]
    assert not best.is_new(0.5, 5) and best.loss == 0.8, (
        "the epoch's validation of the same step says nothing new"
    )
    assert not Best(None).patience_is_over


def test_the_best_model_is_saved_and_patience_ends_the_run(golden_model, images, tmp_path):
    """At a rate at which every step makes it worse, the first weights stay the best."""
    out = tmp_path / "out"
    train_network(golden_model, images, out, *SPLIT, "--max_train_steps", "30", "--early_stop_patience", "3", "--learning_rate", "0.3", "--save_every_n_steps", "1")  # fmt: skip
    steps = len(losses_of(out))
    assert steps < 30
    best = steps - 3
    assert_bit_equal(
        tensors_of(out / "lora-best.safetensors"),
        tensors_of(out / f"lora-step{best:08d}.safetensors"),
    )
    assert (out / "lora.safetensors").exists()


@pytest.mark.long
def test_a_run_that_patience_ended_is_resumed_with_a_larger_patience(
    golden_model, images, tmp_path, capsys
):
    words = [*SPLIT, "--max_train_steps", "4", "--learning_rate", "0.3", "--save_state_on_train_end", "--auto_resume", "--early_stop_patience"]  # fmt: skip
    train_network(golden_model, images, tmp_path, *words, "1")
    steps = len(losses_of(tmp_path))
    train_network(golden_model, images, tmp_path, *words, "1")
    assert mentions(capsys.readouterr().err, "finished|complete", steps)
    train_network(golden_model, images, tmp_path, *words, "2")
    assert len(losses_of(tmp_path)) == steps + 1


@pytest.mark.long
def test_without_patience_the_best_model_is_saved_only_with_save_best(
    golden_model, images, tmp_path
):
    train_network(golden_model, images, tmp_path / "a", *SPLIT, "--max_train_steps", "2")
    train_network(
        golden_model, images, tmp_path / "b", *SPLIT, "--max_train_steps", "2", "--save_best"
    )
    assert (
        not (tmp_path / "a" / "lora-best.safetensors").exists()
        and (tmp_path / "b" / "lora-best.safetensors").exists()
    )


def test_fault_68_schedule_free_optimizers_save_their_eval_weights(
    golden_model, images, tmp_path, monkeypatch
):
    """In eval mode they are the average x; in train mode, where gradients are taken, y. Saves in between change nothing."""
    pytest.importorskip("schedulefree")
    from library.training.optim.optimizer_step import OptimizerStep

    words = [
        "--optimizer_type",
        "AdamWScheduleFree",
        "--max_train_steps",
        "4",
        "--learning_rate",
        "0.01",
    ]
    plain = train_network(golden_model, images, tmp_path / "plain", *words)
    often = train_network(
        golden_model, images, tmp_path / "often", *words, "--save_every_n_steps", "1"
    )
    assert_bit_equal(tensors_of(plain), tensors_of(often))
    third = tensors_of(tmp_path / "often" / "lora-step00000003.safetensors")
    monkeypatch.setattr(OptimizerStep, "eval_weights", lambda update: nullcontext())
    train_network(golden_model, images, tmp_path / "wrong", *words, "--save_every_n_steps", "3")
    wrong = tensors_of(tmp_path / "wrong" / "lora-step00000003.safetensors")
    name = next(name for name in third if name.endswith("lora_up.weight"))
    assert not torch.equal(third[name], wrong[name]), (
        "without the switch another point would be saved"
    )
