"""Networks at inference: golden 07 attached, merged and fused; kinds against LyCORIS; keys against Diffusers; regions."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_models
from tolerance import assert_network

from library.errors import OptionError
from library.models import text_encoders
from library.safetensors_io import load_tensors, write_safetensors
from networks.inference.adapters import AppliedNetworks
from networks.inference.apply import matched_modules
from networks.inference.deltas import unknown_tensors, weight_delta
from networks.inference.key_formats import every_layer, modules_in_file
from networks.inference.options import AppliedNetworkOptions

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return load_tensors(GOLDEN / "07_lora_tiny.safetensors")[0]


@pytest.fixture(scope="module")
def golden_lora(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "golden.safetensors"
    write_safetensors(
        path, {n.removeprefix("lora."): t for n, t in golden.items() if n.startswith("lora.")}, {}
    )
    return path


def predicted(models, golden):
    with torch.no_grad():
        return models.unet(*(golden[name] for name in ("latents", "timesteps", "context", "y")))


# ---------------------------------------------------------------------------------------------------------- three ways


@pytest.mark.parametrize("way", [{}, {"network_pre_calc": True}])
def test_golden_07_at_every_multiplier_and_0_restores_the_model_bit_for_bit(
    way, golden, golden_lora, own_models
):
    plain = predicted(own_models, golden)
    networks = AppliedNetworks(
        AppliedNetworkOptions(network_weights=(golden_lora,), **way), own_models
    )
    for name in (name for name in golden if name.startswith("unet_out.mult")):
        networks.set_multipliers([float(name.removeprefix("unet_out.mult"))])
        assert_network(predicted(own_models, golden), golden[name], name)
    networks.set_multipliers(None)
    with torch.no_grad():
        ids = [golden[f"input_ids{n}"].view(-1, 1, 77) for n in (1, 2)]
        text = text_encoders.encode(*ids, *own_models.text_encoders)
    for found, name in zip(text, ("hidden1", "hidden2", "pool"), strict=True):
        assert_network(found, golden[next(n for n in golden if name in n)])
    networks.set_multipliers([0.0])
    assert torch.equal(predicted(own_models, golden), plain)


@pytest.mark.numeric
def test_merged_and_attached_networks_add_up(golden, golden_lora, own_models):
    """Twice at 0.25, once merged and once attached, equals once at 0.5; the merged one's multiplier has no effect."""
    options = AppliedNetworkOptions(
        network_weights=(golden_lora, golden_lora),
        network_mul=(0.25, 0.25),
        network_merge_n_models=1,
    )
    networks = AppliedNetworks(options, own_models)
    found = predicted(own_models, golden)
    other = open_models(own_models.checkpoint.path)
    AppliedNetworks(
        AppliedNetworkOptions(network_weights=(golden_lora,), network_mul=(0.5,)), other
    )
    assert_network(found, predicted(other, golden))
    networks.set_multipliers([9.0, 0.25])
    assert torch.equal(predicted(own_models, golden), found)


# --------------------------------------------------------------------------------------------------------------- kinds

LINEAR, CONVOLUTION = torch.nn.Linear(12, 20), torch.nn.Conv2d(8, 12, 3, padding=1)


@pytest.mark.numeric
@pytest.mark.parametrize("layer", [LINEAR, CONVOLUTION], ids=["linear", "conv"])
@pytest.mark.parametrize(
    "kind, module", [("locon", "LoConModule"), ("loha", "LohaModule"), ("lokr", "LokrModule")]
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_tucker": True}, {"weight_decompose": True}, {"weight_decompose": True, "wd_on_out": False}, {"use_scalar": True}],
    ids=["plain", "tucker", "dora", "dora of inputs", "scalar"],
)  # fmt: skip
def test_every_kind_gives_the_delta_of_lycoris(kind, module, settings, layer):
    if "use_tucker" in settings and layer is LINEAR:
        pytest.skip("only convolutions have a Tucker decomposition")
    library = pytest.importorskip(f"lycoris.modules.{kind}")
    torch.manual_seed(0)
    theirs = getattr(library, module)("x", layer, 1.0, 4, 2.0, **settings).eval()
    for name, parameter in theirs.named_parameters():
        if "dora" in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
        else:
            parameter.data.normal_()
    tensors = (
        theirs.custom_state_dict() if hasattr(theirs, "custom_state_dict") else theirs.state_dict()
    )
    x = torch.randn(2, 12) if layer is LINEAR else torch.randn(2, 8, 5, 5)
    forward = layer.forward
    theirs.apply_to()
    expected = layer(x)
    layer.forward = forward
    assert not unknown_tensors(tensors)
    weight = layer.weight.detach() + weight_delta(tensors, layer.weight.detach())
    found = torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, (x,))
    assert_network(found, expected)


