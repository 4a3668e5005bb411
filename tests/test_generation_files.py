"""sdxl_gen_img.py: names of files, and metadata that generates an image again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from generating import EVERY_OPTION, assert_same, pixels
from PIL import Image

from library.generation.deep_shrink import DeepShrinkOptions
from library.generation.generate import check_generation
from library.generation.gradual_latent import GradualLatentOptions
from library.generation.metadata import read_texts, save_arguments
from library.generation.options import (
    GENERATION,
    HighresFixOptions,
    ImageOptions,
    InitImageOptions,
    PromptOptions,
)
from library.generation.prompts.sources import read_prompts
from library.generation.request import GenerationRequest
from library.generation.requests import AdapterCounts, RequestBuilder
from library.log import LogOptions
from library.options import read_options

# Written by the version before GenerationRequest got its present names.
WRITTEN_BEFORE = GOLDEN / "generated_image_v1.png"


@pytest.mark.long
def test_names_follow_the_contract_and_no_file_is_replaced(generate, tmp_path, monkeypatch):
    monkeypatch.setattr("library.generation.output._now", lambda: "20261126000000")
    folder = tmp_path / "out"
    words = ("--prompt", "a --d 5 --s 1", "--images_per_prompt", 2, "--batch_size", 2)
    first = generate(*words, outdir=folder)
    assert {path.name for path in first} == {
        "im_20261126000000_000_5.png",
        "im_20261126000000_001_5.png",
    }
    kept = [path.read_bytes() for path in first]
    again = generate(*words, outdir=folder)
    assert {path.name for path in again} == {
        "im_20261126000000_000_5-2.png",
        "im_20261126000000_001_5-2.png",
    }
    assert [path.read_bytes() for path in first] == kept
    assert [p.name for p in generate(*words, "--sequential_file_name", "--n_iter", 2, outdir=folder)] == [f"im_00000{n}.png" for n in (1, 2, 3, 4)]  # fmt: skip
    assert [
        p.name for p in generate("--prompt", "a --s 1", "--sequential_file_name", outdir=folder)
    ] == ["im_000005.png"]
    own = generate(
        "--prompt",
        "a --s 1 --t 0.1",
        "--image_path",
        first[0],
        "--use_original_file_name",
        outdir=tmp_path / "own",
    )
    assert [path.name for path in own] == [first[0].name]


@pytest.mark.parametrize("kind", ["png", pytest.param("webp", marks=pytest.mark.long)])
def test_a_file_generates_its_image_again(kind, generate):
    words = ["--prompt", "a [red|blue] cät, {1$$x|y} --n dark --l 5 --d 11", "--highres_fix_scale", "0.5", "--highres_fix_steps", "2", "--image_format", kind]  # fmt: skip
    (first,) = generate(*words, "--guidance_rescale", "0.5", "--max_embeddings_multiples", 2)
    (again,) = generate("--from_png", first, small=[])
    assert_same(first, again)
    assert read_texts(first, "")["negative-prompt"] == "dark" and first.suffix == f".{kind}"
    (other,) = generate("--from_png", first, "--highres_fix_steps", 3, small=[])
    assert np.abs(pixels(first) - pixels(other)).max() > 0, "options on the command line win"
    more = [
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
    ]
    (changed,) = generate("--from_png", first, *more, small=[])
    texts = read_texts(changed, "")
    assert [texts[name] for name in ("steps", "seed", "scale", "prompt", "negative-prompt")] == ["1", "12", "1.0", "a dog", "bright"]  # fmt: skip
    assert Image.open(changed).size == (96, 64) and texts["sampler"] == "euler_a"


def requests_of(*words):
    """The requests of a command line."""
    options = read_options(
        "", [*GENERATION, LogOptions], [str(word) for word in words], checks=[check_generation]
    )
    prompts = read_prompts(options[PromptOptions], options[InitImageOptions].image_path)
    builder = RequestBuilder(
        prompts=options[PromptOptions],
        image=options[ImageOptions],
        init_images=options[InitImageOptions],
        highres_fix=options[HighresFixOptions],
        deep_shrink=options[DeepShrinkOptions],
        gradual_latent=options[GradualLatentOptions],
        num_prompts=len(prompts),
        counts=AdapterCounts(),
    )
    return builder.build_all(prompts)


def test_every_field_of_a_request_survives_the_command_line(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    line = " ".join(f"--{name} {value}" for name, value in EVERY_OPTION.items() if name != "am")
    words = [
        "--ckpt",
        "m.safetensors",
        "--sampler",
        "euler_a",
        "--guidance_rescale",
        0.3,
        "--image_path",
        tmp_path / "a.png",
    ]
    (request,) = requests_of(*words, "--prompt", f"a cat, {{big}} {line}")
    again = ["--ckpt", "m.safetensors"]
    for name, value in request.as_options().items():
        if value is not None:
            again += [f"--{name}", *(value if isinstance(value, list) else [value])]
    (same,) = requests_of(*again)
    assert same == dataclasses.replace(request, raw_prompt=same.raw_prompt)


def test_a_request_is_stored_under_the_keys_of_the_first_version(tmp_path):
    """An image written before the fields were renamed; its settings are also what this version writes."""
    stored = json.loads(read_texts(WRITTEN_BEFORE, "")["settings"])["drawing"]
    request = GenerationRequest.from_json(stored)
    assert (
        request.deep_shrink.depth_2 == 4
        and request.gradual_latent.timesteps == 800
        and request.index == 0
    )
    assert request.as_json() == stored
    with_files = {
        **stored,
        "source": "a.png",
        "mask": "b.png",
        "guides": ["c.png"],
        "multipliers": [0.5],
        "number": 7,
    }
    request = GenerationRequest.from_json(with_files)
    assert (request.init_image, request.guide_images, request.index) == (
        Path("a.png"),
        (Path("c.png"),),
        7,
    )
    assert json.loads(json.dumps(request.as_json())) == with_files


def test_an_image_that_an_earlier_version_wrote_is_generated_again(generate):
    (again,) = generate("--from_png", WRITTEN_BEFORE, small=[])
    before, after = read_texts(WRITTEN_BEFORE, ""), read_texts(again, "")
    assert before.keys() == after.keys()
    for name in before.keys() - {"raw-prompt", "settings"}:
        assert before[name] == after[name]
    assert Image.open(again).size == (64, 64)
    assert_same(again, WRITTEN_BEFORE, most=2)


@pytest.mark.parametrize("length, kept", [(9_000, {"settings"}), (20_000, set())])
def test_a_jpeg_stores_as_much_of_long_texts_as_it_can(length, kept, tmp_path):
    texts = {"prompt": "a" * length, "raw-prompt": "a" * length, "settings": "a" * 2 * length}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", **save_arguments(texts, "jpeg"))
    assert read_texts(tmp_path / "a.jpg", "").keys() == kept


@pytest.mark.long
def test_a_jpeg_stores_the_texts_and_a_dry_run_writes_nothing(generate, tmp_path, caplog):
    (files,) = generate("--prompt", "a cät --d 4", "--image_format", "jpeg")
    assert files.suffix == ".jpg" and read_texts(files, "")["raw-prompt"] == "a cät --d 4"
    assert (
        generate(
            "--prompt", "a cat", "--images_per_prompt", 3, "--dry_run", outdir=tmp_path / "none"
        )
        == []
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.long
def test_the_contact_sheet_has_a_row_for_each_prompt(generate, tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("a --s 1\nb --s 1\n", encoding="utf-8")
    files = generate("--from_file", file, "--images_per_prompt", 2, "--contact_sheet")
    sheet = next(path for path in files if path.name.startswith("contact_sheet"))
    assert (
        len(files) == 5 and Image.open(sheet).height >= 2 * 64 and Image.open(sheet).width >= 2 * 64
    )
