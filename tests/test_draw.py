"""Drawing: the reference's final latents (golden 11), its first noise, and what batches and guidance must not change."""

import json
from pathlib import Path

import pytest
import torch

from library.safetensors_io import load_tensors
from library.sampling.changes import NoChanges
from library.sampling.draw import Painter, PictureNoise, Start, _noised
from library.sampling.drawing import Drawing
from library.sampling.prompt_line import read_line
from library.sampling.text import PromptEncoder

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    case["name"]: case
    for case in json.loads((GOLDEN / "11_gen.json").read_text(encoding="utf-8"))
    if "error" not in case
}
WITH_CHANGES = {"lora", "lora_merged", "lllite", "ti"}
CPU = torch.device("cpu")


def golden():
    return load_tensors(GOLDEN / "11_gen.safetensors")[0]


def drawing_of(case, **changes):
    line = read_line(case["prompt"], "prompt")
    options = case["options"]
    return Drawing(
        prompt=line.prompt,
        negative=line.negative,
        prompt2=None,
        negative2=None,
        raw_prompt="",
        clip_prompt=None,
        width=case["width"],
        height=case["height"],
        original_width=options.get("original_width"),
        original_height=options.get("original_height"),
        original_width_negative=options.get("original_width_negative"),
        original_height_negative=options.get("original_height_negative"),
        crop_top=options.get("crop_top"),
        crop_left=options.get("crop_left"),
        steps=case["steps"],
        seed=case["seed"],
        sampler=case["sampler"],
        scale=case["scale"],
        negative_scale=None,
        guidance_rescale=0.0,
        strength=line.strength or 0.8,
        multipliers=None,
        shrink=None,
        growth=None,
        source=None,
        mask=None,
        guides=(),
        number=0,
        row=0,
    )


def painter_of(models, changes=None):
    return Painter(
        models, PromptEncoder(models, 3), changes or NoChanges(), v_prediction=False, zero_terminal_snr=False
    )


def assert_golden(latents, name):
    wanted = golden()[f"{name}.last"]
    assert (latents - wanted).norm() / wanted.norm() < 2e-5


@pytest.mark.parametrize("name", sorted(CASES.keys() - WITH_CHANGES - {"img2img"}))
def test_final_latents_are_the_references(name, golden_models):
    assert_golden(painter_of(golden_models).latents([drawing_of(CASES[name])]), name)


def test_a_picture_from_a_picture_starts_and_ends_as_the_references(golden_models, monkeypatch):
    """The reference's VAE drops its attention (INDEX, P9), so the noised start is taken from its record."""
    case = CASES["img2img"]
    start = golden()["img2img.first_unet_input"][:1]
    seen = []

    def noised(sampler, *arguments):
        _, timesteps = _noised(sampler, *arguments)
        seen.extend(timesteps.tolist())
        return start, timesteps

    monkeypatch.setattr("library.sampling.draw._noised", noised)
    latents = painter_of(golden_models).latents([drawing_of(case)], Start(pixels=torch.zeros(1, 3, 128, 128)))
    assert seen == case["timesteps"]
    assert_golden(latents, "img2img")


def test_the_first_noise_and_the_vector_are_the_references():
    recorded = golden()
    noise = PictureNoise.drawn(1234, (1, 4, 16, 12), 6, CPU, torch.float32, for_source=False)
    assert torch.equal(noise.start, recorded["euler_a.start_noise"])
