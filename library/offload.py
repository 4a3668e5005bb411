"""Lane: copies of tensors between where they lie and where they are computed with, beside the computation."""

import torch
from torch import Tensor


class OffloadStream:
    """Moves tensors between a home device (RAM) and a work device (the card).

    On a card copies run on a stream of their own, from and to pinned memory, so that neither host nor computation waits for
    them. Elsewhere a move is a copy that is done at once, so the same code runs, with the same numbers, on a CPU alone.
    """

    def __init__(self, home: torch.device, work: torch.device):
        self.home, self.work = home, work
        self._stream = torch.cuda.Stream(work) if work.type == "cuda" and home.type == "cpu" else None

    def at_home(self, tensor: Tensor) -> Tensor:
        """A new place at home for a tensor like this one; its numbers aren't set."""
        return torch.empty_like(tensor, device=self.home, requires_grad=False, pin_memory=self._stream is not None)

    def send(self, tensor: Tensor, place: Tensor) -> None:
        """Copy a tensor from the work device into its place at home, once what computes it now is done."""
        if self._stream is None:
            place.copy_(tensor)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.work))
        with torch.cuda.stream(self._stream):
            place.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)

    def fetch(self, tensor: Tensor) -> "PendingCopy":
        """Begin to copy a tensor from home to the work device, behind what was sent before."""
        if self._stream is None:
            return PendingCopy(torch.empty_like(tensor, device=self.work, requires_grad=False).copy_(tensor))
        with torch.cuda.stream(self._stream):
            arrived = torch.empty_like(tensor, device=self.work, requires_grad=False).copy_(tensor, non_blocking=True)
            return PendingCopy(arrived, self._stream.record_event())

    def wait(self) -> None:
        """Make the host wait until everything that was sent is at home."""
        if self._stream is not None:
            self._stream.synchronize()


class PendingCopy:
    """A tensor on its way to the work device."""

    def __init__(self, tensor: Tensor, event: torch.cuda.Event | None = None):
        self._tensor, self._event = tensor, event

    def tensor(self) -> Tensor:
        """The tensor; what computes with it from now on waits for it."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._event)
            self._tensor.record_stream(stream)
        return self._tensor
