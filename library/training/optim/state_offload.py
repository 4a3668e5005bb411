"""CPU offload of optimizer state: it is on the GPU only while its parameters are stepped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.offload import OffloadStream

_MIN_NUMEL = 4096  # smaller tensors stay on the GPU


class OffloadedOptimizerState:
    """The state of an optimizer, which is in RAM between steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, stream: OffloadStream):
        self._optimizer, self._stream = optimizer, stream
        self._cpu_buffers: dict[tuple[nn.Parameter, str], Tensor] = {}

    @contextmanager
    def on_device(self, params: Sequence[nn.Parameter]) -> Iterator[None]:
        """Context manager: keeps these parameters' state on the GPU for the duration of a step."""
        for parameter in params:
            self._load(parameter)
        yield
        for parameter in params:
            self._offload(parameter)

    def wait(self) -> None:
        """Wait until all state is in RAM."""
        self._stream.wait()

    def _load(self, parameter: nn.Parameter) -> None:
        state = self._optimizer.state.get(parameter, {})
        copies = {
            key: self._stream.fetch(value) for key, value in state.items() if _is_offloaded(value)
        }
        for key, copy in copies.items():
            state[key] = copy.tensor()

    def _offload(self, parameter: nn.Parameter) -> None:
        state = self._optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not _is_offloaded(value):
                continue
            buffer = self._cpu_buffers.get((parameter, key))
            if buffer is None:
                buffer = self._stream.empty_on_cpu(value)
                self._cpu_buffers[parameter, key] = buffer
            self._stream.offload(value, buffer)
            state[key] = buffer


def _is_offloaded(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() >= _MIN_NUMEL
