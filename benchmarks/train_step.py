"""How long one training step of SDXL's U-Net takes, and how much memory: ours and Diffusers with peft under autocast.

    python benchmarks/train_step.py                                     LoRA of rank 16 at batch 1, 4, 8, 16, checkpointing off and on
    python benchmarks/train_step.py --train full                        the U-Net itself
    python benchmarks/train_step.py --resolution 256 --batch_sizes 1 --checkpointing off --steps 3      on a CPU

Weights are random, text and latents ready. Ours and the baseline live in processes of their own and step in turn, so that a
drift of the machine's speed doesn't matter; a ratio above 1 means that ours is faster. FLOPs are counted (2 a multiply-add), and the
machine's limit is what one large matrix product reaches.
"""

import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import RunError, run
from library.options import OptionGroup, option, read_options


@dataclass(frozen=True)
class StepOptions(OptionGroup):
    """What is measured"""

    train: str = option(
        "lora",
        "what learns: a LoRA of the transformers' 722 layers, or the whole U-Net",
        choices=("lora", "full"),
    )
    rank: int = option(16, "of the LoRA", at_least=1)
    resolution: int = option(1024, "of the square images, in pixels", at_least=64)
    batch_sizes: tuple[int, ...] = option((1, 4, 8, 16), "images a step", metavar="N")
    checkpointing: tuple[str, ...] = option(
        ("off", "on"), "gradient checkpointing, in both", choices=("off", "on")
    )
    precision: str = option("bf16", "dtype to compute in", choices=("no", "bf16"))
    model: str = option("base", "sizes of the U-Net", choices=("base", "tiny"))
    steps: int = option(10, "paired steps of each measurement, after one to warm up", at_least=1)
    compile: bool = option(False, "ours with --torch_compile")
    contenders: tuple[str, ...] = option(
        ("ours", "diffusers"),
        "who is measured; one alone where memory is short",
        choices=("ours", "diffusers"),
    )
    threads: int | None = option(
        None, "threads of a CPU; 1 on a machine that does other things too", at_least=1
    )
    image: str | None = option(
        None, "a PNG or SVG to draw the figures into (needs matplotlib)", metavar="FILE"
    )


class Setup(NamedTuple):
    """One measurement of one contender."""

    contender: str
    train: str
    rank: int
    resolution: int
    batch: int
    checkpointing: bool
    precision: str
    model: str
    compile: bool
    threads: int | None


class Bar(NamedTuple):
    """A measurement, as the image shows it."""

    setup: Setup
    seconds: float
    gibibytes: float


class Taken(NamedTuple):
    """A step's seconds: on the clock; until the host was done (on a CPU: of all its threads)."""

    wall: float
    host: float


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [StepOptions], argv)[StepOptions]
    print(
        f"machine: {described(chosen.threads)}; {chosen.train}, {chosen.resolution} pixels, {chosen.precision}, {chosen.steps} paired steps"
    )
    limit, bars = None, []
    for batch, checkpointing in itertools.product(chosen.batch_sizes, chosen.checkpointing):
        setups = [
            Setup(
                name, chosen.train, chosen.rank, chosen.resolution, batch, checkpointing == "on", chosen.precision,
                chosen.model, chosen.compile and name == "ours", chosen.threads,
            )
            for name in chosen.contenders
        ]  # fmt: skip
        workers = [Worker(setup) for setup in setups]
        try:
            limit = limit or workers[0].ask("limit")
            taken: list[list[Taken]] = [[] for _ in workers]
            for number in range(chosen.steps + 1):
                for worker, kept in zip(workers, taken, strict=True):
                    step = worker.ask("step")
                    if number:
                        kept.append(step)
            for setup, worker, kept in zip(setups, workers, taken, strict=True):
                memory = worker.ask("memory")
                show(setup, kept, worker.ask("flops"), memory, limit)
                bars.append(
                    Bar(setup, statistics.median(step.wall for step in kept), memory / 2**30)
                )
            if len(taken) == 2:
                show_ratios(*taken, *(worker.ask("memory") for worker in workers))
        finally:
            for worker in workers:
                worker.end()
    if chosen.image is not None:
        draw(bars, chosen.image)


