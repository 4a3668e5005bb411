"""Blocks that visit the device, and optimizer state that does: the same bits, in less memory; steps taken where the weights are."""

import shutil

import pytest
import torch
from messages import mentioning
from running import assert_bit_equal, losses_of, tensors_of, train_network
from test_fine_tune import train
from torch import nn

from library import param_group
from library.errors import OptionError
from library.models.memory.activation_checkpointing import ActivationPolicy
from library.models.memory.block_swap import BlockSwapper, largest_blocks
from library.models.unet import UNet
from library.offload import OffloadStream
from tools.tiny_models import TINY

CPU = torch.device("cpu")
FUSED = ["--fused_backward_pass", "--gradient_checkpointing", "--max_train_steps", "2"]
TRACED: list[str] = []


@pytest.fixture(autouse=True)
def small_tensors_are_streamed_too(monkeypatch):
    """The tiny model has no others."""
    monkeypatch.setattr(param_group, "SMALL", 64)


class Traced(OffloadStream):
    """A lane that tells what is sent and fetched."""

    def offload(self, tensor, target):
        TRACED.append("send")
        super().offload(tensor, target)

    def fetch(self, tensor):
        TRACED.append("fetch")
        return super().fetch(tensor)


def tiny_unet(count, *, trained=True):
    torch.manual_seed(0)
    unet = UNet(TINY.unet, checkpointing=ActivationPolicy("full")).requires_grad_(trained)
    if not trained:
        unet.input_blocks[0][0].weight.requires_grad_(True)
    if count:
        unet.activations.streamer = BlockSwapper(
            largest_blocks(unet.blocks, count), Traced(CPU, CPU)
        )
    return unet


def forward(unet):
    draw = torch.Generator().manual_seed(1)
    context, vector = (
        torch.randn(1, *size, generator=draw)
        for size in ((77, TINY.unet.context_channels), (TINY.unet.vector_channels,))
    )
    return unet(torch.randn(1, 4, 16, 8, generator=draw), torch.tensor([700]), context, vector)


def test_a_step_in_backward_is_taken_on_the_device_and_goes_home():
    """Every streamed weight is stepped while it visits, two blocks visit at most, and behind backward all are at home, changed."""
    plain, unet = tiny_unet(0), tiny_unet(12)
    streamer = unet.activations.streamer
    streamed = streamer.tensors
    homes = {id(tensor): tensor.data_ptr() for tensor in unet.parameters()}
    most = []

    def step(parameter: nn.Parameter) -> None:
        if id(parameter) in streamed:
            assert parameter.data_ptr() != homes[id(parameter)], "stepped at home"
            most.append(len(streamer._here) + len(streamer._coming))
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for module in (plain, unet):
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(2):
            forward(module).square().mean().backward()
    assert len(most) >= 2 * len(streamed) and max(most) <= 2
    assert {id(tensor): tensor.data_ptr() for tensor in unet.parameters()} == homes
    assert_bit_equal(dict(plain.named_parameters()), dict(unet.named_parameters()))


def test_frozen_blocks_are_fetched_once_a_direction_and_never_sent():
    unet = tiny_unet(12, trained=False)
    forward(unet)
    TRACED.clear()
    forward(unet).sum().backward()
    tensors = sum(map(len, unet.activations.streamer._tensors))
    last = len(unet.activations.streamer._tensors[-1])
    assert ["fetch"] * (2 * tensors - last) == TRACED  # the last block stays for backward
    with torch.no_grad():
        TRACED.clear()
        forward(unet)
    assert ["fetch"] * tensors == TRACED and not unet.activations.streamer._here


def test_the_largest_blocks_are_streamed_evenly_spread_among_equals():
    sizes = [10, 30, 30, 30, 30, 20]
    blocks = [nn.Linear(size, 1, bias=False) for size in sizes]
    assert [blocks.index(block) for block in largest_blocks(blocks, 2)] == [1, 3]
    assert [blocks.index(block) for block in largest_blocks(blocks, 5)] == [1, 2, 3, 4, 5]
    assert largest_blocks(blocks, 99) == blocks


