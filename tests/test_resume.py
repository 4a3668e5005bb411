"""Resuming: bit-equal to a run that was never interrupted, whatever is trained and wherever it stopped; what isn't the same run is told."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from running import QUICK, ROOT, arguments, assert_bit_equal, script, tensors_of, train_network, without
from test_state import assert_same, tamper

from library.errors import OptionError, RunError
from library.safetensors_io import load_tensors, write_safetensors
from library.training.state import read_facts, read_state
from library.training.update import Update

EPOCHS_OF_4 = ["--gradient_accumulation_steps", "2", "--max_train_steps", "8"]  # 8 pictures an epoch: 4 steps
CACHED_ON_DISK = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]


def rows_of(output: Path, after: int = 0) -> list[dict]:
    """The step log behind a step, without what two runs can't have in common."""
    rows = [json.loads(line) for line in (output / "lora-log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows if row["step"] > after]


def state_at(output: Path, step: int) -> Path:
    return output / f"lora-step{step:08d}-state"


def assert_same_end(plain: Path, resumed: Path, step: int) -> None:
    """Of two runs that saved a state at their end: files, log behind the step, and all that their states hold."""
    files = sorted(path.name for path in plain.glob("lora*.safetensors"))
    for name in files:
        if "step" not in name:
            assert_bit_equal(tensors_of(plain / name), tensors_of(resumed / name))
    assert rows_of(plain, step) == rows_of(resumed, step)
    one, two = read_state(plain / "lora-state"), read_state(resumed / "lora-state")
    for each in (one, two):
        for name in ("written", "saved", "run", "session_id", "files"):
            del each.facts[name]
    assert_same(one.facts, two.facts)
    for part in ("weights", "optimizer", "ema"):
        assert_same(dict(getattr(one, part)), dict(getattr(two, part)), part)


def resumed_at(steps: Sequence[int], first: Path, model: Path, pictures: Path, folder: Path, words: Sequence, quick=QUICK) -> Path:  # fmt: skip
    """Resume from the first run's state at a step, that run's state at the next one, and so on; returns the last one's folder."""
    source = state_at(first, steps[0])
    for number, step in enumerate(steps):
        output = folder / f"resumed_{'_'.join(map(str, steps[: number + 1]))}"
        often = ["--save_every_n_steps", "1"] if number + 1 < len(steps) else []
        train_network(model, pictures, output, *words, *often, "--save_state", "--resume", source, quick=quick)
        if often:
            source = state_at(output, steps[number + 1])
    return output


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


def test_fault_65_a_run_goes_on_to_the_bit(golden_model, pictures, tmp_path):
    """From the middle of an epoch, and again from the next epoch's; noise, dropouts, warm-up, EMA, accumulation."""
    words = [*EPOCHS_OF_4, *NOISY]
    train_network(golden_model, pictures, tmp_path / "plain", *words, "--save_state_on_train_end")
    train_network(golden_model, pictures, tmp_path / "first", *words, "--save_every_n_steps", "1", "--save_state")
    assert_same_end(tmp_path / "plain", tmp_path / "first", 0)  # saving changes nothing
    output = resumed_at([3, 5], tmp_path / "first", golden_model, pictures, tmp_path, words)
    assert_same_end(tmp_path / "plain", output, 5)
