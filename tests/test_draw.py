"""Drawing: the reference's final latents (golden 11), its first noise, and what batches and guidance must not change."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tolerance import LAST_LATENTS, assert_conditioning, assert_formula, distance

from library.generation.deep_shrink import DeepShrink
from library.generation.gradual_latent import GradualLatent, GrowingEuler, _sharpened
from library.generation.init_images import as_tensor, read_image, resized
from library.generation.options import OutputOptions
from library.generation.output import Output
from library.generation.pipeline import ImageNoise, InitImage, SdxlPipeline, _noised
from library.generation.prompt_encoder import PromptEncoder
from library.generation.prompt_options import read_line
from library.generation.request import GenerationRequest
from library.generation.samplers import make_sampler
from library.models.unet import Shrink
from library.models.vae import scale_latents
from library.safetensors_io import load_tensors
from networks.inference.adapters import AppliedNetworks
from networks.inference.options import AppliedNetworkOptions

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    case["name"]: case
    for case in json.loads((GOLDEN / "11_gen.json").read_text(encoding="utf-8"))
    if "error" not in case
}
WITH_CHANGES = {"lora", "lora_merged", "lllite", "ti"}
IN_SHORT = {"ddim", "dpm_2_a", "long", "lora"}
CPU = torch.device("cpu")


def golden():
    return load_tensors(GOLDEN / "11_gen.safetensors")[0]


def cases(names):
    return [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.long) for name in sorted(names)]


def drawing_of(case, **changes):
    line = read_line(case["prompt"], "prompt")
    options = case["options"]
    return GenerationRequest(
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
    """A painter with the changes of `changes`, by default none."""
    changes = changes or AppliedNetworks(AppliedNetworkOptions(), models)
    return SdxlPipeline(models, PromptEncoder(models, 3), changes, v_prediction=False, zero_terminal_snr=False)


def assert_golden(latents, name):
    assert distance(latents, golden()[f"{name}.last"]) <= LAST_LATENTS


@pytest.mark.parametrize("name", cases(CASES.keys() - WITH_CHANGES - {"img2img"}))
def test_final_latents_are_the_references(name, golden_models):
    assert_golden(painter_of(golden_models).latents([drawing_of(CASES[name])]), name)


def test_a_image_from_a_image_starts_and_ends_as_the_references(golden_models, monkeypatch):
    """The reference's VAE drops its attention (INDEX, P9), so the noised start is taken from its record."""
    case = CASES["img2img"]
    start = golden()["img2img.first_unet_input"][:1]
    seen = []

    def noised(sampler, *arguments):
        _, timesteps = _noised(sampler, *arguments)
        seen.extend(timesteps.tolist())
        return start, timesteps

    monkeypatch.setattr("library.generation.pipeline._noised", noised)
    latents = painter_of(golden_models).latents([drawing_of(case)], InitImage(pixels=torch.zeros(1, 3, 128, 128)))
    assert seen == case["timesteps"]
    assert_golden(latents, "img2img")


def test_inpainting_keeps_the_latents_that_are_black_in_the_mask(golden_models):
    pixels = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 12)
    mask[..., 6:] = 1
    drawing = dataclasses.replace(drawing_of(CASES["ddim"]), strength=1.0, steps=3)
    painter = painter_of(golden_models)
    painted, whole = (painter.latents([drawing], InitImage(pixels=pixels, mask=one)) for one in (mask, None))
    noise = ImageNoise.drawn(drawing.seed, (1, 4, 16, 12), 3, CPU, torch.float32, for_source=True)
    own = scale_latents(golden_models.encode_images(pixels, torch.randn((1, 4, 16, 12), generator=noise.generator)))
    assert torch.equal(painted[..., :6], own[..., :6])
    assert (painted - own)[..., 6:].abs().mean() > 0.1 and (whole - own)[..., :6].abs().mean() > 0.1
    # Highres fix draws from one picture, and what stays is another's.
    above = painter.latents([drawing], InitImage(latents=torch.zeros(1, 4, 16, 12), mask=mask, stays=pixels))
    assert torch.equal(above[..., :6], own[..., :6]) and not torch.equal(above[..., 6:], painted[..., 6:])


