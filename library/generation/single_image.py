"""Generate a single image from encoded prompts, as training does for its sample images."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from library.generation.denoise import Conditioning, Guidance, aesthetic_score, denoise
from library.generation.image_grid import to_uint8
from library.generation.samplers import make_sampler, set_steps
from library.models.control import ControlInputs
from library.models.text_encoders import TextConditioning
from library.models.unet import UNet
from library.models.vae import unscale_latents


def generate_image(
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
    inpaint_channels: Tensor | None = None,
    control: ControlInputs | None = None,
) -> np.ndarray:
    """Generate one image: [H, W, 3], uint8.

    Args:
        decode: raw latents -> pixels in -1..1, [1, 3, H, W].
        prompt: the encoded prompt, [1, T, ...]. Its dtype and device are used to generate.
        negative: the encoded negative prompt.
        width: in pixels, a multiple of 32.
        height: in pixels, a multiple of 32.
        scale: of guidance.
        seed: of the initial noise and of noise that the sampler adds. Noise is sampled on the CPU,
            so that it is the same on every device.
        inpaint_channels: additional input of an inpainting model, [1, 5, H/8, W/8].
        control: control inputs of the U-Net, of one image.

    Raises:
        ValueError: if the image has values that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, 4, height // 8, width // 8), generator=generator).to(prompt.context)
    scheduler = make_sampler(
        sampler, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr
    )
    set_steps(scheduler, steps)
    branches = [(prompt, False)]
    if scale > 1:
        branches.insert(0, (negative, True))
    conditioning = [
        Conditioning.of(
            text,
            original=(height, width),
            target=(height, width),
            score=aesthetic_score(unet, is_negative=is_negative),
        )
        for text, is_negative in branches
    ]
    latents = denoise(
        unet,
        scheduler,
        noise * scheduler.init_noise_sigma,
        conditioning,
        Guidance(scale),
        timesteps=scheduler.timesteps,
        generators=generator,
        inpaint_channels=inpaint_channels,
        control_at=lambda step, steps: control,
    )
    pixels = decode(unscale_latents(latents))
    if not pixels.isfinite().all():
        raise ValueError("the image contains NaN or Inf")
    return to_uint8(pixels)[0]
