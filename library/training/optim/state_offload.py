"""Lodging: an optimizer's state lies in RAM, and visits the card with the weights that are stepped (--optimizer_offload)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.offload import OffloadStream

_LEAST = 4096  # numbers; smaller tensors stay where they are


class OffloadedOptimizerState:
    """Where an optimizer's state is between steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, lane: OffloadStream):
        self._optimizer, self._lane = optimizer, lane
        self._places: dict[tuple[nn.Parameter, str], Tensor] = {}

    @contextmanager
    def visit(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Around the step of these parameters of the optimizer's: their state is on the work device meanwhile."""
        for parameter in parameters:
            state = self._optimizer.state.get(parameter, {})
            coming = {key: self._lane.fetch(value) for key, value in state.items() if _travels(value)}
            state.update({key: fetched.tensor() for key, fetched in coming.items()})
        yield
        for parameter in parameters:
            state = self._optimizer.state.get(parameter, {})
            for key, value in state.items():
                if _travels(value):
                    if (place := self._places.get((parameter, key))) is None:
                        place = self._places[parameter, key] = self._lane.empty_on_cpu(value)
                    self._lane.offload(value, place)
                    state[key] = place

    def wait(self) -> None:
        """Until all of it is at home, for whoever reads it there."""
        self._lane.wait()


def _travels(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() >= _LEAST
