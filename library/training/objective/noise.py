"""Noise: from clean latents to the noised ones that the U-Net sees, and what it should predict.

Shapes: B samples, C = 4 latent channels, H and W of the latents. Every function is pure; random
numbers are arguments, and those of a sample come from its position (library/rng.py), where
sd-scripts has one running stream for the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models.noise_schedule import NUM_TIMESTEPS, NoiseSchedule
from library.rng import SampleRng
from library.training.options.objective import NoiseOptions


class NoisedLatents(NamedTuple):
    """Noised latents, and what they are made of.

    Attributes:
        latents: noised scaled latents, [B, C, H, W].
        clean: scaled latents, [B, C, H, W].
        noise: what the U-Net should predict, [B, C, H, W].
        timesteps: [B].
    """

    latents: Tensor
    clean: Tensor
    noise: Tensor
    timesteps: Tensor


def add_training_noise(
    scaled: Tensor,
    rng: SampleRng,
    schedule: NoiseSchedule,
    options: NoiseOptions,
    timesteps: Tensor | None = None,
) -> NoisedLatents:
    """Add random noise to scaled latents.

    Args:
        scaled: [B, C, H, W].
        rng: of the samples.
        schedule: the noise schedule.
        options: kinds and strengths of the noise.
        timesteps: [B]; None: random ones.
    """
    noise = sample_noise(scaled, rng, options)
    if timesteps is None:
        timesteps = sample_timesteps(rng, options)
    added = noise
    if options.ip_noise_gamma:
        gamma = _strength(
            options.ip_noise_gamma, options.ip_noise_gamma_random_strength, "ip noise strength", rng
        )
        added = noise + gamma * rng.normal("ip noise", scaled.shape[1:])
    return NoisedLatents(add_noise(scaled, added, schedule.at(timesteps)), scaled, noise, timesteps)


def sample_noise(scaled: Tensor, rng: SampleRng, options: NoiseOptions) -> Tensor:
    """Return the noise of each sample with offset and pyramid noise, [B, C, H, W]."""
    noise = rng.normal("noise", scaled.shape[1:])
    if options.noise_offset:
        strength = _strength(
            options.noise_offset, options.noise_offset_random_strength, "offset strength", rng
        )
        offset = rng.normal("offset", (scaled.shape[1], 1, 1))
        noise = offset_noise(
            noise, offset, strength, latents=scaled, adaptive=options.adaptive_noise_scale
        )
    if options.multires_noise_iterations:
        pyramids = [_sample_pyramid(noise[i : i + 1], rng, i, options) for i in range(len(noise))]
        noise = torch.cat(pyramids)
    return noise


def _strength(maximum: float, is_random: bool, purpose: str, rng: SampleRng) -> Tensor | float:
    return maximum * rng.uniform(purpose, (1, 1, 1)) if is_random else maximum


def sample_timesteps(rng: SampleRng, options: NoiseOptions) -> Tensor:
    """Return random timesteps from --min_timestep up to, but without, --max_timestep: [B], int64.

    Where that range is empty, all are --max_timestep.
    """
    low = options.min_timestep or 0
    high = NUM_TIMESTEPS if options.max_timestep is None else options.max_timestep
    if low >= high:
        return torch.full((rng.count,), high, device=rng.device)
    if options.timestep_sampling == "uniform":
        return rng.integers("timestep", low, high)
    fraction = _timestep_fractions(rng, options)
    return (low + fraction * (high - low)).long().clamp(low, high - 1)


def _timestep_fractions(rng: SampleRng, options: NoiseOptions) -> Tensor:
    """Return where each sample is in the range of timesteps, 0 clean and 1 noise: [B]."""
    if options.timestep_sampling == "logit_normal":
        return logit_normal(
            rng.normal("timestep", ()), mean=options.logit_mean, std=options.logit_std
        )
    uniform = rng.uniform("timestep")
    if options.timestep_sampling == "mode":
        return mode(uniform, options.mode_scale)
    return cosmap(uniform)


def logit_normal(normal: Tensor, *, mean: float, std: float) -> Tensor:
    """Return timestep fractions around the middle.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.

    Args:
        normal: standard normal random numbers.
        mean: above 0 for more noise, below for less.
        std: width of the distribution.
    """
    return torch.sigmoid(mean + std * normal)


def mode(uniform: Tensor, scale: float) -> Tensor:
    """Return timestep fractions with more (scale > 0) or fewer of the middle; 0 is uniform.

    Source: Esser et al. 2024, arXiv:2403.03206, equation 20.
    """
    return 1 - uniform - scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)


def cosmap(uniform: Tensor) -> Tensor:
    """Return timestep fractions of the cosine schedule's density, 2 / (pi - 2 pi t + 2 pi t^2).

    Source: Esser et al. 2024, arXiv:2403.03206, equation 21.
    """
    return 1 - 1 / (torch.tan(math.pi / 2 * uniform) + 1)


def offset_noise(
    noise: Tensor,
    offset: Tensor,
    strength: Tensor | float,
    *,
    latents: Tensor,
    adaptive: float | None,
) -> Tensor:
    """Return noise that also shifts each channel, for very dark and very bright images.

    Args:
        noise: [B, C, H, W].
        offset: standard normal, [B, C, 1, 1].
        strength: of the shift; a number, or [B, 1, 1, 1].
        latents: scaled latents, [B, C, H, W].
        adaptive: added to the strength times each channel's absolute mean; the sum is at least 0.

    Source: Guttenberg 2023, "Diffusion with offset noise"; contract: training_math.md section 2.
    """
    if adaptive:
        strength = (strength + adaptive * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    return noise + strength * offset


def pyramid_noise(noise: Tensor, levels: Sequence[Tensor], discount: float) -> Tensor:
    """Return noise with coarser noise added, level i times discount^i, of standard deviation 1.

    Args:
        noise: [B, C, H, W]; the deviation is taken over all of it.
        levels: standard normal, [B, C, h_i, w_i], finest first.
        discount: strength of each level relative to the one before.

    Source: Whitaker 2023, "Multi-resolution noise for diffusion model training"; contract:
    training_math.md section 2.
    """
    size = noise.shape[2:]
    for i, level in enumerate(levels):
        noise = noise + F.interpolate(level, size=size, mode="bilinear") * discount**i
    return noise / noise.std()


def pyramid_sizes(
    height: int, width: int, iterations: int, uniform: Sequence[float]
) -> list[tuple[int, int]]:
    """Return the size of each pyramid level: sides divided by r^i, with a random r in 2..4 each.

    The last level has a side of 1.

    Args:
        height: of the latents.
        width: of the latents.
        iterations: most levels.
        uniform: random numbers in 0..1, one for each level.
    """
    sizes: list[tuple[int, int]] = []
    for i in range(iterations):
        ratio = (2 + 2 * uniform[i]) ** i
        sizes.append((max(1, int(height / ratio)), max(1, int(width / ratio))))
        if 1 in sizes[-1]:
            break
    return sizes


def _sample_pyramid(noise: Tensor, rng: SampleRng, i: int, options: NoiseOptions) -> Tensor:
    """Return pyramid noise of sample i, [1, C, H, W]."""
    assert options.multires_noise_iterations
    sample_rng = replace(rng, first_sample_index=rng.first_sample_index + i, count=1)
    cpu_rng = replace(sample_rng, device=torch.device("cpu"))  # sizes are needed on the host
    uniform = cpu_rng.uniform("pyramid sizes", (options.multires_noise_iterations,))[0].tolist()
    height, width = noise.shape[2:]
    sizes = pyramid_sizes(height, width, options.multires_noise_iterations, uniform)
    levels = [
        sample_rng.normal(f"pyramid {level}", (noise.shape[1], *size))
        for level, size in enumerate(sizes)
    ]
    return pyramid_noise(noise, levels, options.multires_noise_discount)


def add_noise(scaled: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
    """
    return alpha_bar.sqrt() * scaled + (1 - alpha_bar).sqrt() * noise


def velocity(scaled: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4.
    """
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * scaled
