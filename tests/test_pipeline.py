"""The pipeline: the reference's final latents (golden 11) and noise, highres fix, Deep Shrink, Gradual Latent."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tolerance import LAST_LATENTS, assert_conditioning, assert_formula, distance

from library.generation.deep_shrink import DeepShrink
from library.generation.gradual_latent import GradualLatent, GrowingEuler
from library.generation.init_images import read_image, resized, to_tensor
from library.generation.options import OutputOptions
from library.generation.output import Output
from library.generation.pipeline import ImageNoise, InitImage, SdxlPipeline, noise_init_latents
from library.generation.prompts.encoder import PromptEncoder
from library.generation.prompts.line import read_line
from library.generation.request import GenerationRequest
from library.generation.samplers import make_sampler
from library.models.unet import Shrink
from library.models.vae import scale_latents
from library.safetensors_io import load_tensors
from library.size import Size
from networks.inference.adapters import AppliedNetworks
from networks.inference.options import AppliedNetworkOptions

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    case["name"]: case
    for case in json.loads((GOLDEN / "11_gen.json").read_text(encoding="utf-8"))
    if "error" not in case
}
WITH_ADAPTERS = {"lora", "lora_merged", "lllite", "ti"}
QUICK = {"ddim", "dpm_2_a", "long", "lora"}
CPU = torch.device("cpu")


def golden():
    return load_tensors(GOLDEN / "11_gen.safetensors")[0]


def cases(names):
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
        for name in sorted(names)
    ]


def request_of(case):
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
        deep_shrink=None,
        gradual_latent=None,
        init_image=None,
        mask=None,
        guide_images=(),
        index=0,
        prompt_index=0,
    )


def pipeline_of(models, adapters=None):
    adapters = adapters or AppliedNetworks(AppliedNetworkOptions(), models)
    return SdxlPipeline(
        models, PromptEncoder(models, 3), adapters, v_prediction=False, zero_terminal_snr=False
    )


def assert_golden(latents, name):
    assert distance(latents, golden()[f"{name}.last"]) <= LAST_LATENTS


@pytest.mark.parametrize("name", cases(CASES.keys() - WITH_ADAPTERS - {"img2img"}))
def test_final_latents_equal_the_reference(name, golden_models):
    assert_golden(pipeline_of(golden_models).latents([request_of(CASES[name])]), name)


def test_img2img_runs_the_timesteps_and_gives_the_latents_of_the_reference(
    golden_models, monkeypatch
):
    """The reference's VAE lacks its attention (INDEX, P9), so the noisy init latents are taken from its record."""
    case = CASES["img2img"]
    noisy = golden()["img2img.first_unet_input"][:1]
    seen = []

    def noise_as_recorded(sampler, *arguments):
        _, timesteps = noise_init_latents(sampler, *arguments)
        seen.extend(timesteps.tolist())
        return noisy, timesteps

    monkeypatch.setattr("library.generation.pipeline.noise_init_latents", noise_as_recorded)
    latents = pipeline_of(golden_models).latents(
        [request_of(case)], InitImage(pixels=torch.zeros(1, 3, 128, 128))
    )
    assert seen == case["timesteps"]
    assert_golden(latents, "img2img")


def test_inpainting_keeps_the_latents_where_the_mask_is_black(golden_models):
    pixels = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 12)
    mask[..., 6:] = 1
    request = dataclasses.replace(request_of(CASES["ddim"]), strength=1.0, steps=3)
    pipeline = pipeline_of(golden_models)
    painted = pipeline.latents([request], InitImage(pixels=pixels, mask=mask))
    complete = pipeline.latents([request], InitImage(pixels=pixels))
    noise = ImageNoise.sample(
        request.seed, (1, 4, 16, 12), 3, CPU, torch.float32, has_init_image=True
    )
    own = scale_latents(
        golden_models.encode_images(pixels, torch.randn((1, 4, 16, 12), generator=noise.generator))
    )
    assert torch.equal(painted[..., :6], own[..., :6])
    assert (painted - own)[..., 6:].abs().mean() > 0.1 and (complete - own)[
        ..., :6
    ].abs().mean() > 0.1
    # Highres fix starts from one image and keeps parts of another.
    start = InitImage(latents=torch.zeros(1, 4, 16, 12), mask=mask, kept_pixels=pixels)
    above = pipeline.latents([request], start)
    assert torch.equal(above[..., :6], own[..., :6]) and not torch.equal(
        above[..., 6:], painted[..., 6:]
    )


