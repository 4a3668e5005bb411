"""Size conditioning: how large the picture was, where it was cropped, how large it is trained or drawn.

The refiner is told an aesthetic score, 0..10, instead of the last. Sources: Podell et al. 2023, arXiv:2307.01952, section 2.2;
Stability-AI/generative-models sd_xl_refiner.yaml.
"""

import torch
from torch import Tensor

from library.models.unet_blocks import sinusoidal_embedding
from library.models.unet_config import SIZE_CHANNELS


def size_vector(original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
    """The embedding of three pairs of numbers; for the refiner of five numbers.

    Args:
        original, target: (height, width) in pixels, [B, 2]; for the refiner `target` is the aesthetic score, [B, 1].
        crop: (top, left) in pixels, [B, 2].

    Returns:
        [B, 6 * 256], float32; [B, 5 * 256] for the refiner.
    """
    return sinusoidal_embedding(torch.cat([original, crop, target], dim=1), SIZE_CHANNELS).flatten(1)


def conditioning_vector(pooled: Tensor, original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
    """What the U-Net gets beside the context: pooled text [B, 1280] and sizes -> [B, 2816], in the dtype of `pooled`.

    For the refiner, whose `target` is the aesthetic score, [B, 2560].
    """
    return torch.cat([pooled, size_vector(original, crop, target).to(pooled.dtype)], dim=1)
