"""Size conditioning: how large the picture was, where it was cropped, how large it is trained or drawn.

Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
"""

import torch
from torch import Tensor

from library.models.unet_blocks import sinusoidal_embedding
from library.models.unet_config import SIZE_CHANNELS


def size_vector(original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
    """The embedding of three pairs of numbers.

    Args:
        original, target: (height, width) in pixels, [B, 2].
        crop: (top, left) in pixels, [B, 2].

    Returns:
        [B, 6 * 256], float32.
    """
    return sinusoidal_embedding(torch.cat([original, crop, target], dim=1), SIZE_CHANNELS).flatten(1)


def conditioning_vector(pooled: Tensor, original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
    """What the U-Net gets beside the context: pooled text [B, 1280] and sizes -> [B, 2816], in the dtype of `pooled`."""
    return torch.cat([pooled, size_vector(original, crop, target).to(pooled.dtype)], dim=1)
