"""sdxl_gen_img.py: prompts with their options, seeds, dynamic prompts, and mistakes in them."""

import json
import random
import re

import pytest
from generating import EVERY_OPTION
from PIL import Image
from running import script, train_network

from library.errors import OptionError
from library.generation.metadata import read_texts
from library.generation.prompts.dynamic import variants
from library.generation.prompts.line import LINE_OPTIONS


@pytest.mark.long
def test_every_option_within_a_prompt_has_its_effect(generate, tmp_path, golden_model, images):
    assert EVERY_OPTION.keys() == LINE_OPTIONS.keys()
    lora = train_network(golden_model, images, tmp_path / "lora", "--max_train_steps", 1)
    lines = [
        f"a (red:1.2) cat BREAK sitting --{name.upper()} {value}"
        for name, value in EVERY_OPTION.items()
    ]
    file = tmp_path / "lines.txt"
    file.write_text("\ufeff# all of them\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    files = generate(
        "--from_file",
        file,
        "--seed",
        3,
        "--network_weights",
        lora,
        "--sequential_file_name",
        "--steps",
        1,
    )
    assert [path.name for path in files] == [f"im_{n:06d}.png" for n in range(1, len(lines) + 1)]
    texts = [read_texts(path, "") for path in files]
    by_option = dict(zip(EVERY_OPTION, texts, strict=True))
    assert (
        by_option["n"]["negative-prompt"] == "dark, blurry"
        and by_option["c"]["clip-prompt"] == "a drawing"
    )
    assert Image.open(files[4]).size == (96, 64)
    assert (by_option["ow"]["original-width"], by_option["oh"]["original-height"]) == ("512", "768")
    assert (by_option["nw"]["original-width-negative"], by_option["ct"]["crop-top"]) == ("64", "8")
    assert (by_option["s"]["steps"], by_option["d"]["seed"]) == ("3", "7")
    assert (by_option["l"]["scale"], by_option["nl"]["negative-scale"]) == ("4.5", "2.0")
    settings = {name: json.loads(text["settings"])["drawing"] for name, text in by_option.items()}
    assert settings["am"]["multipliers"] == [0.5] and settings["t"]["strength"] == 0.5
    last = settings["glus"]  # Deep Shrink and Gradual Latent stay on for the prompts that follow
    assert last["shrink"] == {
        "depth_1": 2,
        "timesteps_1": 700,
        "depth_2": 4,
        "timesteps_2": 300,
        "ratio": 0.5,
    }
    assert last["growth"] == {"timesteps": 800, "ratio": 0.5, "ratio_step": 0.5, "every_n_steps": 1, "s_noise": 0.9, "unsharp": "3,0.5,0.5,0"}  # fmt: skip
    assert settings["c"]["shrink"] is None
    rng = random.Random(3)
    wanted = [rng.randint(0, 0x7FFFFFFF) for _ in lines]
    assert [text["seed"] for name, text in by_option.items() if name != "d"] == [
        str(s) for i, s in enumerate(wanted) if i != 13
    ]


def seeds_of(files):
    return [int(read_texts(path, "")["seed"]) for path in files]


@pytest.mark.long
def test_a_single_image_uses_the_seed_itself_and_several_sample_seeds_from_it(generate):
    assert seeds_of(generate("--prompt", "a", "--seed", 5)) == [5]
    assert seeds_of(generate("--prompt", "a --d 8,9", "--images_per_prompt", 3)) == [8, 9, 9]
    rng = random.Random(5)
    expected = [rng.randint(0, 0x7FFFFFFF) for _ in range(4)]
    assert (
        seeds_of(generate("--prompt", "a", "--seed", 5, "--n_iter", 2, "--images_per_prompt", 2))
        == expected
    )


