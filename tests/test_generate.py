"""sdxl_gen_img.py: files, names, metadata, seeds, batches, and everything that a picture can be told."""

import dataclasses
import json
import os
import random
import re
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from messages import mentioning, mentions
from PIL import Image
from running import ROOT, script, train_network

import sdxl_gen_img
from library.errors import OptionError
from library.generation.dynamic_prompts import variants
from library.generation.init_images import read_image
from library.generation.metadata import read_texts, save_arguments
from library.generation.prompt_options import LINE_OPTIONS

SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler_a"]


@pytest.fixture
def draw(golden_model, tmp_path):
    """Draws in this process; returns the new files in the order of their making."""

    def run(*words, outdir=None, small=SMALL):
        folder = outdir or tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        before = set(folder.iterdir()) if folder.exists() else set()
        sdxl_gen_img.main([str(word) for word in ("--ckpt", golden_model, "--outdir", folder, *small, *words)])
        new = set(folder.iterdir()) - before if folder.exists() else set()
        return sorted(new, key=lambda path: path.stat().st_mtime_ns)

    return run


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def assert_same(one, two, most=0):
    assert np.abs(pixels(one) - pixels(two)).max() <= most


# ------------------------------------------------------------------------------------------------ prompts and their seeds


EVERY_OPTION = {
    "n": "dark, blurry", "c": "a drawing", "p2": "oil on canvas", "n2": "photo", "w": "96", "h": "64", "ow": "512", "oh": "768",
    "nw": "64", "nh": "32", "ct": "8", "cl": "16", "s": "3", "d": "7", "l": "4.5", "nl": "2", "t": "0.5", "am": "0.5",
    "dsd1": "2", "dst1": "700", "dsd2": "4", "dst2": "300", "dsr": "0.5", "glt": "800", "glr": "0.5", "gle": "1", "gls": "0.5",
    "glsn": "0.9", "glus": "3,0.5,0.5,0",
}  # fmt: skip