def test_gradual_latent_grows_to_the_full_size_and_equals_euler_a_at_ratio_1(golden_models):
    case = dataclasses.replace(request_of(CASES["euler_a"]), steps=6)
    plain = pipeline_of(golden_models).latents([case])
    same = pipeline_of(golden_models).latents(
        [dataclasses.replace(case, gradual_latent=GradualLatent(ratio=1.0))]
    )
    assert distance(same, plain) <= LAST_LATENTS
    growing = GradualLatent(
        timesteps=700, ratio=0.5, ratio_step=0.25, every_n_steps=2, unsharp="3,0.5,0.5,0"
    )
    assert growing.sizes_by_step([999, 799, 599, 399, 199, 0], 128, 96) == [
        None,
        None,
        (96, 72),
        None,
        (128, 96),
        None,
    ]
    assert pipeline_of(golden_models).latents(
        [dataclasses.replace(case, gradual_latent=growing)]
    ).shape == (1, 4, 16, 12)


def test_a_growing_step_equals_the_contract_by_hand():
    """Flat latents stay flat when they are resized or sharpened: x + d dt, plus noise times s_noise. euler_a at t = 999, 499."""
    sampler = make_sampler("euler_a", v_prediction=False, zero_terminal_snr=False)
    for target in (0, 1):
        growth = GradualLatent(
            timesteps=1000, ratio=0.5, ratio_step=0.5, s_noise=0.25, unsharp=f"3,0.5,2,{target}"
        )
        growing = GrowingEuler(sampler, growth, 16, 16)
        growing.set_timesteps(2)
        sigma, following = (float(s) for s in sampler.sigmas[:2])
        added = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        flat, predicted = (
            torch.full((1, 4, 8, 8), 3.0),
            torch.full((1, 4, 8, 8), 0.5),
        )  # predicted noise is d itself
        generator = torch.Generator().manual_seed(1)
        (found,) = growing.step(predicted, sampler.timesteps[0], flat, generator)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        expected = 3.0 + 0.5 * ((following**2 - added**2) ** 0.5 - sigma) + noise * 0.25 * added
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sharpening_subtracts_the_blur_times_its_strength_by_hand():
    """A point, and Gauss's kernel of 3 and sigma 0.5: exp(-2) = 0.1353 on both sides, so 0.1065, 0.7870, 0.1065.

    The predicted noise is 0, the sample isn't resized, and the noise that is added has factor 0: x is only sharpened.
    """
    sampler = make_sampler("euler_a", v_prediction=False, zero_terminal_snr=False)
    gradual = GradualLatent(timesteps=1000, ratio=0.5, ratio_step=0.5, s_noise=0, unsharp="3,0.5,2")
    growing = GrowingEuler(sampler, gradual, 5, 5)
    growing.set_timesteps(2)
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 1
    (found,) = growing.step(torch.zeros_like(point), sampler.timesteps[0], point)
    found = found[0, 0]
    assert found[2, 2].item() == pytest.approx(1 + 2 * (1 - 0.78699**2), abs=1e-4)
    assert found[2, 1].item() == pytest.approx(-2 * 0.78699 * 0.10651, abs=1e-4)
    assert found[1, 1].item() == pytest.approx(-2 * 0.10651**2, abs=1e-4) and found[2, 0] == 0


def test_the_first_stage_of_highres_fix_equals_the_contract_by_hand():
    """int(x * scale + 0.5), sides cut to multiples of 32: 832 * 0.6 = 499.2 -> 480, 1216 * 0.6 = 729.6 -> 704."""
    request = dataclasses.replace(
        request_of(CASES["ddim"]),
        width=832,
        height=1216,
        original_width=1000,
        crop_top=11,
        strength=0.7,
    )
    small = request.first_stage(scale=0.6, steps=9, strength=None)
    assert (small.width, small.height, small.original_width, small.crop_top) == (480, 704, 600, 7)
    assert (small.steps, small.strength, small.original_height) == (9, 0.7, None)
    assert request.first_stage(scale=0.6, steps=9, strength=0.2).strength == 0.2


def test_sequential_names_number_the_images_and_both_stages_share_a_number(tmp_path):
    """A batch of two with its first stage saved, then an image without it."""
    (tmp_path / "im_1000004.png").touch()
    output = Output(OutputOptions(outdir=tmp_path, sequential_file_name=True), with_stages=True)
    image = Image.new("RGB", (8, 8))
    saved = []
    for index, stage in ((0, 1), (1, 1), (0, 2), (1, 2), (2, 2)):
        request = dataclasses.replace(request_of(CASES["ddim"]), index=index)
        saved.append(output.save(image, request, {}, batch_index=index % 2, stage=stage).name)
    assert saved == [
        "im_0000005.png",
        "im_0000006.png",
        "im_1000005.png",
        "im_1000006.png",
        "im_1000007.png",
    ]


def test_an_init_image_isnt_changed_if_no_step_runs():
    sampler = make_sampler("euler", v_prediction=False, zero_terminal_snr=False)
    sampler.set_timesteps(4)
    latents, timesteps = noise_init_latents(
        sampler, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), 4, 0.2
    )
    assert torch.equal(latents, torch.ones(1, 4, 2, 2)) and not len(timesteps)


