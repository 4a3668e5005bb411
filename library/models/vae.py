"""The VAE (Diffusers' AutoencoderKL): pictures to raw latents and back.

Shapes: B batch, H and W in pixels. Raw latents are what the VAE gives and the disk keeps; scaled latents are what the
U-Net sees. Nobody else multiplies by LATENT_SCALE.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.imports import import_diffusers
from library.log import log

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LATENT_SCALE = 0.13025
PIXELS_PER_LATENT = 8


def scale_latents(raw: Tensor) -> Tensor:
    return raw * LATENT_SCALE


def unscale_latents(scaled: Tensor) -> Tensor:
    return scaled / LATENT_SCALE


def build_vae(tensors: Mapping[str, Tensor]) -> "AutoencoderKL":
    """The VAE of the sizes that `tensors` (module names) show, without weights, on the meta device."""
    with torch.device("meta"):
        return import_diffusers().AutoencoderKL(scaling_factor=LATENT_SCALE, **vae_config(tensors))


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Diffusers' configuration of the VAE, by the shapes of its tensors (module names)."""
    widths: list[int] = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv2.weight") in tensors:
        widths.append(tensors[name].shape[0])
    first_level = "encoder.down_blocks.0.resnets."
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": sum(name.startswith(first_level) and name.endswith(".conv1.weight") for name in tensors),
        "latent_channels": tensors["post_quant_conv.weight"].shape[1],
        "norm_num_groups": 32,
    }


@torch.no_grad()
def encode(vae: "AutoencoderKL", images: Tensor, noise: Tensor) -> Tensor:
    """Raw latents of `images`: a sample of the posterior, mean + std * noise.

    Args:
        images: [B, 3, H, W] in -1..1, any float dtype.
        noise: standard normal, [B, 4, H/8, W/8].

    Returns:
        [B, 4, H/8, W/8], float32. A picture whose latents aren't finite (fp16 overflows in this VAE) is encoded again in
        float32; if they still aren't, they are returned so, for the caller to name the picture.
    """
    latents = _encode(vae, images, noise)
    bad = ~finite_samples(latents)
    if bad.any() and vae.dtype != torch.float32:
        log.warning(
            "the VAE overflowed in %s for %d of %d pictures; they are encoded again in float32",
            str(vae.dtype)[6:],
            int(bad.sum()),
            len(bad),
        )
        with _in_float32(vae):
            latents[bad] = _encode(vae, images[bad], noise[bad])
    return latents


def _encode(vae: "AutoencoderKL", images: Tensor, noise: Tensor) -> Tensor:
    posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device, torch.float32)


@contextmanager
def _in_float32(vae: "AutoencoderKL") -> Iterator[None]:
    dtype = vae.dtype
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)


@torch.no_grad()
def decode(vae: "AutoencoderKL", raw: Tensor) -> Tensor:
    """Pictures of raw latents [B, 4, H/8, W/8]: [B, 3, H, W], float32, about -1..1; in float32 again if not finite."""
    images = _decode(vae, raw)
    if not images.isfinite().all() and vae.dtype != torch.float32:
        log.warning("the VAE overflowed in %s; the picture is decoded again in float32", str(vae.dtype)[6:])
        with _in_float32(vae):
            images = _decode(vae, raw)
    return images


def _decode(vae: "AutoencoderKL", raw: Tensor) -> Tensor:
    return vae.decode(raw.to(vae.device, vae.dtype)).sample.float()


def finite_samples(latents: Tensor) -> Tensor:
    """Which of a batch are finite in every element: [B], bool."""
    return latents.flatten(1).isfinite().all(dim=1)
