"""The full-size SDXL without numbers: a run's own model, task and update, whose steps are counted and not computed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import plan_of
from library.models.checkpoint.reference_shapes import stand_in
from library.offload import OffloadStream
from library.rng import SampleRng
from library.size import Size
from library.training.setup.measure import random_batch
from library.training.setup.step_plan import Bucket
from library.training.setup.training_state import build_training_state

empty_on_cpu = OffloadStream.empty_on_cpu


def converted(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """nn.Module's `_apply` for tensors without numbers, which it would swap and can't."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = function(tensor.data)
    return module


def uncounted(live: LiveBytes, place: Tensor) -> Tensor:
    """A place in RAM: the device that counts stands for the GPU, and this one lies elsewhere."""
    live.leave_out(place)
    return place


def peak_of(task: str, words: list[str]) -> tuple[int, int]:
    """Bytes of all tensors that are alive at once, at most, in a step of one image of 1024 x 1024; and behind the steps."""
    seen = patch(
        "library.models.sdxl._see_finite", lambda *all: None
    )  # there are no numbers to see
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(nn.Module, "_apply", converted),
        seen,
    ):
        checkpoint = stand_in(Path("sdxl.safetensors"))
        files: Any = {
            id(file): file for part in checkpoint._stored.values() for file, _ in part.values()
        }.values()
        for file in files:
            file._tensors = {
                key: torch.empty(shape, dtype=torch.float16) for key, shape in file.shapes.items()
            }
        with (
            LiveBytes() as live,
            patch.object(
                OffloadStream,
                "empty_on_cpu",
                lambda lane, tensor: uncounted(live, empty_on_cpu(lane, tensor)),
            ),
        ):
            live.leave_out(*(tensor for file in files for tensor in file._tensors.values()))
            plan = plan_of(task, words, checkpoint, torch.device("cpu"))
            process: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
            training = build_training_state(plan, process)
            update = training.optimizer_step
            loaded = live.now
            batch = random_batch(plan, Bucket(Size(1024, 1024), 1, 1, 1))
            for group in training.local_groups:  # the optimizer makes its state
                for parameter in group.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            update.step()
            live.peak = live.now
            update.backward(
                update.loss_module(batch, SampleRng(0, 0, 0, 1, torch.device("cpu"))),
                batch.position,
            )
            update.step()
            return live.peak, loaded
