"""Decoded images as 8-bit arrays, thumbnails, and a contact sheet of many images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_MARGIN = 4  # pixels
_LABEL_WIDTH = 56  # pixels
_EMPTY_ROW_HEIGHT = 16  # pixels


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Convert [B, 3, H, W] in -1..1 to [B, H, W, 3], uint8."""
    levels = pixels.clamp(-1, 1).add(1).mul(127.5).round()
    return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def thumbnail(pixels: np.ndarray, side: int) -> Image.Image:
    """Return the image with its longer side reduced to `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return image


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image | None]]]) -> Image.Image:
    """Return an image with a row of thumbnails next to each label. None leaves a gap."""
    num_columns = max(len(images) for _, images in rows)
    column_width = 1
    row_heights = []
    for _, images in rows:
        row_height = 0
        for image in images:
            if image is not None:
                column_width = max(column_width, image.width)
                row_height = max(row_height, image.height)
        row_heights.append((row_height or _EMPTY_ROW_HEIGHT) + _MARGIN)
    column_width += _MARGIN
    size = (_LABEL_WIDTH + num_columns * column_width, sum(row_heights) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    top = _MARGIN
    for (label, images), row_height in zip(rows, row_heights, strict=True):
        canvas.text((_MARGIN, top), label, fill="black")
        for column, image in enumerate(images):
            if image is not None:
                sheet.paste(image, (_LABEL_WIDTH + column * column_width, top))
        top += row_height
    return sheet
