"""How long a user waits before anything happens: help, mistakes, loading a model, the first step.

    python benchmarks/startup.py                                     without the full-size model
    python benchmarks/startup.py --model sdxl_random_fp16.safetensors (benchmarks/make_full_size.py makes it)

Each row is the median of paired runs: ours and its yardstick in turn, so that a drift of the machine's speed doesn't matter.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import run
from library.options import OptionGroup, option, read_options

ROOT = Path(__file__).resolve().parent.parent

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))

# What any training process must import, and the least that it must make (performance.md: imports are the floor).
FLOOR = "import torch, accelerate; torch.optim.AdamW([torch.zeros(1, requires_grad=True)])"

LOAD = """
import json, resource, sys, time
sys.path.insert(0, {root!r})
import torch
from library.imports import import_diffusers
transformers = __import__("library.imports", fromlist=["x"]).import_transformers()
transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection, import_diffusers().AutoencoderKL
from library.models.checkpoint.reader import open_checkpoint
from library.models.sdxl import SdxlModels
from library.device import Precision

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, start = anonymous(), time.perf_counter()
models = SdxlModels(open_checkpoint({model!r}), Precision.decide("fp16", None, no_half_vae=False), torch.device("cpu"))
modules = [models.unet, *models.text_encoders, models.vae]
total = sum(p.view(torch.uint8).reshape(-1)[::4096].sum().item() for m in modules for p in m.parameters() if p.is_contiguous())
print(json.dumps([time.perf_counter() - start, (anonymous() - before) / 2**20]))
"""

READ = """
import time
start = time.perf_counter()
with open({model!r}, "rb", buffering=0) as file:
    buffer = bytearray(1 << 24)
    while file.readinto(buffer):
        pass
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class BenchmarkOptions(OptionGroup):
    """What is measured"""

    runs: int = option(9, "paired runs of each measurement", at_least=1)
    model: Path | None = option(None, "a full-size checkpoint in float16, for the loading rows")


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [BenchmarkOptions], argv)[BenchmarkOptions]
    for script in SCRIPTS:
        show(
            f"{script} --help",
            seconds(lambda script=script: python(ROOT / script, "--help"), chosen.runs),
            limit=0.5,
        )
    mistake = [ROOT / "sdxl_train_network.py", "--learning_rat", "1", "--mixed_precision", "fp8"]
    show("a mistake told", seconds(lambda: python(*mistake, status=2), chosen.runs), limit=0.5)
    first_step(chosen.runs)
    if chosen.model is not None:
        load(chosen.model, chosen.runs)


def first_step(runs: int) -> None:
    """Complete caches on disk, the tiny model: from start to the end of the first step, against the imports alone."""
    with tempfile.TemporaryDirectory() as folder:
        python(ROOT / "tools" / "make_tiny_sdxl.py", "--output", f"{folder}/tiny.safetensors")
        python(ROOT / "tools" / "make_tiny_dataset.py", "--output", f"{folder}/pictures")
        train = [
            ROOT / "sdxl_train_network.py", "--pretrained_model_name_or_path", f"{folder}/tiny.safetensors", "--train_data_dir", f"{folder}/pictures",
            "--output_dir", f"{folder}/out", "--network_module", "networks.lora", "--network_train_unet_only", "--resolution", 128,
            "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", 1, "--max_data_loader_n_workers", 0,
        ]  # fmt: skip
        python(*train)  # fills the caches
        imported = python("-X", "importtime", *train).stderr
        for name in ("transformers", "diffusers"):
            assert f"| {name}\n" not in imported and f" {name}\n" not in imported, (
                f"{name} was imported"
            )
        ours, floor = paired(lambda: python(*train), lambda: python("-c", FLOOR), runs)
        ratio(
            f"first step, caches complete (imports alone: {statistics.median(floor):.2f} s)",
            ours,
            floor,
            limit=1.6,
        )


def load(model: Path, runs: int) -> None:
    """Every module of a full-size model, every page touched, against reading the file's bytes; both warm."""
    python("-c", READ.format(model=str(model)))

    def loading() -> tuple[float, float]:
        took, grown = json.loads(python("-c", LOAD.format(root=str(ROOT), model=str(model))).stdout)
        return took, grown

    pairs = [
        (loading(), float(python("-c", READ.format(model=str(model))).stdout)) for _ in range(runs)
    ]
    ours, floor = [took for (took, _), _ in pairs], [took for _, took in pairs]
    ratio(
        f"load {model.stat().st_size / 1e9:.1f} GB (reading its bytes: {statistics.median(floor):.2f} s)",
        ours,
        floor,
        limit=1.5,
    )
    memory = max(grown for (_, grown), _ in pairs)
    print(
        f"{'  anonymous memory of loading':66} {memory:8.0f} MiB   limit 512: {'ok' if memory < 512 else 'OVER'}"
    )


def python(*words: object, status: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done


def seconds(call: Callable[[], object], runs: int) -> list[float]:
    return paired(call, lambda: None, runs)[0]


def paired(
    one: Callable[[], object], two: Callable[[], object], runs: int
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    one(), two()  # warm the page cache
    for _ in range(runs):
        for call, kept in zip((one, two), times, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return times


def show(what: str, times: list[float], limit: float) -> None:
    median = statistics.median(times)
    print(
        f"{what:66} {median:8.2f} s     limit {limit}: {'ok' if median <= limit else 'OVER'}   ({min(times):.2f} to {max(times):.2f})"
    )


def ratio(what: str, ours: list[float], floor: list[float], limit: float) -> None:
    median = statistics.median(one / other for one, other in zip(ours, floor, strict=True))
    verdict = "ok" if median <= limit else "OVER"
    print(f"{what:66} {statistics.median(ours):8.2f} s = {median:.2f} x, limit {limit}: {verdict}")


if __name__ == "__main__":
    run(main)
