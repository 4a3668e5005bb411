"""ClipVision: what CLIP's image encoder sees in pictures, in the space of the pooled text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.hub import hub_errors
from library.imports import import_transformers

if TYPE_CHECKING:
    from PIL.Image import Image

_MEAN, _STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # CLIP's, of OpenAI's paper's code


@torch.no_grad()
def image_vectors(name: str, images: "Sequence[Image]", device: torch.device) -> Tensor:
    """[B, 1280], float32, of the image encoder with projection that a folder or hub id holds. Raises OptionError."""
    import numpy as np
    from PIL import Image as Pillow

    with hub_errors(name):
        model = import_transformers().CLIPVisionModelWithProjection.from_pretrained(name).to(device).eval()
    side = model.config.image_size
    pixels = np.stack([np.asarray(_square(image, side, Pillow.Resampling.BICUBIC)) for image in images])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(device) / 255
    mean, std = (torch.tensor(one, device=device)[:, None, None] for one in (_MEAN, _STD))
    return model((values - mean) / std).image_embeds.float()


def _square(image: "Image", side: int, filter: int) -> "Image":
    """The shorter side resized to `side`, then the middle square."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), filter).crop((left, top, left + side, top + side))