ADAFACTOR = [
    "--optimizer_type",
    "Adafactor",
    "--optimizer_args",
    "scale_parameter=False",
    "relative_step=False",
    "warmup_init=False",
]
ALL_AWAY = ["--blocks_to_swap", "20", "--optimizer_offload", "--cpu_offload_checkpointing"]


@pytest.mark.long
def test_full_fine_tuning_with_streamed_blocks_and_state_at_home_is_bit_equal(
    golden_model, images, tmp_path
):
    words = [*FUSED, *ADAFACTOR, "--mixed_precision", "bf16", "--full_bf16"]
    plain = train(golden_model, images, tmp_path / "plain", *words)
    streamed = train(golden_model, images, tmp_path / "streamed", *words, *ALL_AWAY)
    assert_bit_equal(tensors_of(plain), tensors_of(streamed))


@pytest.mark.long
@pytest.mark.parametrize("optimizer", [[], ADAFACTOR])
def test_a_run_with_streamed_blocks_resumes_to_the_bit(optimizer, golden_model, images, tmp_path):
    words = [*FUSED, *ALL_AWAY, *optimizer, "--save_state", "--save_every_n_steps", "1"]
    whole = train(golden_model, images, tmp_path / "whole", *words)
    shutil.copytree(
        tmp_path / "whole" / "lora-step00000001-state",
        tmp_path / "again" / "lora-step00000001-state",
    )
    resumed = train(golden_model, images, tmp_path / "again", *words, "--auto_resume")
    assert_bit_equal(tensors_of(whole), tensors_of(resumed))


@pytest.mark.long
@pytest.mark.parametrize("words", [
    ["--blocks_to_swap", "20", "--gradient_checkpointing", "--optimizer_offload"],
    ["--blocks_to_swap", "99", "--gradient_checkpointing", "--base_quant", "nf4"],
    ["--blocks_to_swap", "5", "--gradient_checkpointing", "--fp8_base"],
])  # fmt: skip
def test_networks_beside_streamed_blocks_are_bit_equal(words, golden_model, images, tmp_path):
    quantized = (
        words[words.index("--base_quant") :]
        if "--base_quant" in words
        else [w for w in words if w == "--fp8_base"]
    )
    # In float32, weights would lie in the file's pages, where kernels may round otherwise than in aligned memory.
    common = ["--max_train_steps", "2", "--network_args", "conv_dim=2", "--mixed_precision", "bf16"]
    plain = train_network(golden_model, images, tmp_path / "plain", *common, *quantized)
    streamed = train_network(golden_model, images, tmp_path / "streamed", *common, *words)
    assert_bit_equal(tensors_of(plain), tensors_of(streamed))
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "streamed")


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Lion"])
def test_optimizer_state_at_home_is_bit_equal(optimizer, golden_model, images, tmp_path):
    words = ["--optimizer_type", optimizer, "--max_train_steps", "3"]
    plain = train(golden_model, images, tmp_path / "plain", *words)
    offloaded = train(golden_model, images, tmp_path / "offloaded", *words, "--optimizer_offload")
    assert_bit_equal(tensors_of(plain), tensors_of(offloaded))


def test_what_cant_stream_is_refused(golden_model, images, tmp_path):
    with pytest.raises(
        OptionError, match=mentioning("--blocks_to_swap", "--gradient_checkpointing")
    ):
        train_network(golden_model, images, tmp_path, "--blocks_to_swap", "5")
    with pytest.raises(OptionError, match=mentioning("--blocks_to_swap", "--fused_backward_pass")):
        train(golden_model, images, tmp_path, "--blocks_to_swap", "5", "--gradient_checkpointing")
    with pytest.raises(
        OptionError,
        match=mentioning("--optimizer_offload", "--optimizer_type", "Prodigy", "gradients"),
    ):
        train_network(
            golden_model,
            images,
            tmp_path,
            "--optimizer_type",
            "Prodigy",
            "--learning_rate",
            "1",
            "--optimizer_offload",
        )
