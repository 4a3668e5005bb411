"""The pipeline with networks, embeddings and control nets: golden 11, strength 0, batches and regions."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from test_pipeline import CASES, assert_golden, pipeline_of, request_of

from library import images
from library.generation.generator import split_into_batches
from library.size import Size
from networks.inference.adapters import AppliedNetworks
from networks.inference.options import AppliedNetworkOptions

pytestmark = pytest.mark.numeric

TRAINED = Path(__file__).parent / "golden" / "10_training"


@pytest.mark.parametrize("name", ["lora", "lora_merged"])
def test_golden_11_with_a_lora_attached_and_merged(name, own_models):
    options = AppliedNetworkOptions(
        network_weights=(TRAINED / "lora_te.out.safetensors",),
        network_mul=(4.0,),
        network_merge=name == "lora_merged",
    )
    networks = AppliedNetworks(options, own_models)
    request = request_of(CASES[name])
    assert_golden(pipeline_of(own_models, networks).latents([request]), name)
    if name == "lora":
        off = pipeline_of(own_models, networks).latents(
            [dataclasses.replace(request, multipliers=(0.0,))]
        )
        assert_golden(off, "lora_base")


def test_golden_11_with_a_control_net(golden_models):
    options = AppliedNetworkOptions(
        control_net_lllite_models=(TRAINED / "lllite.out.safetensors",),
        control_net_multipliers=(20.0,),
    )
    networks = AppliedNetworks(options, golden_models)
    pixels = images.load(TRAINED / "dataset" / "data_cond" / "img0.png")
    guide = torch.from_numpy(images.normalized(images.resize(pixels, Size(128, 128), "lanczos")))[
        None
    ]
    pipeline = pipeline_of(golden_models, networks)
    request = request_of(CASES["lllite"])
    assert_golden(pipeline.latents([request], guide_images=[guide]), "lllite")
    assert_golden(pipeline.latents([request_of(CASES["lllite"])]), "lllite_base")


def test_golden_11_with_an_embedding(own_models, tmp_path):
    shutil.copy(TRAINED / "ti.out.safetensors", tmp_path / "mytoken.safetensors")
    options = AppliedNetworkOptions(
        textual_inversion_embeddings=(tmp_path / "mytoken.safetensors",)
    )
    networks = AppliedNetworks(options, own_models)
    assert_golden(pipeline_of(own_models, networks).latents([request_of(CASES["ti"])]), "ti")


def test_prompts_of_a_regional_batch_have_the_same_number_of_sub_prompts(own_models):
    lora = TRAINED / "lora_te.out.safetensors"
    networks = AppliedNetworks(
        AppliedNetworkOptions(network_weights=(lora, lora)), own_models, is_regional=True
    )
    pipeline = pipeline_of(own_models, networks)
    prompts = ["a AND b", "c AND d", "a AND b AND c", "e AND f"]
    requests = [dataclasses.replace(request_of(CASES["lora"]), prompt=prompt) for prompt in prompts]
    batches = split_into_batches(requests, 4, lambda request: (len(pipeline.sub_prompts(request)),))
    assert [[request.prompt for request in batch] for batch in batches] == [
        prompts[:2],
        prompts[2:3],
        prompts[3:],
    ]


def test_each_region_is_generated_with_its_network_and_sub_prompt(own_models):
    """A complete image; each network's strength changes its own half most."""
    lora = TRAINED / "lora_te.out.safetensors"
    networks = AppliedNetworks(
        AppliedNetworkOptions(network_weights=(lora, lora)), own_models, is_regional=True
    )
    mask = torch.zeros(128, 128, 3, dtype=torch.uint8)
    mask[:, :64, 0], mask[:, 64:, 1] = 255, 255
    request = dataclasses.replace(request_of(CASES["lora"]), prompt="a cat AND a dog", steps=2)
    pipeline = pipeline_of(own_models, networks)

    def generated(*multipliers):
        return pipeline.latents(
            [dataclasses.replace(request, multipliers=multipliers)], regions=mask
        )

    seen = []
    networks.set_multipliers = lambda multipliers, sub_prompt=None: (
        seen.append(sub_prompt),
        AppliedNetworks.set_multipliers(networks, multipliers, sub_prompt),
    )
    plain = generated(0.0, 0.0)
    assert seen == [
        None,
        0,
        1,
        2,
        None,
    ]  # each sub-prompt's text by its own network, the negative prompt by none
    left, right = (
        (generated(*pair) - plain).abs().mean(dim=(0, 1, 2)) for pair in ((4.0, 0.0), (0.0, 4.0))
    )
    assert left[:8].sum() > left[8:].sum() and right[8:].sum() > right[:8].sum()