@pytest.mark.long
def test_iter_same_seed_gives_all_prompts_of_an_iteration_the_same_seeds(generate, tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    seeds = seeds_of(generate("--from_file", file, "--seed", 5, "--n_iter", 2, "--iter_same_seed"))
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


@pytest.mark.parametrize("text, allowed", [
    ("a {b|c} d", {"a b d", "a c d"}), ("{2$$a|b}", {"a, b", "b, a"}), ("{1-2$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
    ("{{a|b}|c} x", {"a x", "b x", "c x"}), ("{one} way", {"one way"}),
])  # fmt: skip
def test_variants_pick_every_allowed_text_and_no_other(text, allowed):
    found = {variants(text, random.Random(seed))[0][0] for seed in range(100)}
    assert found == allowed


@pytest.mark.long
def test_enumerated_variants_give_all_combinations_and_override_images_per_prompt(generate):
    assert variants("{e$$a|b} {e$$1|2|3}", random.Random(0)) == (
        ["a 1", "a 2", "a 3", "b 1", "b 2", "b 3"],
        True,
    )
    files = generate("--prompt", "a {e$$red|blue} cat --s 1", "--images_per_prompt", 5)
    assert [read_texts(path, "")["prompt"] for path in files] == ["a red cat", "a blue cat"]
    assert {read_texts(path, "")["raw-prompt"] for path in files} == {"a {e$$red|blue} cat --s 1"}


# ----------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("line, found", [
    ("a --w 1000", "--w 1000: must be a multiple of 32; use 992 or 1024"),
    ("a --w 20", "--w 20: must be a multiple of 32; use 32"), ("a --s 3.5", "--s: expected a whole number, got '3.5'"),
    ("a --ss euler", "--ss "), ("a --d 1,x", "--d: expected a whole number from 0 to 9.22337e+18"),
    ("a --d 99999999999999999999", "--d: expected a whole number from 0"),
    ("a --glt 700 --glr 0.1", "a 64x64 image; use a ratio of 0.125 or more"),
    ("a --dsd1 3 --dsr 0.1", "8 cells that block 3 sees of a 64x64 image"),
    ("a --am 0.5", "--am: no network"), ("a --t 2", "--t: expected a number from 0 to 1"), ("{3$$a|b}", "it has 2"),
    ("a --glus 4,1,1", "--glus 4,1,1: "), ("a AND b", "AND separates"), ("a --ds1 3", "did you mean 'dsd1'?"),
])  # fmt: skip
def test_mistakes_in_prompts_are_reported_with_the_line(line, found, generate, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text(f"good\n{line}\n", encoding="utf-8")
    with pytest.raises(OptionError, match=re.escape(found)) as error:
        generate("--from_file", file)
    assert "lines.txt, line 2: " in str(error.value)


def bad_files(tmp_path):
    (tmp_path / "text.png").write_text("not an image", encoding="utf-8")
    (tmp_path / "utf16.txt").write_bytes("é".encode("utf-16"))
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "lora.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "grey.png")


@pytest.mark.parametrize("words, found", [
    (["--from_file", "gone.txt"], "gone.txt: no such file"), (["--from_file", "utf16.txt"], "save it as UTF-8"),
    (["--from_file", "empty.txt"], "--from_file empty.txt: "), ([], "no prompt: "), (["--prompt", "a", "--sampler", "eular"], "did you mean 'euler'"),
    (["--prompt", "a", "--W", "100"], "use 96 or 128"), (["--prompt", "a", "--image_path", "text.png"], "--image_path text.png: "),
    (["--prompt", "a", "--image_path", "folder"], "--image_path folder: "), (["--prompt", "a", "--mask_path", "grey.png"], "--mask_path needs"),
    (["--prompt", "a", "--mask_path", "grey.png", "--network_weights", "grey.png", "--network_merge"], "--network_weights that aren't merged"),
    (["--prompt", "a", "--mask_path", "grey.png", "--network_weights", "grey.png", "--network_pre_calc"], "weights have no regions"),
    (["--prompt", "a", "--network_weights", "lora.safetensors"], "lora.safetensors"), (["--prompt", "a", "--network_weights", "gone"], "no such file"),
    (["--prompt", "a", "--guide_image_path", "gone.png"], "no such file"), (["--from_png", "gone.png"], "no such file"),
    (["--prompt", "a", "--control_net_lllite_models", "lora.safetensors"], "need --guide_image_path"),
    (["--prompt", "a", "--gradual_latent_timesteps", "500", "--sampler", "ddim"], "Gradual Latent needs --sampler euler_a"),
    (["--prompt", "a", "--highres_fix_scale", "0.5", "--highres_fix_upscaler", "no.module"], "--highres_fix_upscaler no.module: "),
    (["--prompt", "a", "--highres_fix_scale", "0.4"], "makes 0x0 of 64x64; each side needs at least 32 pixels: use 0.5 or more"),
    (["--prompt", "a --glt 700", "--highres_fix_scale", "0.5"], "Gradual Latent and --highres_fix_scale"),
    (["--prompt", "a --glt 700", "--image_path", "grey.png", "--mask_path", "grey.png"], "can't be combined with --mask_path"),
])  # fmt: skip
def test_mistakes_in_options_and_files_are_reported(words, found, generate, tmp_path, monkeypatch):
    bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=re.escape(found)) as error:
        generate(*words)
    assert type(error.value).__name__ in ("OptionError", "RunError")


def test_a_mistake_is_reported_without_torch_and_exits_with_status_2(golden_model):
    code = (
        "import sys, sdxl_gen_img\nfrom library.errors import run\ntry:\n"
        f"    run(lambda: sdxl_gen_img.main(['--ckpt', {str(golden_model)!r}, '--prompt', 'a --w 1001']))\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = script("-c", code)
    assert done.stdout == "2 False\n" and "use 992 or 1024" in done.stderr