def test_gradual_latent_grows_to_the_full_size_and_with_ratio_1_is_euler_a(golden_models):
    case = dataclasses.replace(drawing_of(CASES["euler_a"]), steps=6)
    plain = painter_of(golden_models).latents([case])
    same = painter_of(golden_models).latents([dataclasses.replace(case, growth=GradualLatent(ratio=1.0))])
    assert distance(same, plain) <= LAST_LATENTS
    growing = GradualLatent(timesteps=700, ratio=0.5, ratio_step=0.25, every_n_steps=2, unsharp="3,0.5,0.5,0")
    assert growing.growths([999, 799, 599, 399, 199, 0], 128, 96) == [None, None, (96, 72), None, (128, 96), None]
    assert painter_of(golden_models).latents([dataclasses.replace(case, growth=growing)]).shape == (1, 4, 16, 12)


def test_a_growing_step_is_the_contracts_by_hand():
    """A flat picture stays flat when it is resized or sharpened: x + d dt, and fresh noise times s_noise. euler_a at t = 999, 499."""
    sampler = make_sampler("euler_a", v_prediction=False, zero_terminal_snr=False)
    for target in (0, 1):
        growth = GradualLatent(timesteps=1000, ratio=0.5, ratio_step=0.5, s_noise=0.25, unsharp=f"3,0.5,2,{target}")
        growing = GrowingEuler(sampler, growth, 16, 16)
        growing.set_timesteps(2)
        sigma, following = (float(s) for s in sampler.sigmas[:2])
        added = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        flat, predicted = torch.full((1, 4, 8, 8), 3.0), torch.full((1, 4, 8, 8), 0.5)  # predicted noise is d itself
        generator = torch.Generator().manual_seed(1)
        (found,) = growing.step(predicted, sampler.timesteps[0], flat, generator)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        expected = 3.0 + 0.5 * ((following**2 - added**2) ** 0.5 - sigma) + noise * 0.25 * added
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sharpening_takes_away_the_blur_times_its_strength_by_hand():
    """A point, and Gauss's 1, 3 of sigma 0.5: exp(-2) = 0.1353 to both sides, so 0.1065, 0.7870, 0.1065."""
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 1
    found = _sharpened(point, (3, 0.5, 2.0, True))[0, 0]
    assert found[2, 2].item() == pytest.approx(1 + 2 * (1 - 0.78699**2), abs=1e-4)
    assert found[2, 1].item() == pytest.approx(-2 * 0.78699 * 0.10651, abs=1e-4)
    assert found[1, 1].item() == pytest.approx(-2 * 0.10651**2, abs=1e-4) and found[2, 0] == 0


def test_the_small_stage_of_highres_fix_is_the_contracts_by_hand():
    """int(x * scale + 0.5), sides cut to multiples of 32: 832 * 0.6 = 499.2 -> 480, 1216 * 0.6 = 729.6 -> 704."""
    drawing = dataclasses.replace(drawing_of(CASES["ddim"]), width=832, height=1216, original_width=1000, crop_top=11, strength=0.7)  # fmt: skip
    small = drawing.small_stage(scale=0.6, steps=9, strength=None)
    assert (small.width, small.height, small.original_width, small.crop_top) == (480, 704, 600, 7)
    assert (small.steps, small.strength, small.original_height) == (9, 0.7, None)
    assert drawing.small_stage(scale=0.6, steps=9, strength=0.2).strength == 0.2


def test_sequential_names_count_images_and_both_stages_of_one_have_its_number(tmp_path):
    """A batch of two with its small stage saved, then a picture without it."""
    (tmp_path / "im_1000004.png").touch()
    output = Output(OutputOptions(outdir=tmp_path, sequential_file_name=True), with_stages=True)
    drawing, image = drawing_of(CASES["ddim"]), Image.new("RGB", (8, 8))
    saved = [
        output.save(image, dataclasses.replace(drawing, number=number), {}, place=number % 2, stage=stage).name
        for number, stage in ((0, 1), (1, 1), (0, 2), (1, 2), (2, 2))
    ]
    assert saved == ["im_0000005.png", "im_0000006.png", "im_1000005.png", "im_1000006.png", "im_1000007.png"]


def test_a_source_through_no_step_stays_as_it_is():
    sampler = make_sampler("euler", v_prediction=False, zero_terminal_snr=False)
    sampler.set_timesteps(4)
    latents, timesteps = _noised(sampler, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), 4, 0.2)
    assert torch.equal(latents, torch.ones(1, 4, 2, 2)) and not len(timesteps)


def test_deep_shrink_works_in_its_timesteps_and_leaves_the_size():
    shrink = DeepShrink(depth_1=3, timesteps_1=650, depth_2=6, timesteps_2=300)
    assert [shrink.block_at(t) for t in (999, 650, 649, 300, 299)] == [3, 3, 6, 6, None]
    assert [DeepShrink().block_at(t) for t in (650, 649)] == [3, None]


