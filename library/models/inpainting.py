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
        images, masks: as for shown_and_hidden.
        encode: pictures -> raw latents, [B, 4, H/8, W/8].
    """
    shown, cells = shown_and_hidden(images, masks)
    return with_scaled_latents(torch.cat([cells, encode(shown).to(cells)], dim=1))


def shown_and_hidden(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures without what is to be painted, and which cells of the latents that is, 0 or 1: [B, 1, H/8, W/8], float32.

    Args:
        images: [B, 3, H, W] in -1..1.
        masks: [B, H, W] in 0..1; from 0.5 on, a pixel is to be painted.
    """
    hidden = (masks[:, None] >= 0.5).float()
    size = (images.shape[2] // PIXELS_PER_LATENT, images.shape[3] // PIXELS_PER_LATENT)
    return images * (1 - hidden), F.interpolate(hidden, size)


def with_scaled_latents(channels: Tensor) -> Tensor:
    """The five channels as the U-Net sees them, of the mask and raw latents, which are what caches hold: [B, 5, H/8, W/8]."""
    return torch.cat([channels[:, :1], scale_latents(channels[:, 1:])], dim=1)
