"""Networks from elsewhere, base weights, preserved outputs, and text encoders that stop."""

import json
import sys

import pytest
import torch
from messages import mentioning, mentions, shows_caching
from running import (
    QUICK,
    arguments,
    assert_bit_equal,
    losses_of,
    run_here,
    tensors_of,
    train_network,
    without,
)
from tolerance import assert_network

import sdxl_train_network
from library.errors import OptionError
from library.models.text_encoders import TextConditioning
from library.safetensors_io import read_header, write_safetensors
from networks.base_weights import BaseWeights
from networks.inference.deltas import weight_delta
from networks.lora import LoraNetwork
from networks.lora_file import read_lora
from networks.lora_settings import LoraSettings
from networks.targets import all_targets

TEXT_TOO = without(QUICK, "--cache_text_encoder_outputs", "--network_train_unet_only")


# ------------------------------------------------------------------------------------------------------------- lycoris


@pytest.mark.parametrize("algo, parts", [
    pytest.param("loha", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}, marks=pytest.mark.long), ("lokr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"}),
])  # fmt: skip
def test_lycoris_trains_for_real(algo, parts, golden_model, images, tmp_path):
    """U-Net and both encoders, in bfloat16 beside float32 weights of theirs; the file goes on being trained."""
    pytest.importorskip("lycoris")
    words = [
        "--network_module",
        "lycoris.kohya",
        "--network_args",
        f"algo={algo}",
        "conv_dim=2",
        "preset=full",
    ]
    words += ["--max_train_steps", "2", "--mixed_precision", "bf16"]
    first = train_network(golden_model, images, tmp_path / "first", *words, quick=TEXT_TOO)
    tensors, metadata = tensors_of(first), read_header(first).metadata
    assert {name.split(".", 1)[1] for name in tensors} == parts
    modules = {name.split(".")[0] for name in tensors}
    for name in (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te2_text_model_encoder_layers_1_mlp_fc2",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_output_blocks_2_2_conv", "lora_unet_middle_block_0_in_layers_2",
    ):  # fmt: skip
        assert name in modules
    assert (
        metadata["ss_network_module"] == "lycoris.kohya"
        and json.loads(metadata["ss_network_args"])["algo"] == algo
    )
    assert metadata["sshs_model_hash"] and all(
        tensor.isfinite().all() for tensor in tensors.values()
    )
    again = train_network(golden_model, images, tmp_path / "again", *words, "--network_weights", first, "--dim_from_weights", quick=TEXT_TOO)  # fmt: skip
    start = "hada_w1_b" if algo == "loha" else "lokr_w2_b"
    later = tensors_of(again)
    moved = [
        name
        for name in tensors
        if name.endswith(start) and not torch.equal(tensors[name], later[name])
    ]
    assert len(moved) > 100