@pytest.mark.parametrize("block", [pytest.param(0, marks=pytest.mark.long), 3, pytest.param(8, marks=pytest.mark.long)])
def test_a_shrunk_map_is_as_large_as_each_skip_again(block, golden_models):
    """By hooks: the shrunk block and those behind it see half the sides, the block on the way up that meets its skip the old ones."""
    unet, seen = golden_models.unet, {}
    names = [*(f"input_blocks.{i}" for i in range(9)), *(f"output_blocks.{i}" for i in range(9))]
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].shape[2:])
        )
        for name in names
    ]
    inputs = torch.randn(1, 4, 16, 24), torch.tensor([999]), torch.randn(1, 77, 192), torch.randn(1, 1664)
    sizes = []
    for shrink in (None, Shrink(block, 0.5)):
        assert unet(*inputs, None, shrink).shape == inputs[0].shape
        sizes.append(dict(seen))
    for hook in hooks:
        hook.remove()
    for i in range(9):
        factor = 1 if i < block else 2
        assert all(
            a == b * factor for a, b in zip(sizes[0][f"input_blocks.{i}"], sizes[1][f"input_blocks.{i}"], strict=True)
        )
        factor = 2 if 8 - i >= block else 1  # the skip of input block 8 - i comes to output block i
        assert all(
            a == b * factor for a, b in zip(sizes[0][f"output_blocks.{i}"], sizes[1][f"output_blocks.{i}"], strict=True)
        )


def test_long_prompts_keep_their_markers_and_weights_keep_the_mean(golden_models):
    encoder = PromptEncoder(golden_models, None)
    text = ", ".join(f"detail {i}" for i in range(60))  # 60 words, 59 commas, 110 digits
    assert encoder.chunks(text) == 4 and encoder.chunks("a", text) == 4 and encoder.chunks("a BREAK b") == 2
    assert PromptEncoder(golden_models, 1).chunks(text) == 1
    plain, weighted = encoder.encode("a red house", None, 1), encoder.encode("a (red:1.5) house", None, 1)
    assert plain.context.shape == (1, 77, 192) and torch.equal(plain.pooled, weighted.pooled)
    for part in (slice(0, 64), slice(64, None)):
        torch.testing.assert_close(weighted.context[..., part].mean(), plain.context[..., part].mean())
    assert not torch.equal(plain.context, weighted.context)
    second = encoder.encode("a red house", "a dog", 1)
    assert torch.equal(second.context[..., :64], plain.context[..., :64]) and not torch.equal(
        second.pooled, plain.pooled
    )


def test_the_first_noise_and_the_vector_are_the_references(golden_models):
    recorded = golden()
    noise = ImageNoise.drawn(1234, (1, 4, 16, 12), 6, CPU, torch.float32, for_source=False)
    assert_formula(noise.start, recorded["euler_a.start_noise"])
    for name in ("options", "long"):
        drawing = drawing_of(CASES[name])
        painter = painter_of(golden_models)
        prompts, _ = painter._prompts([drawing])
        vectors = torch.cat([told.vector for told in painter._told(drawing, prompts, [drawing])])
        numbers = [case for case in (drawing.original_height, drawing.original_width) if case]
        largest = max(drawing.height, drawing.width, *numbers)
        assert_conditioning(vectors, recorded[f"{name}.unet_y"], torch.full((len(vectors), 6), largest))


@pytest.mark.parametrize("name", cases(WITH_CHANGES))
def test_final_latents_with_networks_are_the_references(name, own_models, tmp_path):
    """Of files trained in golden 10: a LoRA beside the layers and merged, a ControlNet-LLLite, a new word."""

    options, runs = CASES[name]["options"], GOLDEN / "10_training"
    files = {"lora_te.safetensors": "lora_te", "lllite.safetensors": "lllite", "mytoken.safetensors": "ti"}
    words = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in options.items()
        if key not in ("guide_image_path", "network_module")
    }
    for key in ("network_weights", "control_net_lllite_models", "textual_inversion_embeddings"):
        for file in words.get(key, ()):
            shutil.copy(runs / f"{files[file]}.out.safetensors", tmp_path / file)
            words[key] = (tmp_path / file,)
    applied = AppliedNetworks(AppliedNetworkOptions(**words), own_models)
    drawing = drawing_of(CASES[name])
    guides = []
    if "guide_image_path" in options:
        guide = runs / "dataset" / "data_cond" / options["guide_image_path"][0]
        guides = [as_tensor([resized(read_image(guide, ""), drawing.width, drawing.height)])]
    assert_golden(painter_of(own_models, applied).latents([drawing], guides=guides), name)
