"""The VAE (Diffusers' AutoencoderKL): pictures to raw latents and back.

Shapes: B batch, H and W in pixels. Raw latents are what the VAE gives and the disk keeps; scaled latents are what the
U-Net sees. Nobody else multiplies by LATENT_SCALE.
"""

from collections.abc import Callable, Mapping
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


InFloat32 = Callable[[], "AutoencoderKL"]
"""Gives the same VAE in float32, its weights as stored."""


@torch.inference_mode()
def encode(vae: "AutoencoderKL", images: Tensor, noise: Tensor, in_float32: InFloat32 | None = None) -> Tensor:
    """Raw latents of `images`: a sample of the posterior, mean + std * noise.

    Args:
        images: [B, 3, H, W] in -1..1, any float dtype.
        noise: standard normal, [B, 4, H/8, W/8].
        in_float32: for pictures whose latents aren't finite (fp16 overflows in this VAE), which are encoded again.

    Returns:
        [B, 4, H/8, W/8], float32. What isn't finite in float32 either is returned so, for the caller to name the picture.
    """
    latents = _encode(vae, images, noise)
    if vae.dtype == torch.float32 or in_float32 is None:
        return latents
    bad = ~finite_samples(latents)
    if bad.any():
        _tell_overflow(vae, int(bad.sum()), len(bad))
        latents[bad] = _encode(in_float32(), images[bad.to(images.device)], noise[bad.to(noise.device)])
    return latents


def _encode(vae: "AutoencoderKL", images: Tensor, noise: Tensor) -> Tensor:
    inputs = images.to(vae.device, vae.dtype, memory_format=torch.channels_last)
    posterior = vae.encode(inputs).latent_dist
    return posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device, torch.float32)


def _tell_overflow(vae: "AutoencoderKL", count: int, total: int) -> None:
    log.warning(
        "the VAE overflowed in %s for %d of %d pictures; it works in float32 from here on (--no_half_vae from the start)",
        str(vae.dtype).removeprefix("torch."),
        count,
        total,
    )


@torch.inference_mode()
def decode(
    vae: "AutoencoderKL", raw: Tensor, in_float32: InFloat32 | None = None, *, black: float | None = None
) -> Tensor:
    """Pictures of raw latents [B, 4, H/8, W/8]: [B, 3, H, W], float32, about -1..1.

    Args:
        in_float32: for pictures that aren't finite, which are decoded again.
        black: those that are nowhere brighter than this are decoded again too.
    """
    images = _decode(vae, raw)
    if vae.dtype == torch.float32 or in_float32 is None:
        return images
    bad = ~finite_samples(images)
    if black is not None:
        bad |= images.flatten(1).amax(dim=1) <= black
    if bad.any():
        _tell_overflow(vae, int(bad.sum()), len(bad))
        images[bad] = _decode(in_float32(), raw[bad.to(raw.device)])
    return images


def decode_in_tiles(vae: "AutoencoderKL") -> None:
    """From now on it decodes overlapping tiles of 512 pixels: least memory. Their seams are blended, so pictures differ a little."""
    vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
    vae.enable_tiling()


def decode_in_slices(vae: "AutoencoderKL", slices: int) -> None:
    """From now on each 3x3 convolution of its decoder works on so many slices of the rows in turn: less memory, the same picture."""
    convolutions: list[Any] = [m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions:
        if convolution.kernel_size == (3, 3):
            convolution.forward = _sliced(convolution, slices)


def _sliced(conv: torch.nn.Conv2d, slices: int) -> Callable[[Tensor], Tensor]:
    """The convolution, so many slices of the rows in turn; each sees a row of its neighbours."""

    def forward(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        rows = -(-x.shape[2] // slices)
        parts = [
            torch.nn.functional.conv2d(padded[:, :, first : first + rows + 2], conv.weight, conv.bias)
            for first in range(0, x.shape[2], rows)
        ]
        return torch.cat(parts, dim=2)

    return forward


def _decode(vae: "AutoencoderKL", raw: Tensor) -> Tensor:
    return vae.decode(raw.to(vae.device, vae.dtype)).sample.float()


def finite_samples(latents: Tensor) -> Tensor:
    """Which of a batch are finite in every element: [B], bool."""
    return latents.flatten(1).isfinite().all(dim=1)
