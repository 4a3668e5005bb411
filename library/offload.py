"""Copies of tensors between RAM and the GPU that run in parallel with the computation."""

import torch
from torch import Tensor


class OffloadStream:
    """Moves tensors between an offload device (RAM) and a compute device (the GPU).

    On a GPU the copies run on a CUDA stream of their own, from and to pinned memory, so that neither the host nor the
    computation waits for them. Elsewhere a move is a plain copy, so the same code runs, with the same values, on a CPU.
    """

    def __init__(self, cpu: torch.device, device: torch.device):
        """Create the stream.

        Args:
            cpu: where tensors are kept while they are offloaded.
            device: where the computation runs.
        """
        self.cpu = cpu
        self.device = device
        is_asynchronous = device.type == "cuda" and cpu.type == "cpu"
        self._stream = torch.cuda.Stream(device) if is_asynchronous else None

    def empty_on_cpu(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized tensor like this one on the offload device, in pinned memory where copies are asynchronous."""
        return torch.empty_like(
            tensor, device=self.cpu, requires_grad=False, pin_memory=self._stream is not None
        )

    def offload(self, tensor: Tensor, target: Tensor) -> None:
        """Copy a tensor of the compute device into `target` on the offload device, after the kernels that are queued now."""
        if self._stream is None:
            target.copy_(tensor)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)

    def fetch(self, tensor: Tensor) -> "PendingCopy":
        """Start to copy an offloaded tensor to the compute device, after all earlier copies."""
        if self._stream is None:
            return PendingCopy(
                torch.empty_like(tensor, device=self.device, requires_grad=False).copy_(tensor)
            )
        with torch.cuda.stream(self._stream):
            copy = torch.empty_like(tensor, device=self.device, requires_grad=False).copy_(
                tensor, non_blocking=True
            )
            return PendingCopy(copy, self._stream.record_event())

    def wait(self) -> None:
        """Make the host wait until every offloaded tensor has arrived."""
        if self._stream is not None:
            self._stream.synchronize()


class PendingCopy:
    """A tensor that is being copied to the compute device."""

    def __init__(self, tensor: Tensor, event: torch.cuda.Event | None = None):
        self._tensor, self._event = tensor, event

    def tensor(self) -> Tensor:
        """Return the tensor. Kernels that are queued from now on wait for the copy."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._event)
            self._tensor.record_stream(stream)
        return self._tensor
