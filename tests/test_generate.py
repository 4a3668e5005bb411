"""sdxl_gen_img.py: batches, networks, img2img, highres fix, the VAE, and interactive prompts."""

import json
import os
import re
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from generating import SMALL, assert_same, pixels
from PIL import Image
from running import ROOT, train_network

from library.errors import OptionError
from library.generation.init_images import read_image
from library.generation.metadata import read_texts


def test_an_image_doesnt_depend_on_the_others_of_its_batch(generate, tmp_path):
    words = ("--prompt", "a cat --d 1,2,3,4", "--images_per_prompt", 4)
    single, batch = generate(*words), generate(*words, "--batch_size", 4)
    for one, other in zip(single, batch, strict=True):
        assert_same(one, other, most=1)
    assert len({pixels(path).tobytes() for path in single}) == 4
    file = tmp_path / "others.txt"
    file.write_text("a dog --d 9\na cat --d 3\na dog --d 9\nred --d 8\n", encoding="utf-8")
    assert_same(generate("--from_file", file, "--batch_size", 4)[1], batch[2])


def test_a_lora_changes_the_image_and_strength_0_restores_it_bit_for_bit(
    generate, golden_model, images, tmp_path
):
    lora = train_network(
        golden_model, images, tmp_path / "lora", "--max_train_steps", 2, "--learning_rate", "1e-1"
    )
    words = ("--prompt", "a cat --d 5", "--network_weights", lora)
    (plain,), (changed,), (off,) = (
        generate(*words[:2]),
        generate(*words),
        generate(*words, "--network_mul", 0),
    )
    assert_same(plain, off)
    assert np.abs(pixels(plain) - pixels(changed)).max() > 3
    (by_prompt,) = generate("--prompt", "a cat --d 5 --am 0", *words[2:])
    assert_same(plain, by_prompt)
    (fused,), (merged,) = (
        generate(*words, "--network_pre_calc"),
        generate(*words, "--network_merge"),
    )
    assert_same(changed, fused, most=1)
    assert_same(changed, merged, most=1)


@pytest.mark.long
def test_control_nets_use_guide_images_in_turn_and_strength_0_has_no_effect(generate):
    guides = GOLDEN / "10_training" / "dataset" / "data_cond"
    words = ("--prompt", "a cat --d 5", "--images_per_prompt", 2)
    net = (
        "--control_net_lllite_models",
        GOLDEN / "10_training" / "lllite.out.safetensors",
        "--guide_image_path",
        guides,
    )
    plain = generate(*words)
    off, followed = (
        generate(*words, *net, "--control_net_multipliers", 0),
        generate(*words, *net, "--control_net_multipliers", 20),
    )
    assert_same(plain[0], off[0], most=1)
    settings = [
        json.loads(read_texts(path, "")["settings"])["drawing"]["guides"] for path in followed
    ]
    names = sorted(path.name for path in guides.iterdir())
    assert [[os.path.basename(guide) for guide in one] for one in settings] == [
        [names[0]],
        [names[1]],
    ]
    assert np.abs(pixels(followed[0]) - pixels(followed[1])).max() > 0, (
        "the seed is the same, the guide images differ"
    )
    for one, both in zip(
        followed,
        generate(*words, *net, "--control_net_multipliers", 20, "--batch_size", 2),
        strict=True,
    ):
        assert_same(one, both, most=1)


@pytest.mark.long
def test_regions_have_their_networks_and_sub_prompts_and_are_stored_in_the_file(generate, tmp_path):
    lora = GOLDEN / "10_training" / "lora_te.out.safetensors"
    mask = np.zeros((64, 64, 3), dtype=np.uint8)
    mask[:, :32, 0], mask[:, 32:, 1] = 255, 255
    Image.fromarray(mask).save(tmp_path / "regions.png")
    words = (
        "--network_weights",
        lora,
        lora,
        "--network_mul",
        4,
        4,
        "--mask_path",
        tmp_path / "regions.png",
    )
    (both,) = generate("--prompt", "a cat AND a dog --d 5", *words)
    (other,) = generate("--prompt", "a cat AND a tree --d 5", *words)
    assert np.abs(pixels(both) - pixels(other)).max() > 0
    assert_same(generate("--from_png", both, small=[])[0], both)
    with pytest.raises(OptionError, match=r"--prompt: 2 networks .* AND.* 1$"):
        generate("--prompt", "a cat", *words)


@pytest.fixture
def init_image(tmp_path):
    path = tmp_path / "init.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)).resize(
        (100, 70)
    ).save(path)
    return path


