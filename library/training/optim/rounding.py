"""Rounding of float32 to 16 bits, so that steps smaller than the last bit aren't lost.

A bfloat16 has 8 significant bits: of a weight of 0.02 the last one is 0.00012, a hundred times a
step at learning rate 1e-6, and the nearest value is the old one. Source: Zamirai et al. 2020,
arXiv:2010.06192.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.data.batch_sampler import BatchPosition
from library.param_group import ParamGroup
from library.rng import seed_of

_LOWER_HALF = 1 << 16


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round each value up or down to bfloat16 at random, so that the mean is the value.

    A bfloat16 is the upper half of a float32: random bits are added to the lower half, which is
    then cut off. Values that a bfloat16 represents exactly stay; infinities and NaN too.

    Args:
        values: float32.
        generator: of random numbers on their device.
    """
    bits = torch.randint(
        _LOWER_HALF, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    bits += values.view(torch.int32)
    bits &= -_LOWER_HALF
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return rounded.masked_fill_(
        values.isnan(), float("nan")
    )  # some NaNs have all bits set, and would overflow


class Compensated(NamedTuple):
    """A value as the sum of two of fewer bits: the nearest one, and the rounding error."""

    nearest: Tensor
    compensation: Tensor


def compensate(values: Tensor, dtype: torch.dtype) -> Compensated:
    """Return values in twice the bits of `dtype`, so that small steps add up in the compensation.

    Source: Kahan 1965, CACM 8(1).

    Args:
        values: float32.
        dtype: of both results.
    """
    nearest = values.to(dtype)
    return Compensated(nearest, (values - nearest).to(dtype))


class StochasticSums:
    """Rounds accumulated bfloat16 gradients stochastically; autograd would round to nearest."""

    def __init__(self, groups: Sequence[ParamGroup], seed: int):
        """Add a hook to each bfloat16 parameter.

        Args:
            groups: the parameters that are trained.
            seed: of the rounding.
        """
        self._seed = seed
        self._position: BatchPosition | None = None
        for group in groups:
            for name, parameter in group.parameters.items():
                if parameter.dtype is torch.bfloat16:
                    parameter.register_hook(self._hook(name, parameter))

    def begin(self, position: BatchPosition) -> None:
        """Prepare for a micro-batch's backward."""
        self._position = position

    def _hook(self, name: str, parameter: nn.Parameter) -> Callable[[Tensor], Tensor | None]:
        """Return the hook that gives autograd the sum in place of the new gradient."""

        @torch.no_grad()
        def add_accumulated(gradient: Tensor) -> Tensor | None:
            accumulated, position = parameter.grad, self._position
            if accumulated is None:
                return None
            assert position is not None
            parameter.grad = None  # or autograd would add it again
            seed = seed_of(self._seed, "sums", position.epoch, position.first_sample_index, name)
            generator = torch.Generator(gradient.device).manual_seed(seed)
            return round_stochastically(accumulated.float().add_(gradient), generator)

        return add_accumulated
