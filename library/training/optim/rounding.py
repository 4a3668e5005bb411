"""Rounding: from float32 to the fewer bits of a trained weight, so that steps smaller than its last bit aren't lost.

A bfloat16 has 8 significant bits: of a weight of 0.02 the last one is 0.00012, a hundred times a step at learning rate 1e-6, and the
nearest number is the old one. Source: Zamirai et al. 2020, arXiv:2010.06192.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.data.batch_sampler import BatchPosition
from library.param_group import ParamGroup
from library.rng import seed_of

_LOWER_HALF = 1 << 16


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two bfloat16 neighbours of each value, the nearer the likelier, so that the mean of many is the value.

    A bfloat16 is the upper half of a float32: random bits are added to the lower half, which is then cut off. What a bfloat16 holds
    exactly stays; infinities and NaN too.

    Args: values: float32. generator: of their device.
    """
    bits = torch.randint(_LOWER_HALF, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits += values.view(torch.int32)
    bits &= -_LOWER_HALF
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return rounded.masked_fill_(values.isnan(), float("nan"))  # some NaNs have all bits set, and would overflow


class Compensated(NamedTuple):
    """A value as the sum of two numbers of fewer bits: the nearest one, and what it lacks."""

    nearest: Tensor
    rest: Tensor


def compensate(values: Tensor, dtype: torch.dtype) -> Compensated:
    """The value in twice the bits of `dtype`, so that small steps add up in the rest. Source: Kahan 1965, CACM 8(1).

    Args: values: float32.
    """
    nearest = values.to(dtype)
    return Compensated(nearest, (values - nearest).to(dtype))


class StochasticSums:
    """Each sum of a gradient and what was there before it is rounded stochastically; autograd alone would round to nearest."""

    def __init__(self, groups: Sequence[ParamGroup], seed: int):
        self._seed = seed
        self._place: BatchPosition | None = None
        for group in groups:
            for name, parameter in group.parameters.items():
                if parameter.dtype is torch.bfloat16:
                    parameter.register_hook(lambda new, name=name, own=parameter: self._sum(new, name, own))

    def begin(self, place: BatchPosition) -> None:
        """Before a micro-batch's backward."""
        self._place = place

    @torch.no_grad()
    def _sum(self, new: Tensor, name: str, parameter: nn.Parameter) -> Tensor | None:
        """What autograd is to take as the parameter's gradient. None: `new` as it is."""
        before = parameter.grad
        if before is None:
            return None
        assert self._place is not None
        parameter.grad = None  # or autograd would add it again
        draw = torch.Generator(new.device).manual_seed(
            seed_of(self._seed, "sums", self._place.epoch, self._place.first_sample_index, name)
        )
        return round_stochastically(before.float().add_(new), draw)
