"""What small changes are worth: the optimizer's step as one kernel, q, k and v in one product.

    python benchmarks/quick_wins.py [--threads 1]

Medians of 9 runs, in turn; of the host's CPU time on a CPU, of the clock on a card.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import run
from library.options import OptionGroup, option, read_options

if TYPE_CHECKING:
    import torch

RUNS = 9


@dataclass(frozen=True)
class QuickOptions(OptionGroup):
    """What is measured"""

    rank: int = option(4, "of the LoRA whose 1,444 tensors are stepped", at_least=1)
    threads: int | None = option(None, "threads of a CPU; 1 on a machine that does other things too", at_least=1)


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [QuickOptions], argv)[QuickOptions]
    import torch

    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    show("AdamW's step of a LoRA's tensors", steps(device, chosen.rank), device)
    for channels, positions in ((640, 256), (1280, 64), (640, 4096), (1280, 1024)):
        show(f"q, k, v of {positions} positions, {channels} channels", products(device, channels, positions), device)


def steps(device: "torch.device", rank: int) -> dict[str, Callable[[], object]]:
    """AdamW over a LoRA of SDXL's U-Net: tensor by tensor, in lists of tensors, as one kernel."""
    import torch

    from library.models.unet import UNet
    from networks.lora import LoraNetwork, unet_targets
    from networks.options import LoraSettings
    from tools.tiny_models import SDXL_BASE

    with torch.device("meta"):
        network = LoraNetwork.from_settings(unet_targets(UNet(SDXL_BASE)), LoraSettings(dim=rank, alpha=rank))
    parameters = list(network.to_empty(device=device).parameters())
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    kinds = {
        "tensor by tensor": {"foreach": False},
        "in lists": {"foreach": True},
        "one kernel (ours)": {"fused": True},
    }
    return {name: torch.optim.AdamW(parameters, lr=1e-9, **kind).step for name, kind in kinds.items()}


def products(device: "torch.device", channels: int, positions: int) -> dict[str, Callable[[], object]]:
    """The three projections of self-attention and the gradient of their input, as three products and as one."""
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(positions, channels, device=device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(channels, channels, device=device, dtype=dtype) for _ in range(3)]
    joined, ones = torch.cat(weights), torch.ones(positions, channels, device=device, dtype=dtype)
    return {
        "three products (ours)": lambda: torch.autograd.grad([x @ weight.t() for weight in weights], x, [ones] * 3),
        "one product": lambda: torch.autograd.grad((x @ joined.t()).split(channels, dim=1), x, [ones] * 3),
    }


def show(what: str, ways: dict[str, Callable[[], object]], device: "torch.device") -> None:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(RUNS + 1):
        for name, way in ways.items():
            seconds = measured(way, device)
            if number:
                taken[name].append(seconds)
    print(what)
    first = next(iter(taken.values()))
    for name, own in taken.items():
        ratio = statistics.median(one / other for one, other in zip(first, own, strict=True))
        print(f"    {name:24} {statistics.median(own) * 1e3:8.2f} ms, {ratio:.2f} × as fast as the first")


def measured(way: Callable[[], object], device: "torch.device") -> float:
    import torch

    if device.type != "cuda":
        start = time.process_time()
        way()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
