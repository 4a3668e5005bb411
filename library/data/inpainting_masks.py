"""Random inpainting masks for images that have no mask.

Source: the model card of stable-diffusion-inpainting (runwayml, 2022): synthetic masks, and in a
quarter of the samples everything is masked.
"""

import torch
from torch import Tensor

from library.rng import SampleRng

_EVERYTHING = 0.25  # fraction of the samples in which everything is masked
_MAX_BOXES = 4
_SMALLEST, _LARGEST = 0.1, 0.7  # sides of a box, as fractions of the image's sides
_NUMBERS_PER_BOX = 5


def random_masks(rng: SampleRng, height: int, width: int) -> Tensor:
    """Return a mask for each sample, on the CPU: [B, H, W], 0 or 1, float32.

    Either everything is 1, or one to four boxes are.
    """
    uniform = rng.uniform("mask", (1 + _NUMBERS_PER_BOX * _MAX_BOXES,))
    masks = torch.zeros(len(uniform), height, width)
    for mask, (first, *numbers) in zip(masks, uniform.tolist(), strict=True):
        if first < _EVERYTHING:
            mask.fill_(1)
            continue
        for i in range(_MAX_BOXES):
            start = _NUMBERS_PER_BOX * i
            exists, tall, wide, down, right = numbers[start : start + _NUMBERS_PER_BOX]
            if i and exists < 0.5:
                continue
            box_height, box_width = int(_side(tall) * height), int(_side(wide) * width)
            top, left = int(down * (height - box_height)), int(right * (width - box_width))
            mask[top : top + box_height, left : left + box_width] = 1
    return masks


def _side(uniform: float) -> float:
    return _SMALLEST + uniform * (_LARGEST - _SMALLEST)
