"""The VAE (Diffusers' AutoencoderKL): images to raw latents and back.

Shapes: B batch, H and W in pixels. Raw latents are the output of the VAE and are stored on disk; scaled latents are the
input of the U-Net. No other module multiplies by LATENT_SCALE.
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
    """Build the VAE for the shapes of `tensors` (module names), on the meta device."""
    with torch.device("meta"):
        return import_diffusers().AutoencoderKL(scaling_factor=LATENT_SCALE, **vae_config(tensors))


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return Diffusers' configuration of the VAE for the shapes of its tensors (module names)."""
    widths: list[int] = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv2.weight") in tensors:
        widths.append(tensors[name].shape[0])
    first_level = "encoder.down_blocks.0.resnets."
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": sum(
            name.startswith(first_level) and name.endswith(".conv1.weight") for name in tensors
        ),
        "latent_channels": tensors["post_quant_conv.weight"].shape[1],
        "norm_num_groups": 32,
    }


InFloat32 = Callable[[], "AutoencoderKL"]
"""Returns the same VAE in float32, with its weights as stored."""


@torch.inference_mode()
def encode(
    vae: "AutoencoderKL", images: Tensor, noise: Tensor, in_float32: InFloat32 | None = None
) -> Tensor:
    """Encode images to raw latents: a sample of the posterior, mean + std * noise.

    Args:
        images: [B, 3, H, W] in -1..1, any float dtype.
        noise: standard normal, [B, 4, H/8, W/8].
        in_float32: encodes images again whose latents have NaN or Inf (fp16 overflows in this VAE).

    Returns:
        [B, 4, H/8, W/8], float32. NaN and Inf remain if float32 gives them too, so that the caller can name the image.
    """
    latents = _encode(vae, images, noise)
    if vae.dtype == torch.float32 or in_float32 is None:
        return latents
    bad = ~finite_samples(latents)
    if bad.any():
        _warn_overflow(vae, int(bad.sum()), len(bad))
        latents[bad] = _encode(
            in_float32(), images[bad.to(images.device)], noise[bad.to(noise.device)]
        )
    return latents


def _encode(vae: "AutoencoderKL", images: Tensor, noise: Tensor) -> Tensor:
    inputs = images.to(vae.device, vae.dtype, memory_format=torch.channels_last)
    posterior = vae.encode(inputs).latent_dist
    return posterior.mean.float() + posterior.std.float() * noise.to(
        posterior.mean.device, torch.float32
    )


def _warn_overflow(vae: "AutoencoderKL", count: int, total: int) -> None:
    log.warning(
        "the VAE overflowed in %s for %d of %d images. It uses float32 from now on (--no_half_vae: from the start)",
        str(vae.dtype).removeprefix("torch."),
        count,
        total,
    )


@torch.inference_mode()
def decode(
    vae: "AutoencoderKL",
    raw: Tensor,
    in_float32: InFloat32 | None = None,
    *,
    black: float | None = None,
) -> Tensor:
    """Decode raw latents [B, 4, H/8, W/8] to images: [B, 3, H, W], float32, about -1..1.

    Args:
        raw: raw latents.
        in_float32: decodes images again that have NaN or Inf.
        black: images without a brighter value than this are decoded again too.
    """
    images = _decode(vae, raw)
    if vae.dtype == torch.float32 or in_float32 is None:
        return images
    bad = ~finite_samples(images)
    if black is not None:
        bad |= images.flatten(1).amax(dim=1) <= black
    if bad.any():
        _warn_overflow(vae, int(bad.sum()), len(bad))
        images[bad] = _decode(in_float32(), raw[bad.to(raw.device)])
    return images


def decode_in_tiles(vae: "AutoencoderKL") -> None:
    """Make the VAE decode overlapping tiles of 512 pixels, for the least memory. Seams are blended, so images differ slightly."""
    vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
    vae.enable_tiling()


def decode_in_slices(vae: "AutoencoderKL", slices: int) -> None:
    """Make each 3x3 convolution of the decoder work on one of N slices of the rows at a time: less memory, the same image."""
    convolutions: list[Any] = [m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions:
        if convolution.kernel_size == (3, 3):
            convolution.forward = _sliced(convolution, slices)


def _sliced(conv: torch.nn.Conv2d, slices: int) -> Callable[[Tensor], Tensor]:
    """Return a forward that convolves one slice of the rows at a time, with one row of each neighbor."""

    def forward(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        rows = -(-x.shape[2] // slices)
        parts = [
            torch.nn.functional.conv2d(
                padded[:, :, first : first + rows + 2], conv.weight, conv.bias
            )
            for first in range(0, x.shape[2], rows)
        ]
        return torch.cat(parts, dim=2)

    return forward


def _decode(vae: "AutoencoderKL", raw: Tensor) -> Tensor:
    return vae.decode(raw.to(vae.device, vae.dtype)).sample.float()


def finite_samples(latents: Tensor) -> Tensor:
    """Return for each sample of a batch whether it has neither NaN nor Inf: [B], bool."""
    return latents.flatten(1).isfinite().all(dim=1)
