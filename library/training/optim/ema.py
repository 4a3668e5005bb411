"""Ema: the exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.training.trainable import Trainable


class Ema:
    """Averages the weights after every step: average <- d * average + (1 - d) * weights.

    The decay warms up: d = min(decay, (1 + steps) / (10 + steps)).

    The average is float32 whatever the weights are, so that small steps aren't lost. Early on it
    forgets faster, as the initial weights aren't worth remembering. Source: Polyak & Juditsky 1992;
    the warm-up is TensorFlow's ExponentialMovingAverage's.

    Attributes:
        averages: the average of each weight, by its name.
    """

    def __init__(self, trainables: Sequence[Trainable], decay: float, device: torch.device | None):
        """Start from the weights.

        Args:
            trainables: whose weights that require gradients are averaged.
            decay: weight of the old average in a step.
            device: of the averages; None: that of the weights.
        """
        self._decay = decay
        self._weights = {}
        for trainable in trainables:
            for name, parameter in trainable.tensors().items():
                if parameter.requires_grad:
                    self._weights[name] = parameter
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in self._weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the weights after optimizer step `step`, which counts from 1, in."""
        new_weight = 1 - min(self._decay, (1 + step) / (10 + step))
        averages = list(self.averages.values())
        weights = []
        for weight, average in zip(self._weights.values(), averages, strict=True):
            weights.append(weight.detach().to(average.device, average.dtype))
        torch._foreach_lerp_(averages, weights, new_weight)

    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Restore the averages saved in a state."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager: the weights are the averages."""
        trained = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self.averages[name].to(weight.device, weight.dtype)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = trained[name]
