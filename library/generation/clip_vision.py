"""CLIP's image encoder: image embeddings in the space of the pooled text embeddings."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import OptionError
from library.hub import hub_errors
from library.imports import import_transformers

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# Mean and standard deviation of the pixels, as in the code of OpenAI's paper.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def image_embeddings(
    name: str,
    images: "Iterable[np.ndarray]",
    *,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield the CLIP embedding of each image: [1, width], float32.

    Args:
        name: folder or hub id of an image encoder with projection.
        images: [H, W, 3], uint8.
        width: size of the model's pooled text embedding.
        device: where to compute.
        dtype: the dtype to compute in.

    Raises:
        OptionError: if the encoder can't be found, lacks tensors, or has another width.
    """
    import numpy as np

    encoder = _open(name, width).to(device, dtype).eval()
    mean = torch.tensor(_MEAN)[:, None, None]
    std = torch.tensor(_STD)[:, None, None]
    for image in images:
        square = np.array(_center_square(image, encoder.config.image_size))
        pixels = torch.from_numpy(square).permute(2, 0, 1).float() / 255
        pixels = (pixels - mean) / std
        yield encoder(pixels[None].to(device, dtype)).image_embeds.float()


def _open(name: str, width: int) -> Any:
    model_class = import_transformers().CLIPVisionModelWithProjection
    with hub_errors(f"--clip_vision_model {name}"):
        model, loaded = model_class.from_pretrained(name, output_loading_info=True)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise OptionError(
            f"--clip_vision_model {name}: this is not a CLIP image encoder with projection; "
            f"{len(missing)} of its tensors are missing ({', '.join(missing[:3])}, …)"
        )
    if model.config.projection_dim != width:
        raise OptionError(
            f"--clip_vision_model {name}: its embeddings have {model.config.projection_dim} "
            f"values, but this model's pooled text has {width}; use the image encoder that "
            "belongs to the model's second text encoder"
        )
    return model


def _center_square(pixels: "np.ndarray", side: int) -> "Image":
    """Resize the shorter side to `side` and crop the centre square."""
    from PIL import Image

    image = Image.fromarray(pixels)
    scale = side / min(image.size)
    width = max(side, round(image.width * scale))
    height = max(side, round(image.height * scale))
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))
