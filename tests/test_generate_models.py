"""sdxl_gen_img.py with every SDXL: velocity models, SSD-1B, Vega, the refiner, inpainting models; with CLIP's eyes, and compiled."""

import numpy as np
import pytest
import torch
from messages import mentioning, mentions
from PIL import Image
from running import script

import sdxl_gen_img
from library.errors import OptionError
from library.generation import pipeline as drawing_room
from library.models import compile as compiling
from library.models.unet_blocks import sinusoidal_embedding
from library.safetensors_io import write_safetensors

SMALL = ["--prompt", "a cat --d 1", "--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler_a"]


@pytest.fixture
def draw(tmp_path):
    def run(model, *words):
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        sdxl_gen_img.main([str(word) for word in ("--ckpt", model, "--outdir", folder, *SMALL, *words)])
        (path,) = folder.iterdir()
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    return run


@pytest.fixture
def seen(monkeypatch):
    """What each denoising is given: told, and beside."""
    found, real = [], drawing_room.denoise

    def noted(unet, sampler, latents, told, guidance, **more):
        found.append((told, more["beside"]))
        return real(unet, sampler, latents, told, guidance, **more)

    monkeypatch.setattr(drawing_room, "denoise", noted)
    return found


@pytest.fixture
def files(tmp_path):
    """A source of noise, and a mask whose right half is to be painted."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "source.png"
    )
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "source.png", tmp_path / "mask.png"


@pytest.mark.long
@pytest.mark.parametrize("name", ["ssd-1b", "vega"])
def test_smaller_models_draw(name, twins, draw):
    assert draw(twins(name)).std() > 5


def test_a_velocity_model_with_zero_snr_is_known_by_its_keys(twins, draw):
    """The same weights without the keys want the options; without those, another picture comes out."""
    known = draw(twins("base-v"))
    told = draw(twins("base"), "--v_parameterization", "--zero_terminal_snr")
    assert np.array_equal(known, told) and np.abs(known - draw(twins("base"))).max() > 5


def test_the_refiner_draws_from_a_image_and_is_told_its_two_scores(twins, draw, seen, files):
    draw(twins("refiner"), "--image_path", files[0], "--strength", 0.5)
    scores = sinusoidal_embedding(torch.tensor([2.5, 6.0]), 256)
    for told, score in zip(seen[0][0], scores, strict=True):
        torch.testing.assert_close(told.vector[0, -256:], score)
        assert told.context.shape == (1, 77, 128) and told.vector.shape == (1, 128 + 5 * 256)


def test_a_new_word_is_refused_for_the_refiner_which_has_one_encoder(twins, draw, tmp_path):
    write_safetensors(tmp_path / "word.safetensors", {"clip_g": torch.zeros(1, 128)}, {})
    with pytest.raises(
        OptionError, match=mentioning("--textual_inversion_embeddings", "word.safetensors", "text encoders", "refiner")
    ):
        draw(twins("refiner"), "--textual_inversion_embeddings", tmp_path / "word.safetensors")


# ----------------------------------------------------------------------------------------------------------- inpainting


def test_an_inpainting_model_sees_the_mask_or_is_told_to_paint_everything(twins, draw, seen, files, capsys):
    masked = draw(twins("inpainting"), "--image_path", files[0], "--mask_path", files[1])
    beside = seen[0][1]
    assert beside.shape == (1, 5, 8, 8) and (beside[:, 0, :, 4:] == 1).all() and (beside[:, 0, :, :4] == 0).all()
    assert not mentions(capsys.readouterr().err, "--mask_path")
    whole = draw(twins("inpainting"), "--image_path", files[0])
    assert mentions(capsys.readouterr().err, "--mask_path")
    assert (seen[1][1][:, 0] == 1).all() and np.abs(masked - whole).max() > 5
    draw(twins("inpainting"))
    assert torch.equal(seen[2][1][:, 0], torch.ones(1, 8, 8))


def test_highres_fix_keeps_what_the_mask_keeps_in_both_stages(twins, draw, seen, files):
    """The second stage, whose seed is the next one, sees the source: not what the first stage made of it."""
    fix = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_latents_upscaling")
    masked = ("--image_path", files[0], "--mask_path", files[1], "--prompt")
    draw(twins("inpainting"), *masked, "a cat --d 5", *fix)
    draw(twins("inpainting"), *masked, "a cat --d 6")
    (_, small), (_, second), (_, plain) = seen
    assert small.shape[2:] == (4, 4) and small[:, 0].mean() == 0.5
    torch.testing.assert_close(second, plain)


def test_gradual_latent_is_refused_for_an_inpainting_model(twins, draw):
    with pytest.raises(
        OptionError,
        match=mentioning("--ckpt", "inpainting.safetensors", "Gradual Latent", "--gradual_latent_timesteps"),
    ):
        draw(twins("inpainting"), "--gradual_latent_timesteps", 700)


# ---------------------------------------------------------------------------------------------------------- CLIP's eyes


def vision_folder(folder, width):
    """A tiny image encoder with projection."""
    from library.imports import import_transformers

    transformers = import_transformers()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=width)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_the_pooled_text_gives_way_to_what_clip_sees_times_the_strength(twins, draw, seen, files, tmp_path):
    vision = vision_folder(tmp_path / "vision", 128)
    for strength in (1, 2):
        draw(twins("base"), "--image_path", files[0], "--clip_vision_strength", strength, "--clip_vision_model", vision)
    draw(twins("base"), "--image_path", files[0])
    (negative, once), (_, twice), (plain_negative, plain) = (told for told, _ in seen)
    assert torch.equal(once.vector[:, :128] * 2, twice.vector[:, :128]) and once.vector[:, :128].any()
    assert torch.equal(once.vector[:, 128:], plain.vector[:, 128:]) and torch.equal(once.context, plain.context)
    assert torch.equal(negative.vector, plain_negative.vector)


def test_an_image_encoder_that_doesnt_fit_is_refused_before_anything_is_drawn(twins, draw, files, tmp_path):
    words = ("--image_path", files[0], "--clip_vision_strength", 1, "--clip_vision_model")
    with pytest.raises(OptionError, match=mentioning("--clip_vision_model", "vision", "96", "128")):
        draw(twins("base"), *words, vision_folder(tmp_path / "vision", 96))
    with pytest.raises(OptionError, match=mentioning("--clip_vision_model", "nowhere", "file", "folder")):
        draw(twins("base"), *words, "nowhere")


# -------------------------------------------------------------------------------------------------------------- compiled


def test_where_no_compiler_works_the_image_is_drawn_all_the_same_and_that_is_told(twins, draw, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    plain = draw(twins("base"))
    monkeypatch.setattr(compiling.torch, "compile", fail)
    assert np.array_equal(plain, draw(twins("base"), "--compile"))
    assert mentions(capsys.readouterr().err, "--compile", "inductor", "no C++ compiler")


@pytest.mark.long
def test_compiled_blocks_draw_the_same_image(twins, draw, tmp_path):
    plain = draw(twins("base"))
    words = ["--ckpt", twins("base"), "--outdir", tmp_path / "compiled", *SMALL, "--compile"]
    done = script("sdxl_gen_img.py", *words, timeout=900)
    assert done.returncode == 0 and not mentions(done.stderr, "WARNING", "inductor"), done.stderr
    (path,) = (tmp_path / "compiled").iterdir()
    assert np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - plain).max() <= 1
