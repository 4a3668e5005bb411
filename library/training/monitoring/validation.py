"""Validation: the loss of pictures that are held out, with noise and timesteps that are the same every time.

It calls the training forward, in eval mode and without gradients. All that is drawn has seeds of its own, so training goes
on as if nothing had been computed. Source: contract, dataset_config.md section 8.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.data.batch_sampler import BatchPosition, BucketGroup, MicroBatch
from library.data.loader import Batches
from library.models.noise_schedule import NUM_TIMESTEPS
from library.rng import SampleRng, seed_of

_TIMESTEPS = 4  # per picture, spread evenly over the range that is trained


@dataclass(frozen=True)
class Validation:
    """The held-out pictures of a run.

    Attributes:
        micro_batches: all of them, the same on every process.
        timesteps: at which each picture's loss is taken.
        every_steps, every_epochs: when; None: never.
    """

    batches: Batches
    micro_batches: Sequence[MicroBatch]
    timesteps: Sequence[int]
    seed: int
    every_steps: int | None
    every_epochs: int | None

    def is_due(self, *, step: int = 0, epoch: int = 0) -> bool:
        """Whether it is time after this optimizer step, or after this epoch; both count from 1."""
        every, number = (self.every_steps, step) if step else (self.every_epochs, epoch)
        return bool(self.micro_batches and every and number % every == 0)

    @torch.no_grad()
    def loss(self, loss_module: nn.Module, device: torch.device, share: tuple[int, int]) -> float:
        """The mean loss over pictures and timesteps, over all processes. Args: share: (rank, processes)."""
        rank, processes = share
        total, count = torch.zeros((), device=device), torch.zeros((), device=device)
        was_training = loss_module.training
        loss_module.eval()
        try:
            for micro in self.micro_batches[rank::processes]:
                batch = self.batches[micro].to(device)
                rng = SampleRng(seed_of(self.seed, "validation"), 0, micro.place.first_sample_index, len(batch), device)
                for timestep in self.timesteps:
                    losses: Tensor = loss_module(batch, rng, torch.full((len(batch),), timestep, device=device))
                    total += losses.sum()
                    count += len(batch)
        finally:
            loss_module.train(was_training)
        if processes > 1:
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
        return (total / count).item()


@dataclass
class Best:
    """The lowest validation loss so far, and for how many validations it has stood."""

    patience: int | None
    loss: float = math.inf
    waited: int = 0
    _step: int = -1

    def is_new(self, loss: float, step: int) -> bool:
        """Whether the loss after this optimizer step is the lowest so far. Asked twice for one step, the second counts nothing."""
        if step == self._step:
            return False
        self._step = step
        self.waited = 0 if loss < self.loss else self.waited + 1
        self.loss = min(self.loss, loss)
        return not self.waited

    def state(self) -> dict[str, float | int | None]:
        return {"loss": None if math.isinf(self.loss) else self.loss, "waited": self.waited, "step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.loss = math.inf if state["loss"] is None else state["loss"]
        self.waited, self._step = state["waited"], state["step"]

    @property
    def is_lost(self) -> bool:
        """Whether patience is over (--early_stop_patience)."""
        return self.patience is not None and self.waited >= self.patience


def fixed_timesteps(low: int | None, high: int | None) -> list[int]:
    """The inner points of the trained range, evenly spread: 200, 400, 600, 800 of the whole one."""
    low, high = low or 0, NUM_TIMESTEPS if high is None else high
    inner = range(1, _TIMESTEPS + 1)
    return [min(NUM_TIMESTEPS - 1, low + (high - low) * i // (_TIMESTEPS + 1)) for i in inner]


def validation_batches(groups: Sequence[BucketGroup], total_steps: int, most: int | None) -> list[MicroBatch]:
    """The held-out samples in batches, at most so many. Args: total_steps: of the run, so that tag warm-up is over."""
    found: list[MicroBatch] = []
    first = 0
    for group in groups:
        for i in range(0, len(group.samples), group.batch_size):
            samples = group.samples[i : i + group.batch_size]
            place = BatchPosition(
                0, total_steps, len(found), first, len(samples), is_last_microbatch=True, is_padding=False
            )
            found.append(MicroBatch(place, samples))
            first += len(samples)
    return found[:most] if most else found
