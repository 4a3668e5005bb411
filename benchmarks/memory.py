"""What a step of the five bars takes on a GPU, compared with the estimate; SDXL base, one image of 1024x1024, random values.

    python benchmarks/memory.py --model sdxl_random_fp16.safetensors    (benchmarks/make_full_size.py makes it)

The difference is to be at most a tenth. Each bar runs in a process of its own, so that nothing of the one before is left.
"""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import OptionError, run
from library.options import OptionGroup, Options, option, read_options
from library.training.options.compatibility import COMMON_TRAINING
from library.training.options.tasks import FineTuneOptions, PivotalOptions
from networks.options import NetworkOptions

GIB = 1 << 30
GROUPS = {
    "fine_tune.FineTune": (FineTuneOptions,),
    "network.NetworkTask": (NetworkOptions, PivotalOptions),
}
FILES = ["--pretrained_model_name_or_path", "sdxl.safetensors", "--output_dir", "out"]
EVERYWHERE = [
    "--mixed_precision",
    "bf16",
    "--gradient_checkpointing",
    "--cache_latents",
    "--cache_text_encoder_outputs",
]
FULL = [
    *EVERYWHERE, "--full_bf16", "--fused_backward_pass", "--optimizer_type", "Adafactor", "--optimizer_args", "scale_parameter=False",
    "relative_step=False", "warmup_init=False",
]  # fmt: skip
LORA = [
    *EVERYWHERE,
    "--network_module",
    "networks.lora",
    "--network_dim",
    "16",
    "--network_train_unet_only",
]
# name -> (GiB of tensors at most, task, words)
BARS = {
    "full": (7.0, "fine_tune.FineTune", FULL),
    "full away": (
        4.0,
        "fine_tune.FineTune",
        [*FULL, "--blocks_to_swap", "60", "--optimizer_offload", "--cpu_offload_checkpointing"],
    ),
    "lora": (6.2, "network.NetworkTask", LORA),
    "fp8": (4.0, "network.NetworkTask", [*LORA, "--fp8_base"]),
    "nf4": (3.1, "network.NetworkTask", [*LORA, "--base_quant", "nf4"]),
}


def options_of(task: str, words: list[str]) -> Options:
    """What these words ask of its script."""
    return read_options("", [*GROUPS[task], *COMMON_TRAINING], [*FILES, *words])


def kind_of(task: str) -> Any:
    """A Task's class."""
    module, _, name = task.rpartition(".")
    return getattr(importlib.import_module(f"library.training.tasks.{module}"), name)


def plan_of(task: str, words: list[str], checkpoint: Any, device: Any) -> Any:
    """Return the RunPlan of these words, for one image of 1024x1024."""
    from library.data.buckets import Buckets, BucketSettings
    from library.data.captions import CaptionSettings
    from library.data.samples import DatasetConfig, PixelSettings, Sample, Subset
    from library.data.scan import Dataset
    from library.size import Size
    from library.training.setup.inputs import RunInputs
    from library.training.setup.plan import make_plan

    buckets = BucketSettings(resolution=Size(1024, 1024))
    subset = Subset(Path("images"), 1, CaptionSettings(), PixelSettings())
    fit = Buckets(buckets).fit(Size(1024, 1024))
    sample = Sample("images/a.png", "", "", subset, 0, Size(1024, 1024), fit, "images/a", 1)
    dataset = Dataset(DatasetConfig(1, buckets, (subset,)), (sample,))
    inputs = RunInputs(checkpoint, False, False, (dataset,), None)  # type: ignore[arg-type]
    return make_plan(kind_of(task), options_of(task, words), inputs, device, world_size=1, seed=0)


@dataclass(frozen=True)
class MemoryBenchmarkOptions(OptionGroup):
    """Benchmark"""

    model: Path | None = option(None, "an SDXL base model; its numbers don't matter")
    bar: str | None = option(None, "measure this bar alone, in this process")


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__ or "", [MemoryBenchmarkOptions], argv)[MemoryBenchmarkOptions]
    if chosen.model is None or not chosen.model.is_file():
        raise OptionError("--model: give the SDXL base model to measure")
    import torch

    if not torch.cuda.is_available():
        raise OptionError("there is no CUDA device to measure on")
    if chosen.bar is not None:
        measure_bar(chosen.bar, chosen.model)
        return
    print(
        f"{'':12}{'bar':>8}{'estimated':>12}{'measured':>12}{'difference':>12}   GiB, {torch.cuda.get_device_name()}"
    )
    for name in BARS:
        subprocess.run(
            [sys.executable, __file__, "--model", str(chosen.model), "--bar", name], check=True
        )


def measure_bar(name: str, model: Path) -> None:
    """Print a row: what a bar's step is estimated to take, and takes."""
    import torch

    from library.models.checkpoint.reader import open_checkpoint
    from library.training.distributed.launch import start_processes
    from library.training.setup.measure import measure

    most, task, words = BARS[name]
    plan = plan_of(task, words, open_checkpoint(str(model)), torch.device("cuda"))
    estimated = plan.memory().total
    measured = measure(plan, start_processes()).peak
    print(
        f"{name:12}{most:8.1f}{estimated / GIB:12.2f}{measured / GIB:12.2f}{measured / estimated - 1:12.0%}",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