def test_deep_shrink_is_on_in_its_timesteps():
    shrink = DeepShrink(depth_1=3, timesteps_1=650, depth_2=6, timesteps_2=300)
    assert [shrink.block_at(t) for t in (999, 650, 649, 300, 299)] == [3, 3, 6, 6, None]
    assert [DeepShrink().block_at(t) for t in (650, 649)] == [3, None]


@pytest.mark.parametrize(
    "block", [pytest.param(0, marks=pytest.mark.long), 3, pytest.param(8, marks=pytest.mark.long)]
)
def test_a_shrunk_feature_map_has_the_size_of_each_skip_connection(block, golden_models):
    """The shrunk block and those after it see half the sides; the output block that gets its skip connection sees the full ones."""
    unet, seen = golden_models.unet, {}
    names = [*(f"input_blocks.{i}" for i in range(9)), *(f"output_blocks.{i}" for i in range(9))]
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].shape[2:])
        )
        for name in names
    ]
    inputs = (
        torch.randn(1, 4, 16, 24),
        torch.tensor([999]),
        torch.randn(1, 77, 192),
        torch.randn(1, 1664),
    )
    sizes = []
    for shrink in (None, Shrink(block, 0.5)):
        assert unet(*inputs, None, shrink).shape == inputs[0].shape
        sizes.append(dict(seen))
    for hook in hooks:
        hook.remove()
    for i in range(9):
        factor = 1 if i < block else 2
        assert all(
            a == b * factor
            for a, b in zip(
                sizes[0][f"input_blocks.{i}"], sizes[1][f"input_blocks.{i}"], strict=True
            )
        )
        factor = 2 if 8 - i >= block else 1  # the skip of input block 8 - i comes to output block i
        assert all(
            a == b * factor
            for a, b in zip(
                sizes[0][f"output_blocks.{i}"], sizes[1][f"output_blocks.{i}"], strict=True
            )
        )


def test_long_prompts_keep_start_and_end_tokens_and_weights_keep_the_mean(golden_models):
    encoder = PromptEncoder(golden_models, None)
    text = ", ".join(f"detail {i}" for i in range(60))  # 60 words, 59 commas, 110 digits
    assert (
        encoder.chunks(text) == 4
        and encoder.chunks("a", text) == 4
        and encoder.chunks("a BREAK b") == 2
    )
    assert PromptEncoder(golden_models, 1).chunks(text) == 1
    plain, weighted = (
        encoder.encode("a red house", None, 1),
        encoder.encode("a (red:1.5) house", None, 1),
    )
    assert plain.context.shape == (1, 77, 192) and torch.equal(plain.pooled, weighted.pooled)
    for part in (slice(0, 64), slice(64, None)):
        torch.testing.assert_close(
            weighted.context[..., part].mean(), plain.context[..., part].mean()
        )
    assert not torch.equal(plain.context, weighted.context)
    second = encoder.encode("a red house", "a dog", 1)
    assert torch.equal(second.context[..., :64], plain.context[..., :64]) and not torch.equal(
        second.pooled, plain.pooled
    )


def test_the_initial_noise_and_the_vector_equal_the_reference(golden_models):
    recorded = golden()
    noise = ImageNoise.sample(1234, (1, 4, 16, 12), 6, CPU, torch.float32, has_init_image=False)
    assert_formula(noise.initial, recorded["euler_a.start_noise"])
    for name in ("options", "long"):
        request = request_of(CASES[name])
        pipeline = pipeline_of(golden_models)
        prompts, _ = pipeline.encode_prompts([request])
        vectors = torch.cat([branch.vector for branch in pipeline.conditioning([request], prompts)])
        sizes = [
            request.height,
            request.width,
            request.original_height or 0,
            request.original_width or 0,
        ]
        assert_conditioning(
            vectors, recorded[f"{name}.unet_y"], torch.full((len(vectors), 6), max(sizes))
        )


@pytest.mark.parametrize("name", cases(WITH_ADAPTERS))
def test_final_latents_with_adapters_equal_the_reference(name, own_models, tmp_path):
    """Of files trained in golden 10: a LoRA attached and merged, a ControlNet-LLLite, an embedding."""
    options, runs = CASES[name]["options"], GOLDEN / "10_training"
    files = {
        "lora_te.safetensors": "lora_te",
        "lllite.safetensors": "lllite",
        "mytoken.safetensors": "ti",
    }
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
    request = request_of(CASES[name])
    guide_images = []
    if "guide_image_path" in options:
        file = runs / "dataset" / "data_cond" / options["guide_image_path"][0]
        pixels = resized(read_image(file, ""), Size(request.width, request.height))
        guide_images = [to_tensor([pixels])]
    assert_golden(
        pipeline_of(own_models, applied).latents([request], guide_images=guide_images), name
    )
