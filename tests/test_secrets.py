"""Faults 12, 13 and 73: metadata that don't fit never cost the weights, and secrets are written nowhere."""

import json

import pytest
import torch
from running import arguments, run_here, tensors_of, train_network

import sdxl_train_network
from library import safetensors_io
from library.safetensors_io import read_header
from networks.lora_file import write_lora

TENSORS = {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.alpha": torch.tensor(1.0)}


def test_fault_12_metadata_over_the_header_limit_is_left_out_largest_first(
    tmp_path, monkeypatch, caplog
):
    """A million tags; the limit is lowered too, so that the test is quick in both ways."""
    path = tmp_path / "lora.safetensors"
    tags = json.dumps({"folder": {f"some long tag number {i}": i for i in range(1_000_000)}})
    metadata = {"ss_tag_frequency": tags, "ss_dataset_dirs": "x" * 70_000_000, "ss_seed": "7"}
    write_lora(path, TENSORS, metadata, None)
    found = read_header(path).metadata
    assert (
        "ss_dataset_dirs" not in found
        and found["ss_tag_frequency"] == tags
        and found["sshs_model_hash"]
    )
    monkeypatch.setattr(safetensors_io, "MAX_HEADER_BYTES", 1_000_000)
    write_lora(path, TENSORS, metadata, None)
    assert set(read_header(path).metadata) == {"ss_seed", "sshs_model_hash", "sshs_legacy_hash"}
    assert torch.equal(
        tensors_of(path)["lora_unet_a.lora_down.weight"], TENSORS["lora_unet_a.lora_down.weight"]
    )


def test_fault_13_metadata_of_any_type_becomes_text(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "lora.safetensors"
    write_lora(
        path,
        TENSORS,
        {"number": 5, "none": None, "surrogate": "a\ud800b", "list": [1], 3: "x", "é": "ü\n"},
        None,
    )
    with safe_open(path, "pt") as file:
        found = file.metadata()
        assert torch.equal(
            file.get_tensor("lora_unet_a.lora_down.weight"), TENSORS["lora_unet_a.lora_down.weight"]
        )
    del found["sshs_model_hash"], found["sshs_legacy_hash"]
    assert found == {"number": "5", "surrogate": "a\\ud800b", "list": "[1]", "3": "x", "é": "ü\n"}


SECRETS = {"wandb_api_key": "0123456789abcdef0123456789abcdef01234567", "huggingface_token": "hf_abcdefghijklmnopqrstuvwxyz0123456789"}  # fmt: skip


@pytest.mark.parametrize("extra", [[], ["--learning_rate", "nonsense"]])
def test_fault_73_secrets_are_in_no_file_and_no_log_line(extra, golden_model, images, tmp_path):
    """Neither of a run, nor of a refused one, nor of a written configuration."""
    out, config = tmp_path / "out", tmp_path / "run.toml"
    secret = [word for name, value in SECRETS.items() for word in (f"--{name}", value)]
    words = [*arguments(golden_model, images, out, "--max_train_steps", 1, "--logging_dir", tmp_path / "log", "--log_config"), *secret, *extra]  # fmt: skip
    done = run_here(sdxl_train_network.main, *words)
    assert done.returncode == (2 if extra else 0), done.stderr[-2000:]
    written = run_here(sdxl_train_network.main, *words, "--output_config", "--config_file", config)
    written_text = done.stdout + done.stderr + written.stdout + written.stderr
    folders = [
        path for folder in (out, tmp_path / "log") for path in folder.rglob("*") if path.is_file()
    ]
    files = [*folders, *([config] if config.exists() else [])]
    assert bool(files) == (not extra)
    for value in SECRETS.values():
        assert value not in written_text
        assert [path for path in files if value.encode() in path.read_bytes()] == []


def test_a_wrong_secret_is_not_repeated(golden_model, images, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        'huggingface_token = ["hf_abcdefghijklmnopqrstuvwxyz0123456789"]\n', encoding="utf-8"
    )
    done = run_here(sdxl_train_network.main, *arguments(golden_model, images, tmp_path / "out"), "--config_file", config)  # fmt: skip
    assert (
        done.returncode == 2 and "huggingface_token" in done.stderr and "hf_abc" not in done.stderr
    )


def test_safetensors_reads_the_metadata_of_a_run(golden_model, images, tmp_path):
    from safetensors import safe_open

    path = train_network(
        golden_model,
        images,
        tmp_path / "out",
        "--max_train_steps",
        1,
        "--training_comment",
        "ü \ud83d",
    )
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_training_comment"] == "ü \\ud83d"
