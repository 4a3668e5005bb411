"""LoRA: golden 07 at full size and tiny, dropouts, files from other programs."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from messages import mentioning, mentions
from running import assert_bit_equal
from tolerance import (
    ADAPTER_GRADIENT_NORM,
    assert_formula,
    assert_network,
    assert_norm,
    assert_zero_in_theory,
)

from library.errors import OptionError
from library.models import text_encoders
from library.models.checkpoint.key_maps import Renaming, unet_pairs_of_config
from library.models.memory.quantization import QuantizedLinear
from library.models.unet import UNet
from library.models.unet_config import UNetConfig
from library.safetensors_io import load_tensors, read_header, write_safetensors
from networks.lora import LoraNetwork
from networks.lora_file import read_lora, write_lora
from networks.lora_layers import LoraModule, add_lora
from networks.lora_linear import lora_linear
from networks.lora_settings import LoraSettings, read_lora_settings
from networks.options import NetworkOptions
from networks.targets import all_targets, unet_targets

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads(gzip.decompress((GOLDEN / "07_lora_fullsize.json.gz").read_bytes()))["cases"]


def settings_of(*pairs: str, dim: int = 4, alpha: float = 1.0) -> LoraSettings:
    settings, mistakes = read_lora_settings(dim, alpha, None, pairs)
    assert not mistakes, mistakes
    return settings


def targets_of(models):
    return all_targets(models.unet, models.text_encoders)


@pytest.fixture(scope="module")
def full_size_targets():
    from library.imports import import_transformers
    from tools.tiny_models import FULL, _text_encoder

    import_transformers()
    shapes = json.loads(gzip.decompress((GOLDEN / "06_block_lr_index.json.gz").read_bytes()))[
        "shapes"
    ]
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_shapes({name: tuple(shape) for name, shape in shapes.items()}))
        encoders = [_text_encoder(n, getattr(FULL, f"text_encoder_{n}")) for n in (1, 2)]
    return all_targets(None, encoders), list(unet_targets(unet))


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["network_args"])[:60])
def test_golden_07_names_shapes_alphas_and_learning_rates_at_full_size(case, full_size_targets):
    result = case["result"]
    pairs = [f"{key}={value}" for key, value in case["network_args"].items()]
    settings, mistakes = read_lora_settings(case["network_dim"], case["network_alpha"], None, pairs)
    if "error" in result:
        assert mistakes and "23" in mistakes[0]
        return
    text, unet = full_size_targets
    with torch.device("meta"):
        network = LoraNetwork.from_settings(
            [*(text if case["train_text_encoder"] else []), *unet], settings
        )
    assert [target.name for target in network.targets] == list(result["modules"])
    if result["block_lr_weight"] is not None:
        assert list(settings.block_lr_weights) == result["block_lr_weight"]
    groups = network.groups(case["unet_lr"], (case["text_encoder_lr"],) * 2)
    rates = {name: (group.lr, group.name) for group in groups for name in group.parameters}
    for target in network.targets:
        dim, alpha, down, up, down_lr, up_lr, group = result["modules"][target.name]
        lora = network.lora(target.name)
        assert (lora.rank, lora.alpha) == (dim, alpha), target.name
        if down is not None:
            assert [list(lora.lora_down.weight.shape), list(lora.lora_up.weight.shape)] == [
                down,
                up,
            ]
        if (
            target.name in network.untrainable()
        ):  # left out of the optimizer here (docs/differences.md)
            assert target.name.startswith("lora_te1_text_model_encoder_layers_11_")
            continue
        assert rates[f"{target.name}.lora_down.weight"][0] == pytest.approx(down_lr, abs=1e-12)
        assert rates[f"{target.name}.lora_up.weight"] == (pytest.approx(up_lr, abs=1e-12), group)


def test_golden_07_outputs_and_gradients(own_models):
    golden, _ = load_tensors(GOLDEN / "07_lora_tiny.safetensors")
    expected = json.loads((GOLDEN / "07_lora_tiny.json").read_text())
    tensors = {
        name.removeprefix("lora."): tensor
        for name, tensor in golden.items()
        if name.startswith("lora.")
    }
    network = LoraNetwork.from_tensors(targets_of(own_models), tensors, LoraSettings())
    network.load(tensors, source=Path("golden"), allow_partial=False)
    network.attach()
    inputs = [golden[name] for name in ("latents", "timesteps", "context", "y")]
    for name in (name for name in golden if name.startswith("unet_out.mult")):
        network.set_multiplier(float(name.removeprefix("unet_out.mult")))
        with torch.no_grad():
            assert_network(own_models.unet(*inputs), golden[name], name)
    network.set_multiplier(1.0)
    with torch.no_grad():
        ids = [golden[f"input_ids{n}"].view(-1, 1, 77) for n in (1, 2)]
        text = text_encoders.encode(*ids, *own_models.text_encoders)
    names = [
        next(name for name in golden if part in name) for part in ("hidden1", "hidden2", "pool")
    ]
    for found, name in zip(text, names, strict=True):
        assert_network(found, golden[name], name)
    loss = torch.nn.functional.mse_loss(own_models.unet(*inputs), golden["target"])
    loss.backward()
    assert_formula(loss.detach(), torch.tensor(expected["loss"]))
    parameters = dict(network.named_parameters())
    for name, norm in expected["lora_grad_norms"].items():
        found = parameters[name].grad.norm().item()
        if norm < 1e-7:  # level 0: one channel a group
            assert_zero_in_theory(found, name)
        else:
            assert_norm(found, norm, name, share=ADAPTER_GRADIENT_NORM)


# ------------------------------------------------------------------------------------------------------------- the module


@pytest.mark.numeric
@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Linear(6, 5),
        torch.nn.Conv2d(6, 5, 3, stride=2, padding=1),
        torch.nn.Conv2d(6, 5, 1),
    ],
)
def test_the_module_adds_what_the_formula_says_and_starts_at_nothing(layer):
    torch.manual_seed(0)
    lora = LoraModule(layer, rank=3, alpha=1.5)
    x = torch.randn(2, 6, 8, 8) if isinstance(layer, torch.nn.Conv2d) else torch.randn(2, 7, 6)
    assert torch.equal(add_lora(layer, lora)(x), layer(x))
    torch.nn.init.normal_(lora.lora_up.weight)
    delta = (lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1)).view(
        layer.weight.shape
    )
    lora.multiplier = -0.5
    merged = layer.weight + -0.5 * (1.5 / 3) * delta
    expected = torch.func.functional_call(layer, {"weight": merged, "bias": layer.bias}, (x,))
    torch.testing.assert_close(add_lora(layer, lora)(x), expected)


def test_nothing_as_large_as_the_output_is_saved_for_backward_beyond_what_the_base_saves():
    layer = torch.nn.Linear(64, 200).requires_grad_(False)
    lora = LoraModule(layer, rank=4, alpha=4)
    x = torch.randn(8, 32, 64, requires_grad=True)
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = add_lora(layer, lora)(x)
    assert y.numel() not in saved and saved.count(x.numel()) <= 1


@pytest.mark.numeric
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_of_a_linear_layer_and_its_lora_has_the_gradients_of_its_formula(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7, bias=bias).double().requires_grad_(False)
    lora = LoraModule(layer, rank=3, alpha=1.5).double()
    torch.nn.init.normal_(lora.lora_up.weight)
    lora.multiplier = -0.7
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    down, up = lora.lora_down.weight, lora.lora_up.weight

    def fused(x, down, up):
        return lora_linear(x.flatten(0, 1), layer.weight, layer.bias, down, up, -0.35)

    assert torch.autograd.gradcheck(fused, (x, down, up))
    expected = layer(x) - 0.35 * (x @ down.t() @ up.t())
    torch.testing.assert_close(add_lora(layer, lora)(x), expected)
    assert "_LoraLinear" in str(add_lora(layer, lora)(x).grad_fn.next_functions[0][0].name())


def test_a_base_layer_that_is_trained_gets_its_gradient_too():
    layer, x = torch.nn.Linear(5, 7), torch.randn(4, 5)
    lora = LoraModule(layer, rank=2, alpha=2)
    add_lora(layer, lora)(x).sum().backward()
    assert layer.weight.grad is not None


def test_a_quantized_layer_with_a_lora_is_the_sum_of_both():
    torch.manual_seed(0)
    quantized = QuantizedLinear(
        torch.nn.Linear(8, 6).requires_grad_(False), torch.randn(6, 8), "int8"
    )
    lora = LoraModule(quantized, rank=2, alpha=2)
    torch.nn.init.normal_(lora.lora_up.weight)
    x = torch.randn(3, 4, 8)
    expected = quantized(x) + x @ lora.lora_down.weight.T @ lora.lora_up.weight.T
    torch.testing.assert_close(add_lora(quantized, lora)(x), expected)


def test_attaching_leaves_the_parameters_of_the_models_and_their_names(own_models):
    modules = [own_models.unet, *own_models.text_encoders]
    before = [dict(module.named_parameters()) for module in modules]
    LoraNetwork.from_settings(targets_of(own_models), LoraSettings(dim=2, conv_dim=1)).attach()
    for module, parameters in zip(modules, before, strict=True):
        after = dict(module.named_parameters())
        assert list(after) == list(parameters)
        assert all(after[name] is parameters[name] for name in parameters)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["dropout", "rank_dropout", "module_dropout"])
def test_dropouts_keep_the_mean_and_act_in_training_only(name):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 4, bias=False)
    lora = LoraModule(layer, rank=8, alpha=8, **{name: 0.25})
    torch.nn.init.normal_(lora.lora_up.weight)
    x = torch.randn(4000, 2, 16) if name != "module_dropout" else torch.randn(1, 2, 16)
    base, full = layer(x), add_lora(layer, lora.eval())(x)
    lora.train()
    if name == "module_dropout":
        outputs = torch.cat([add_lora(layer, lora)(x) - base for _ in range(4000)])
        share = (outputs.abs().sum((1, 2)) == 0).float().mean()
        assert share == pytest.approx(0.25, abs=0.03)
        return
    change = add_lora(layer, lora)(x) - base
    torch.testing.assert_close(
        (change * (full - base)).sum() / (full - base).square().sum(),
        torch.tensor(1.0),
        atol=0.03,
        rtol=0,
    )
    assert not torch.allclose(change, full - base)


def test_rank_dropout_drops_whole_ranks_of_a_sample():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3, bias=False)
    lora = LoraModule(layer, rank=3, alpha=3, rank_dropout=0.5).train()
    lora.lora_up.weight.data, lora.lora_down.weight.data = torch.eye(3), torch.eye(3)
    change = add_lora(layer, lora)(torch.ones(50, 7, 3)) - layer(torch.ones(50, 7, 3))
    values = {round(value, 4) for value in change.flatten().tolist()}
    assert values == {0.0, 2.0} and (change == change[:, :1]).all()


def test_bfloat16_layers_take_float32_modules():
    layer = torch.nn.Linear(8, 8).bfloat16()
    lora = LoraModule(layer, rank=2, alpha=2)
    y = add_lora(layer, lora)(torch.randn(2, 3, 8).bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and lora.lora_up.weight.grad.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- network_args


@pytest.mark.parametrize(
    "pair, tokens",
    [
        ("conv_dims=4", ["'conv_dims'", "networks.lora", "'conv_dim'"]),
        ("conv_dim=four", ["conv_dim", "number|integer", "'four'"]),
        ("conv_dim", ["conv_dim", "number|integer", "''"]),
        ("block_dims=4,4,4", ["block_dims", "23", "'4,4,4'"]),
        ("rank_dropout=1.5", ["rank_dropout", "probability|number", "'1.5'"]),
        ("down_lr_weight=0.5", ["down_lr_weight", "9", "sine", "'0.5'"]),
        ("down_lr_weight=sinus+1", ["down_lr_weight", "9", "sine", "'sinus+1'"]),
        ("conv_alpha=1", ["conv_alpha", "conv_dim"]),
        ("block_lr=1e-4", ["'block_lr'", "networks.lora"]),
    ],
)
def test_bad_network_args_are_named_with_what_is_expected(pair, tokens):
    with pytest.raises(OptionError) as error:
        NetworkOptions(network_module="networks.lora", network_args=(pair,))
    assert mentions(str(error.value), "--network_args", *tokens)


def test_weights_lists_are_cut_filled_and_thresholded():
    settings = settings_of(
        "down_lr_weight=0.5,,0.1", "mid_lr_weight=2,2,2,9", "block_lr_zero_threshold=0.1"
    )
    assert settings.block_lr_weights == (1.0, 0.5, 0, 0, *[1.0] * 6, 2, 2, 2, *[1.0] * 9, 1.0)


def test_block_options_without_dims_take_the_networks_dim(own_models):
    settings = settings_of("conv_block_dims=" + ",".join(["0"] * 14 + ["2"] * 9), dim=3, alpha=0)
    network = LoraNetwork.from_settings(unet_targets(own_models.unet), settings)
    ranks = {target.name: network.lora(target.name).rank for target in network.targets}
    assert "lora_unet_input_blocks_1_0_in_layers_2" not in ranks
    assert (
        ranks["lora_unet_output_blocks_4_0_in_layers_2"] == 2
        and ranks["lora_unet_input_blocks_4_0_emb_layers_1"] == 3
    )
    assert (
        network.lora("lora_unet_input_blocks_4_0_emb_layers_1").alpha == 3
    )  # alpha 0 means the rank


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def network(own_models):
    torch.manual_seed(1)
    network = LoraNetwork.from_settings(
        targets_of(own_models), settings_of("conv_dim=2", dim=3, alpha=2)
    )
    for lora in network.loras():
        torch.nn.init.normal_(lora.lora_up.weight)
    return network


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt"])
def test_a_file_comes_back_as_it_was(network, own_models, tmp_path, ending):
    path = tmp_path / f"lora{ending}"
    write_lora(path, network.file_tensors(), {"ss_network_dim": "3"}, None)
    tensors = read_lora(path, own_models.unet)
    again = LoraNetwork.from_tensors(targets_of(own_models), tensors, LoraSettings())
    again.load(tensors, source=path, allow_partial=False)
    assert_bit_equal(network.file_tensors(), again.file_tensors())


def test_the_file_has_the_chosen_dtype_everywhere(network, tmp_path):
    write_lora(tmp_path / "x.safetensors", network.file_tensors(), {}, torch.bfloat16)
    header = read_header(tmp_path / "x.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {"BF16"}
    assert set(header.metadata) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_diffusers_spelling_of_unet_names_is_understood(network, own_models, tmp_path):
    rename = Renaming(unet_pairs_of_config(own_models.unet.config))
    paths = {
        f"lora_unet_{p.replace('.', '_')}": f"lora_unet_{rename(p).replace('.', '_')}"
        for p, _ in own_models.unet.named_modules()
        if p
    }
    tensors = network.file_tensors()
    respelt = {
        f"{paths.get(name.split('.')[0], name.split('.')[0])}.{name.split('.', 1)[1]}": tensor
        for name, tensor in tensors.items()
    }
    assert any("down_blocks_1_attentions_0" in name for name in respelt)
    write_safetensors(tmp_path / "x.safetensors", respelt, {})
    assert read_lora(tmp_path / "x.safetensors", own_models.unet).keys() == tensors.keys()


def changed(tensors: dict, kind: str) -> dict:
    tensors = dict(tensors)
    name = "lora_unet_middle_block_1_proj_in.lora_down.weight"
    if kind == "a key dropped":
        del tensors[name]
    elif kind == "a key renamed":
        tensors["lora_unet_middle_block_9_proj_in.lora_down.weight"] = tensors.pop(name)
    elif kind == "a key resized":
        tensors[name] = tensors[name][:2]
    return tensors


@pytest.mark.parametrize(
    "kind, tokens",
    [
        ("a key dropped", ["1", "missing|lacks|absent"]),
        ("a key renamed", ["1", "lora_unet_middle_block_9"]),
        ("a key resized", ["1", "shape", "[2, 128]", "[3, 128]"]),
    ],
)
def test_fault_19_a_file_that_doesnt_fit_is_told_with_counts_and_names(
    kind, tokens, network, own_models
):
    tensors = changed(network.file_tensors(), kind)
    with pytest.raises(OptionError) as error:
        network.load(tensors, source=Path("x"), allow_partial=False)
    assert mentions(
        str(error.value),
        "--network_weights",
        "lora_unet_middle_block_1_proj_in",
        "--allow_partial",
        *tokens,
    )
    network.load(tensors, source=Path("x"), allow_partial=True)


def test_fault_19_a_file_of_which_nothing_fits_is_always_refused(network):
    with pytest.raises(OptionError, match=mentioning("--network_weights", "1", "696")):
        network.load(
            {"lora_unet_else.lora_down.weight": torch.zeros(2, 2)},
            source=Path("x"),
            allow_partial=True,
        )


def test_a_files_alpha_is_used_and_saved(network):
    tensors = {
        name: torch.tensor(0.5) if name.endswith(".alpha") else tensor
        for name, tensor in network.file_tensors().items()
    }
    network.load(tensors, source=Path("x"), allow_partial=False)
    assert {lora.alpha for lora in network.loras()} == {0.5}


@pytest.mark.parametrize("conv", [False, True])
def test_the_norm_of_a_change_is_limited_to_what_was_asked_for(conv):
    """By hand: the norm of (alpha / r) up @ down, and both factors times the root of limit / norm."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 5, 3) if conv else torch.nn.Linear(6, 5)
    lora = LoraModule(layer, 3, 1.5)
    torch.nn.init.normal_(lora.lora_up.weight)

    def change() -> torch.Tensor:
        return 0.5 * lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1)

    before, up = change().detach(), lora.lora_up.weight.detach().clone()
    norm = before.norm().item()
    assert lora.limit_norm(norm * 2).item() == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(change(), before)
    lora.limit_norm(norm / 4)
    torch.testing.assert_close(change(), before / 4)
    torch.testing.assert_close(lora.lora_up.weight, up / 2)


def test_a_module_that_changes_nothing_yet_stays_as_it_is():
    lora = LoraModule(torch.nn.Linear(6, 5), 3, 1.0)
    down = lora.lora_down.weight.detach().clone()
    lora.limit_norm(0.1)
    assert torch.equal(lora.lora_down.weight, down) and not lora.lora_up.weight.any()
