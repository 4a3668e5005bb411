"""Rounding: from float32 to the fewer bits of a trained weight, so that steps smaller than its last bit aren't lost.

A bfloat16 has 8 significant bits: of a weight of 0.02 the last one is 0.00012, a hundred times a step at learning rate 1e-6, and the
nearest number is the old one. Source: Zamirai et al. 2020, arXiv:2010.06192.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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
