"""Faults as users meet them: the message, the exit status, and that nothing was written. Numbers are trust.md's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from running import QUICK, Ended, arguments, losses_of, run_here, script, tensors_of, train_network, without

import sdxl_train_network
from library.safetensors_io import write_safetensors


def run(*words: object, quick=QUICK) -> Ended:
    return run_here(sdxl_train_network.main, *arguments(*words, quick=quick))


def refused(done, output: Path, *pieces: str, status: int = 2) -> str:
    """Whether the script told `pieces` without a traceback, ended with `status` and wrote nothing."""
    assert done.returncode == status, (done.returncode, done.stderr[-3000:])
    assert "Traceback" not in done.stderr
    for piece in pieces:
        assert piece in done.stderr, (piece, done.stderr[-3000:])
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
        f"{model}: not a complete safetensors file: cut short: the header needs 83,264,872 bytes, the file has 1,000,000",
    )


def test_fault_15_a_cut_lora_is_refused(golden_model, images, output, tmp_path):
    lora = tmp_path / "cut.safetensors"
    write_safetensors(lora, {"lora_unet_x.lora_down.weight": torch.zeros(100)}, {})
    lora.write_bytes(lora.read_bytes()[:-5])
    refused(run(golden_model, images, output, "--network_weights", lora), output, "--network_weights", "cut short")


def test_fault_17_a_ckpt_that_would_run_code_is_refused(images, output, tmp_path):
    evil = tmp_path / "evil"
    program = (
        f"import os, torch\nclass E:\n    def __reduce__(self): return os.mkdir, ({str(evil)!r},)\n"
        f"torch.save({{'state_dict': E()}}, {str(tmp_path / 'm.ckpt')!r})"
    )
    assert script("-c", program).returncode == 0
    refused(run(tmp_path / "m.ckpt", images, output), output, "m.ckpt: refused: it holds more than tensors")
    assert not evil.exists()


def test_fault_19_a_lora_that_doesnt_fit_is_refused(golden_model, images, output, tmp_path):
    lora = train_network(golden_model, images, tmp_path / "first", "--max_train_steps", "1")
    done = run(golden_model, images, output, "--network_weights", lora, "--network_dim", "3")
    refused(done, output, "none of its 384 tensors fits this network", "have another shape")


def test_fault_19_another_kind_of_file_is_no_lora(golden_model, images, output):
    refused(
        run(golden_model, images, output, "--network_weights", golden_model),
        output,
        "a LoRA with .lora_down.weight keys is needed",
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
        f"error: {model}: this is an SD 1.x checkpoint; an SDXL checkpoint is needed",
    )


def test_fault_21_a_float8_checkpoint_trains(golden_model, images, output, tmp_path):
    model = tmp_path / "fp8.safetensors"
    write_safetensors(
        model, {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors_of(golden_model).items()}, {}
    )
    train_network(model, images, output, "--max_train_steps", "1")
    assert losses_of(output)[0] > 0


def test_fault_23_hostile_metadata_in_the_model_does_no_harm(golden_model, images, output, tmp_path):
    model = tmp_path / "hostile.safetensors"
    hostile = {"modelspec.title": "../" * 1000, "ss_output_name": "x" * 10_000_000, "ss_tag_frequency": "[" * 100_000}
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
            "picture1.png: damaged",
            "--skip_bad_images",
            status=1,
        )
    (folder / "picture2.png").write_bytes(b"")
    refused(run(golden_model, images, output), output, "picture2.png: no picture")  # by its header, before torch
    train_network(golden_model, images, output, "--skip_bad_images", "--max_train_steps", "1")


def test_fault_34_captions_that_are_no_text_are_refused(golden_model, images, output):
    folder = next(images.iterdir())
    (folder / "picture0.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "picture3.txt").write_bytes("cat".encode("utf-16"))
    refused(run(golden_model, images, output), output, "picture0.txt: it is not UTF-8", "picture3.txt: it is UTF-16")


def test_fault_47_no_images_is_no_success(golden_model, output, tmp_path):
    (tmp_path / "empty" / "1_x").mkdir(parents=True)
    refused(run(golden_model, tmp_path / "empty", output), output, "no pictures to train on")


@pytest.mark.parametrize(
    "extra, pieces",
    [
        (["--learning_rat", "1"], ["did you mean 'learning_rate'?"]),
        (["--optimizer", "Lion"], ["--optimizer is not an option"]),
        (["--block_lr", "1"], ["--block_lr is not an option of this script; it is an option of sdxl_train.py"]),
    ],
)
def test_fault_57_a_misspelt_option_is_refused(extra, pieces, golden_model, images, output):
    refused(run(golden_model, images, output, *extra), output, *pieces)


def test_fault_57_a_misspelt_key_in_the_config_file_is_refused_with_its_line(golden_model, images, output, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("[a]\nmin_snr_gama = 5\n[b]\nlearning_rat = 1\n", encoding="utf-8")
    told = refused(
        run(golden_model, images, output, "--config_file", config),
        output,
        "did you mean 'min_snr_gamma'?",
        "did you mean 'learning_rate'?",
    )
    assert f"{config}, line 2: min_snr_gama" in told and told.count("error: ") == 2


@pytest.mark.parametrize(
    "line, expected",
    [
        ("learning_rate = 'fast'", "expected a number, got 'fast'"),
        ("learning_rate = nan", "expected a finite number, got nan"),
        ("max_train_steps = -5", "must be at least 1, got -5"),
        ("mixed_precision = 'fp8'", "expected one of no, fp16, bf16"),
        ("caption_dropout_rate = 1.5", "must be at most 1, got 1.5"),
        ("min_timestep = 1000", "must be at most 999, got 1000"),
        ("gradient_accumulation_steps = 0", "must be at least 1"),
    ],
)
def test_fault_58_a_wrong_value_is_refused_with_its_line(line, expected, golden_model, images, output, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(f"# a comment\n{line}\n", encoding="utf-8")
    quick = without(QUICK, "--learning_rate", "1e-3")
    refused(
        run(golden_model, images, output, "--config_file", config, quick=quick),
        output,
        f"{config}, line 2: ",
        expected,
    )


@pytest.mark.parametrize(
    "extra, expected",
    [
        (["--shuffle_caption"], "shuffle_caption changes captions from step to step"),
        (["--caption_dropout_rate", "0.1"], "caption_dropout_rate changes captions"),
        (["--adaptive_noise_scale", "0.1"], "--adaptive_noise_scale needs --noise_offset"),
        (["--v_parameterization", "--v_pred_like_loss", "1"], "--v_pred_like_loss is for models that predict noise"),
        (["--scale_v_pred_loss_like_noise_pred"], "is for velocity models"),
        (["--zero_terminal_snr", "--min_snr_gamma", "5"], "infinite at the last timestep"),
        (["--lr_warmup_steps", "10"], "constant has no warm-up"),
        (["--use_8bit_adam", "--optimizer_type", "Lion"], "old ways to say --optimizer_type"),
        (["--network_train_text_encoder_only"], "leave nothing to train"),
        (["--v2"], "SD 2.x models can't be trained"),
        (["--min_bucket_reso", "512"], "min_bucket_reso 512 is above max_bucket_reso 128"),
        (["--full_bf16"], "--full_bf16 needs --mixed_precision bf16, got no"),
        (["--log_with", "tensorboard"], "needs --logging_dir"),
    ],
)
def test_fault_59_contradictions_are_refused_before_the_model_loads(extra, expected, golden_model, images, output):
    refused(run(golden_model, images, output, *extra), output, expected)


def test_fault_59_cached_text_and_trained_text_encoders_exclude_each_other(golden_model, images, output):
    quick = without(QUICK, "--network_train_unet_only")
    refused(run(golden_model, images, output, quick=quick), output, "give --network_train_unet_only too")


def test_an_option_against_the_checkpoint_is_refused(golden_model, images, output, tmp_path):
    model, config = tmp_path / "v.safetensors", tmp_path / "run.toml"
    write_safetensors(model, {**tensors_of(golden_model), "v_pred": torch.zeros(0)}, {})
    config.write_text("v_parameterization = false\n", encoding="utf-8")
    refused(
        run(model, images, output, "--config_file", config),
        output,
        "v_parameterization = false, but v.safetensors is such a model (by its key v_pred)",
    )
    refused(run(model, images, output, "--v_pred_like_loss", "1"), output, "v.safetensors predicts velocity")


def test_bad_network_args_are_refused(golden_model, images, output):
    done = run(golden_model, images, output, "--network_args", "conv_dims=4", "rank_dropout=2")
    refused(
        done,
        output,
        "'conv_dims' is no argument of networks.lora; did you mean 'conv_dim'?",
        "rank_dropout: expected a number in 0..1",
    )


def test_a_missing_optimizer_package_is_told_before_caching(golden_model, images, output):
    refused(run(golden_model, images, output, "--optimizer_type", "nosuch.Thing"), output, "pip install nosuch")
    assert not list(images.rglob("*.npz"))


def poison(images: Path, name: str) -> None:
    """Put latents that aren't finite into a picture's cache file, as a program without a check would."""
    (path,) = images.rglob(f"{name}_*_sdxl.npz")
    arrays = dict(np.load(path))
    arrays["latents"][0, 0, 0] = np.inf
    np.savez(path, **arrays)


def test_fault_60_a_loss_that_isnt_finite_stops_the_run_naming_step_and_image(golden_model, images, output, tmp_path):
    train_network(golden_model, images, tmp_path / "first", "--cache_latents_to_disk", "--max_train_steps", "1")
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
    assert f"step {step}: the loss of {images / '2_shapes' / 'picture2.png'} is not finite" in done.stderr
    saved = sorted(path.name for path in output.glob("*.safetensors"))
    assert saved == [f"lora-step{n:08d}.safetensors" for n in range(1, step)]  # no final file, none of the bad step
    for name in saved:
        assert all(tensor.isfinite().all() for tensor in tensors_of(output / name).values())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_an_output_folder_that_cant_be_made_is_told(golden_model, images, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = run(golden_model, images, locked / "output")
    assert done.returncode == 2 and "can't be created or written to" in done.stderr


def test_an_output_folder_that_is_a_file_is_told_before_caching(golden_model, images, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(golden_model, images, tmp_path / "file" / "output")
    assert "caching" not in done.stderr
    assert done.returncode == 2 and "can't be created or written to" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt_ends_with_its_status(golden_model, images, output):
    program = "import sys\nfrom library.errors import run\ndef main(): raise KeyboardInterrupt\nrun(main)"
    assert script("-c", program).returncode == 130


# ------------------------------------------------------------------------------- what is told before hours of caching


@pytest.mark.parametrize(
    "extra, expected",
    [
        (["--optimizer_args", "weight_deacy=0.1"], "AdamW has no 'weight_deacy'; did you mean 'weight_decay'"),
        (["--optimizer_args", "lr=0.5"], "--optimizer_args lr=0.5: give --learning_rate"),
        (["--optimizer_args", "betas=0.9"], "AdamW doesn't take betas=0.9"),
        (["--optimizer_type", "torch.nn.Linear"], "--optimizer_type torch.nn.Linear: it is not an optimizer"),
        (["--learning_rate", "0"], "nothing is trained: every learning rate is 0"),
        (["--lr_scheduler_type", "ReduceLROnPlateau"], "it needs a metric at every step"),
        (["--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "--lr_scheduler", "adafactor"], "finds its own rate"),
        (["--min_timestep", "900", "--max_timestep", "100"], "no timestep lies between them"),
        (["--ddp_static_graph", "--gradient_accumulation_steps", "2"], "--ddp_static_graph can't go with"),
        (["--output_name", "lora.safetensors"], "give it without its ending"),
        (["--network_module", "not_there.kohya"], "--network_module not_there.kohya: not_there isn't installed; pip install not_there"),
        (["--network_module", "networks.dylora"], "it isn't part of this suite; take --network_module lycoris.kohya"),
        (["--network_module", "json"], "json: it has no create_network"),
        (["-max_train_steps", "10"], "-max_train_steps is not an option of this script; did you mean 'max_train_steps'? (options start with two dashes)"),
        (["--seed", "99999999999999999999"], "--seed: must be at most"),
    ],
)  # fmt: skip
def test_what_cant_work_is_told_before_caching(extra, expected, golden_model, images, output, tmp_path):
    told = refused(run(golden_model, images, output, *extra), output, expected)
    assert "caching" not in told and told.count("error:") == 1


def junk(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"junk text", "the header should have"),
        ([1, 2], "is a file without tensors"),
        ({"a": torch.zeros(2)}, "a LoRA with .lora_down.weight keys is needed"),
        ({"lora_unet_x.lora_down.weight": torch.tensor(1.0)}, "no LoRA's"),
        ({"lora_unet_x.lora_down.weight": torch.ones(2, 2, dtype=torch.int64)}, "hold no finite numbers"),
        ({"lora_unet_x.lora_down.weight": torch.full((2, 2), float("nan"))}, "hold no finite numbers"),
        ({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, "this is a LoHa"),
    ],
)
def test_faults_15_and_17_pickles_as_network_weights_are_told_in_a_sentence(content, expected, golden_model, images, output, tmp_path):  # fmt: skip
    path = junk(tmp_path / "x.pt", content)
    told = refused(run(golden_model, images, output, "--network_weights", path, "--dim_from_weights"), output, expected)
    assert "weights_only" not in told and "caching" not in told


def test_dim_from_weights_keeps_learning_rate_factors(golden_model, images, output, tmp_path):
    first = train_network(golden_model, images, tmp_path / "first", "--max_train_steps", "1")
    done = run(
        golden_model, images, output, "--network_weights", first, "--dim_from_weights", "--max_train_steps", "1",
        "--network_args", "loraplus_lr_ratio=16",
    )  # fmt: skip
    assert done.returncode == 0 and "unet plus      192" in done.stderr, done.stderr[-2000:]


def test_weights_that_arent_finite_are_never_saved(golden_model, images, output):
    done = run(
        golden_model, images, output, "--learning_rate", "1e6", "--max_train_steps", "1", "--save_precision", "fp16"
    )
    assert done.returncode == 1 and "not saved, as" in done.stderr and not list(output.glob("*.safetensors"))


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'a = "C:\\models"', "write Windows paths in 'single quotes'"),
        ('a = "x"'.encode("utf-16"), "it is not UTF-8"),
        (None, "no such file"),
    ],
)
def test_a_config_file_that_cant_be_read_is_the_only_mistake_told(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    done = run_here(sdxl_train_network.main, "--config_file", tmp_path / "run.toml")
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("error:") == 1


def test_a_vae_that_is_none_is_told_by_its_header(golden_model, images, output, tmp_path):
    lora = train_network(golden_model, images, tmp_path / "first", "--max_train_steps", "1")
    refused(run(golden_model, images, output, "--vae", lora), output, "--vae", "this is a LoRA", "a VAE is needed")


def test_a_hub_id_without_a_network_is_one_sentence(images, output):
    refused(run("some-one/no-such-model", images, output), output, "some-one/no-such-model: no such local file or folder, and the hub says")  # fmt: skip


def test_a_broken_xformers_is_told_and_done_without(golden_model, images, output, tmp_path, monkeypatch):
    (tmp_path / "site" / "xformers").mkdir(parents=True)
    (tmp_path / "site" / "xformers" / "__init__.py").write_text("raise ImportError('made for another torch')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    done = run(golden_model, images, output, "--xformers", "--max_train_steps", "1")
    assert done.returncode == 0 and "can't be used (made for another torch)" in done.stderr, done.stderr[-2000:]


def test_a_caption_that_is_too_long_is_told(golden_model, images, output):
    (images / "2_shapes" / "picture0.txt").write_text("many words " * 60)
    done = run(golden_model, images, output, "--max_train_steps", "1")
    assert done.returncode == 0 and "a caption has more than 75 tokens (--max_token_length); left out: '" in done.stderr


def test_accelerates_own_settings_change_nothing(golden_model, images, output, tmp_path, monkeypatch):
    plain = train_network(golden_model, images, tmp_path / "plain", "--max_train_steps", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train_network(golden_model, images, output, "--max_train_steps", "2")
    assert losses_of(output) == losses_of(plain.parent)


def test_fault_70_a_tracker_that_fails_doesnt_end_the_run(golden_model, images, output, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    final = train_network(golden_model, images, output, "--max_train_steps", "3", "--logging_dir", tmp_path / "log")
    assert final.exists() and len(losses_of(output)) == 3
