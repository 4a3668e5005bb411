"""sdxl_gen_img.py with all kinds of SDXL: velocity, SSD-1B, Vega, refiner, inpainting; CLIP vision; compiled."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from running import script

import sdxl_gen_img
from library.errors import OptionError
from library.generation import pipeline
from library.models import compile as compiling
from library.models.unet_blocks import sinusoidal_embedding
from library.safetensors_io import write_safetensors

SMALL = [
    "--prompt",
    "a cat --d 1",
    "--W",
    "64",
    "--H",
    "64",
    "--steps",
    "2",
    "--sampler",
    "euler_a",
]


@pytest.fixture
def generate(tmp_path):
    def run(model, *words):
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        sdxl_gen_img.main(
            [str(word) for word in ("--ckpt", model, "--outdir", folder, *SMALL, *words)]
        )
        (path,) = folder.iterdir()
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    return run


@pytest.fixture
def seen(monkeypatch):
    """The conditioning and inpainting channels of each denoising."""
    inputs, real = [], pipeline.denoise

    def recorded(unet, sampler, latents, conditioning, guidance, **more):
        inputs.append((conditioning, more["inpaint_channels"]))
        return real(unet, sampler, latents, conditioning, guidance, **more)

    monkeypatch.setattr(pipeline, "denoise", recorded)
    return inputs


@pytest.fixture
def files(tmp_path):
    """An init image of noise, and a mask whose right half is repainted."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "source.png"
    )
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "source.png", tmp_path / "mask.png"


@pytest.mark.long
@pytest.mark.parametrize("name", ["ssd-1b", "vega"])
def test_smaller_models_generate(name, twins, generate):
    assert generate(twins(name)).std() > 5


def test_a_velocity_model_with_zero_snr_is_recognized_by_its_keys(twins, generate):
    """The same weights without the keys need the options; without those, another image is generated."""
    by_keys = generate(twins("base-v"))
    by_options = generate(twins("base"), "--v_parameterization", "--zero_terminal_snr")
    assert (
        np.array_equal(by_keys, by_options) and np.abs(by_keys - generate(twins("base"))).max() > 5
    )


def test_the_refiner_refines_an_image_and_is_conditioned_on_two_scores(
    twins, generate, seen, files
):
    generate(twins("refiner"), "--image_path", files[0], "--strength", 0.5)
    scores = sinusoidal_embedding(torch.tensor([2.5, 6.0]), 256)
    for branch, score in zip(seen[0][0], scores, strict=True):
        torch.testing.assert_close(branch.vector[0, -256:], score)
        assert branch.context.shape == (1, 77, 128) and branch.vector.shape == (1, 128 + 5 * 256)


def test_an_embedding_is_refused_for_the_refiner_which_has_one_encoder(twins, generate, tmp_path):
    write_safetensors(tmp_path / "word.safetensors", {"clip_g": torch.zeros(1, 128)}, {})
    with pytest.raises(OptionError, match=r"word\.safetensors: .*both text encoders"):
        generate(twins("refiner"), "--textual_inversion_embeddings", tmp_path / "word.safetensors")


# ----------------------------------------------------------------------------------------------------------- inpainting


def test_an_inpainting_model_gets_the_mask_or_generates_complete_images(
    twins, generate, seen, files, caplog
):
    masked = generate(twins("inpainting"), "--image_path", files[0], "--mask_path", files[1])
    channels = seen[0][1]
    assert (
        channels.shape == (1, 5, 8, 8)
        and (channels[:, 0, :, 4:] == 1).all()
        and (channels[:, 0, :, :4] == 0).all()
    )
    assert "--mask_path" not in caplog.text
    complete = generate(twins("inpainting"), "--image_path", files[0])
    assert (seen[1][1][:, 0] == 1).all() and np.abs(masked - complete).max() > 5
    generate(twins("inpainting"))
    assert torch.equal(seen[2][1][:, 0], torch.ones(1, 8, 8))


def test_the_mask_applies_in_both_stages_of_highres_fix(twins, generate, seen, files):
    """The second stage, whose seed is the next one, gets the init image and not the first stage's result."""
    fix = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_latents_upscaling")
    masked = ("--image_path", files[0], "--mask_path", files[1], "--prompt")
    generate(twins("inpainting"), *masked, "a cat --d 5", *fix)
    generate(twins("inpainting"), *masked, "a cat --d 6")
    (_, small), (_, second), (_, plain) = seen
    assert small.shape[2:] == (4, 4) and small[:, 0].mean() == 0.5
    torch.testing.assert_close(second, plain)


def test_gradual_latent_is_refused_for_an_inpainting_model(twins, generate):
    with pytest.raises(OptionError, match=r"inpainting\.safetensors: .*--gradual_latent_timesteps"):
        generate(twins("inpainting"), "--gradual_latent_timesteps", 700)


# ---------------------------------------------------------------------------------------------------------- CLIP vision


def vision_folder(folder, width):
    """A tiny image encoder with projection."""
    from library.imports import import_transformers

    transformers = import_transformers()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = transformers.CLIPVisionConfig(
        **sizes, image_size=32, patch_size=16, projection_dim=width
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_the_clip_embedding_times_the_strength_replaces_the_pooled_text(
    twins, generate, seen, files, tmp_path
):
    vision = vision_folder(tmp_path / "vision", 128)
    for strength in (1, 2):
        generate(
            twins("base"),
            "--image_path",
            files[0],
            "--clip_vision_strength",
            strength,
            "--clip_vision_model",
            vision,
        )
    generate(twins("base"), "--image_path", files[0])
    (negative, once), (_, twice), (plain_negative, plain) = (
        conditioning for conditioning, _ in seen
    )
    assert (
        torch.equal(once.vector[:, :128] * 2, twice.vector[:, :128]) and once.vector[:, :128].any()
    )
    assert torch.equal(once.vector[:, 128:], plain.vector[:, 128:]) and torch.equal(
        once.context, plain.context
    )
    assert torch.equal(negative.vector, plain_negative.vector)


def test_an_image_encoder_that_doesnt_fit_is_refused_before_generation(
    twins, generate, files, tmp_path
):
    words = ("--image_path", files[0], "--clip_vision_strength", 1, "--clip_vision_model")
    with pytest.raises(OptionError, match=r"--clip_vision_model .*\b96\b.*\b128\b"):
        generate(twins("base"), *words, vision_folder(tmp_path / "vision", 96))
    with pytest.raises(OptionError, match="--clip_vision_model nowhere"):
        generate(twins("base"), *words, "nowhere")


# -------------------------------------------------------------------------------------------------------------- compiled


def test_without_a_working_compiler_the_image_is_generated_uncompiled_with_a_warning(
    twins, generate, monkeypatch, capsys
):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    plain = generate(twins("base"))
    monkeypatch.setattr(compiling.torch, "compile", fail)
    assert np.array_equal(plain, generate(twins("base"), "--compile"))
    assert re.search(
        r"WARNING.*--compile: .*inductor.*: no C\+\+ compiler", capsys.readouterr().err
    )


@pytest.mark.long
def test_compiled_blocks_generate_the_same_image(twins, generate, tmp_path):
    plain = generate(twins("base"))
    words = ["--ckpt", twins("base"), "--outdir", tmp_path / "compiled", *SMALL, "--compile"]
    done = script("sdxl_gen_img.py", *words, timeout=900)
    assert done.returncode == 0 and "--compile:" not in done.stderr, done.stderr
    (path,) = (tmp_path / "compiled").iterdir()
    assert np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - plain).max() <= 1
