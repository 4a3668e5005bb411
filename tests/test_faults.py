"""Faults as users meet them: the message, the exit status, and that nothing was written. Numbers are trust.md's."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from messages import mentions, shows_caching
from PIL import Image
from running import (
    QUICK,
    Ended,
    arguments,
    losses_of,
    run_here,
    script,
    tensors_of,
    train_network,
    without,
)

import sdxl_train_network
from library.safetensors_io import write_safetensors


def run(*words: object, quick=QUICK) -> Ended:
    return run_here(sdxl_train_network.main, *arguments(*words, quick=quick))


def refused(done, output: Path, *claims: Sequence[object], status: int = 2) -> str:
    """Check that the script named each claim's tokens in a line, without a traceback, ended with `status`, and wrote nothing."""
    assert done.returncode == status, (done.returncode, done.stderr[-3000:])
    assert "Traceback" not in done.stderr
    for tokens in claims:
        assert not isinstance(tokens, str), (
            "a claim is a list of tokens; of a text each letter would be one"
        )
        assert mentions(done.stderr, *tokens), (tokens, done.stderr[-3000:])
    assert not output.exists() or not list(output.iterdir())
    return done.stderr


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def test_fault_15_a_cut_model_is_refused(golden_model, images, output, tmp_path):
    model = tmp_path / "cut.safetensors"
    model.write_bytes(golden_model.read_bytes()[:1_000_000])
    refused(
        run(model, images, output),
        output,
        [model, "83,264,872", "1,000,000"],
    )


def test_fault_15_a_cut_lora_is_refused(golden_model, images, output, tmp_path):
    lora = tmp_path / "cut.safetensors"
    write_safetensors(lora, {"lora_unet_x.lora_down.weight": torch.zeros(100)}, {})
    lora.write_bytes(lora.read_bytes()[:-5])
    refused(
        run(golden_model, images, output, "--network_weights", lora),
        output,
        ["--network_weights", lora, "496", "491"],
    )


def test_fault_17_a_ckpt_that_would_run_code_is_refused(images, output, tmp_path):
    evil = tmp_path / "evil"
    program = (
        f"import os, torch\nclass E:\n    def __reduce__(self): return os.mkdir, ({str(evil)!r},)\n"
        f"torch.save({{'state_dict': E()}}, {str(tmp_path / 'm.ckpt')!r})"
    )
    assert script("-c", program).returncode == 0
    refused(run(tmp_path / "m.ckpt", images, output), output, ["m.ckpt", "tensors", "code"])
    assert not evil.exists()


def test_fault_19_a_lora_that_doesnt_fit_is_refused(golden_model, images, output, tmp_path):
    lora = train_network(golden_model, images, tmp_path / "first", "--max_train_steps", "1")
    done = run(golden_model, images, output, "--network_weights", lora, "--network_dim", "3")
    refused(done, output, ["--network_weights", lora, "384", "shape", "[2, 64]", "[3, 64]"])


def test_fault_19_another_kind_of_file_is_no_lora(golden_model, images, output):
    refused(
        run(golden_model, images, output, "--network_weights", golden_model),
        output,
        ["--network_weights", golden_model, "LoRA", ".lora_down.weight"],
    )


def test_fault_20_a_model_of_another_family_is_refused(images, output, tmp_path):
    model = tmp_path / "sd15.safetensors"
    write_safetensors(
        model,
        {
            "cond_stage_model.transformer.x": torch.zeros(1),
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1),
        },
        {},
    )
    refused(
        run(model, images, output),
        output,
        ["error", model, "SD 1", "SDXL"],
    )


def test_fault_21_a_float8_checkpoint_trains(golden_model, images, output, tmp_path):
    model = tmp_path / "fp8.safetensors"
    write_safetensors(
        model,
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors_of(golden_model).items()},
        {},
    )
    train_network(model, images, output, "--max_train_steps", "1")
    assert losses_of(output)[0] > 0


def test_fault_23_hostile_metadata_in_the_model_does_no_harm(
    golden_model, images, output, tmp_path
):
    model = tmp_path / "hostile.safetensors"
    hostile = {
        "modelspec.title": "../" * 1000,
        "ss_output_name": "x" * 10_000_000,
        "ss_tag_frequency": "[" * 100_000,
    }
    write_safetensors(model, tensors_of(golden_model), hostile)
    train_network(model, images, output, "--max_train_steps", "1")
    assert (output / "lora.safetensors").exists()


