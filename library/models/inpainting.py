"""Inpainting: the further input channels of a 9-channel model, a mask and the latents of the masked image.

Channels: 4 noisy latents, 1 mask, 4 scaled latents of the masked image. A mask of 1 marks the area to inpaint, which is gray
in the masked image. The same as in Diffusers' StableDiffusionXLInpaintPipeline. Shapes: B images, H and W in pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models.vae import PIXELS_PER_LATENT, scale_latents


def inpainting_channels(
    images: Tensor, masks: Tensor, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the five channels that follow the noisy latents: [B, 5, H/8, W/8], float32, on the device of the masks.

    Args:
        images: [B, 3, H, W] in -1..1.
        masks: [B, H, W] in 0..1; a pixel is inpainted from 0.5 on.
        encode: images -> raw latents, [B, 4, H/8, W/8].
    """
    masked, cells = masked_images(images, masks)
    return with_scaled_latents(torch.cat([cells, encode(masked).to(cells)], dim=1))


def masked_images(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images without the area to inpaint, and that area in latent cells.

    Args:
        images: [B, 3, H, W] in -1..1.
        masks: [B, H, W] in 0..1; a pixel is inpainted from 0.5 on.

    Returns:
        [B, 3, H, W], and [B, 1, H/8, W/8] of 0 and 1, float32.
    """
    hidden = (masks[:, None] >= 0.5).float()
    size = (images.shape[2] // PIXELS_PER_LATENT, images.shape[3] // PIXELS_PER_LATENT)
    return images * (1 - hidden), F.interpolate(hidden, size)


def with_scaled_latents(channels: Tensor) -> Tensor:
    """Return the U-Net's input for the mask and raw latents that caches hold: [B, 5, H/8, W/8]."""
    return torch.cat([channels[:, :1], scale_latents(channels[:, 1:])], dim=1)