@pytest.mark.long
def test_a_file_of_lines_with_every_option_is_drawn_as_each_line_says(draw, tmp_path, golden_model, images):
    assert EVERY_OPTION.keys() == LINE_OPTIONS.keys()
    lora = train_network(golden_model, images, tmp_path / "lora", "--max_train_steps", 1)
    lines = [f"a (red:1.2) cat BREAK sitting --{name.upper()} {value}" for name, value in EVERY_OPTION.items()]
    file = tmp_path / "lines.txt"
    file.write_text("\ufeff# all of them\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    drawn = draw("--from_file", file, "--seed", 3, "--network_weights", lora, "--sequential_file_name", "--steps", 1)
    assert [path.name for path in drawn] == [f"im_{n:06d}.png" for n in range(1, len(lines) + 1)]
    texts = [read_texts(path, "") for path in drawn]
    by_option = dict(zip(EVERY_OPTION, texts, strict=True))
    assert by_option["n"]["negative-prompt"] == "dark, blurry" and by_option["c"]["clip-prompt"] == "a drawing"
    assert Image.open(drawn[4]).size == (96, 64)
    assert (by_option["ow"]["original-width"], by_option["oh"]["original-height"]) == ("512", "768")
    assert (by_option["nw"]["original-width-negative"], by_option["ct"]["crop-top"]) == ("64", "8")
    assert (by_option["s"]["steps"], by_option["d"]["seed"]) == ("3", "7")
    assert (by_option["l"]["scale"], by_option["nl"]["negative-scale"]) == ("4.5", "2.0")
    settings = {name: json.loads(text["settings"])["drawing"] for name, text in by_option.items()}
    assert settings["am"]["multipliers"] == [0.5] and settings["t"]["strength"] == 0.5
    last = settings["glus"]  # Deep Shrink and Gradual Latent stay on for the lines that follow
    assert last["shrink"] == {"depth_1": 2, "timesteps_1": 700, "depth_2": 4, "timesteps_2": 300, "ratio": 0.5}
    assert last["growth"] == {"timesteps": 800, "ratio": 0.5, "ratio_step": 0.5, "every_n_steps": 1, "s_noise": 0.9, "unsharp": "3,0.5,0.5,0"}  # fmt: skip
    assert settings["c"]["shrink"] is None
    rng = random.Random(3)
    wanted = [rng.randint(0, 0x7FFFFFFF) for _ in lines]
    assert [text["seed"] for name, text in by_option.items() if name != "d"] == [
        str(s) for i, s in enumerate(wanted) if i != 13
    ]


def seeds_of(drawn):
    return [int(read_texts(path, "")["seed"]) for path in drawn]


@pytest.mark.long
def test_seeds_one_image_has_its_own_lists_are_used_up_and_rounds_may_share(draw):
    plan = ("--dry_run",)
    assert draw("--prompt", "a", "--seed", 5, *plan) == []
    assert seeds_of(draw("--prompt", "a", "--seed", 5)) == [5]
    assert seeds_of(draw("--prompt", "a --d 8,9", "--images_per_prompt", 3)) == [8, 9, 9]
    rng = random.Random(5)
    drawn = [rng.randint(0, 0x7FFFFFFF) for _ in range(4)]
    assert seeds_of(draw("--prompt", "a", "--seed", 5, "--n_iter", 2, "--images_per_prompt", 2)) == drawn


@pytest.mark.long
def test_iter_same_seed_gives_all_prompts_of_a_round_the_same_seeds(draw, tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    seeds = seeds_of(draw("--from_file", file, "--seed", 5, "--n_iter", 2, "--iter_same_seed"))
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


@pytest.mark.parametrize("text, allowed", [
    ("a {b|c} d", {"a b d", "a c d"}), ("{2$$a|b}", {"a, b", "b, a"}), ("{1-2$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
    ("{{a|b}|c} x", {"a x", "b x", "c x"}), ("{one} way", {"one way"}),
])  # fmt: skip
def test_variants_draw_all_that_they_may_and_nothing_else(text, allowed):
    found = {variants(text, random.Random(seed))[0][0] for seed in range(100)}
    assert found == allowed


@pytest.mark.long
def test_enumerated_variants_multiply_and_replace_the_images_per_prompt(draw):
    assert variants("{e$$a|b} {e$$1|2|3}", random.Random(0)) == (["a 1", "a 2", "a 3", "b 1", "b 2", "b 3"], True)
    drawn = draw("--prompt", "a {e$$red|blue} cat --s 1", "--images_per_prompt", 5)
    assert [read_texts(path, "")["prompt"] for path in drawn] == ["a red cat", "a blue cat"]
    assert {read_texts(path, "")["raw-prompt"] for path in drawn} == {"a {e$$red|blue} cat --s 1"}


# ----------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("line, tokens", [
    ("a --w 1000", ["--w", "1000", "32", "992", "1024"]),
    ("a --w 20", ["--w", "20", "32"]), ("a --s 3.5", ["--s", "'3.5'"]),
    ("a --ss euler", ["--ss"]), ("a --d 1,x", ["--d", "0", "9.22337e+18", "comma", "'1,x'"]),
    ("a --d 99999999999999999999", ["--d", "0", "9.22337e+18", "99999999999999999999"]),
    ("a --glt 700 --glr 0.1", ["Gradual Latent", "0.1", "8", "64x64", "0.125"]),
    ("a --dsd1 3 --dsr 0.1", ["Deep Shrink", "0.1", "8", "block 3", "64x64", "0.125"]),
    ("a --am 0.5", ["--am", "network"]), ("a --t 2", ["--t", "0", "1", "'2'"]), ("{3$$a|b}", ["{3$$a", "3", "2"]),
    ("a --glus 4,1,1", ["--glus", "odd", "'4,1,1'"]), ("a AND b", ["AND", "--network_weights", "--mask_path"]), ("a --ds1 3", ["--ds1", "'dsd1'|--dsd1"]),
])  # fmt: skip
def test_mistakes_in_lines_are_told_with_the_line(line, tokens, draw, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text(f"good\n{line}\n", encoding="utf-8")
    with pytest.raises(OptionError, match=mentioning("lines.txt", "line 2", *tokens)):
        draw("--from_file", file)


def bad_files(tmp_path):
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "utf16.txt").write_bytes("é".encode("utf-16"))
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "lora.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "grey.png")


@pytest.mark.parametrize("words, tokens", [
    (["--from_file", "gone.txt"], ["--from_file", "gone.txt"]), (["--from_file", "utf16.txt"], ["--from_file", "utf16.txt", "UTF-8"]),
    (["--from_file", "empty.txt"], ["--from_file", "empty.txt"]), ([], ["--prompt", "--from_file", "--from_png", "--interactive"]), (["--prompt", "a", "--sampler", "eular"], ["--sampler", "'euler'", "'eular'"]),
    (["--prompt", "a", "--W", "100"], ["--W", "100", "96", "128"]), (["--prompt", "a", "--image_path", "text.png"], ["--image_path", "text.png"]),
    (["--prompt", "a", "--image_path", "folder"], ["--image_path", "folder", ".png"]), (["--prompt", "a", "--mask_path", "grey.png"], ["--mask_path", "--image_path", "--network_weights"]),
    (["--prompt", "a", "--mask_path", "grey.png", "--network_weights", "grey.png", "--network_merge"], ["--mask_path", "--image_path", "--network_weights"]),
    (["--prompt", "a", "--mask_path", "grey.png", "--network_weights", "grey.png", "--network_pre_calc"], ["--network_pre_calc", "--mask_path", "--network_merge"]),
    (["--prompt", "a", "--network_weights", "lora.safetensors"], ["--network_weights", "lora.safetensors", "16", "10"]), (["--prompt", "a", "--network_weights", "gone"], ["--network_weights", "gone"]),
    (["--prompt", "a", "--guide_image_path", "gone.png"], ["--guide_image_path", "gone.png"]), (["--from_png", "gone.png"], ["--from_png", "gone.png"]),
    (["--prompt", "a", "--control_net_lllite_models", "lora.safetensors"], ["--control_net_lllite_models", "--guide_image_path"]),
    (["--prompt", "a", "--gradual_latent_timesteps", "500", "--sampler", "ddim"], ["Gradual Latent", "--sampler", "euler_a", "ddim"]),
    (["--prompt", "a", "--highres_fix_scale", "0.5", "--highres_fix_upscaler", "no.module"], ["--highres_fix_upscaler", "no.module", "No module named"]),
    (["--prompt", "a", "--highres_fix_scale", "0.4"], ["--highres_fix_scale", "0.4", "0x0", "64x64", "32", "0.5"]),
    (["--prompt", "a --glt 700", "--highres_fix_scale", "0.5"], ["Gradual Latent", "--highres_fix_scale"]),
    (["--prompt", "a --glt 700", "--image_path", "grey.png", "--mask_path", "grey.png"], ["Gradual Latent", "--mask_path"]),
])  # fmt: skip
def test_mistakes_in_options_and_files_are_told(words, tokens, draw, tmp_path, monkeypatch):
    bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=mentioning(*tokens)) as error:
        draw(*words)
    assert type(error.value).__name__ in ("OptionError", "RunError")