@pytest.mark.numeric
def test_dora_equals_peft(own_models, tmp_path):
    """A DoRA of one layer that PEFT made, with PEFT's keys."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = own_models.unet.get_submodule("input_blocks.4.1.transformer_blocks.0.attn1.to_q")
    model = torch.nn.ModuleDict(
        {"to_q": torch.nn.Linear(layer.in_features, layer.out_features, bias=False)}
    )
    model["to_q"].weight.data.copy_(layer.weight)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], use_dora=True)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
        if "magnitude" in name:
            parameter.data *= 1.3
    tensors = {
        name.replace("base_model.model.to_q", f"base_model.model.{path}"): tensor
        for name, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    tensors[f"base_model.model.{path}.alpha"] = torch.tensor(2.0)
    write_safetensors(
        tmp_path / "dora.safetensors", {n: t.contiguous() for n, t in tensors.items()}, {}
    )
    x = torch.randn(3, layer.in_features)
    expected = wrapped.base_model.model["to_q"](x)
    AppliedNetworks(
        AppliedNetworkOptions(network_weights=(tmp_path / "dora.safetensors",)), own_models
    )
    assert_network(layer(x), expected)


# --------------------------------------------------------------------------------------------------------- key formats


@pytest.mark.numeric
def test_diffusers_and_peft_keys_give_the_same_network(golden, golden_lora, own_models, tmp_path):
    """By Diffusers' own converter, with the alphas in the metadata as Diffusers saves them."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader

    tensors = {
        n: t
        for n, t in load_tensors(golden_lora)[0].items()
        if "lora_unet" in n and "_1_transformer_blocks" in n
    }
    write_safetensors(tmp_path / "kohya.safetensors", tensors, {})
    layers = every_layer(own_models.unet, own_models.text_encoders)

    def read(name):
        return matched_modules(
            tmp_path / name, layers, own_models.unet, flag="--network_weights", allow_partial=False
        )

    ours = read("kohya.safetensors")
    diffusers, alphas = Loader.lora_state_dict(
        {k: v.clone() for k, v in tensors.items()}, unet_config=_Config()
    )
    one = next(iter(alphas.values()))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": one, "unet.r": 3})}
    write_safetensors(tmp_path / "diffusers.safetensors", diffusers, metadata)
    theirs = read("diffusers.safetensors")
    assert theirs.keys() == ours.keys() and all(name.startswith("lora_unet_") for name in ours)
    by_name = {target.name: target.layer.weight for target in layers}
    for name, tensors in ours.items():
        assert_network(
            weight_delta(theirs[name], by_name[name]), weight_delta(tensors, by_name[name])
        )


@pytest.mark.numeric
def test_alphas_are_read_from_the_configuration_in_pefts_folder(golden_lora, own_models, tmp_path):
    """Of one module that PEFT saves: its alpha, and that of rank-stabilized LoRA."""
    import peft

    name = "input_blocks.4.1.proj_in"
    layer = own_models.unet.get_submodule(name)
    layers = every_layer(own_models.unet, own_models.text_encoders)
    for rslora in (False, True):
        config = peft.LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=["proj_in"],
            init_lora_weights=False,
            use_rslora=rslora,
        )
        model: Any = torch.nn.ModuleDict({"input_blocks": torch.nn.ModuleDict({"4": torch.nn.ModuleDict({"1": torch.nn.ModuleDict({"proj_in": copy.deepcopy(layer)})})})})  # fmt: skip
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
        delta = model.get_submodule(name).get_delta_weight("default")
        read = matched_modules(
            tmp_path / "adapter_model.safetensors",
            layers,
            own_models.unet,
            flag="--network_weights",
            allow_partial=False,
        )
        (tensors,) = read.values()
        assert_network(weight_delta(tensors, layer.weight), delta.detach())


