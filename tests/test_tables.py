"""Tables that feed every step have the same bits on every CPU: computed in processes whose kernels differ."""

import os
import re
import subprocess
import sys

import pytest
from running import ROOT

# A process that is confined to kernels of other CPUs. One that this CPU lacks is replaced by the best that it has.
KERNELS = [
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "avx512"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"MKL_CBWR": "COMPATIBLE"},
]

CODE = """
import hashlib
import torch

from library.models.noise_schedule import NoiseSchedule
from library.models.unet_blocks import embedding_frequencies

tables = {f"frequencies {count}": embedding_frequencies(count) for count in (16, 128, 160, 192)}
for zero in (False, True):
    schedule = NoiseSchedule.sdxl(zero_terminal_snr=zero)
    tables |= {f"{name} {zero}": getattr(schedule, name) for name in ("betas", "alpha_bar", "snr")}
for name, table in tables.items():
    assert table.dtype is torch.float32
    print(name, hashlib.sha256(table.numpy().tobytes()).hexdigest(), sep=": ")
"""


@pytest.mark.numeric
def test_the_tables_have_the_same_bytes_whatever_kernels_compute_them():
    variables = {name for setting in KERNELS for name in setting}
    plain = {name: value for name, value in os.environ.items() if name not in variables}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            cwd=ROOT,
            env=plain | setting | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for setting in KERNELS
    ]
    said = []
    for process, setting in zip(running, KERNELS, strict=True):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, (setting, error)
        said.append(dict(line.split(": ") for line in out.splitlines()))
    assert len(said[0]) == 10
    for setting, found in zip(KERNELS, said, strict=True):
        different = [name for name in found if found[name] != said[0][name]]
        assert not different, (setting, different)


def test_make_test_long_runs_the_numeric_tests_under_the_same_kernels():
    (found,) = re.findall(
        r"^CPU_SETTINGS := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
    )
    words = found.replace("\\\n", " ").split()
    assert words == [f"{name}={value}" for setting in KERNELS for name, value in setting.items()]
