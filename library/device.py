"""Moving tensors to a device without making the host wait for it."""

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From ordinary memory a copy to a card waits until the card is idle; from pinned it doesn't."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def lacks_bf16(device: torch.device) -> str:
    """A sentence about a GPU or CPU that has no bfloat16 arithmetic of its own; "" if it has."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return ""
        return "this CPU has no bfloat16 arithmetic, so it is emulated, many times slower; take --mixed_precision no"
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


DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The dtypes of one run.

    Attributes:
        compute: frozen weights and all activations of the U-Net and the text encoders. There is no autocast: a trained
            float32 weight is cast inside its layer, and norms keep float32 statistics inside.
        trained: weights that are trained, and their gradients; the optimizer's state is float32's in any case.
        vae: the VAE; float32 with --no_half_vae.
        save: the file's tensors; None keeps each tensor's own dtype.
    """

    compute: torch.dtype
    trained: torch.dtype
    vae: torch.dtype
    save: torch.dtype | None

    @classmethod
    def decide(
        cls, mixed_precision: str, save_precision: str | None, *, no_half_vae: bool, full: bool = False
    ) -> "Precision":
        """The dtypes that --mixed_precision, --save_precision and --no_half_vae ask for. Args: full: --full_bf16 or --full_fp16."""
        compute = DTYPES[mixed_precision]
        return cls(
            compute=compute,
            trained=compute if full else torch.float32,
            vae=torch.float32 if no_half_vae else compute,
            save=None if save_precision is None else DTYPES[save_precision],
        )