class _Config:
    """What Diffusers' converter needs of a U-Net's configuration: SDXL's blocks."""

    layers_per_block = 2


@pytest.mark.parametrize(
    "key, module, part",
    [
        ("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight", "lora_unet_input_blocks_4_1_proj_in", "lora_down.weight"),
        ("unet.up_blocks.0.attentions.1.proj_out.lora.up.weight", "lora_unet_output_blocks_1_1_proj_out", "lora_up.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
         "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0", "lora_down.weight"),
        ("base_model.model.mid_block.resnets.1.conv1.lora_B.default.weight", "lora_unet_middle_block_2_in_layers_2", "lora_up.weight"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_up.weight"),
        ("text_encoder_2.encoder.layers.1.mlp.fc1.lora_magnitude_vector", "lora_te2_text_model_encoder_layers_1_mlp_fc1", "dora_scale"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora_unet_middle_block_1_proj_in", "lora_down.weight"),
    ],
)  # fmt: skip
def test_keys_of_other_programs(key, module, part, golden_models, tmp_path):
    write_safetensors(tmp_path / "one.safetensors", {key: torch.zeros(2, 2)}, {})
    found = modules_in_file(
        tmp_path / "one.safetensors", golden_models.unet, flag="--network_weights"
    )
    assert {name: list(parts) for name, parts in found.items()} == {module: [part]}


def test_a_file_that_does_not_fit_is_refused_with_counts_unless_partial(
    golden_lora, own_models, tmp_path
):
    tensors, _ = load_tensors(golden_lora)
    changed = {**tensors, "lora_unet_nowhere.lora_down.weight": torch.zeros(2, 4), "lora_unet_nowhere.lora_up.weight": torch.zeros(4, 2)}  # fmt: skip
    up = next(name for name in tensors if name.endswith("to_q.lora_up.weight"))
    changed[up] = torch.zeros(7, 3)
    changed["lora_unet_odd.oft_blocks"] = torch.zeros(2, 2, 2)
    write_safetensors(tmp_path / "other.safetensors", changed, {})
    options = {"network_weights": (tmp_path / "other.safetensors",)}
    with pytest.raises(
        OptionError,
        match=r"1 of its \d+ modules .*\(lora_unet_odd\); 1 of .*nowhere.*; 1 of .*--allow_partial",
    ):
        AppliedNetworks(AppliedNetworkOptions(**options), own_models)
    AppliedNetworks(AppliedNetworkOptions(**options, allow_partial=True), own_models)
    write_safetensors(
        tmp_path / "other.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(1, 2), "lora_unet_x.lora_up.weight": torch.zeros(2, 1)}, {}
    )  # fmt: skip
    with pytest.raises(
        OptionError,
        match=r"--network_weights .*other\.safetensors: .*\b1 of its 1 modules .*lora_unet_x",
    ):
        AppliedNetworks(AppliedNetworkOptions(**options, allow_partial=True), own_models)
    write_safetensors(
        tmp_path / "other.safetensors", {"model.diffusion_model.out.0.weight": torch.zeros(2)}, {}
    )
    with pytest.raises(
        OptionError, match=r"--network_weights .*other\.safetensors: .*LoRA, LoHa or LoKr"
    ):
        AppliedNetworks(AppliedNetworkOptions(**options, allow_partial=True), own_models)


# ------------------------------------------------------------------------------------------------------------- regions


def test_regional_networks_by_hand(golden, golden_lora, own_models):
    """With strength 0 the output is the model's; with half masks each network changes its own half most."""
    x, t, context, vector = (golden[name][:1] for name in ("latents", "timesteps", "context", "y"))
    rows = [value.expand(2, *value.shape[1:]) for value in (x, t, context, vector)]
    with torch.no_grad():
        plain = own_models.unet(*rows)
    options = AppliedNetworkOptions(network_weights=(golden_lora, golden_lora))
    networks = AppliedNetworks(options, own_models, is_regional=True)
    assert networks.is_regional
    height, width = x.shape[2] * 8, x.shape[3] * 8

    def predict(mask, strengths):
        networks.set_multipliers(strengths)
        at = networks.prepare_batch(
            guide_images=(), sub_contexts=[context, context], mask=mask, num_branches=2
        )
        with torch.no_grad():
            return own_models.unet(*rows, at(0, 4))

    halves = torch.zeros(height, width, 3, dtype=torch.uint8)
    halves[:, : width // 2, 0], halves[:, width // 2 :, 1] = 255, 255
    torch.testing.assert_close(
        predict(halves, [0.0, 0.0]), plain, rtol=0, atol=1e-2
    )  # the 1e-4 added to the sum of masks
    left = (predict(halves, [1.0, 0.0]) - plain)[1].abs().mean(dim=(0, 1))
    right = (predict(halves, [0.0, 1.0]) - plain)[1].abs().mean(dim=(0, 1))
    half = x.shape[3] // 2
    assert left[:half].sum() > left[half:].sum() and right[half:].sum() > right[:half].sum()
    with pytest.raises(OptionError, match=r"--mask_path: 2 networks .* AND.* 1$"):
        networks.prepare_batch(guide_images=(), sub_contexts=[context], mask=halves, num_branches=2)


@pytest.mark.numeric
def test_merged_networks_have_no_region(golden, golden_lora, own_models):
    options = AppliedNetworkOptions(
        network_weights=(golden_lora, golden_lora), network_merge_n_models=1
    )
    networks = AppliedNetworks(options, own_models, is_regional=True)
    rows = [
        golden[name][:1].expand(2, *golden[name].shape[1:])
        for name in ("latents", "timesteps", "context", "y")
    ]
    everywhere = torch.zeros(*(8 * side for side in rows[0].shape[2:]), 3, dtype=torch.uint8)
    networks.prepare_batch(
        guide_images=(), sub_contexts=[rows[2][:1]], mask=everywhere, num_branches=2
    )  # one sub-prompt is enough
    networks.set_multipliers([9.0, 0.0])
    with torch.no_grad():
        without = own_models.unet(*rows)
        networks.set_multipliers([9.0, 1.0])
        assert not torch.equal(own_models.unet(*rows), without)
    options = AppliedNetworkOptions(network_weights=(golden_lora,), network_merge=True)
    assert not AppliedNetworks(
        options, open_models(own_models.checkpoint.path), is_regional=True
    ).is_regional


@pytest.mark.parametrize("sides", [(40, 32), (28, 60)])
def test_regions_keep_their_position_on_feature_maps_of_another_aspect_ratio(
    sides, golden_lora, own_models
):
    """Gradual Latent shrinks 416x608 to 32x40 latents, and 1120x576 to 60x28: the left half stays the left half."""
    networks = AppliedNetworks(
        AppliedNetworkOptions(network_weights=(golden_lora, golden_lora)),
        own_models,
        is_regional=True,
    )
    height, width = {(40, 32): (608, 416), (28, 60): (576, 1120)}[sides]
    mask = torch.zeros(height, width, 3, dtype=torch.uint8)
    mask[:, : width // 2, 0], mask[:, width // 2 :, 1] = 255, 255
    torch.manual_seed(0)
    x, context, vector = torch.randn(1, 4, *sides), torch.randn(1, 77, 192), torch.randn(1, 1664)
    networks.prepare_batch(
        guide_images=(), sub_contexts=[context, context], mask=mask, num_branches=1
    )

    def predict(*strengths):
        networks.set_multipliers(strengths)
        with torch.no_grad():
            return own_models.unet(x, torch.tensor([500]), context, vector)

    changed = (predict(1.0, 0.0) - predict(0.0, 0.0)).abs().mean(dim=(0, 1))
    quarter = sides[1] // 4
    assert changed[:, :quarter].mean(dim=1).min() > changed[:, -quarter:].mean(dim=1).max(), (
        "in every row"
    )


def test_text_encoders_use_only_the_network_of_the_sub_prompt(golden_lora, own_models):
    networks = AppliedNetworks(
        AppliedNetworkOptions(network_weights=(golden_lora, golden_lora)),
        own_models,
        is_regional=True,
    )

    def encoded():
        with torch.no_grad():
            return own_models.encode_texts(["a red square"], 75).pooled

    networks.set_multipliers([0.5, 2.0])
    both = encoded()
    networks.set_multipliers([0.5, 2.0], sub_prompt=0)
    first = encoded()
    networks.set_multipliers([0.5, 2.0], sub_prompt=1)
    second = encoded()
    networks.set_multipliers([0.0, 2.0])
    assert torch.equal(encoded(), second)
    assert not torch.equal(first, second) and not torch.equal(both, second)


def test_masks_by_channel_and_by_color_code():
    from networks.inference.regional import masks_of

    mask = torch.zeros(1, 4, 3, dtype=torch.uint8)
    mask[0, 0, 0], mask[0, 1, 1], mask[0, 2, :2] = 255, 255, 255
    by_channel = masks_of(mask, 3, None)
    assert by_channel[:, 0].tolist() == [
        [1, 0, 1, 0],
        [0, 1, 1, 0],
        [1, 1, 1, 1],
    ]  # an empty region is everywhere
    by_code = masks_of(mask, 3, 7)
    assert by_code[:, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


# ---------------------------------------------------------------------------------------------------------- embeddings


def test_embedding_files_of_each_format_are_tokens(own_models, tmp_path):
    widths = (64, 128)
    torch.manual_seed(0)
    rows = [torch.randn(2, width) for width in widths]
    write_safetensors(tmp_path / "xboth.safetensors", {"clip_l": rows[0], "clip_g": rows[1]}, {})
    torch.save({"string_to_param": {"*": rows[0]}}, tmp_path / "xolder.pt")
    torch.save({"clip_l": rows[0], "clip_g": rows[1]}, tmp_path / "xdict.pt")
    files = (tmp_path / "xboth.safetensors", tmp_path / "xolder.pt", tmp_path / "xdict.pt")
    AppliedNetworks(AppliedNetworkOptions(textual_inversion_embeddings=files), own_models)
    assert len(own_models.tokenizers[0].ids("xboth xolder")) == 4
    with torch.no_grad():
        one, two, three = (
            own_models.encode_texts([f"a {word} cat"], 75) for word in ("xboth", "xdict", "xolder")
        )
    assert torch.equal(one.hidden_1, two.hidden_1) and torch.equal(one.pooled, two.pooled)
    assert torch.equal(one.hidden_1, three.hidden_1) and not torch.equal(one.pooled, three.pooled)


def test_a_bundled_embedding_is_loaded_unless_its_own_file_is(golden_lora, own_models, tmp_path):
    torch.manual_seed(0)
    rows = {"clip_l": torch.randn(2, 64), "clip_g": torch.randn(2, 128)}
    bundled = {f"bundle_emb.zyx.{name}": tensor for name, tensor in rows.items()}
    write_safetensors(
        tmp_path / "lora.safetensors", {**load_tensors(golden_lora)[0], **bundled}, {}
    )
    write_safetensors(
        tmp_path / "zyx.safetensors", {name: -tensor for name, tensor in rows.items()}, {}
    )

    def pooled(**words):
        models = open_models(own_models.checkpoint.path)
        AppliedNetworks(
            AppliedNetworkOptions(network_weights=(tmp_path / "lora.safetensors",), **words), models
        )
        assert len(models.tokenizers[0].ids("zyx")) == 2
        with torch.no_grad():
            return models.encode_texts(["a zyx cat"], 75).pooled

    assert not torch.equal(
        pooled(), pooled(textual_inversion_embeddings=(tmp_path / "zyx.safetensors",))
    )
    # A token whose name another embedding uses for one of its vectors changes neither tokenizer.
    write_safetensors(
        tmp_path / "zyx1.safetensors", {name: tensor[:1] for name, tensor in rows.items()}, {}
    )
    options = AppliedNetworkOptions(
        network_weights=(tmp_path / "lora.safetensors",),
        textual_inversion_embeddings=(tmp_path / "zyx1.safetensors",),
    )
    AppliedNetworks(options, own_models)
    first, second = (tokenizer.ids("zyx") for tokenizer in own_models.tokenizers)
    assert first == second and len(first) > 1 and max(first) < 49408


def test_embedding_files_that_do_not_fit_are_refused(own_models, tmp_path):
    def refused(tensors, text, name="word.safetensors"):
        write_safetensors(tmp_path / name, tensors, {})
        with pytest.raises(OptionError, match=text):
            AppliedNetworks(
                AppliedNetworkOptions(textual_inversion_embeddings=(tmp_path / name,)), own_models
            )

    refused({"clip_l": torch.zeros(1, 768)}, r"clip_l .*\[1, 768\].*clip_l \[n, 64\]")
    refused({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(2, 128)}, r"vectors.*'clip_g': 2")
    refused({"clip_l": torch.full((1, 64), torch.nan)}, "clip_l .*NaN")
    refused(
        {"clip_l": torch.zeros(1, 64)},
        "know already.*give the file another name",
        "cat.safetensors",
    )
    (tmp_path / "bad.pt").write_bytes(b"no pickle")
    with pytest.raises(OptionError, match=r"bad\.pt"):
        AppliedNetworks(
            AppliedNetworkOptions(textual_inversion_embeddings=(tmp_path / "bad.pt",)), own_models
        )


# -------------------------------------------------------------------------------------------------------- control nets


def test_control_nets_add_up_and_end_after_their_share_of_the_steps(golden_models, tmp_path):
    golden, _ = load_tensors(GOLDEN / "08_lllite_tiny.safetensors")
    path = tmp_path / "lllite.safetensors"
    write_safetensors(
        path,
        {n.removeprefix("lllite."): t for n, t in golden.items() if n.startswith("lllite.")},
        {},
    )
    options = AppliedNetworkOptions(
        control_net_lllite_models=(path, path),
        control_net_multipliers=(0.5,),
        control_net_ratios=(1.0, 0.5),
    )
    networks = AppliedNetworks(options, golden_models)
    guide = golden["cond_image"]
    at = networks.prepare_batch(
        guide_images=[guide, guide], sub_contexts=(), mask=None, num_branches=1
    )
    inputs = [golden[name] for name in ("latents", "timesteps", "context", "y")]
    with torch.no_grad():
        assert_network(golden_models.unet(*inputs, at(3, 4)), golden["out.mult0.5"])
        both = golden_models.unet(*inputs, at(2, 4))
    assert (both - golden["out.mult0.5"]).abs().max() > 1e-3
    assert at(0, 4) is at(2, 4)  # the control inputs of all steps are one object
    doubled = networks.prepare_batch(
        guide_images=[guide, guide], sub_contexts=(), mask=None, num_branches=2
    )
    with torch.no_grad():
        twice = golden_models.unet(*(torch.cat([value, value]) for value in inputs), doubled(3, 4))
    assert_network(twice, torch.cat([golden["out.mult0.5"]] * 2))
    assert (
        networks.prepare_batch(guide_images=(), sub_contexts=(), mask=None, num_branches=2)(0, 4)
        is None
    )


@pytest.mark.parametrize(
    "options, text",
    [
        ({"network_module": ("networks.lora",)}, "1 networks, but --network_weights has 0 files"),
        ({"network_module": ("networks.oft",), "network_weights": (GOLDEN / "02_unet.json",)}, "networks.oft: "),
        ({"network_weights": (Path("nowhere.safetensors"),)}, "no such file"),
        ({"network_mul": (1.0,)}, "--network_mul: 1 values for 0 files"),
        ({"network_pre_calc": True, "network_regional_mask_max_color_codes": 4}, "weights have no regions"),
    ],
)  # fmt: skip
def test_mistakes_in_options_are_reported(options, text):
    with pytest.raises(OptionError, match=text):
        mistakes = list(AppliedNetworkOptions(**options).mistakes())
        raise OptionError("; ".join(mistake.text for mistake in mistakes))
