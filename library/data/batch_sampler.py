"""Order: which pictures form which micro-batch, when, and on which process.

An epoch is cut into rounds of (processes x accumulation) micro-batches, all of one bucket; a round is one optimizer step.
Micro-batches left over form mixed rounds at random places, so no picture is dropped or repeated within an epoch. The order
depends on the seed and that product alone: two processes see in a step what one with twice the accumulation sees.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class BatchPosition(NamedTuple):
    """Where a micro-batch stands in the run; random draws are functions of it.

    Attributes:
        epoch: counted from 0.
        step: optimizer steps done before this one.
        micro: number of this micro-batch in the epoch's global order.
        first: number of its first picture in the epoch's global order.
        window_samples: pictures in this optimizer step, over all processes.
        closes_window: the optimizer steps after it.
        is_idle: it is another process's batch, computed with weight 0 because there is nothing else to do.
    """

    epoch: int
    step: int
    microbatch_index: int
    first_sample_index: int
    global_batch_size: int
    is_last_microbatch: bool
    is_padding: bool


class MicroBatch(NamedTuple):
    """The work of one forward: sample numbers, and their place."""

    place: BatchPosition
    samples: tuple[int, ...]


class BucketGroup(NamedTuple):
    """Sample numbers that may share a batch (one bucket of one dataset), repeats included."""

    samples: tuple[int, ...]
    batch_size: int


StepBatches = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class BatchSampler:
    """The order of a whole run.

    Attributes:
        per_process: micro-batches of a round on each process (gradient accumulation).
    """

    groups: tuple[BucketGroup, ...]
    seed: int
    processes: int = 1
    per_process: int = 1

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(group.samples) // group.batch_size) for group in self.groups)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.round_size)

    @property
    def round_size(self) -> int:
        return self.processes * self.per_process

    def epoch(self, number: int) -> list[StepBatches]:
        """The rounds of one epoch."""
        draw = random.Random(f"{self.seed} order {number}")
        rounds: list[StepBatches] = []
        left_over: list[tuple[int, ...]] = []
        for group in self.groups:
            samples = list(group.samples)
            draw.shuffle(samples)
            batches = [tuple(samples[i : i + group.batch_size]) for i in range(0, len(samples), group.batch_size)]
            whole = len(batches) // self.round_size * self.round_size
            rounds += _cut(batches[:whole], self.round_size)
            left_over += batches[whole:]
        draw.shuffle(left_over)
        rounds += _cut(left_over, self.round_size)
        draw.shuffle(rounds)
        return rounds

    def from_step(self, step: int, rank: int) -> Iterator[MicroBatch]:
        """The micro-batches of one process from an optimizer step on, without end."""
        while True:
            epoch, skipped = divmod(step, self.steps_per_epoch)
            microbatch_index = first_sample_index = 0
            for number, members in enumerate(self.epoch(epoch)):
                if number >= skipped:
                    yield from self._share(members, rank, epoch, step, microbatch_index, first_sample_index)
                    step += 1
                microbatch_index += len(members)
                first_sample_index += sum(map(len, members))

    def _share(
        self, members: StepBatches, rank: int, epoch: int, step: int, microbatch_index: int, first_sample_index: int
    ) -> Iterator[MicroBatch]:
        """What one process computes of a round: every so many-th micro-batch."""
        firsts = [first_sample_index + sum(map(len, members[:i])) for i in range(len(members))]
        slots = -(-len(members) // self.processes)
        for slot in range(slots):
            i = slot * self.processes + rank
            is_padding = i >= len(members)
            i = len(members) - 1 if is_padding else i
            window = sum(map(len, members))
            yield MicroBatch(
                BatchPosition(epoch, step, microbatch_index + i, firsts[i], window, slot == slots - 1, is_padding),
                members[i],
            )


def _cut(batches: list[tuple[int, ...]], size: int) -> list[StepBatches]:
    return [tuple(batches[i : i + size]) for i in range(0, len(batches), size)]
