"""Precision: which dtype the weights, the activations, the VAE and the saved files have. Decided once, at the start."""

from dataclasses import dataclass

import torch

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
