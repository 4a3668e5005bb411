"""Inpainting masks: drawn where pictures have none of their own.

Source: the card of stable-diffusion-inpainting (runwayml, 2022): synthetic masks, and in a quarter of the samples everything
is masked.
"""

import torch
from torch import Tensor

from library.rng import SampleRng

_EVERYTHING = 0.25  # share of the pictures that are to be painted whole
_MOST_BOXES = 4
_SMALLEST, _LARGEST = 0.1, 0.7  # sides of a box, as shares of the picture's


def draw_masks(rng: SampleRng, height: int, width: int) -> Tensor:
    """A mask for each sample, on the CPU: [B, H, W], 0 or 1, float32. Everything, or one to four boxes, is 1."""
    chances = rng.uniform("mask", (1 + 5 * _MOST_BOXES,))
    masks = torch.zeros(len(chances), height, width)
    for mask, (whole, *numbers) in zip(masks, chances.tolist(), strict=True):
        if whole < _EVERYTHING:
            mask.fill_(1)
        for number in range(_MOST_BOXES):
            is_there, tall, wide, down, right = numbers[5 * number : 5 * number + 5]
            if number and is_there < 0.5:
                continue
            box_height, box_width = (int(_share(side) * of) for side, of in ((tall, height), (wide, width)))
            top, left = int(down * (height - box_height)), int(right * (width - box_width))
            mask[top : top + box_height, left : left + box_width] = 1
    return masks


def _share(chance: float) -> float:
    return _SMALLEST + chance * (_LARGEST - _SMALLEST)
