"""Draws: randomness as a function of a sample's place in the run.

Every random number comes from (seed, purpose, epoch, number of the sample in the epoch's global order); never from a
running stream, a rank, a worker or the size of the micro-batch. So a resumed run, or one on two processes, draws the same.
Numbers are drawn on the CPU, so that they don't depend on the card either.
"""

import hashlib
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from library.device import to_device


def seed_of(*key: object) -> int:
    """A 63-bit seed from anything that prints."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "big") >> 1


def python_rng(*key: object) -> random.Random:
    """Python's generator for one place and purpose."""
    return random.Random(seed_of(*key))


def generator(*key: object) -> torch.Generator:
    """A torch CPU generator for one place and purpose."""
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass(frozen=True)
class SampleRng:
    """The draws of one micro-batch: those of its samples, stacked.

    Attributes:
        first: number of the first sample in the epoch's global order; count: samples in the micro-batch.
        device: where the numbers go.
    """

    seed: int
    epoch: int
    first_sample_index: int
    count: int
    device: torch.device = torch.device("cpu")

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers: [B, *shape], float32."""
        return to_device(torch.stack([torch.randn(shape, generator=g) for g in self._generators(purpose)]), self.device)

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Numbers in 0..1: [B, *shape], float32."""
        return to_device(torch.stack([torch.rand(shape, generator=g) for g in self._generators(purpose)]), self.device)

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Whole numbers from low up to, not including, high: [B], int64."""
        drawn = torch.cat([torch.randint(low, high, (1,), generator=g) for g in self._generators(purpose)])
        return to_device(drawn, self.device)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [generator(self.seed, purpose, self.epoch, self.first_sample_index + i) for i in range(self.count)]


def seed_global_rng(seed: int, epoch: int, micro: int, part: int = 0) -> None:
    """Seed the global generators for what draws inside modules (dropout), by the micro-batch's place and part."""
    torch.manual_seed(seed_of(seed, "modules", epoch, micro, *([part] if part else [])))
