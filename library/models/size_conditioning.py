"""Size conditioning: the original size of the image, its crop, and the size at which it is trained or generated.

The refiner gets an aesthetic score, 0..10, instead of the last one. Sources: Podell et al. 2023, arXiv:2307.01952, section 2.2;
Stability-AI/generative-models sd_xl_refiner.yaml.
"""

import torch
from torch import Tensor

from library.models.unet_blocks import sinusoidal_embedding
from library.models.unet_config import SIZE_CHANNELS


def size_vector(original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
    """Return the embedding of the sizes.

    Args:
        original: (height, width) in pixels, [B, 2].
        crop: (top, left) in pixels, [B, 2].
        target: (height, width) in pixels, [B, 2]; for the refiner the aesthetic score, [B, 1].

    Returns:
        [B, 6 * 256], float32; [B, 5 * 256] for the refiner.
    """
    return sinusoidal_embedding(torch.cat([original, crop, target], dim=1), SIZE_CHANNELS).flatten(
        1
    )


def conditioning_vector(pooled: Tensor, original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
    """Return the U-Net's vector input: the pooled text [B, 1280] and the embedding of the sizes.

    Returns:
        [B, 2816] in the dtype of `pooled`; for the refiner, whose `target` is the aesthetic score, [B, 2560].
    """
    sizes = size_vector(original, crop, target).to(pooled.dtype)
    return torch.cat([pooled, sizes], dim=1)
