"""Random numbers as a function of a sample's position in the run.

Every random number comes from (seed, purpose, epoch, index of the sample in the epoch's global order). It never depends on a
running stream, a rank, a worker or the size of the micro-batch, so a resumed run, or one on two processes, gets the same
numbers. They are generated on the CPU, so that they don't depend on the GPU either.
"""

import hashlib
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from library.device import to_device


def seed_of(*key: object) -> int:
    """Return a 63-bit seed that is a hash of the key, whose parts are converted to text."""
    return (
        int.from_bytes(
            hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "big"
        )
        >> 1
    )


def python_rng(*key: object) -> random.Random:
    """Return Python's generator for one position and purpose."""
    return random.Random(seed_of(*key))


def generator(*key: object) -> torch.Generator:
    """Return a torch CPU generator for one position and purpose."""
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass(frozen=True)
class SampleRng:
    """The random numbers of one micro-batch: those of its samples, stacked.

    Attributes:
        first_sample_index: index of the micro-batch's first sample in the epoch's global order.
        count: number of samples in the micro-batch, B.
        device: the device of the returned tensors.
    """

    seed: int
    epoch: int
    first_sample_index: int
    count: int
    device: torch.device = torch.device("cpu")

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal random numbers: [B, *shape], float32."""
        samples = [torch.randn(shape, generator=g) for g in self._generators(purpose)]
        return to_device(torch.stack(samples), self.device)

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return uniform random numbers in [0, 1): [B, *shape], float32."""
        samples = [torch.rand(shape, generator=g) for g in self._generators(purpose)]
        return to_device(torch.stack(samples), self.device)

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Return random integers from low up to but not including high: [B], int64."""
        samples = [torch.randint(low, high, (1,), generator=g) for g in self._generators(purpose)]
        return to_device(torch.cat(samples), self.device)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [
            generator(self.seed, purpose, self.epoch, self.first_sample_index + i)
            for i in range(self.count)
        ]


def seed_global_rng(seed: int, epoch: int, microbatch_index: int, split_index: int = 0) -> None:
    """Seed the global generators, which modules use (dropout), by the position of the micro-batch.

    Args:
        microbatch_index: index of the micro-batch in the epoch's global order.
        split_index: index of the part, where a micro-batch is split because memory ran out.
    """
    split = [split_index] if split_index else []
    torch.manual_seed(seed_of(seed, "modules", epoch, microbatch_index, *split))
