"""Picture: one picture from a prompt's conditioning, and many of them on one sheet."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from library.generation.denoise import Conditioning, Guidance, denoise, score_of
from library.generation.samplers import make_sampler, set_steps
from library.models.control import ControlInputs
from library.models.text_encoders import TextConditioning
from library.models.unet import UNet
from library.models.vae import unscale_latents

_MARGIN, _LABEL_WIDTH = 4, 56  # pixels


def draw_image(
    unet: UNet,
    decode: Callable[[Tensor], Tensor],
    prompt: TextConditioning,
    negative: TextConditioning,
    *,
    width: int,
    height: int,
    steps: int,
    scale: float,
    seed: int,
    sampler: str,
    v_prediction: bool,
    zero_terminal_snr: bool,
    beside: Tensor | None = None,
    extra: ControlInputs | None = None,
) -> np.ndarray:
    """One picture: [H, W, 3], uint8.

    Args:
        decode: raw latents -> pixels in -1..1, [1, 3, H, W].
        prompt, negative: [1, T, ...]; the picture is drawn in their dtype and on their device.
        width, height: in pixels, multiples of 32.
        beside: what an inpainting model sees beside the latents, [1, 5, H/8, W/8].
        extra: what else reaches the U-Net's blocks, of one picture.
        seed: of the first noise and all later ones, drawn on the CPU so that every device gives the same.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, 4, height // 8, width // 8), generator=generator).to(prompt.context)
    chosen = make_sampler(sampler, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    set_steps(chosen, steps)
    told = [
        Conditioning.of(
            text, original=(height, width), target=(height, width), score=score_of(unet, is_negative=text is not prompt)
        )
        for text in ((negative, prompt) if scale > 1 else (prompt,))
    ]
    latents = denoise(
        unet, chosen, noise * chosen.init_noise_sigma, told, Guidance(scale), timesteps=chosen.timesteps, generators=generator,
        beside=beside, control_at=lambda step, steps: extra,
    )  # fmt: skip
    pixels = decode(unscale_latents(latents))
    if not pixels.isfinite().all():
        raise ValueError("its numbers aren't finite")
    return as_bytes(pixels)[0]


def as_bytes(pixels: Tensor) -> np.ndarray:
    """[B, 3, H, W] in -1..1 -> [B, H, W, 3], uint8."""
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def thumbnail(pixels: np.ndarray, side: int) -> Image.Image:
    """The picture, its longer side `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return image


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image | None]]]) -> Image.Image:
    """Rows of small pictures with a label each, in columns. None leaves a gap."""
    columns = max(len(images) for _, images in rows)
    all_images = [image for _, images in rows for image in images if image is not None]
    width = max((image.width for image in all_images), default=1) + _MARGIN
    heights = [max((p.height for p in images if p is not None), default=16) + _MARGIN for _, images in rows]
    sheet = Image.new("RGB", (_LABEL_WIDTH + columns * width, sum(heights) + _MARGIN), "white")
    pen, top = ImageDraw.Draw(sheet), _MARGIN
    for (label, images), height in zip(rows, heights, strict=True):
        pen.text((_MARGIN, top), label, fill="black")
        for column, image in enumerate(images):
            if image is not None:
                sheet.paste(image, (_LABEL_WIDTH + column * width, top))
        top += height
    return sheet