def test_a_mistake_is_told_without_torch_and_ends_with_status_2(golden_model):
    code = (
        "import sys, sdxl_gen_img\nfrom library.errors import run\ntry:\n"
        f"    run(lambda: sdxl_gen_img.main(['--ckpt', {str(golden_model)!r}, '--prompt', 'a --w 1001']))\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = script("-c", code)
    assert done.stdout == "2 False\n" and mentions(done.stderr, "--w", "1001", "992", "1024")


# -------------------------------------------------------------------------------------------------------- files and metadata


@pytest.mark.long
def test_names_are_the_contracts_and_nothing_is_replaced(draw, tmp_path, monkeypatch):
    monkeypatch.setattr("library.generation.output._now", lambda: "20261126000000")
    folder = tmp_path / "out"
    words = ("--prompt", "a --d 5 --s 1", "--images_per_prompt", 2, "--batch_size", 2)
    first = draw(*words, outdir=folder)
    assert {path.name for path in first} == {"im_20261126000000_000_5.png", "im_20261126000000_001_5.png"}
    kept = [path.read_bytes() for path in first]
    again = draw(*words, outdir=folder)
    assert {path.name for path in again} == {"im_20261126000000_000_5-2.png", "im_20261126000000_001_5-2.png"}
    assert [path.read_bytes() for path in first] == kept
    assert [p.name for p in draw(*words, "--sequential_file_name", "--n_iter", 2, outdir=folder)] == [f"im_00000{n}.png" for n in (1, 2, 3, 4)]  # fmt: skip
    assert [p.name for p in draw("--prompt", "a --s 1", "--sequential_file_name", outdir=folder)] == ["im_000005.png"]
    own = draw(
        "--prompt", "a --s 1 --t 0.1", "--image_path", first[0], "--use_original_file_name", outdir=tmp_path / "own"
    )
    assert [path.name for path in own] == [first[0].name]


@pytest.mark.parametrize("kind", ["png", pytest.param("webp", marks=pytest.mark.long)])
def test_a_file_draws_its_image_again(kind, draw):
    words = ["--prompt", "a [red|blue] cät, {1$$x|y} --n dark --l 5 --d 11", "--highres_fix_scale", "0.5", "--highres_fix_steps", "2", "--image_format", kind]  # fmt: skip
    (first,) = draw(*words, "--guidance_rescale", "0.5", "--max_embeddings_multiples", 2)
    (again,) = draw("--from_png", first, small=[])
    assert_same(first, again)
    assert read_texts(first, "")["negative-prompt"] == "dark" and first.suffix == f".{kind}"
    (other,) = draw("--from_png", first, "--highres_fix_steps", 3, small=[])
    assert np.abs(pixels(first) - pixels(other)).max() > 0, "options beside the file win"
    beside = (
        "--steps",
        1,
        "--seed",
        12,
        "--scale",
        1,
        "--W",
        96,
        "--prompt",
        "a dog --n bright",
        "--highres_fix_steps",
        1,
    )
    (changed,) = draw("--from_png", first, *beside, small=[])
    texts = read_texts(changed, "")
    assert [texts[name] for name in ("steps", "seed", "scale", "prompt", "negative-prompt")] == ["1", "12", "1.0", "a dog", "bright"]  # fmt: skip
    assert Image.open(changed).size == (96, 64) and texts["sampler"] == "euler_a"


def test_what_draws_a_image_alone_are_options_that_plan_the_same_image(draw, tmp_path, monkeypatch):
    """Every field of a drawing goes through the command line and comes back."""
    seen = []
    monkeypatch.setattr("library.generation.generate._tell", lambda drawings, options: seen.extend(drawings))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    line = " ".join(f"--{name} {value}" for name, value in EVERY_OPTION.items() if name != "am")
    draw(
        "--prompt", f"a cat, {{big}} {line}", "--image_path", tmp_path / "a.png", "--dry_run", "--guidance_rescale", 0.3
    )
    words = [word for name, value in seen[0].as_options().items() if value is not None for word in (f"--{name}", value)]
    draw(*(word for value in words for word in (value if isinstance(value, list) else [value])), "--dry_run", small=[])
    assert seen[1] == dataclasses.replace(seen[0], raw_prompt=seen[1].raw_prompt)


@pytest.mark.parametrize("length, kept", [(9_000, {"settings"}), (20_000, set())])
def test_a_jpeg_keeps_as_much_of_long_texts_as_it_can(length, kept, tmp_path):
    texts = {"prompt": "a" * length, "raw-prompt": "a" * length, "settings": "a" * 2 * length}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", **save_arguments(texts, "jpeg"))
    assert read_texts(tmp_path / "a.jpg", "").keys() == kept


@pytest.mark.long
def test_jpeg_keeps_the_texts_and_a_dry_run_writes_nothing(draw, tmp_path, caplog):
    (drawn,) = draw("--prompt", "a cät --d 4", "--image_format", "jpeg")
    assert drawn.suffix == ".jpg" and read_texts(drawn, "")["raw-prompt"] == "a cät --d 4"
    assert draw("--prompt", "a cat", "--images_per_prompt", 3, "--dry_run", outdir=tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.long
def test_the_contact_sheet_has_a_row_for_each_prompt(draw, tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("a --s 1\nb --s 1\n", encoding="utf-8")
    drawn = draw("--from_file", file, "--images_per_prompt", 2, "--contact_sheet")
    sheet = next(path for path in drawn if path.name.startswith("contact_sheet"))
    assert len(drawn) == 5 and Image.open(sheet).height >= 2 * 64 and Image.open(sheet).width >= 2 * 64


# ----------------------------------------------------------------------------------------------------------------- pictures


def test_a_batch_of_four_is_four_images_and_its_company_changes_no_bit(draw, tmp_path):
    words = ("--prompt", "a cat --d 1,2,3,4", "--images_per_prompt", 4)
    single, batch = draw(*words), draw(*words, "--batch_size", 4)
    for one, other in zip(single, batch, strict=True):
        assert_same(one, other, most=1)
    assert len({pixels(path).tobytes() for path in single}) == 4
    file = tmp_path / "others.txt"
    file.write_text("a dog --d 9\na cat --d 3\na dog --d 9\nred --d 8\n", encoding="utf-8")
    assert_same(draw("--from_file", file, "--batch_size", 4)[1], batch[2])


def test_a_lora_changes_the_image_and_multiplier_0_restores_it_bit_for_bit(draw, golden_model, images, tmp_path):
    lora = train_network(golden_model, images, tmp_path / "lora", "--max_train_steps", 2, "--learning_rate", "1e-1")
    words = ("--prompt", "a cat --d 5", "--network_weights", lora)
    (plain,), (changed,), (off,) = draw(*words[:2]), draw(*words), draw(*words, "--network_mul", 0)
    assert_same(plain, off)
    assert np.abs(pixels(plain) - pixels(changed)).max() > 3
    (by_line,) = draw("--prompt", "a cat --d 5 --am 0", *words[2:])
    assert_same(plain, by_line)
    (folded,), (merged,) = draw(*words, "--network_pre_calc"), draw(*words, "--network_merge")
    assert_same(changed, folded, most=1)
    assert_same(changed, merged, most=1)


@pytest.mark.long
def test_control_nets_take_their_guides_in_turn_and_strength_0_leaves_the_image(draw):
    guides = GOLDEN / "10_training" / "dataset" / "data_cond"
    words = ("--prompt", "a cat --d 5", "--images_per_prompt", 2)
    net = (
        "--control_net_lllite_models",
        GOLDEN / "10_training" / "lllite.out.safetensors",
        "--guide_image_path",
        guides,
    )
    plain = draw(*words)
    off, followed = (
        draw(*words, *net, "--control_net_multipliers", 0),
        draw(*words, *net, "--control_net_multipliers", 20),
    )
    assert_same(plain[0], off[0], most=1)
    settings = [json.loads(read_texts(path, "")["settings"])["drawing"]["guides"] for path in followed]
    names = sorted(path.name for path in guides.iterdir())
    assert [[os.path.basename(guide) for guide in one] for one in settings] == [[names[0]], [names[1]]]
    assert np.abs(pixels(followed[0]) - pixels(followed[1])).max() > 0, "the seed is one, the guides are two"
    for one, both in zip(followed, draw(*words, *net, "--control_net_multipliers", 20, "--batch_size", 2), strict=True):
        assert_same(one, both, most=1)


@pytest.mark.long
def test_regions_have_their_networks_and_sub_prompts_and_draw_again_from_the_file(draw, tmp_path):
    lora = GOLDEN / "10_training" / "lora_te.out.safetensors"
    mask = np.zeros((64, 64, 3), dtype=np.uint8)
    mask[:, :32, 0], mask[:, 32:, 1] = 255, 255
    Image.fromarray(mask).save(tmp_path / "regions.png")
    words = ("--network_weights", lora, lora, "--network_mul", 4, 4, "--mask_path", tmp_path / "regions.png")
    (both,) = draw("--prompt", "a cat AND a dog --d 5", *words)
    (other,) = draw("--prompt", "a cat AND a tree --d 5", *words)
    assert np.abs(pixels(both) - pixels(other)).max() > 0
    assert_same(draw("--from_png", both, small=[])[0], both)
    with pytest.raises(OptionError, match=mentioning("--prompt", "2", "AND", "1")):
        draw("--prompt", "a cat", *words)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)).resize((100, 70)).save(
        path
    )
    return path


def test_16_bits_are_read_as_training_reads_them(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "depth.png", ""))[..., 0], np.rint(ramp / 257))


