"""Checkpoint policies and offload: the same numbers to the bit, and fewer bytes kept."""

import pytest
import torch
from live_bytes import LiveBytes
from running import assert_bit_equal, tensors_of, train_network
from torch._subclasses.fake_tensor import FakeTensorMode

from library.models.memory import activation_checkpointing as checkpointing
from library.models.memory.activation_checkpointing import KEPT, ActivationPolicy
from library.models.unet import UNet
from tools.tiny_models import TINY

RAM = torch.device("cpu")
FULL_AWAY, SELECTIVE_AWAY = ActivationPolicy("full", RAM), ActivationPolicy("selective", RAM)


def unet_and_inputs(how, dtype=torch.float32):
    torch.manual_seed(0)
    unet = UNet(TINY.unet, checkpointing=how)
    context, vector = (
        torch.randn(1, 77, TINY.unet.context_channels),
        torch.randn(1, TINY.unet.vector_channels),
    )
    return unet, (torch.randn(1, 4, 16, 8, dtype=dtype), torch.tensor([700]), context, vector)


def output_and_gradients(how, dtype):
    unet, inputs = unet_and_inputs(how, dtype)
    output = unet(*inputs)
    output.square().mean().backward()
    return {
        "output": output,
        **{name: parameter.grad for name, parameter in unet.named_parameters()},
    }


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)]
)
def test_every_policy_and_offload_give_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(checkpointing, "_LEAST_BYTES", 64)  # so that all kinds of tensors leave
    expected = output_and_gradients(KEPT, dtype)
    for how in (ActivationPolicy("full"), ActivationPolicy("selective"), FULL_AWAY, SELECTIVE_AWAY):
        assert_bit_equal(expected, output_and_gradients(how, dtype))


def kept_bytes(how):
    """What a forward leaves on the device for backward: counted without numbers."""
    with FakeTensorMode(), LiveBytes() as live:
        unet, inputs = unet_and_inputs(how)
        before = live.now
        output = unet(*inputs)
        assert output.grad_fn is not None
        return live.now - before


@pytest.mark.long
def test_selective_keeps_less_than_everything_and_full_less_than_that():
    everything, selective, full = (
        kept_bytes(ActivationPolicy(policy)) for policy in (None, "selective", "full")
    )
    assert full < 0.4 * everything and selective < 0.85 * everything


def test_what_left_has_no_place_on_the_device(monkeypatch):
    """The meta device stands for RAM, so that what is there isn't counted."""
    monkeypatch.setattr(checkpointing, "_LEAST_BYTES", 1 << 10)
    assert kept_bytes(ActivationPolicy("full", torch.device("meta"))) < 0.5 * kept_bytes(
        ActivationPolicy("full")
    )


@pytest.mark.parametrize("extra", [
    ["--checkpoint_policy", "selective", "--cpu_offload_checkpointing"],
    pytest.param(["--cpu_offload_checkpointing"], marks=pytest.mark.long),
    pytest.param(["--checkpoint_policy", "selective"], marks=pytest.mark.long),
])  # fmt: skip
def test_a_run_with_them_is_bit_equal(extra, golden_model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "_LEAST_BYTES", 64)
    words = ["--max_train_steps", "1", "--network_dropout", "0.1"]
    plain = train_network(golden_model, images, tmp_path / "plain", *words)
    other = train_network(
        golden_model, images, tmp_path / "other", *words, "--gradient_checkpointing", *extra
    )
    assert_bit_equal(tensors_of(plain), tensors_of(other))