def draw(bars: list[Bar], file: str) -> None:
    """Seconds per step and memory of each contender, measured in turn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, sizes) = pyplot.subplots(
        1, 2, figsize=(10, 1.2 + 0.35 * len(bars)), layout="constrained"
    )
    names = [
        f"{setup.contender}, batch {setup.batch}{', checkpointing' if setup.checkpointing else ''}"
        for setup, _, _ in bars
    ]
    colors = ["tab:blue" if setup.contender == "ours" else "tab:gray" for setup, _, _ in bars]
    for axes, values, what in (
        (times, [bar.seconds for bar in bars], "seconds per step"),
        (sizes, [bar.gibibytes for bar in bars], "peak memory, GiB"),
    ):
        axes.bar_label(axes.barh(range(len(bars)), values, color=colors), fmt="%.3g", padding=3)
        axes.set(
            xlabel=what, yticks=range(len(bars)), yticklabels=names, xlim=(0, 1.15 * max(values))
        )
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    sizes.set_yticklabels([])
    figure.savefig(file, dpi=110)


def described(threads: int | None) -> str:
    import platform

    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {threads or torch.get_num_threads()} threads"
    )
    return f"{device}; Python {platform.python_version()}, torch {torch.__version__}"


def show(setup: Setup, taken: list[Taken], flops: float, memory: float, limit: float) -> None:
    wall = statistics.median(step.wall for step in taken)
    host = statistics.median(step.host for step in taken)
    print(
        f"batch {setup.batch:2} checkpointing {'on ' if setup.checkpointing else 'off'} {setup.contender:9} {wall:8.3f} s/step "
        f"{setup.batch / wall:7.3f} images/s {flops / 1e12:8.4f} TFLOP {flops / wall / 1e12:9.4f} TFLOP/s = "
        f"{flops / wall / limit:4.0%} of {limit / 1e12:.4f}; host {host:8.3f} s; {memory / 2**30:6.2f} GiB"
    )


def show_ratios(ours: list[Taken], theirs: list[Taken], memory: float, their_memory: float) -> None:
    def ratio(of: Callable[[Taken], float]) -> float:
        return statistics.median(
            of(their) / of(our) for our, their in zip(ours, theirs, strict=True)
        )

    print(
        f"{'':26}ours is {ratio(lambda step: step.wall):.2f} × as fast, host {ratio(lambda step: step.host):.2f} ×, "
        f"memory {memory / their_memory:.2f} ×"
    )


class Worker:
    """A process with one contender."""

    def __init__(self, setup: Setup):
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(setup, other), daemon=True)
        self._process.start()
        other.close()

    def ask(self, what: str) -> Any:
        self._pipe.send(what)
        found = self._pipe.recv()
        if isinstance(found, str):
            raise RunError(found)
        return found

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


def serve(setup: Setup, pipe: Connection) -> None:
    """Answer the parent's questions until it ends this process."""
    import torch

    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = training(setup, device)
    answers = {
        "step": lambda: next(steps),
        "flops": lambda: counted_flops(setup),
        "memory": lambda: peak_memory(device),
        "limit": lambda: measured_limit(device, setup.precision),
    }
    while True:
        what = pipe.recv()
        try:
            pipe.send(answers[what]())
        except Exception:
            pipe.send(f"{setup.contender}: {traceback.format_exc()}")


def training(setup: Setup, device: Any) -> Iterator[Taken]:
    """Train forever, and report what each step took."""
    import torch

    forward, parameters = build(setup, device)
    if setup.train == "lora":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    else:
        from library.training.optim.optimizers import find_optimizer

        optimizer = find_optimizer("Adafactor")[0](
            parameters, lr=1e-5, relative_step=False, scale_parameter=False
        )
    while True:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        forward().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            host = time.perf_counter() - start
            torch.cuda.synchronize()
        else:
            host = time.process_time() - cpu
        yield Taken(time.perf_counter() - start, host)


