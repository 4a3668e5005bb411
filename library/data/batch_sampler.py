"""BatchSampler: which samples form which micro-batch, in which step, and on which process.

An epoch is divided into steps of (processes x accumulation) micro-batches, all of one bucket.
Leftover micro-batches form mixed steps at random positions, so no image is dropped or repeated
within an epoch. The order depends on the seed and on that product alone: a step on two processes
has the same samples as a step on one process with twice the accumulation.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class BatchPosition(NamedTuple):
    """The position of a micro-batch in the run. Random numbers are functions of it.

    Attributes:
        epoch: index of the epoch.
        step: number of optimizer steps before this one.
        microbatch_index: index of the micro-batch in the epoch's global order.
        first_sample_index: index of its first sample in the epoch's global order.
        global_batch_size: number of samples in this optimizer step, over all processes.
        is_last_microbatch: the optimizer steps after it.
        is_padding: a dummy batch with loss weight 0, which keeps this process in step with others.
    """

    epoch: int
    step: int
    microbatch_index: int
    first_sample_index: int
    global_batch_size: int
    is_last_microbatch: bool
    is_padding: bool


class MicroBatch(NamedTuple):
    """The samples of one forward, by index, and its position."""

    position: BatchPosition
    samples: tuple[int, ...]


class BucketGroup(NamedTuple):
    """Indices of samples that may share a batch (one bucket of one dataset), with repeats."""

    samples: tuple[int, ...]
    batch_size: int


Indices = tuple[int, ...]

StepBatches = tuple[Indices, ...]
"""The micro-batches of one optimizer step, over all processes."""


@dataclass(frozen=True)
class BatchSampler:
    """The order of samples in a run.

    Attributes:
        groups: all samples.
        seed: the seed of the order.
        world_size: number of processes.
        accumulation_steps: micro-batches of a step on each process.
    """

    groups: tuple[BucketGroup, ...]
    seed: int
    world_size: int = 1
    accumulation_steps: int = 1

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(group.samples) // group.batch_size) for group in self.groups)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.batches_per_step)

    @property
    def batches_per_step(self) -> int:
        return self.world_size * self.accumulation_steps

    def epoch(self, index: int) -> list[StepBatches]:
        """Return the steps of one epoch."""
        rng = random.Random(f"{self.seed} order {index}")
        steps: list[StepBatches] = []
        leftover: list[Indices] = []
        for group in self.groups:
            samples = list(group.samples)
            rng.shuffle(samples)
            batches = []
            for start in range(0, len(samples), group.batch_size):
                batches.append(tuple(samples[start : start + group.batch_size]))
            complete = len(batches) // self.batches_per_step * self.batches_per_step
            steps += self._divide(batches[:complete])
            leftover += batches[complete:]
        rng.shuffle(leftover)
        steps += self._divide(leftover)
        rng.shuffle(steps)
        return steps

    def _divide(self, batches: list[Indices]) -> list[StepBatches]:
        size = self.batches_per_step
        return [tuple(batches[i : i + size]) for i in range(0, len(batches), size)]

    def from_step(self, step: int, rank: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one process from an optimizer step on, without end."""
        while True:
            epoch, num_skipped = divmod(step, self.steps_per_epoch)
            batch_index = sample_index = 0
            for i, batches in enumerate(self.epoch(epoch)):
                if i >= num_skipped:
                    yield from self._of_rank(batches, rank, epoch, step, batch_index, sample_index)
                    step += 1
                batch_index += len(batches)
                sample_index += _num_samples(batches)

    def _of_rank(
        self,
        batches: StepBatches,
        rank: int,
        epoch: int,
        step: int,
        first_batch: int,
        first_sample: int,
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step that one process computes.

        Args:
            batches: the micro-batches of all processes.
            rank: the process.
            epoch: the epoch of the step.
            step: the index of the step.
            first_batch: index of the step's first micro-batch in the epoch.
            first_sample: index of the step's first sample in the epoch.
        """
        num_rounds = -(-len(batches) // self.world_size)
        for i in range(num_rounds):
            index = i * self.world_size + rank
            is_padding = index >= len(batches)
            if is_padding:
                index = len(batches) - 1
            position = BatchPosition(
                epoch,
                step,
                first_batch + index,
                first_sample + _num_samples(batches[:index]),
                global_batch_size=_num_samples(batches),
                is_last_microbatch=i == num_rounds - 1,
                is_padding=is_padding,
            )
            yield MicroBatch(position, batches[index])


def _num_samples(batches: StepBatches) -> int:
    return sum(map(len, batches))
