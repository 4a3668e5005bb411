"""The U-Net: golden 02 and 06, Diffusers' U-Net, and every family by its shapes."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from tolerance import assert_formula, assert_network, assert_norm, assert_zero_in_theory

from library.models.attention import chunked, sdpa
from library.models.control import AttentionControl, BlockControl, LLLiteModulation
from library.models.memory.activation_checkpointing import ActivationPolicy
from library.models.unet import UNet, block_of
from library.models.unet_blocks import GEGLU
from library.models.unet_config import UNetConfig
from library.safetensors_io import load_tensors
from tools.tiny_models import INPAINTING, REFINER, SDXL_BASE, SSD_1B, TINY, VEGA

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"

# At level 0 a group norm has one channel a group, so what only shifts a channel has a gradient that is rounding noise.
NOISE = [f"{block}.{name}" for block in ("input_blocks.1.0", "input_blocks.2.0", "output_blocks.6.0", "output_blocks.7.0", "output_blocks.8.0")
         for name in ("in_layers.2.bias", "emb_layers.1.weight", "emb_layers.1.bias")]  # fmt: skip
NOISE += ["output_blocks.8.0.out_layers.3.bias", "output_blocks.8.0.skip_connection.bias"]


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("attention", [sdpa, chunked])
def test_golden_02_output_and_every_gradient(
    case, gradient_checkpointing, attention, golden_models
):
    golden, _ = load_tensors(GOLDEN / "02_unet.safetensors")
    expected = json.loads((GOLDEN / "02_unet.json").read_text())[case]
    unet = UNet(
        golden_models.checkpoint.unet,
        attention,
        ActivationPolicy("full" if gradient_checkpointing else None),
    )
    unet.load_state_dict(golden_models.checkpoint.tensors("unet"))
    latents, context = (
        golden[f"{case}.{name}"].requires_grad_() for name in ("latents", "context")
    )
    output = unet(latents, golden[f"{case}.timesteps"], context, golden[f"{case}.y"])
    assert_network(output, golden[f"{case}.output"])
    loss = torch.nn.functional.mse_loss(output, golden[f"{case}.target"])
    loss.backward()
    assert_formula(loss.detach(), torch.tensor(expected["loss"]))
    assert_network(latents.grad, golden[f"{case}.grad_latents"])
    for name, parameter in unet.named_parameters():
        if name in NOISE:
            assert_zero_in_theory(parameter.grad.norm().item(), name)
        else:
            assert_norm(parameter.grad.norm().item(), expected["grad_norms"][name], name)


def test_golden_06_names_order_and_learning_rate_blocks():
    golden = json.loads(gzip.decompress((GOLDEN / "06_block_lr_index.json.gz").read_bytes()))
    with torch.device("meta"):
        unet = UNet(
            UNetConfig.from_shapes({name: tuple(shape) for name, shape in golden["shapes"].items()})
        )
    assert [name for name, _ in unet.named_parameters()] == list(golden["names"])
    assert {name: block_of(name) for name in golden["names"]} == golden["names"]
    assert {name: list(p.shape) for name, p in unet.named_parameters()} == golden["shapes"]
    assert block_of("middle_block_1_proj_in") == 11


@pytest.mark.parametrize(
    "config, family, millions",
    [
        (SDXL_BASE, "SDXL base", 2567.5),
        (SSD_1B, "SSD-1B", 1330.9),
        (VEGA, "Segmind Vega", 745.1),
        (REFINER, "SDXL refiner", 2299.7),
        (INPAINTING, "SDXL base, inpainting (9 channels)", 2567.5),
        (TINY.unet, "tiny SDXL (for tests)", 8.67),
    ],
)
def test_every_family_is_read_off_its_shapes(config, family, millions):
    with torch.device("meta"):
        unet = UNet(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    assert UNetConfig.from_shapes(shapes) == config
    assert config.family == family
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == pytest.approx(
        millions, rel=0.03
    )


def test_a_bf16_forward_stays_bf16_and_near_float32(golden_models):
    golden, _ = load_tensors(GOLDEN / "02_unet.safetensors")
    inputs = [golden[f"a.{name}"] for name in ("timesteps", "context", "y")]
    unet = UNet(golden_models.checkpoint.unet)
    unet.load_state_dict(golden_models.checkpoint.tensors("unet"))
    with torch.no_grad():
        by_casting = unet(
            golden["a.latents"].bfloat16(), *inputs
        )  # float32 weights, cast inside their layers
        in_bf16 = unet.bfloat16()(golden["a.latents"].bfloat16(), *inputs)
    assert by_casting.dtype == in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(by_casting, in_bf16, rtol=0, atol=0)
    difference = (in_bf16.float() - golden["a.output"]).norm() / golden["a.output"].norm()
    assert difference < 0.03


def test_chunked_attention_equals_sdpa():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 64) for n in (2500, 77, 77))
    assert_network(chunked(q, k, v), sdpa(q, k, v))


def test_steering_changes_what_projections_see_and_its_tensors_get_equal_gradients_with_checkpointing(
    golden_models,
):
    """By hand: the steered U-Net equals one whose projection is called with the changed input; None changes no bit."""
    golden, _ = load_tensors(GOLDEN / "02_unet.safetensors")
    inputs = [golden[f"a.{name}"] for name in ("latents", "timesteps", "context", "y")]
    torch.manual_seed(0)
    positions = inputs[0].shape[2] * inputs[0].shape[3] // 4  # level 1 has half of each side
    shapes = [(1, positions, 4), (4, 64), (4,), (4, 4), (64, 4), (64,)]
    tensors = [torch.randn(shape).requires_grad_() for shape in shapes]
    extra = {
        "input_blocks.4": (BlockControl(attn1=AttentionControl(q=(LLLiteModulation(*tensors),))),)
    }
    outputs, gradients = [], []
    for checkpointing in (False, True):
        unet = UNet(
            golden_models.checkpoint.unet,
            checkpointing=ActivationPolicy("full" if checkpointing else None),
        )
        unet.load_state_dict(golden_models.checkpoint.tensors("unet"))
        outputs.append(unet(*inputs, extra))
        gradients.append(torch.autograd.grad(outputs[-1].square().mean(), tensors))
    assert torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(one, two) and one.any() for one, two in zip(*gradients, strict=True))
    layer = unet.get_submodule("input_blocks.4.1.transformer_blocks.0.attn1.to_q")
    base = layer.forward
    condition, down, down_bias, mid, up, up_bias = tensors
    layer.forward = lambda x: base(
        x + ((condition + (x @ down.T + down_bias).relu() @ mid.T).relu() @ up.T + up_bias)
    )
    assert_network(unet(*inputs), outputs[0])
    layer.forward = base
    assert torch.equal(unet(*inputs), unet(*inputs, {}))
    assert not torch.equal(unet(*inputs), outputs[0])


def test_a_geglu_keeps_its_projection_alone_and_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    geglu = GEGLU(4, 6).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    value, gate = geglu.proj(x).chunk(2, dim=-1)
    torch.testing.assert_close(geglu(x), value * torch.nn.functional.gelu(gate))
    assert torch.autograd.gradcheck(geglu, (x,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape), lambda tensor: tensor
    ):
        geglu(x)
    assert saved.count(torch.Size([2, 3, 12])) == 1 and torch.Size([2, 3, 6]) not in saved
