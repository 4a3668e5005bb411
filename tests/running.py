"""Running the scripts: in this process (fast), or as a user does."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch

from library.errors import run
from library.safetensors_io import load_tensors

ROOT = Path(__file__).resolve().parent.parent

# A LoRA run of a second or two on the golden model: six images at 64 pixels, everything cached.
QUICK = [
    "--network_module", "networks.lora", "--network_dim", "2", "--network_train_unet_only", "--resolution", "64", "--enable_bucket",
    "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32", "--cache_latents",
    "--cache_text_encoder_outputs", "--max_data_loader_n_workers", "0", "--learning_rate", "1e-3", "--seed", "7",
]  # fmt: skip


def arguments(
    model: Path, images: Path, output: Path, *extra: object, quick: Sequence[str] = QUICK
) -> list[str]:
    """The words behind sdxl_train_network.py; later ones win."""
    files = [
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        "--output_dir",
        output,
        "--output_name",
        "lora",
    ]
    return [str(word) for word in [*quick, *files, *extra]]


def without(words: Sequence[str], *left_out: str) -> list[str]:
    return [word for word in words if word not in left_out]


def train_network(
    model: Path, images: Path, output: Path, *extra: object, quick: Sequence[str] = QUICK
) -> Path:
    """Train in this process; returns the final file."""
    import sdxl_train_network

    sdxl_train_network.main(arguments(model, images, output, *extra, quick=quick))
    return output / "lora.safetensors"


class Ended(NamedTuple):
    """How a script ended."""

    returncode: int
    stdout: str
    stderr: str


def run_here(main: Callable[[list[str]], None], *words: object) -> Ended:
    """What a user who starts the script sees, without the seconds of a new process's imports."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run(lambda: main([str(word) for word in words]))
        except SystemExit as ended:
            status = ended.code or 0
    return Ended(status, out.getvalue(), err.getvalue())


def losses_of(output: Path, name: str = "loss/current") -> list[float]:
    """Of a run's log."""
    lines = (output / "lora-log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_tensors(path)[0]


def assert_bit_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"{len(different)} tensors differ, among them {different[:3]}"


def script(
    *words: object, env: dict[str, str] | None = None, timeout: int = 180, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run `python WORDS` in a new process."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env=whole,
        timeout=timeout,
        cwd=cwd,
    )
