"""ClipVision: what CLIP's image encoder sees in pictures, in the space of the pooled text."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import OptionError
from library.hub import hub_errors
from library.imports import import_transformers

if TYPE_CHECKING:
    from PIL.Image import Image

_MEAN, _STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # CLIP's, of OpenAI's paper's code


@torch.no_grad()
def image_vectors(
    name: str, images: "Iterable[Image]", *, width: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """What the image encoder with projection that a folder or hub id holds sees in each picture: [1, width], float32.

    Args:
        width: of the model's pooled text.
        dtype: to compute in.

    Raises OptionError for an encoder that isn't there, lacks tensors, or has another width.
    """
    import numpy as np
    from PIL import Image as Pillow

    model = _open(name, width).to(device, dtype).eval()
    side = model.config.image_size
    mean, std = (torch.tensor(one)[:, None, None] for one in (_MEAN, _STD))
    for image in images:
        pixels = torch.from_numpy(np.array(_square(image, side, Pillow.Resampling.BICUBIC)))
        values = (pixels.permute(2, 0, 1).float() / 255 - mean) / std
        yield model(values[None].to(device, dtype)).image_embeds.float()


def _open(name: str, width: int) -> Any:
    kind = import_transformers().CLIPVisionModelWithProjection
    with hub_errors(f"--clip_vision_model {name}"):
        model, loaded = kind.from_pretrained(name, output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise OptionError(
            f"--clip_vision_model {name}: it is no CLIP image encoder with projection; {len(missing)} of its tensors are missing "
            f"({', '.join(missing[:3])}, …)"
        )
    if model.config.projection_dim != width:
        raise OptionError(
            f"--clip_vision_model {name}: its vectors have {model.config.projection_dim} numbers, and this model's pooled text "
            f"has {width}; give the image encoder that belongs to its second text encoder"
        )
    return model


def _square(image: "Image", side: int, filter: int) -> "Image":
    """The shorter side resized to `side`, then the middle square."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), filter).crop((left, top, left + side, top + side))
