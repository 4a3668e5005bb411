"""Inpainting: what a 9-channel model sees beside the noisy latents, a mask and the picture without what it hides.

Channels: 4 noisy latents, 1 mask, 4 scaled latents of the masked picture; a mask of 1 is to be painted. What is hidden is
grey. As Diffusers' StableDiffusionXLInpaintPipeline does it. Shapes: B pictures, H and W in pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models.vae import PIXELS_PER_LATENT, scale_latents


def inpainting_channels(images: Tensor, masks: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The five channels beside the noisy latents: [B, 5, H/8, W/8], float32, where the masks are.

    Args:
        images: [B, 3, H, W] in -1..1.
        masks: [B, H, W] in 0..1; from 0.5 on, a pixel is to be painted.
        encode: pictures -> raw latents, [B, 4, H/8, W/8].
    """
    hidden = (masks[:, None] >= 0.5).float()
    latents = scale_latents(encode(images * (1 - hidden))).to(hidden)
    size = (images.shape[2] // PIXELS_PER_LATENT, images.shape[3] // PIXELS_PER_LATENT)
    return torch.cat([F.interpolate(hidden, size), latents], dim=1)
