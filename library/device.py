"""Devices and dtypes: copies that don't make the host wait, support of bfloat16, and the dtypes of a run."""

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`, without waiting for the GPU.

    A copy from pageable memory makes the host wait until the GPU is idle; a copy from pinned memory doesn't.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def lacks_bf16(device: torch.device) -> str:
    """Return a sentence about a device that has no bfloat16 instructions; "" if it has them."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return ""
        return "this CPU has no bfloat16 instructions; PyTorch emulates them, which is many times slower. Use --mixed_precision no"
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)} has no bfloat16 instructions (its compute capability is {major}.{minor}, 8.0 is "
        "required); PyTorch emulates them, which is many times slower. Use --mixed_precision fp16"
    )


class PendingScalars:
    """Scalars that are being copied from a device to the host, to be read later without waiting for newer kernels."""

    def __init__(self, *scalars: Tensor):
        """Start the copy.

        Args:
            scalars: tensors of shape [], all on the same device.
        """
        stacked = torch.stack([scalar.detach().float() for scalar in scalars])
        self._copied: torch.cuda.Event | None = None
        if stacked.device.type == "cuda":
            self._values = torch.empty(len(scalars), pin_memory=True)
            self._values.copy_(stacked, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = stacked

    def read(self) -> list[float]:
        """Return the values, after waiting for their copy only."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


DTYPES = {
    "no": torch.float32,
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Precision:
    """The dtypes of one run.

    Attributes:
        compute: dtype of frozen weights and of all activations of the U-Net and the text encoders. There is no autocast: a
            trained float32 weight is cast inside its layer, and norms use float32 statistics internally.
        trained: dtype of trained weights and their gradients. The optimizer state is that of float32 weights in any case.
        vae: dtype of the VAE; float32 with --no_half_vae.
        save: dtype of saved tensors; None keeps each tensor's own dtype.
    """

    compute: torch.dtype
    trained: torch.dtype
    vae: torch.dtype
    save: torch.dtype | None

    @classmethod
    def decide(
        cls,
        mixed_precision: str,
        save_precision: str | None,
        *,
        no_half_vae: bool,
        full: bool = False,
    ) -> "Precision":
        """Return the dtypes for --mixed_precision, --save_precision and --no_half_vae.

        Args:
            full: --full_bf16 or --full_fp16 is given.
        """
        compute = DTYPES[mixed_precision]
        return cls(
            compute=compute,
            trained=compute if full else torch.float32,
            vae=torch.float32 if no_half_vae else compute,
            save=None if save_precision is None else DTYPES[save_precision],
        )
