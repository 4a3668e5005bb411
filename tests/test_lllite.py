"""ControlNet-LLLite's modules: golden 08 at full size and tiny, and files that don't fit."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from messages import mentioning
from tolerance import (
    ADAPTER_GRADIENT_NORM,
    assert_formula,
    assert_network,
    assert_norm,
    assert_zero_in_theory,
)

from library.errors import OptionError
from library.models.unet import UNet
from library.models.unet_config import UNetConfig
from library.safetensors_io import load_tensors, write_safetensors
from networks.lllite import (
    ControlNetLLLite,
    attention_projections,
    conditions,
    to_control_inputs,
    trained_projections,
)
from networks.lllite_file import lllite_from_file

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def full_size_unet():
    shapes = json.loads(gzip.decompress((GOLDEN / "06_block_lr_index.json.gz").read_bytes()))[
        "shapes"
    ]
    with torch.device("meta"):
        return UNet(UNetConfig.from_shapes({name: tuple(shape) for name, shape in shapes.items()}))


@pytest.mark.parametrize("number", [0, 1])
def test_golden_08_names_shapes_order_and_depths_at_full_size(number, full_size_unet):
    case = json.loads(gzip.decompress((GOLDEN / "08_lllite_fullsize.json.gz").read_bytes()))[number]
    chosen = trained_projections(full_size_unet)
    with torch.device("meta"):
        net = ControlNetLLLite(dict.fromkeys(chosen, (case["cond_emb_dim"], case["mlp_dim"])))
    assert len(net.projections) == case["n_modules"]
    assert {projection.name: projection.depth for projection in net.projections} == case["depth"]
    assert [(name, list(tensor.shape)) for name, tensor in net.named_parameters()] == list(
        case["tensors"].items()
    )


@pytest.fixture
def golden():
    return load_tensors(GOLDEN / "08_lllite_tiny.safetensors")[0]


@pytest.fixture
def golden_file(golden, tmp_path) -> Path:
    tensors = {
        name.removeprefix("lllite."): tensor
        for name, tensor in golden.items()
        if name.startswith("lllite.")
    }
    write_safetensors(tmp_path / "lllite.safetensors", tensors, {})
    return tmp_path / "lllite.safetensors"


def test_golden_08_outputs_and_gradients(golden, golden_file, golden_models):
    expected = json.loads(gzip.decompress((GOLDEN / "08_lllite_tiny.json.gz").read_bytes()))
    unet = golden_models.unet
    net = lllite_from_file(
        golden_file, attention_projections(unet), flag="--control_net_lllite_models"
    )
    inputs = [golden[name] for name in ("latents", "timesteps", "context", "y")]
    with torch.no_grad():
        assert_network(unet(*inputs), golden["out.base"])
        half = unet(*inputs, to_control_inputs(net(golden["cond_image"], 0.5)))
        assert_network(half, golden["out.mult0.5"])
        pair = [golden["x_pair"], *(golden[name][:1].expand(2, *[-1] * (golden[name].ndim - 1)) for name in ("timesteps", "context", "y"))]  # fmt: skip
        one_for_both = unet(*pair, to_control_inputs(net(golden["cond_image"][:1])))
        expected_pair = golden["out.pair_uncond_cond_single_cond_image"]
        assert_network(one_for_both, expected_pair)
    net.requires_grad_(True).train()
    output = unet(*inputs, to_control_inputs(net(golden["cond_image"])))
    assert_network(output, golden["out.mult1.0"])
    loss = torch.nn.functional.mse_loss(output, golden["target"])
    loss.backward()
    assert_formula(loss.detach(), torch.tensor(expected["loss"]))
    parameters = dict(net.named_parameters())
    assert len(parameters) == len(expected["grad_norms"])
    for name, norm in expected["grad_norms"].items():
        found = parameters[name].grad.norm().item()
        if name.endswith("attn1_to_k.up.0.bias"):  # a softmax doesn't see what moves all keys alike
            assert_zero_in_theory(found, name)
        else:
            assert_norm(found, norm, name, share=ADAPTER_GRADIENT_NORM)


def test_the_joint_convolutions_equal_each_module_alone(golden_file, golden_models):
    net = lllite_from_file(
        golden_file, attention_projections(golden_models.unet), flag="--control_net_lllite_models"
    )
    modules = [net.lllite(projection) for projection in net.projections if projection.depth == 3]
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    for module, condition in zip(modules, conditions(modules, image), strict=True):
        embedding = module.conditioning1(image).flatten(2).transpose(1, 2)
        alone = torch.nn.functional.linear(
            embedding, module.middle_weights[0], module.linear("mid").bias
        )
        assert_network(condition, alone)


def test_a_control_net_that_starts_adds_the_bias_alone_and_dropout_works_while_it_trains(
    golden_models,
):
    """The last layer's weight is zero, its bias is not (contract, training_math.md section 9)."""
    torch.manual_seed(0)
    net = ControlNetLLLite(
        dict.fromkeys(trained_projections(golden_models.unet), (8, 8)), dropout=0.5
    )
    projection, modulation = net(torch.zeros(1, 3, 64, 64))[0]
    x = torch.randn(1, modulation.condition.shape[1], projection.channels)
    assert torch.equal(modulation.added(x), net.lllite(projection).linear("up").bias.expand_as(x))
    torch.nn.init.normal_(net.lllite(projection).linear("up").weight)
    dropped = net(torch.zeros(1, 3, 64, 64))[0][1]
    assert not torch.equal(dropped.added(x), dropped.added(x))
    kept = net.eval()(torch.zeros(1, 3, 64, 64))[0][1]
    assert torch.equal(kept.added(x), kept.added(x))