def test_fault_25_damaged_images_stop_the_run_before_the_first_step(golden_model, images, output):
    folder = next(images.iterdir())
    noise = np.random.default_rng(0).integers(0, 256, (112, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "picture1.png")
    raw = (folder / "picture1.png").read_bytes()
    (folder / "picture1.png").write_bytes(raw[: len(raw) // 2])
    for quick in (QUICK, without(QUICK, "--cache_latents")):
        refused(
            run(golden_model, images, output, quick=quick),
            output,
            ["picture1.png"],
            ["--skip_bad_images"],
            status=1,
        )
    (folder / "picture2.png").write_bytes(b"")
    refused(
        run(golden_model, images, output), output, ["picture2.png"]
    )  # by its header, before torch
    train_network(golden_model, images, output, "--skip_bad_images", "--max_train_steps", "1")


def test_fault_34_captions_that_are_no_text_are_refused(golden_model, images, output):
    folder = next(images.iterdir())
    (folder / "picture0.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "picture3.txt").write_bytes("cat".encode("utf-16"))
    refused(
        run(golden_model, images, output),
        output,
        ["picture0.txt", "UTF-8"],
        ["picture3.txt", "UTF-16"],
    )


def test_fault_47_no_images_is_no_success(golden_model, output, tmp_path):
    (tmp_path / "empty" / "1_x").mkdir(parents=True)
    refused(run(golden_model, tmp_path / "empty", output), output, ["error", "1_x", ".png"])


@pytest.mark.parametrize(
    "extra, tokens",
    [
        (["--learning_rat", "1"], ["did you mean 'learning_rate'?"]),
        (["--optimizer", "Lion"], ["--optimizer is not an option"]),
        (
            ["--block_lr", "1"],
            ["--block_lr is not an option of this script; it is an option of sdxl_train.py"],
        ),
    ],
)
def test_fault_57_a_misspelt_option_is_refused(extra, tokens, golden_model, images, output):
    refused(run(golden_model, images, output, *extra), output, tokens)


def test_fault_57_a_misspelt_key_in_the_config_file_is_refused_with_its_line(
    golden_model, images, output, tmp_path
):
    config = tmp_path / "run.toml"
    config.write_text("[a]\nmin_snr_gama = 5\n[b]\nlearning_rat = 1\n", encoding="utf-8")
    told = refused(
        run(golden_model, images, output, "--config_file", config),
        output,
        [config, "line 2", "min_snr_gama", "'min_snr_gamma'|--min_snr_gamma"],
        [config, "line 4", "learning_rat", "'learning_rate'|--learning_rate"],
    )
    assert told.count("error: ") == 2


@pytest.mark.parametrize(
    "line, tokens",
    [
        ("learning_rate = 'fast'", ["learning_rate", "number", "'fast'"]),
        ("learning_rate = nan", ["learning_rate", "finite", "nan"]),
        ("max_train_steps = -5", ["max_train_steps", "1", "-5"]),
        ("mixed_precision = 'fp8'", ["mixed_precision", "no, fp16, bf16", "'fp8'"]),
        ("caption_dropout_rate = 1.5", ["caption_dropout_rate", "1", "1.5"]),
        ("min_timestep = 1000", ["min_timestep", "999", "1000"]),
        ("gradient_accumulation_steps = 0", ["gradient_accumulation_steps", "1", "0"]),
    ],
)
def test_fault_58_a_wrong_value_is_refused_with_its_line(
    line, tokens, golden_model, images, output, tmp_path
):
    config = tmp_path / "run.toml"
    config.write_text(f"# a comment\n{line}\n", encoding="utf-8")
    quick = without(QUICK, "--learning_rate", "1e-3")
    refused(
        run(golden_model, images, output, "--config_file", config, quick=quick),
        output,
        [config, "line 2", *tokens],
    )


@pytest.mark.parametrize(
    "extra, tokens",
    [
        (
            ["--shuffle_caption"],
            ["shuffle_caption", "--cache_text_encoder_outputs", "--text_cache_variants"],
        ),
        (
            ["--caption_dropout_rate", "0.1"],
            ["caption_dropout_rate", "--cache_text_encoder_outputs"],
        ),
        (["--adaptive_noise_scale", "0.1"], ["--adaptive_noise_scale", "--noise_offset"]),
        (
            ["--v_parameterization", "--v_pred_like_loss", "1"],
            ["--v_pred_like_loss", "--v_parameterization"],
        ),
        (
            ["--scale_v_pred_loss_like_noise_pred"],
            ["--scale_v_pred_loss_like_noise_pred", "--v_parameterization"],
        ),
        (
            ["--zero_terminal_snr", "--min_snr_gamma", "5"],
            ["--zero_terminal_snr", "--min_snr_gamma"],
        ),
        (
            ["--lr_warmup_steps", "10"],
            ["--lr_warmup_steps", "10", "constant", "constant_with_warmup"],
        ),
        (["--use_8bit_adam", "--optimizer_type", "Lion"], ["--use_8bit_adam", "--optimizer_type"]),
        (
            ["--network_train_text_encoder_only"],
            ["--network_train_unet_only", "--network_train_text_encoder_only"],
        ),
        (["--v2"], ["--v2", "SD 2", "SDXL"]),
        (["--min_bucket_reso", "512"], ["min_bucket_reso", "512", "max_bucket_reso", "128"]),
        (["--full_bf16"], ["--full_bf16", "--mixed_precision", "bf16", "no"]),
        (["--log_with", "tensorboard"], ["--log_with", "tensorboard", "--logging_dir"]),
    ],
)
def test_fault_59_contradictions_are_refused_before_the_model_loads(
    extra, tokens, golden_model, images, output
):
    refused(run(golden_model, images, output, *extra), output, tokens)


def test_fault_59_cached_text_and_trained_text_encoders_exclude_each_other(
    golden_model, images, output
):
    quick = without(QUICK, "--network_train_unet_only")
    refused(
        run(golden_model, images, output, quick=quick),
        output,
        ["--cache_text_encoder_outputs", "--network_train_unet_only"],
    )


def test_an_option_against_the_checkpoint_is_refused(golden_model, images, output, tmp_path):
    model, config = tmp_path / "v.safetensors", tmp_path / "run.toml"
    write_safetensors(model, {**tensors_of(golden_model), "v_pred": torch.zeros(0)}, {})
    config.write_text("v_parameterization = false\n", encoding="utf-8")
    refused(
        run(model, images, output, "--config_file", config),
        output,
        [config, "line 1", "v_parameterization", "false", "v.safetensors", "v_pred"],
    )
    refused(
        run(model, images, output, "--v_pred_like_loss", "1"),
        output,
        ["--v_pred_like_loss", "v.safetensors"],
    )


def test_bad_network_args_are_refused(golden_model, images, output):
    done = run(golden_model, images, output, "--network_args", "conv_dims=4", "rank_dropout=2")
    refused(
        done,
        output,
        ["--network_args", "'conv_dims'", "'conv_dim'"],
        ["--network_args", "rank_dropout", "0", "1", "2"],
    )


def test_a_missing_optimizer_package_is_told_before_caching(golden_model, images, output):
    refused(
        run(golden_model, images, output, "--optimizer_type", "nosuch.Thing"),
        output,
        ["--optimizer_type", "pip install nosuch"],
    )
    assert not list(images.rglob("*.npz"))


def poison(images: Path, name: str) -> None:
    """Put latents that aren't finite into an image's cache file, as a program without a check would."""
    (path,) = images.rglob(f"{name}_*_sdxl.npz")
    arrays = dict(np.load(path))
    arrays["latents"][0, 0, 0] = np.inf
    np.savez(path, **arrays)


def test_fault_60_a_loss_that_isnt_finite_stops_the_run_naming_step_and_image(
    golden_model, images, output, tmp_path
):
    train_network(
        golden_model,
        images,
        tmp_path / "first",
        "--cache_latents_to_disk",
        "--max_train_steps",
        "1",
    )
    poison(images, "picture2")
    done = run(
        golden_model,
        images,
        output,
        "--cache_latents_to_disk",
        "--skip_cache_check",  # which is what lets bad latents in
        "--save_every_n_steps",
        "1",
        "--max_train_steps",
        "50",
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    step = len(losses_of(output)) + 1
    assert mentions(
        done.stderr, f"step {step}", images / "2_shapes" / "picture2.png", "loss", "finite|NaN|Inf"
    )
    saved = sorted(path.name for path in output.glob("*.safetensors"))
    assert saved == [
        f"lora-step{n:08d}.safetensors" for n in range(1, step)
    ]  # no final file, none of the bad step
    for name in saved:
        assert all(tensor.isfinite().all() for tensor in tensors_of(output / name).values())


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind"
)
def test_an_output_folder_that_cant_be_made_is_told(golden_model, images, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = run(golden_model, images, locked / "output")
    assert done.returncode == 2 and mentions(
        done.stderr, "error", "--output_dir", locked / "output", "permission"
    )


def test_an_output_folder_that_is_a_file_is_told_before_caching(golden_model, images, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(golden_model, images, tmp_path / "file" / "output")
    assert not shows_caching(done.stderr)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert mentions(
        done.stderr, "error", "--output_dir", tmp_path / "file" / "output", "Not a directory"
    )


def test_an_interrupt_ends_with_its_status(golden_model, images, output):
    program = (
        "import sys\nfrom library.errors import run\ndef main(): raise KeyboardInterrupt\nrun(main)"
    )
    assert script("-c", program).returncode == 130


# ------------------------------------------------------------------------------- what is told before hours of caching


@pytest.mark.parametrize(
    "extra, tokens",
    [
        (["--optimizer_args", "weight_deacy=0.1"], ["--optimizer_args", "AdamW", "'weight_deacy'", "'weight_decay'"]),
        (["--optimizer_args", "lr=0.5"], ["--optimizer_args", "lr=0.5", "--learning_rate"]),
        (["--optimizer_args", "betas=0.9"], ["--optimizer_args", "AdamW", "betas=0.9"]),
        (["--optimizer_type", "torch.nn.Linear"], ["--optimizer_type", "torch.nn.Linear", "optimizer"]),
        (["--learning_rate", "0"], ["learning rate", "0"]),
        (["--lr_scheduler_type", "ReduceLROnPlateau"], ["--lr_scheduler_type", "ReduceLROnPlateau", "metric"]),
        (["--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "--lr_scheduler", "adafactor"], ["--lr_scheduler", "adafactor", "--optimizer_type", "relative_step"]),
        (["--min_timestep", "900", "--max_timestep", "100"], ["--min_timestep", "900", "--max_timestep", "100"]),
        (["--ddp_static_graph", "--gradient_accumulation_steps", "2"], ["--ddp_static_graph", "--gradient_accumulation_steps"]),
        (["--output_name", "lora.safetensors"], ["--output_name", "lora.safetensors", "--save_model_as"]),
        (["--network_module", "not_there.kohya"], ["--network_module", "not_there.kohya", "pip install not_there"]),
        (["--network_module", "networks.dylora"], ["--network_module", "networks.dylora", "lycoris.kohya", "algo=dylora"]),
        (["--network_module", "json"], ["--network_module", "json", "create_network"]),
        (["-max_train_steps", "10"], ["-max_train_steps", "'max_train_steps'|--max_train_steps", "two dashes|--"]),
        (["--seed", "99999999999999999999"], ["--seed", "9.22337e+18", "99999999999999999999"]),
    ],
)  # fmt: skip
def test_what_cant_work_is_told_before_caching(
    extra, tokens, golden_model, images, output, tmp_path
):
    told = refused(run(golden_model, images, output, *extra), output, ["error", *tokens])
    assert not shows_caching(told) and told.count("error:") == 1


def junk(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "content, tokens",
    [
        (b"junk text", ["safetensors", "header", "9"]),
        ([1, 2], ["without tensors|no tensors", ".lora_down.weight"]),
        ({"a": torch.zeros(2)}, ["unknown|known|recognised|recognized", ".lora_down.weight"]),
        (
            {"lora_unet_x.lora_down.weight": torch.tensor(1.0)},
            ["lora_unet_x", "lora_down.weight", "[]", "alpha"],
        ),
        (
            {"lora_unet_x.lora_down.weight": torch.ones(2, 2, dtype=torch.int64)},
            ["finite|NaN|Inf", "lora_unet_x.lora_down.weight"],
        ),
        (
            {"lora_unet_x.lora_down.weight": torch.full((2, 2), float("nan"))},
            ["finite|NaN|Inf", "lora_unet_x.lora_down.weight"],
        ),
        ({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, ["LoHa", ".lora_down.weight"]),
    ],
)
def test_faults_15_and_17_pickles_as_network_weights_are_told_in_a_sentence(content, tokens, golden_model, images, output, tmp_path):  # fmt: skip
    path = junk(tmp_path / "x.pt", content)
    told = refused(
        run(golden_model, images, output, "--network_weights", path, "--dim_from_weights"),
        output,
        ["error", *tokens],
    )
    assert "weights_only" not in told and not shows_caching(told)


def test_dim_from_weights_keeps_learning_rate_factors(golden_model, images, output, tmp_path):
    first = train_network(golden_model, images, tmp_path / "first", "--max_train_steps", "1")
    done = run(
        golden_model, images, output, "--network_weights", first, "--dim_from_weights", "--max_train_steps", "1",
        "--network_args", "loraplus_lr_ratio=16",
    )  # fmt: skip
    assert done.returncode == 0 and mentions(done.stderr, "unet plus", "192"), done.stderr[-2000:]


def test_weights_that_arent_finite_are_never_saved(golden_model, images, output):
    done = run(
        golden_model,
        images,
        output,
        "--learning_rate",
        "1e6",
        "--max_train_steps",
        "1",
        "--save_precision",
        "fp16",
    )
    assert done.returncode == 1 and mentions(
        done.stderr, "error", "lora.safetensors", "192", "finite|NaN|Inf"
    )
    assert not list(output.glob("*.safetensors"))


@pytest.mark.parametrize(
    "content, tokens",
    [
        (b'a = "C:\\models"', ["TOML", "line 1", "Windows"]),
        ('a = "x"'.encode("utf-16"), ["UTF-8"]),
        (None, ["file"]),
    ],
)
def test_a_config_file_that_cant_be_read_is_the_only_mistake_told(content, tokens, tmp_path):
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    done = run_here(sdxl_train_network.main, "--config_file", tmp_path / "run.toml")
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert mentions(done.stderr, "error", "--config_file", tmp_path / "run.toml", *tokens)


def test_a_vae_that_is_none_is_told_by_its_header(golden_model, images, output, tmp_path):
    lora = train_network(golden_model, images, tmp_path / "first", "--max_train_steps", "1")
    refused(
        run(golden_model, images, output, "--vae", lora), output, ["--vae", lora, "LoRA", "VAE"]
    )


def test_a_hub_id_without_a_network_is_one_sentence(images, output):
    refused(run("some-one/no-such-model", images, output), output, ["some-one/no-such-model", "hub", "HF_HUB_OFFLINE"])  # fmt: skip


def test_a_broken_xformers_is_told_and_done_without(
    golden_model, images, output, tmp_path, monkeypatch
):
    (tmp_path / "site" / "xformers").mkdir(parents=True)
    (tmp_path / "site" / "xformers" / "__init__.py").write_text(
        "raise ImportError('made for another torch')"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    done = run(golden_model, images, output, "--xformers", "--max_train_steps", "1")
    assert done.returncode == 0 and mentions(
        done.stderr, "--xformers", "made for another torch", "--sdpa"
    ), done.stderr[-2000:]


def test_a_caption_that_is_too_long_is_told(golden_model, images, output):
    (images / "2_shapes" / "picture0.txt").write_text("many words " * 60)
    done = run(golden_model, images, output, "--max_train_steps", "1")
    assert done.returncode == 0 and mentions(done.stderr, "75", "--max_token_length", "many words")
    assert shows_caching(done.stderr)  # so the tests that look for none would see it


def test_accelerates_own_settings_change_nothing(
    golden_model, images, output, tmp_path, monkeypatch
):
    plain = train_network(golden_model, images, tmp_path / "plain", "--max_train_steps", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train_network(golden_model, images, output, "--max_train_steps", "2")
    assert losses_of(output) == losses_of(plain.parent)


def test_fault_70_a_tracker_that_fails_doesnt_end_the_run(
    golden_model, images, output, tmp_path, monkeypatch
):
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    final = train_network(
        golden_model, images, output, "--max_train_steps", "3", "--logging_dir", tmp_path / "log"
    )
    assert final.exists() and len(losses_of(output)) == 3