def test_with_merged_networks_a_mask_says_what_is_repainted(draw, source, tmp_path):
    lora = GOLDEN / "10_training" / "lora_te.out.safetensors"
    Image.new("RGB", (64, 64), "black").save(tmp_path / "mask.png")
    words = (
        "--prompt",
        "a --d 1",
        "--image_path",
        source,
        "--strength",
        1,
        "--network_weights",
        lora,
        "--network_merge",
    )
    (painted,), (kept,) = draw(*words), draw(*words, "--mask_path", tmp_path / "mask.png")
    (untouched,) = draw("--prompt", "a --d 1", "--image_path", source, "--strength", 0)
    assert_same(kept, untouched, 1)
    assert np.abs(pixels(painted) - pixels(kept)).mean() > 1


def test_stored_prompts_are_drawn_from_their_own_images(draw, tmp_path):
    for name in "ab":
        draw("--prompt", f"picture {name}", outdir=tmp_path / name)[0].replace(tmp_path / f"{name}.png")
        (tmp_path / name).rmdir()
    drawn = draw("--image_path", tmp_path, "--images_per_prompt", 2, outdir=tmp_path / "out")
    texts = [read_texts(path, "") for path in drawn]
    sources = [json.loads(text["settings"])["drawing"]["source"] for text in texts]
    assert [(text["prompt"], source[-5]) for text, source in zip(texts, sources, strict=True)] == [("picture a", "a")] * 2 + [("picture b", "b")] * 2  # fmt: skip


