"""Ema: the exponential moving average of what is trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.training.trainable import Trainable


class Ema:
    """average <- d * average + (1 - d) * weights after every step, with d = min(decay, (1 + steps) / (10 + steps)).

    The average is float32 whatever the weights are, so that small steps aren't lost. Early on it forgets faster, as the
    start isn't worth remembering. Source: Polyak & Juditsky 1992; the warm-up is TensorFlow's ExponentialMovingAverage's.
    """

    def __init__(self, parts: Sequence[Trainable], decay: float, device: torch.device | None):
        """Args: device: where it lies; None: beside the weights."""
        self._decay = decay
        self._weights = {
            name: parameter for part in parts for name, parameter in part.tensors().items() if parameter.requires_grad
        }
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in self._weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        averages = list(self.averages.values())
        weights = [
            weight.detach().to(own.device, own.dtype)
            for weight, own in zip(self._weights.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, share)

    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Go on with those of a state."""
        for name, own in self.averages.items():
            own.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages stand in the weights' places meanwhile."""
        kept = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self.averages[name].to(weight.device, weight.dtype)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = kept[name]