def build(setup: Setup, device: Any) -> tuple[Callable[[], Any], list[Any]]:
    """The forward to the loss, and what is trained. On the meta device, where FLOPs are counted, nothing has numbers."""
    import torch

    from tools.tiny_models import SDXL_BASE, TINY

    config = SDXL_BASE if setup.model == "base" else TINY.unet
    compute = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    kept = torch.float32 if setup.train == "full" else compute
    side = setup.resolution // 8
    latents = torch.randn(setup.batch, 4, side, side, device=device)
    noise = torch.randn_like(latents)
    timesteps = torch.full((setup.batch,), 500, device=device)
    context = torch.randn(setup.batch, 77, config.context_channels, device=device)
    vector = torch.randn(setup.batch, config.vector_channels, device=device)
    with torch.device("meta"):
        unet = (ours if setup.contender == "ours" else theirs)(config, setup).to(kept)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if device.type != "meta":
        unet.to_empty(device=device)
        fill(unet)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if setup.contender == "ours":
        if device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        if setup.compile:
            from library.models.compile import compile_blocks

            compile_blocks(unet, "inductor", device)

        def predict() -> Any:
            return unet(latents.to(compute), timesteps, context, vector)
    else:
        sizes = {
            "text_embeds": vector[:, : -6 * 256],
            "time_ids": torch.ones(setup.batch, 6, device=device),
        }

        def predict() -> Any:
            on = setup.precision == "bf16"
            with (
                torch.autocast("cpu" if device.type == "meta" else device.type, compute)
                if on
                else nullcontext()
            ):
                return unet(
                    latents.to(kept), timesteps, context.to(kept), added_cond_kwargs=sizes
                ).sample

    def loss() -> Any:
        return torch.nn.functional.mse_loss(predict().float(), noise)

    unet.train()
    return loss, parameters


def ours(config: Any, setup: Setup) -> Any:
    from library.models.memory.activation_checkpointing import KEPT, ActivationPolicy
    from library.models.unet import UNet
    from networks.lora import LoraNetwork
    from networks.lora_settings import LoraSettings
    from networks.targets import unet_targets

    unet = UNet(config, checkpointing=ActivationPolicy("full") if setup.checkpointing else KEPT)
    if setup.train == "full":
        return unet
    unet.requires_grad_(False)
    network = LoraNetwork.from_settings(
        unet_targets(unet), LoraSettings(dim=setup.rank, alpha=setup.rank)
    )
    network.attach()
    unet.network = network  # so that it goes where the U-Net goes
    return unet


def theirs(config: Any, setup: Setup) -> Any:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    from library.models.checkpoint.writer import unet_folder_config

    unet = UNet2DConditionModel.from_config(unet_folder_config(config))
    if setup.train == "lora":
        unet.requires_grad_(False)
        layers = [
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "ff.net.0.proj",
            "ff.net.2",
            "proj_in",
            "proj_out",
        ]
        unet.add_adapter(LoraConfig(r=setup.rank, lora_alpha=setup.rank, target_modules=layers))
    if setup.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def fill(module: Any) -> None:
    """Weights with variance 1 / inputs, biases at 0, norms as the identity; a LoRA's up projections small, not 0."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                bound = (3 / parameter[0].numel()) ** 0.5 * (
                    0.1 if "lora_up" in name or "lora_B" in name else 1.0
                )
                parameter.uniform_(-bound, bound)


def counted_flops(setup: Setup) -> float:
    """The operations of one step's forward and backward, recomputation among them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def of_addmm(
        into: Any, a: Any, b: Any, **_: Any
    ) -> int:  # the counter knows it only where it isn't in place
        return 2 * a[0] * a[1] * b[1]

    forward, _ = build(setup._replace(compile=False), torch.device("meta"))
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: of_addmm}
    ) as counter:
        forward().backward()
    return float(counter.get_total_flops())


def measured_limit(device: Any, precision: str) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    import torch

    side = 8192 if device.type == "cuda" else 1024
    one = torch.randn(
        side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(one, one)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def peak_memory(device: Any) -> float:
    """Bytes: of the GPU, else of this process."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1.0 if sys.platform == "darwin" else 1024.0
    )


if __name__ == "__main__":
    run(main)