def test_16_bit_images_are_read_as_in_training(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    assert np.array_equal(read_image(tmp_path / "depth.png", "")[..., 0], np.rint(ramp / 257))


def test_with_merged_networks_the_mask_is_for_inpainting(generate, init_image, tmp_path):
    lora = GOLDEN / "10_training" / "lora_te.out.safetensors"
    Image.new("RGB", (64, 64), "black").save(tmp_path / "mask.png")
    words = (
        "--prompt",
        "a --d 1",
        "--image_path",
        init_image,
        "--strength",
        1,
        "--network_weights",
        lora,
        "--network_merge",
    )
    (repainted,), (kept,) = generate(*words), generate(*words, "--mask_path", tmp_path / "mask.png")
    (untouched,) = generate("--prompt", "a --d 1", "--image_path", init_image, "--strength", 0)
    assert_same(kept, untouched, 1)
    assert np.abs(pixels(repainted) - pixels(kept)).mean() > 1


def test_stored_prompts_use_their_own_image_as_init_image(generate, tmp_path):
    for name in "ab":
        generate("--prompt", f"image {name}", outdir=tmp_path / name)[0].replace(
            tmp_path / f"{name}.png"
        )
        (tmp_path / name).rmdir()
    files = generate("--image_path", tmp_path, "--images_per_prompt", 2, outdir=tmp_path / "out")
    texts = [read_texts(path, "") for path in files]
    sources = [json.loads(text["settings"])["drawing"]["source"] for text in texts]
    assert [(text["prompt"], source[-5]) for text, source in zip(texts, sources, strict=True)] == [("image a", "a")] * 2 + [("image b", "b")] * 2  # fmt: skip


@pytest.mark.long
def test_img2img_keeps_the_size_and_strength_sets_the_change(generate, init_image):
    words = ("--prompt", "a --d 1", "--image_path", init_image)
    (weak,), (strong,) = (
        generate(*words, "--strength", s, small=["--steps", "4"]) for s in (0.0, 1.0)
    )
    assert Image.open(weak).size == (96, 64)
    (resized,) = generate(*words)
    assert Image.open(resized).size == (64, 64)
    assert np.abs(pixels(weak) - pixels(strong)).mean() > 1


@pytest.mark.long
@pytest.mark.parametrize("words", [
    ["--highres_fix_latents_upscaling"], ["--highres_fix_upscaler", "an_upscaler", "--highres_fix_upscaler_args", "factor=2"],
])  # fmt: skip
def test_highres_fix_saves_both_stages_with_prefixes(words, generate, tmp_path, monkeypatch):
    (tmp_path / "an_upscaler.py").write_text(
        "import torch\n"
        "class Up:\n"
        "    def __init__(self, factor): assert factor == '2'\n"
        "    def to(self, device, dtype): pass\n"
        "    def support_latents(self): return True\n"
        "    def upscale(self, vae, images, latents, dtype, width, height, batch_size, vae_batch_size):\n"
        "        return torch.nn.functional.interpolate(latents, size=(height // 8, width // 8))\n"
        "def create_upscaler(**arguments): return Up(**arguments)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    files = generate("--prompt", "a --w 128 --h 64 --d 3", "--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_save_1st", *words)  # fmt: skip
    assert [re.sub(r"\d{14}", "T", path.name) for path in files] == [
        "im_T_0000_3.png",
        "im_T_1000_3.png",
    ]
    assert [Image.open(path).size for path in files] == [(64, 32), (128, 64)]


@pytest.mark.long
def test_vae_slices_and_small_vae_batches_decode_the_same_image(generate):
    words = ("--prompt", "a --w 96 --d 1,2", "--images_per_prompt", 2, "--batch_size", 2)
    plain = generate(*words)
    for more in (
        ("--vae_slices", 3),
        ("--vae_batch_size", 1),
        ("--vae_batch_size", 0.5),
        ("--vae_tiling",),
    ):
        for one, other in zip(plain, generate(*words, *more), strict=True):
            assert_same(one, other, most=1)


def test_a_black_image_is_decoded_again_in_float32_with_a_warning(generate, monkeypatch, capsys):
    from library.models import vae

    real = vae._decode
    monkeypatch.setattr(vae, "_decode", lambda model, raw: real(model, raw) if model.dtype == torch.float32 else torch.full((len(raw), 3, 64, 64), -1.0))  # fmt: skip
    (files,) = generate("--prompt", "a --d 1", "--bf16")
    assert re.search(r"bfloat16 for 1 of 1 .*--no_half_vae", capsys.readouterr().err)
    assert pixels(files).max() > 10


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_interactive_generates_prompt_by_prompt_and_continues_after_mistakes(
    golden_model, tmp_path
):
    import pty

    main, side = pty.openpty()
    import subprocess

    words = ["--ckpt", golden_model, "--outdir", tmp_path / "out", *SMALL, "--interactive"]
    run = subprocess.Popen([sys.executable, ROOT / "sdxl_gen_img.py", *map(str, words)], stdin=side, stdout=side, stderr=side, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    os.close(side)
    os.write(main, b"a cat --s 1 --d 5\na --w 1001\na --dsd1 3 --dsr 0.1\na dog --s 1 --d 6\n\n")
    said, end = b"", time.monotonic() + 120
    while run.poll() is None and time.monotonic() < end:
        try:
            said += os.read(main, 4096)
        except OSError:
            break
    assert run.wait(30) == 0, said.decode()
    names = sorted(re.sub(r"\d{14}", "T", path.name) for path in (tmp_path / "out").iterdir())
    assert (
        names == ["im_T_000_5.png", "im_T_000_6.png"]
        and b"use 992 or 1024" in said
        and b"Deep Shrink" in said
    )
