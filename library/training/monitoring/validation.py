"""Validation: the loss of images that are held out, always with the same noise and timesteps.

It calls the training forward, in eval mode and without gradients. Its random numbers have seeds of
their own, so training is not affected. Source: contract, dataset_config.md section 8.
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

_TIMESTEPS = 4  # per image, evenly spaced over the range in which the model is trained


@dataclass(frozen=True)
class Validation:
    """The held-out images of a run.

    Attributes:
        batches: loads micro-batches.
        micro_batches: all of them, the same on every process.
        timesteps: those at which the loss of each image is computed.
        seed: of the noise.
        every_steps: steps between validations; None: none after a step.
        every_epochs: epochs between validations; None: none after an epoch.
    """

    batches: Batches
    micro_batches: Sequence[MicroBatch]
    timesteps: Sequence[int]
    seed: int
    every_steps: int | None
    every_epochs: int | None

    def is_due(self, *, step: int = 0, epoch: int = 0) -> bool:
        """Return whether validation is due after this step or epoch (both 1-based)."""
        if not self.micro_batches:
            return False
        if step:
            return bool(self.every_steps) and step % (self.every_steps or 1) == 0
        return bool(self.every_epochs) and epoch % (self.every_epochs or 1) == 0

    @torch.no_grad()
    def loss(
        self, loss_module: nn.Module, device: torch.device, *, rank: int, world_size: int
    ) -> float:
        """Return the mean loss over images and timesteps, over all processes.

        Args:
            loss_module: the training forward, which gives the loss of each image.
            device: of the batches.
            rank: of this process among those that share the images.
            world_size: the number of these processes.
        """
        total, count = torch.zeros((), device=device), torch.zeros((), device=device)
        was_training = loss_module.training
        loss_module.eval()
        try:
            for micro_batch in self.micro_batches[rank::world_size]:
                batch = self.batches[micro_batch].to(device)
                first_sample_index = micro_batch.position.first_sample_index
                rng = SampleRng(
                    seed_of(self.seed, "validation"), 0, first_sample_index, len(batch), device
                )
                for timestep in self.timesteps:
                    losses: Tensor = loss_module(
                        batch, rng, torch.full((len(batch),), timestep, device=device)
                    )
                    total += losses.sum()
                    count += len(batch)
        finally:
            loss_module.train(was_training)
        if world_size > 1:
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
        return (total / count).item()


@dataclass
class Best:
    """The lowest validation loss so far.

    Attributes:
        patience: validations without a lower loss after which the run ends (--early_stop_patience);
            None: it doesn't.
        loss: the lowest one; infinite before the first validation.
        waited: validations since then.
    """

    patience: int | None
    loss: float = math.inf
    waited: int = 0
    _step: int = -1

    def is_new(self, loss: float, step: int) -> bool:
        """Record the loss after an optimizer step, and return whether it is the lowest so far.

        A second loss of the same step, that of its epoch's end, is not counted.
        """
        if step == self._step:
            return False
        self._step = step
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            return True
        self.waited += 1
        return False

    def state(self) -> dict[str, float | int | None]:
        """Return what a state stores."""
        loss = None if math.isinf(self.loss) else self.loss
        return {"loss": loss, "waited": self.waited, "step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what a state has stored."""
        self.loss = math.inf if state["loss"] is None else state["loss"]
        self.waited, self._step = state["waited"], state["step"]

    @property
    def patience_is_over(self) -> bool:
        """Whether the run ends because the loss has not become lower."""
        return self.patience is not None and self.waited >= self.patience


def fixed_timesteps(low: int | None, high: int | None) -> list[int]:
    """Return four evenly spaced inner points of the trained range.

    They are 200, 400, 600 and 800 for the complete range.
    """
    low = low or 0
    if high is None:
        high = NUM_TIMESTEPS
    return (
        torch.linspace(low, high, _TIMESTEPS + 2)[1:-1].int().clamp(max=NUM_TIMESTEPS - 1).tolist()
    )


def validation_batches(
    groups: Sequence[BucketGroup], total_steps: int, limit: int | None
) -> list[MicroBatch]:
    """Return the held-out samples in batches.

    Args:
        groups: the held-out samples by bucket.
        total_steps: of the run; the position of the batches is after its end, where tag warm-up is
            over.
        limit: the most batches; None or 0: all.
    """
    micro_batches: list[MicroBatch] = []
    first_sample_index = 0
    for group in groups:
        for start in range(0, len(group.samples), group.batch_size):
            samples = group.samples[start : start + group.batch_size]
            position = BatchPosition(
                epoch=0,
                step=total_steps,
                microbatch_index=len(micro_batches),
                first_sample_index=first_sample_index,
                global_batch_size=len(samples),
                is_last_microbatch=True,
                is_padding=False,
            )
            micro_batches.append(MicroBatch(position, samples))
            first_sample_index += len(samples)
    return micro_batches[:limit] if limit else micro_batches