def test_blocks_are_chosen_by_name(golden_models):
    chosen = trained_projections(
        golden_models.unet, ["input_blocks.4", "middle_block", "output_blocks"]
    )
    assert {projection.block for projection in chosen} == {"input_blocks.4", "middle_block", *(f"output_blocks.{i}" for i in range(6))}  # fmt: skip


def test_a_file_that_does_not_fit_is_refused_with_counts_unless_partial(
    golden_file, golden_models, tmp_path
):
    tensors, _ = load_tensors(golden_file)
    first = next(iter(tensors)).partition(".")[0]
    flag = "--control_net_lllite_models"

    def read(changed, **arguments):
        write_safetensors(tmp_path / "other.safetensors", changed, {})
        return lllite_from_file(
            tmp_path / "other.safetensors",
            attention_projections(golden_models.unet),
            flag=flag,
            **arguments,
        )

    more = {
        **tensors,
        "lllite_unet_input_blocks_9_1_transformer_blocks_0_attn1_to_q.up.0.bias": torch.zeros(3),
    }
    with pytest.raises(
        OptionError,
        match=mentioning(
            flag, "other.safetensors", "1", "lllite_unet_input_blocks_9", "--allow_partial"
        ),
    ):
        read(more)
    fewer = {name: tensor for name, tensor in more.items() if name != f"{first}.up.0.bias"}
    net = read(fewer, allow_partial=True)
    assert len(net.projections) == 31 and first not in {
        projection.name for projection in net.projections
    }
    with pytest.raises(
        OptionError,
        match=mentioning(flag, "other.safetensors", "368", "lllite_unet_down_input_blocks_4"),
    ):
        read(
            {
                name.replace("lllite_unet_", "lllite_unet_down_"): tensor
                for name, tensor in tensors.items()
            },
            allow_partial=True,
        )
    with pytest.raises(
        OptionError, match=mentioning(flag, "LoRA", "ControlNet-LLLite", "lllite_unet")
    ):
        read({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)})


def test_a_file_with_convolutions_for_matrices_is_the_same_net(
    golden_file, golden_models, tmp_path
):
    tensors, _ = load_tensors(golden_file)
    as_convolutions = {
        name: tensor[..., None, None]
        if name.endswith(("down.0.weight", "mid.0.weight", "up.0.weight"))
        else tensor
        for name, tensor in tensors.items()
    }
    write_safetensors(tmp_path / "conv.safetensors", as_convolutions, {})
    found = [
        lllite_from_file(path, attention_projections(golden_models.unet), flag="--x").state_dict()
        for path in (golden_file, tmp_path / "conv.safetensors")
    ]
    assert all(
        torch.equal(one, two) for one, two in zip(*(net.values() for net in found), strict=True)
    )