OWN_MODULE = """
import torch
class Scale(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.weight, self.layer, self.on = torch.nn.Parameter(torch.zeros(1)), [layer], 1.0
    def apply_to(self):
        before = self.layer[0].forward
        self.layer[0].forward = lambda x: before(x) * (1 + self.on * self.weight)
class Network(torch.nn.Module):
    def apply_to(self, text_encoder, unet, apply_text_encoder, apply_unet):
        for name, layer in unet.named_modules():
            if name.endswith("attn1.to_q"):
                self.add_module("own_unet_" + name.replace(".", "_"), Scale(layer))
        for scale in self.children(): scale.apply_to()
    def set_multiplier(self, multiplier):
        for scale in self.children(): scale.on = multiplier
    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, learning_rate):
        return [{"params": list(self.parameters()), "lr": unet_lr}]
def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    assert kwargs == {"wanted": "yes"}, kwargs
    return Network()
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(OWN_MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_network", raising=False)


def test_any_module_with_create_network_will_do(golden_model, images, tmp_path, own_module):
    words = [
        "--network_module",
        "own_network",
        "--network_args",
        "wanted=yes",
        "--max_train_steps",
        "2",
    ]
    tensors = tensors_of(train_network(golden_model, images, tmp_path / "out", *words))
    assert tensors and all(
        name.startswith("own_unet_") and tensor.item() != 0 for name, tensor in tensors.items()
    )


def test_arguments_that_the_module_refuses_are_told_before_caching(
    golden_model, images, tmp_path, own_module
):
    words = arguments(golden_model, images, tmp_path / "out", "--network_module", "own_network", "--network_args", "other=1")  # fmt: skip
    done = run_here(sdxl_train_network.main, *words)
    assert done.returncode == 2 and not shows_caching(done.stderr)
    assert mentions(
        done.stderr,
        "error",
        "--network_module",
        "own_network",
        "--network_args",
        "other=1",
        "AssertionError",
    )


# -------------------------------------------------------------------------------------------------------- base weights


@pytest.fixture(scope="module")
def trained_lora(golden_model, tmp_path_factory):
    """A LoRA over everything, convolutions too, with weights that matter."""
    from tools.make_tiny_dataset import make_images

    folder = tmp_path_factory.mktemp("lora")
    make_images(folder / "pictures" / "1_shapes", 2)
    return train_network(golden_model, folder / "pictures", folder / "out", "--network_args", "conv_dim=2", "conv_alpha=1", "--max_train_steps", "3", "--learning_rate", "0.05", quick=TEXT_TOO)  # fmt: skip


def predicted(models) -> torch.Tensor:
    with torch.no_grad():
        text = TextConditioning.of(models.encode_texts(["a red square"], 75))
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        return models.unet(
            x,
            torch.tensor([500]),
            text.context,
            torch.cat([text.pooled, torch.zeros(1, 6 * 256)], dim=1),
        )


@pytest.mark.numeric
def test_merged_base_weights_do_what_the_network_beside_the_model_does(golden_model, trained_lora):
    from conftest import open_models

    plain = predicted(open_models(golden_model))
    merged = open_models(golden_model)
    skeleton = merged.without_weights()
    merged.change = BaseWeights([trained_lora], [0.7], skeleton.unet, skeleton.text_encoders)
    beside = open_models(golden_model)
    targets = all_targets(beside.unet, beside.text_encoders)
    tensors = read_lora(trained_lora, beside.unet)
    network = LoraNetwork.from_tensors(targets, tensors, LoraSettings())
    network.load(tensors, source=trained_lora, allow_partial=False)
    network.attach()
    network.set_multiplier(0.7)
    expected = predicted(beside)
    assert (expected - plain).abs().max() > 1e-2
    assert_network(predicted(merged), expected)


@pytest.mark.numeric
def test_the_change_of_a_convolution_by_hand():
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    change = weight_delta(parts, torch.empty(5, 3, 3, 3))
    x = torch.randn(1, 3, 6, 6)
    expected = 0.5 * torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up)
    assert_network(torch.nn.functional.conv2d(x, change), expected)


def test_base_weights_count_in_the_text_cache_and_change_what_is_trained(
    golden_model, images, trained_lora, tmp_path
):
    disk = ["--cache_text_encoder_outputs_to_disk", "--max_train_steps", "2"]
    plain = train_network(golden_model, images, tmp_path / "plain", *disk)
    caches = {path: path.read_bytes() for path in images.rglob("*_te_outputs.npz")}
    based = train_network(golden_model, images, tmp_path / "based", *disk, "--base_weights", trained_lora, "--base_weights_multiplier", "0.5")  # fmt: skip
    assert caches and all(path.read_bytes() != content for path, content in caches.items())
    assert losses_of(tmp_path / "plain") != losses_of(tmp_path / "based")
    assert tensors_of(plain).keys() == tensors_of(based).keys()


def test_base_weights_that_fit_nothing_are_refused(golden_model, tmp_path):
    from conftest import open_models

    path = tmp_path / "foreign.safetensors"
    names = ["lora_unet_input_blocks_99_1_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    write_safetensors(path, {f"{n}.{part}": torch.ones(1, 1) for n in names for part in ("lora_down.weight", "lora_up.weight")}, {})  # fmt: skip
    skeleton = open_models(golden_model).without_weights()
    with pytest.raises(OptionError, match=mentioning("--base_weights", path, "1", "2", names[0])):
        BaseWeights([path], [], skeleton.unet, skeleton.text_encoders)


# --------------------------------------------------------------------------------- preserved outputs, text that stops


def dataset_file(path, images, attributes: str):
    path.write_text(
        f"[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = {str(images / '2_shapes')!r}\n"
        f"caption_extension = '.txt'\ncustom_attributes = {attributes}\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize(
    "quick", [pytest.param(QUICK, marks=pytest.mark.long), TEXT_TOO], ids=["cached", "text"]
)
def test_preserved_images_are_told_what_the_base_model_makes_of_them(
    quick, golden_model, images, tmp_path
):
    """A new network changes nothing, so its loss there is 0; a trained one is drawn back to it."""
    config = dataset_file(tmp_path / "data.toml", images, "{ diff_output_preservation = true }")
    words = [
        *without(quick, "--enable_bucket"),
        "--dataset_config",
        config,
        "--max_train_steps",
        "3",
    ]
    words = [word for i, word in enumerate(words) if "--train_data_dir" not in (word, words[i - 1])]
    import sdxl_train_network

    def train(output, *extra):
        files = [
            "--pretrained_model_name_or_path",
            golden_model,
            "--output_dir",
            output,
            "--output_name",
            "lora",
        ]
        sdxl_train_network.main([str(word) for word in [*words, *files, *extra]])
        return losses_of(output)

    assert train(tmp_path / "new") == [0.0] * 3
    trained = train_network(golden_model, images, tmp_path / "trained", "--max_train_steps", "2", "--learning_rate", "0.05", quick=quick)  # fmt: skip
    losses = train(tmp_path / "drawn back", "--network_weights", trained, "--max_train_steps", "10")
    assert losses[0] > 1e-4 and sum(losses[-3:]) < sum(losses[:3])


def test_text_encoders_stop_after_their_steps_and_the_unet_goes_on(golden_model, images, tmp_path):
    two = train_network(
        golden_model, images, tmp_path / "two", "--max_train_steps", "2", quick=TEXT_TOO
    )
    three = train_network(golden_model, images, tmp_path / "three", "--max_train_steps", "3", "--stop_text_encoder_training", "2", quick=TEXT_TOO)  # fmt: skip
    early, late = tensors_of(two), tensors_of(three)
    text = {name for name in early if name.startswith("lora_te")}
    assert_bit_equal({n: early[n] for n in text}, {n: late[n] for n in text})
    ups = [
        name for name in early if name.startswith("lora_unet") and name.endswith("lora_up.weight")
    ]
    assert ups and not any(torch.equal(early[name], late[name]) for name in ups)
