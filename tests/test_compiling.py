"""--torch_compile: the same numbers from few graphs, or a reason why not."""

import pytest
import torch
from running import losses_of, train_network
from torch._dynamo.utils import counters

from library.models import compile as compiling
from library.models.compile import compile_blocks
from networks.lora import LoraNetwork
from networks.lora_settings import LoraSettings
from networks.targets import unet_targets

CPU = torch.device("cpu")


def with_lora(models):
    torch.manual_seed(0)
    network = LoraNetwork.from_settings(unet_targets(models.unet), LoraSettings(dim=2, alpha=2))
    for lora in network.loras():
        torch.nn.init.normal_(lora.lora_up.weight)
    network.attach()
    return models.unet, network


def output_and_gradients(unet, network, height, width):
    generator = torch.Generator().manual_seed(height)
    sizes = unet.config.context_channels, unet.config.vector_channels
    latents = torch.randn(1, 4, height, width, generator=generator)
    context, vector = (
        torch.randn(1, 7, sizes[0], generator=generator),
        torch.randn(1, sizes[1], generator=generator),
    )
    network.zero_grad()
    output = unet(latents, torch.tensor([500]), context, vector)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.numeric
@pytest.mark.long
def test_compiled_blocks_give_the_same_numbers_and_all_buckets_share_their_graphs(own_models):
    unet, network = with_lora(own_models)
    sizes = [(8, 8), (8, 12), (12, 8), (16, 8), (8, 20)]
    expected = [output_and_gradients(unet, network, *size) for size in sizes]
    assert compile_blocks(unet, "aot_eager", CPU)
    counters.clear()
    graphs = []
    for size, own in zip(sizes, expected, strict=True):
        for one, other in zip(output_and_gradients(unet, network, *size), own, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2] and not counters["graph_break"]


@pytest.mark.numeric
@pytest.mark.long
def test_a_run_with_inductor_has_the_losses_of_one_without(golden_model, images, tmp_path):
    few = ["--max_train_steps", "3"]
    train_network(golden_model, images, tmp_path / "plain", *few)
    train_network(golden_model, images, tmp_path / "compiled", *few, "--torch_compile")
    assert losses_of(tmp_path / "compiled") == pytest.approx(
        losses_of(tmp_path / "plain"), rel=1e-4
    )


def test_a_compiler_that_doesnt_work_is_told_with_its_reason_and_nothing_is_compiled(
    own_models, monkeypatch, caplog
):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compiling.torch, "compile", fail)
    assert not compile_blocks(own_models.unet, "inductor", CPU)
    assert all(word in caplog.text for word in ("--torch_compile", "inductor", "no C++ compiler"))
    assert all(module._compiled_call_impl is None for module in own_models.unet.modules())


@pytest.mark.long
def test_a_block_that_cant_be_compiled_runs_as_it_is(own_models):
    unet, network = with_lora(own_models)
    expected = output_and_gradients(unet, network, 8, 8)
    refused = []

    def small_graphs_only(graph, _):
        if len(graph.graph.nodes) > 8:
            refused.append(graph)
            raise RuntimeError("no kernel for this")
        return graph.forward

    try:
        assert compile_blocks(unet, small_graphs_only, CPU)
        for one, other in zip(output_and_gradients(unet, network, 8, 8), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    finally:
        torch._dynamo.reset()
    assert refused
