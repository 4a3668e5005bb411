"""Quantised bases: bounds against bfloat16 on golden 02, gradients, what a run with one saves."""

from pathlib import Path

import pytest
import torch
from conftest import open_models
from messages import mentioning
from running import QUICK, losses_of, tensors_of, train_network, without
from tolerance import assert_network
from torch import nn

from library.errors import OptionError
from library.models.memory.quantization import QuantizedLinear, dequantize_weight, quantize_weight
from library.models.text_encoders import clip_body
from library.safetensors_io import load_tensors, read_header

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("fp8", "int8", "nf4")

# Distance from float32's output on golden 02, in its norm, of a tiny model; bfloat16 alone is at most 0.03 away.
BOUNDS = {"fp8": 0.1, "int8": 0.03, "nf4": 0.3}


def quantized(path: Path, kind: str, parts=("unet",)):
    models = open_models(path)
    models.quantized = dict.fromkeys(parts, kind)
    return models


def by_hand(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a weight, from the definitions."""
    if kind == "fp8":
        scale = 2.0 ** torch.ceil(torch.log2(weight.abs().max() / 448))
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    if kind == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / scale).round() * scale
    levels = torch.tensor([
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302, 0.24611230,
        0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
    ])  # fmt: skip
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * scale).view_as(weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_weight_is_what_the_definition_says(kind):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    found = dequantize_weight(*quantize_weight(weight, kind), kind, weight.shape, torch.float32)
    different = (found - by_hand(weight, kind)).abs() > 1e-6 * weight.abs().max()
    assert different.float().mean() <= 1e-3  # bitsandbytes may round a tie of NF4 the other way


def test_fp8_scales_by_the_tensor_so_that_small_weights_keep_their_digits():
    weight = torch.randn(64, 64) * 1e-5  # a plain cast would make most of these 0
    found = dequantize_weight(*quantize_weight(weight, "fp8"), "fp8", weight.shape, torch.float32)
    assert (found - weight).norm() < 0.04 * weight.norm()
    assert weight.to(torch.float8_e4m3fn).float().count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_golden_02_stays_within_the_stated_bound(kind, golden_model):
    golden, _ = load_tensors(GOLDEN / "02_unet.safetensors")
    unet = quantized(golden_model, kind).unet
    for case in "ab":
        latents, *others = (
            golden[f"{case}.{name}"] for name in ("latents", "timesteps", "context", "y")
        )
        expected = golden[f"{case}.output"]
        for given in (latents, latents.bfloat16()):
            with torch.no_grad():
                found = unet(given, *others)
            assert found.dtype == given.dtype
            assert (
                1e-4
                < (found.float() - expected).norm() / expected.norm()
                < BOUNDS[kind] + (0.03 if given is not latents else 0)
            )
    linears = [layer for layer in unet.modules() if isinstance(layer, nn.Linear)]
    assert (
        sum(isinstance(layer, QuantizedLinear) for layer in linears) == len(linears) - 4
    )  # time and label embeddings


def test_the_inputs_gradient_is_that_of_the_packed_weight():
    plain, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(2, 3, 64)
    packed = QuantizedLinear(plain, plain.weight, "nf4")
    plain.weight.data = packed.dequantized(torch.float32)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    expected, found = plain(one), packed(two)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    grad = torch.randn_like(expected)
    assert_network(
        *torch.autograd.grad(found, two, grad), *torch.autograd.grad(expected, one, grad)
    )


def test_the_encoders_embeddings_stay_as_they_are(golden_model):
    models = quantized(golden_model, "fp8", ("text_encoder_1", "text_encoder_2"))
    plain = open_models(golden_model)
    for one, two in zip(models.text_encoders, plain.text_encoders, strict=True):
        layer = clip_body(one).encoder.layers[0]
        assert isinstance(layer.mlp.fc1, QuantizedLinear)
        name = "token_embedding.weight"
        assert torch.equal(
            clip_body(one).embeddings.get_parameter(name),
            clip_body(two).embeddings.get_parameter(name),
        )
    found, expected = (m.encode_texts(["a red cat"], 75) for m in (models, plain))
    for one, two in zip(found, expected, strict=True):
        assert 0 < (one - two).norm() / two.norm() < 0.1


@pytest.mark.parametrize("words, unet_only", [
    (["--base_quant", "nf4", "--network_args", "conv_dim=2"], True),
    pytest.param(["--fp8_base"], False, marks=pytest.mark.long),
    pytest.param(["--fp8_base_unet", "--gradient_checkpointing"], True, marks=pytest.mark.long),
    pytest.param(["--base_quant", "int8"], True, marks=pytest.mark.long),
])  # fmt: skip
def test_a_network_learns_on_a_quantized_base_nearly_what_it_learns_on_the_whole_one(
    words, unet_only, golden_model, images, tmp_path
):
    quick = (
        QUICK
        if unet_only
        else without(QUICK, "--network_train_unet_only", "--cache_text_encoder_outputs")
    )
    common = [*(words[2:] if "--network_args" in words else []), "--max_train_steps", "2"]
    plain = train_network(golden_model, images, tmp_path / "plain", *common, quick=quick)
    found = train_network(
        golden_model, images, tmp_path / "found", *words, "--max_train_steps", "2", quick=quick
    )
    assert losses_of(tmp_path / "found")[0] == pytest.approx(
        losses_of(tmp_path / "plain")[0], rel=0.05
    )
    assert losses_of(tmp_path / "found")[0] != losses_of(tmp_path / "plain")[0]
    assert tensors_of(found).keys() == tensors_of(plain).keys()
    metadata = read_header(found).metadata
    assert metadata["ss_fp8_base"] == str("--fp8_base" in words)
    assert metadata["ss_fp8_base_unet"] == str("--fp8_base_unet" in words)


def test_base_weights_are_merged_into_the_unquantized_file(golden_model, images, tmp_path):
    """Merging into packed weights would lose a small change: here it must move the packed result as it moves the whole one."""
    lora = train_network(golden_model, images, tmp_path / "lora", "--max_train_steps", "2")
    from networks.base_weights import BaseWeights

    plain, merged = quantized(golden_model, "int8"), quantized(golden_model, "int8")
    skeleton = merged.without_weights()
    merged.change = BaseWeights([lora], [30.0], skeleton.unet, ())
    whole = open_models(golden_model)
    whole.change = merged.change
    name = "middle_block.1.transformer_blocks.0.attn1.to_q"
    before, after, expected = (m.unet.get_submodule(name) for m in (plain, merged, whole))
    change = after.dequantized(torch.float32) - before.dequantized(torch.float32)
    assert change.norm() > 0
    torch.testing.assert_close(
        after.dequantized(torch.float32),
        expected.weight,
        rtol=0,
        atol=0.01 * expected.weight.abs().max().item(),
    )


def test_quantized_bases_are_refused_where_the_base_is_trained_or_read_by_others(
    golden_model, images, tmp_path
):
    import sdxl_train

    files = [
        "--pretrained_model_name_or_path",
        golden_model,
        "--train_data_dir",
        images,
        "--output_dir",
        tmp_path,
    ]
    with pytest.raises(
        OptionError, match=mentioning("--fp8_base", "--fp8_base_unet", "--base_quant")
    ):
        sdxl_train.main([str(word) for word in [*files, "--fp8_base"]])
    with pytest.raises(
        OptionError,
        match=mentioning("--network_module", "lycoris.kohya", "--fp8_base", "--base_quant"),
    ):
        train_network(
            golden_model,
            images,
            tmp_path,
            "--network_module",
            "lycoris.kohya",
            "--base_quant",
            "nf4",
        )
    with pytest.raises(OptionError, match=mentioning("--base_quant", "--fp8_base")):
        train_network(golden_model, images, tmp_path, "--fp8_base", "--base_quant", "nf4")
