"""Denoise: from noise to scaled latents, with classifier-free guidance.

Shapes: B pictures, H and W in pixels.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.models.conditioning import conditioning_vector
from library.models.text_encoders import TextConditioning
from library.models.unet import UNet
from library.models.unet_config import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE


@torch.no_grad()
def denoise(
    unet: UNet,
    sampler: Any,
    noise: Tensor,
    prompt: TextConditioning,
    negative: TextConditioning,
    *,
    steps: int,
    scale: float,
    generator: torch.Generator | None = None,
    beside: Tensor | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Draw pictures: scaled latents, [B, 4, H/8, W/8], in the dtype of the noise.

    Args:
        sampler: of make_sampler.
        noise: standard normal, [B, 4, H/8, W/8].
        prompt, negative: [B, T, ...] each.
        scale: strength of the prompt against the negative one; 1 or below leaves the negative one out.
        beside: what an inpainting model sees beside the latents, [B, 5, H/8, W/8] (models/inpainting.py).
        generator: of the noise that samplers like euler_a add at each step; the global one if None.

    Source: Ho & Salimans 2022, arXiv:2207.12598, equation 6.
    """
    guided = scale > 1
    text = TextConditioning(*(torch.cat(pair) for pair in zip(negative, prompt, strict=True))) if guided else prompt
    size = torch.tensor([[noise.shape[2] * 8, noise.shape[3] * 8]], device=noise.device).expand(len(text.pooled), 2)
    scores = [[NEGATIVE_AESTHETIC_SCORE]] * (len(text.pooled) - len(noise)) + [[AESTHETIC_SCORE]] * len(noise)
    target = torch.tensor(scores, device=noise.device) if unet.config.takes_score else size
    vector = conditioning_vector(text.pooled, size, torch.zeros_like(size), target)
    if beside is not None:
        beside = beside.repeat(len(text.pooled) // len(noise), 1, 1, 1).to(noise.dtype)
    sampler.set_timesteps(steps, device=noise.device)
    draws = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    latents = noise * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        doubled = torch.cat([latents, latents]) if guided else latents
        doubled = sampler.scale_model_input(doubled, timestep).to(noise.dtype)
        if beside is not None:
            doubled = torch.cat([doubled, beside], dim=1)
        predicted = unet(doubled, timestep.expand(len(doubled)), text.context, vector)
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = without + scale * (with_prompt - without)
        latents = sampler.step(predicted, timestep, latents, return_dict=False, **draws)[0]
        on_step()
    return latents
