"""Validation: fixed noise and timesteps, a split that doesn't overlap, and no effect on training."""

import json
from pathlib import Path

import pytest
from messages import mentions
from running import QUICK, assert_bit_equal, losses_of, tensors_of, train_network, without

from library.data.batch_sampler import BucketGroup
from library.training.monitoring.validation import fixed_timesteps, validation_batches

SPLIT = ["--validation_split", "0.5", "--validation_seed", "3", "--max_train_steps", "4"]


def validation_lines(output: Path) -> list[dict]:
    lines = map(json.loads, (output / "lora-log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if any("validation" in key for key in line)]


def step_losses(output: Path) -> list[float]:
    name = "loss/validation/step_average"
    return [line[name] for line in validation_lines(output) if name in line]


def test_timesteps_are_the_inner_points_of_the_trained_range():
    assert fixed_timesteps(None, None) == [200, 400, 600, 800]
    assert fixed_timesteps(100, 600) == [200, 300, 400, 500]
    assert fixed_timesteps(999, 1000) == [999] * 4


def test_held_out_samples_are_batched_once_each_up_to_a_limit():
    groups = [BucketGroup((0, 1, 2), 2), BucketGroup((3,), 2)]
    batches = validation_batches(groups, 100, None)
    assert [batch.samples for batch in batches] == [(0, 1), (2,), (3,)]
    assert [batch.position.first_sample_index for batch in batches] == [0, 2, 3] and batches[
        0
    ].position.step == 100
    assert len(validation_batches(groups, 100, 2)) == 2


@pytest.mark.parametrize(
    "caches",
    [[], pytest.param(["--cache_latents", "--cache_text_encoder_outputs"], marks=pytest.mark.long)],
)
def test_validation_does_not_affect_training(caches, golden_model, images, tmp_path):
    words = [
        *without(QUICK, "--cache_latents", "--cache_text_encoder_outputs"),
        *caches,
        "--network_dropout",
        "0.3",
    ]
    rare = train_network(
        golden_model,
        images,
        tmp_path / "rare",
        *SPLIT,
        "--validate_every_n_epochs",
        100,
        quick=words,
    )
    often = train_network(
        golden_model, images, tmp_path / "often", *SPLIT, "--validate_every_n_steps", 1, quick=words
    )
    assert losses_of(tmp_path / "rare") == losses_of(tmp_path / "often")
    assert_bit_equal(tensors_of(rare), tensors_of(often))
    assert validation_lines(tmp_path / "rare") == []
    lines = validation_lines(tmp_path / "often")
    assert [line["step"] for line in lines if "loss/validation/step_average" in line] == [
        1,
        2,
        3,
        4,
    ]
    # Two images with two repeats each are trained: four steps per epoch.
    assert [line["step"] for line in lines if "loss/validation/epoch_average" in line] == [4]


def test_the_same_weights_have_the_same_validation_loss(golden_model, images, tmp_path):
    train_network(
        golden_model,
        images,
        tmp_path / "out",
        *SPLIT,
        "--learning_rate",
        "1e-12",
        "--validate_every_n_steps",
        1,
    )
    losses = step_losses(tmp_path / "out")
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6) and losses[0] > 0
    train_network(golden_model, images, tmp_path / "other", *SPLIT, "--learning_rate", "1e-12", "--seed", "99", "--validate_every_n_steps", 4)  # fmt: skip
    (other,) = step_losses(tmp_path / "other")
    assert other == pytest.approx(losses[0], rel=1e-5)  # --validation_seed alone decides


def test_images_that_are_held_out_are_never_trained(golden_model, images, tmp_path):
    train_network(golden_model, images, tmp_path / "out", *SPLIT)
    from library.safetensors_io import read_header

    metadata = read_header(tmp_path / "out" / "lora.safetensors").metadata
    assert metadata["ss_num_train_images"] == "4" and metadata["ss_num_validation_images"] == "2"
    assert metadata["ss_validation_split"] == "0.5" and metadata["ss_validation_seed"] == "3"


def test_validation_without_images_is_logged(golden_model, images, tmp_path, capsys):
    train_network(
        golden_model,
        images,
        tmp_path / "out",
        "--max_train_steps",
        "1",
        "--validate_every_n_steps",
        "1",
    )
    assert mentions(capsys.readouterr().err, "WARNING", "--validation_split")
    assert validation_lines(tmp_path / "out") == []
