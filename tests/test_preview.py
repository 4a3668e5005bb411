"""Sample images during training: when they are generated, under which names, and that training is not affected."""

import json
import re

import numpy as np
import pytest
from forked import end_together
from forked import processes as on_processes
from PIL import Image
from running import (
    QUICK,
    arguments,
    assert_bit_equal,
    losses_of,
    tensors_of,
    train_network,
    without,
)

from library.generation import single_image
from library.generation.image_grid import contact_sheet, thumbnail

PROMPTS = (
    "a red square --s 2\na (blue:1.4) circle --w 96 --h 64 --d 5 --s 2 --ss euler_a --n dark\n"
)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def names_in(output):
    return sorted(re.sub(r"_\d{14}", "", path.name) for path in (output / "sample").iterdir())


def test_samples_by_steps_have_the_contracts_names_and_the_training_resolution(
    golden_model, images, prompts, tmp_path
):
    out = tmp_path / "out"
    train_network(golden_model, images, out, "--max_train_steps", 4, "--sample_prompts", prompts, "--sample_every_n_steps", 2, "--sample_at_first")  # fmt: skip
    assert names_in(out) == sorted(
        [
            *(
                f"lora_{when}_0{n}{end}.png"
                for when in ("000002", "000004", "e000000")
                for n, end in ((0, ""), (1, "_5"))
            ),
            "lora_contact_sheet.png",
        ]
    )
    sizes = {Image.open(path).size for path in (out / "sample").glob("lora_0*_00_*")}
    assert sizes == {(64, 64)}
    assert {Image.open(path).size for path in (out / "sample").glob("*_5.png")} == {(96, 64)}
    changed = [
        np.asarray(Image.open(next((out / "sample").glob(f"lora_{w}_00_*"))))
        for w in ("e000000", "000004")
    ]
    assert (changed[0] != changed[1]).any(), "the noise is the same, so only training can change it"
    sheet = Image.open(out / "sample" / "lora_contact_sheet.png")
    assert sheet.height >= 3 * 64 and sheet.width >= 64 + 96


@pytest.mark.parametrize("cached", [pytest.param(True, marks=pytest.mark.long), False])
def test_epochs_override_steps_and_samples_do_not_affect_training(
    cached, golden_model, images, prompts, tmp_path
):
    words = QUICK if cached else without(QUICK, "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")  # fmt: skip
    words = [*words, "--network_args", "rank_dropout=0.2", "--max_train_steps", "8"]
    plain = train_network(golden_model, images, tmp_path / "plain", quick=words)
    sampled = train_network(golden_model, images, tmp_path / "sampled", "--sample_prompts", prompts, "--sample_every_n_epochs", 1, "--sample_every_n_steps", 2, quick=words)  # fmt: skip
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "sampled")
    assert_bit_equal(tensors_of(plain), tensors_of(sampled))
    assert names_in(tmp_path / "sampled") == [
        "lora_contact_sheet.png",
        "lora_e000001_00.png",
        "lora_e000001_01_5.png",
    ]


@pytest.mark.long
def test_two_processes_generate_the_samples_of_one(golden_model, images, prompts, tmp_path):
    def run(processes):
        out = tmp_path / str(processes)
        words = arguments(golden_model, images, out, "--max_train_steps", 1, "--gradient_accumulation_steps", 2 // processes, "--sample_prompts", prompts, "--sample_at_first")  # fmt: skip
        end_together(on_processes("sdxl_train_network.py", *words, count=processes))
        return {
            re.sub(r"_\d{14}", "", path.name): path.read_bytes()
            for path in (out / "sample").iterdir()
        }

    one = run(1)
    assert one == run(2) and len(one) == 3


def test_fault_69_a_sample_that_fails_is_logged_and_the_run_continues(golden_model, images, prompts, tmp_path, monkeypatch, capsys):  # fmt: skip
    def broken(*args, **kwargs):
        raise RuntimeError("no memory for this\nsecond line")

    monkeypatch.setattr(single_image, "denoise", broken)
    final = train_network(golden_model, images, tmp_path / "out", "--max_train_steps", 2, "--sample_prompts", prompts, "--sample_every_n_steps", 1)  # fmt: skip
    assert final.exists() and len(losses_of(tmp_path / "out")) == 2
    assert (
        "sample 1 of 000002 failed: RuntimeError: no memory for this\n" in capsys.readouterr().err
    )


def test_fault_69_bad_prompts_are_left_out(golden_model, images, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(
        json.dumps([5, {"prompt": "a", "sample_steps": 1, "width": "wide"}]), encoding="utf-8"
    )
    final = train_network(golden_model, images, tmp_path / "out", "--max_train_steps", 1, "--sample_prompts", path, "--sample_every_n_steps", 1)  # fmt: skip
    assert final.exists() and names_in(tmp_path / "out") == [
        "lora_000001_00.png",
        "lora_contact_sheet.png",
    ]


def test_samples_go_to_the_tracker_too(golden_model, images, prompts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_network(golden_model, images, tmp_path / "out", "--max_train_steps", 1, "--sample_prompts", prompts, "--sample_every_n_steps", 1, "--logging_dir", tmp_path / "log")  # fmt: skip
    (folder,) = (tmp_path / "log").glob("*/network_train")
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == ["sample/0", "sample/1"]
    assert (events.Images("sample/1")[0].width, events.Images("sample/1")[0].height) == (96, 64)


def test_the_contact_sheet_has_a_row_per_step_and_a_gap_for_a_failed_sample():
    red = thumbnail(np.full((32, 64, 3), (255, 0, 0), dtype=np.uint8), 16)
    assert red.size == (16, 8)
    sheet = contact_sheet([("000001", [red, None]), ("000002", [red, red])])
    reds = (np.asarray(sheet) == (255, 0, 0)).all(axis=2)
    assert reds.sum() == 3 * 16 * 8
