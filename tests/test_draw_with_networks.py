"""Drawing with networks, new words and control nets: golden 11, and that a strength of 0 leaves every bit."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_draw import CASES, assert_golden, drawing_of, painter_of

from library import images
from library.generation.generator import ImageGenerator
from library.generation.options import ImageOptions
from library.size import Size
from networks.inference.adapters import AppliedNetworks
from networks.inference.options import AppliedNetworkOptions

pytestmark = pytest.mark.numeric

TRAINED = Path(__file__).parent / "golden" / "10_training"


@pytest.mark.parametrize("name", ["lora", "lora_merged"])
def test_golden_11_with_a_lora_beside_and_merged(name, own_models):
    options = AppliedNetworkOptions(
        network_weights=(TRAINED / "lora_te.out.safetensors",), network_mul=(4.0,), network_merge=name == "lora_merged"
    )
    networks = AppliedNetworks(options, own_models)
    drawing = drawing_of(CASES[name])
    assert_golden(painter_of(own_models, networks).latents([drawing]), name)
    if name == "lora":
        off = painter_of(own_models, networks).latents([dataclasses.replace(drawing, multipliers=(0.0,))])
        assert_golden(off, "lora_base")


def test_golden_11_with_a_control_net(golden_models):
    options = AppliedNetworkOptions(
        control_net_lllite_models=(TRAINED / "lllite.out.safetensors",), control_net_multipliers=(20.0,)
    )
    networks = AppliedNetworks(options, golden_models)
    pixels = images.load(TRAINED / "dataset" / "data_cond" / "img0.png")
    guide = torch.from_numpy(images.normalized(images.resize(pixels, Size(128, 128), "lanczos")))[None]
    painter = painter_of(golden_models, networks)
    assert_golden(painter.latents([drawing_of(CASES["lllite"])], guides=[guide]), "lllite")
    assert_golden(painter.latents([drawing_of(CASES["lllite"])]), "lllite_base")


def test_golden_11_with_a_new_word(own_models, tmp_path):
    shutil.copy(TRAINED / "ti.out.safetensors", tmp_path / "mytoken.safetensors")
    options = AppliedNetworkOptions(textual_inversion_embeddings=(tmp_path / "mytoken.safetensors",))
    networks = AppliedNetworks(options, own_models)
    assert_golden(painter_of(own_models, networks).latents([drawing_of(CASES["ti"])]), "ti")


def test_a_batch_in_regions_holds_prompts_of_as_many_sub_prompts(own_models):
    lora = TRAINED / "lora_te.out.safetensors"
    networks = AppliedNetworks(AppliedNetworkOptions(network_weights=(lora, lora)), own_models, is_regional=True)
    studio = SimpleNamespace(
        _painter=painter_of(own_models, networks), _options={ImageOptions: ImageOptions(batch_size=4)}
    )
    prompts = ["a AND b", "c AND d", "a AND b AND c", "e AND f"]
    drawings = [dataclasses.replace(drawing_of(CASES["lora"]), prompt=prompt) for prompt in prompts]
    assert [[d.prompt for d in batch] for batch in ImageGenerator._batches(studio, drawings)] == [prompts[:2], prompts[2:3], prompts[3:]]  # fmt: skip


def test_regions_draw_with_a_sub_prompt_for_each_network(own_models):
    """A whole picture through the painter; each network's strength changes its own half most."""
    lora = TRAINED / "lora_te.out.safetensors"
    networks = AppliedNetworks(AppliedNetworkOptions(network_weights=(lora, lora)), own_models, is_regional=True)
    mask = torch.zeros(128, 128, 3, dtype=torch.uint8)
    mask[:, :64, 0], mask[:, 64:, 1] = 255, 255
    drawing = dataclasses.replace(drawing_of(CASES["lora"]), prompt="a cat AND a dog", steps=2)
    painter = painter_of(own_models, networks)

    def drawn(*multipliers):
        return painter.latents([dataclasses.replace(drawing, multipliers=multipliers)], regions=mask)

    seen = []
    networks.set_multipliers = lambda multipliers, sub_prompt=None: (
        seen.append(sub_prompt),
        AppliedNetworks.set_multipliers(networks, multipliers, sub_prompt),
    )
    plain = drawn(0.0, 0.0)
    assert seen == [None, 0, 1, 2, None]  # each sub-prompt's text by its own network, the negative prompt by none
    left, right = ((drawn(*pair) - plain).abs().mean(dim=(0, 1, 2)) for pair in ((4.0, 0.0), (0.0, 4.0)))
    assert left[:8].sum() > left[8:].sum() and right[8:].sum() > right[:8].sum()
