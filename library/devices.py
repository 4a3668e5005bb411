"""Moving tensors to a device without making the host wait for it."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From ordinary memory a copy to a card waits until the card is idle; from pinned it doesn't."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def lacks_bf16(device: torch.device) -> str:
    """A sentence about a card that has no bfloat16 arithmetic of its own; "" if it has, or is none."""
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic (compute capability {major}.{minor}; 8.0 has), so it is emulated, "
        "many times slower; take --mixed_precision fp16"
    )


class Arriving:
    """Numbers on their way from a device to the host, read later without waiting for what the device does meanwhile."""

    def __init__(self, *numbers: Tensor):
        """Args: numbers: [] each, of one device."""
        stacked = torch.stack([number.detach().float() for number in numbers])
        self._arrived: torch.cuda.Event | None = None
        if stacked.device.type == "cuda":
            self._numbers = torch.empty(len(numbers), pin_memory=True)
            self._numbers.copy_(stacked, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._numbers = stacked

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