@pytest.mark.long
def test_from_a_image_sizes_are_its_own_and_strength_tells_how_much_stays(draw, source):
    words = ("--prompt", "a --d 1", "--image_path", source)
    (weak,), (strong,) = (draw(*words, "--strength", s, small=["--steps", "4"]) for s in (0.0, 1.0))
    assert Image.open(weak).size == (96, 64)
    (resized,) = draw(*words)
    assert Image.open(resized).size == (64, 64)
    assert np.abs(pixels(weak) - pixels(strong)).mean() > 1


@pytest.mark.long
@pytest.mark.parametrize("words", [
    ["--highres_fix_latents_upscaling"], ["--highres_fix_upscaler", "an_upscaler", "--highres_fix_upscaler_args", "factor=2"],
])  # fmt: skip
def test_highres_fix_saves_both_stages_with_their_prefixes(words, draw, tmp_path, monkeypatch):
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
    drawn = draw("--prompt", "a --w 128 --h 64 --d 3", "--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_save_1st", *words)  # fmt: skip
    assert [re.sub(r"\d{14}", "T", path.name) for path in drawn] == ["im_T_0000_3.png", "im_T_1000_3.png"]
    assert [Image.open(path).size for path in drawn] == [(64, 32), (128, 64)]


@pytest.mark.long
def test_slices_decode_the_same_image_and_small_vae_batches_too(draw):
    words = ("--prompt", "a --w 96 --d 1,2", "--images_per_prompt", 2, "--batch_size", 2)
    plain = draw(*words)
    for more in (("--vae_slices", 3), ("--vae_batch_size", 1), ("--vae_batch_size", 0.5), ("--vae_tiling",)):
        for one, other in zip(plain, draw(*words, *more), strict=True):
            assert_same(one, other, most=1)


def test_a_black_image_is_decoded_again_in_float32_and_told(draw, monkeypatch, capsys):
    from library.models import vae

    real = vae._decode
    monkeypatch.setattr(vae, "_decode", lambda model, raw: real(model, raw) if model.dtype == torch.float32 else torch.full((len(raw), 3, 64, 64), -1.0))  # fmt: skip
    (drawn,) = draw("--prompt", "a --d 1", "--bf16")
    assert mentions(capsys.readouterr().err, "VAE", "bfloat16", "1", "float32", "--no_half_vae")
    assert pixels(drawn).max() > 10


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_interactive_draws_line_by_line_at_a_terminal_and_survives_mistakes(golden_model, tmp_path):
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
    files = sorted(re.sub(r"\d{14}", "T", path.name) for path in (tmp_path / "out").iterdir())
    assert files == ["im_T_000_5.png", "im_T_000_6.png"]
    assert mentions(said.decode(), "--w", "1001", "992", "1024") and mentions(
        said.decode(), "Deep Shrink", "block 3", "0.125"
    )
