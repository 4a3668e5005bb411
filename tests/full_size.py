"""The full-size SDXL without numbers: a run's own model, task and update, whose steps are counted and not computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import kind_of, options_of
from library.models.checkpoint.reference_shapes import stand_in
from library.offload import OffloadStream
from library.rng import SampleRng
from library.size import Size
from library.training.optim.build import build_optimizer_step
from library.training.setup.build import build_loss_module, build_task, open_models
from library.training.setup.dry_run import made_up
from library.training.setup.inputs import RunInputs
from library.training.setup.plan import Bucket

at_home = OffloadStream.at_home


def converted(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """nn.Module's `_apply` for tensors without numbers, which it would swap and can't."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = function(tensor.data)
    return module


def uncounted(live: LiveBytes, place: Tensor) -> Tensor:
    """A place in RAM: the device that counts stands for the card, and this one lies elsewhere."""
    live.leave_out(place)
    return place


def peak_of(task: str, words: list[str]) -> tuple[int, int]:
    """Bytes of all tensors that are alive at once, at most, in a step of one picture of 1024 x 1024; and behind the steps."""
    kind, options = kind_of(task), options_of(task, words)
    emulation = patch("library.models.products.cpu_lacks_bfloat16", lambda: False)  # a card has none
    tried = patch("library.training.optim.build._is_separable", lambda options: True)  # which compares numbers
    seen = patch("library.models.sdxl._see_finite", lambda *all: None)  # there are no numbers to see
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(nn.Module, "_apply", converted),
        emulation,
        tried,
        seen,
    ):
        checkpoint = stand_in(Path("sdxl.safetensors"))
        files: Any = {id(file): file for part in checkpoint._stored.values() for file, _ in part.values()}.values()
        for file in files:
            file._tensors = {key: torch.empty(shape, dtype=torch.float16) for key, shape in file.shapes.items()}
        found = RunInputs(checkpoint, False, False, (), None)  # type: ignore[arg-type]
        with (
            LiveBytes() as live,
            patch.object(OffloadStream, "at_home", lambda lane, tensor: uncounted(live, at_home(lane, tensor))),
        ):
            live.leave_out(*(tensor for file in files for tensor in file._tensors.values()))
            models = open_models(kind, options, found, torch.device("cpu"))
            task_ = build_task(kind, models, options, found, 10)
            groups = task_.param_groups()
            update = build_optimizer_step(
                build_loss_module(task_, models, options, found), groups, options, 10, seed=0, processes=1
            )
            loaded = live.now
            batch = made_up(options, models, Bucket(Size(1024, 1024), 1, 1, 1), [])
            for group in groups:  # the optimizer makes its state
                for parameter in group.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            update.step()
            live.peak = live.now
            update.backward(update.loss_module(batch, SampleRng(0, 0, 0, 1, torch.device("cpu"))), batch.place)
            update.step()
            return live.peak, loaded
