"""Random models of any of SDXL's families, built from their sizes: what make_tiny_sdxl.py and the benchmarks write."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.models.checkpoint import layouts
from library.models.checkpoint.key_maps import FILE_PREFIXES, REFINER_PREFIXES
from library.models.unet import UNet
from library.models.unet_config import SIZE_CHANNELS, BlockPlan, UNetConfig


@dataclass(frozen=True)
class TextEncoderSizes:
    """Sizes of one CLIP text encoder."""

    width: int
    layers: int
    projection: int
    vocabulary: int = 49408
    positions: int = 77


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a whole checkpoint. The refiner has no text encoder 1."""

    unet: UNetConfig
    text_encoder_1: TextEncoderSizes | None
    text_encoder_2: TextEncoderSizes
    vae_channels: tuple[int, ...]


def unet_config(
    channels: int,
    multipliers: Sequence[int],
    down_depths: Sequence[int],
    up_depths: Sequence[Sequence[int]],
    middle_depth: int | None,
    context_channels: int,
    vector_channels: int,
    in_channels: int = 4,
) -> UNetConfig:
    """The sizes of a U-Net with two residual blocks a level on the way down and three on the way up.

    Args:
        multipliers, down_depths: of each level, the finest first.
        up_depths: transformer blocks of each of a level's three blocks on the way up, the coarsest level first.
    """
    widths = [channels * multiplier for multiplier in multipliers]
    down, skips, width = [], [channels], channels
    for level, (out, depth) in enumerate(zip(widths, down_depths, strict=True)):
        for _ in range(2):
            down.append(BlockPlan(width, out, depth))
            width = out
            skips.append(width)
        if level < len(widths) - 1:
            down.append(BlockPlan(width, width, resample=True))
            skips.append(width)
    up = []
    for level, depths in enumerate(up_depths):
        out = widths[-1 - level]
        for i, depth in enumerate(depths):
            up.append(
                BlockPlan(
                    width + skips.pop(), out, depth, resample=i == 2 and level < len(widths) - 1
                )
            )
            width = out
    return UNetConfig(
        in_channels,
        4,
        channels,
        channels * 4,
        context_channels,
        vector_channels,
        tuple(down),
        middle_depth,
        tuple(up),
    )


SDXL_BASE = unet_config(320, (1, 2, 4), (0, 2, 10), ((10,) * 3, (2,) * 3, (0,) * 3), 10, 2048, 2816)
SSD_1B = unet_config(320, (1, 2, 4), (0, 2, 4), ((4, 4, 10), (2, 1, 1), (0,) * 3), None, 2048, 2816)
VEGA = unet_config(320, (1, 2, 4), (0, 1, 2), ((2, 2, 2), (1, 1, 1), (0,) * 3), None, 2048, 2816)
REFINER = unet_config(
    384, (1, 2, 4, 4), (0, 4, 4, 0), ((0,) * 3, (4,) * 3, (4,) * 3, (0,) * 3), 4, 1280, 2560
)
INPAINTING = unet_config(
    320, (1, 2, 4), (0, 2, 10), ((10,) * 3, (2,) * 3, (0,) * 3), 10, 2048, 2816, in_channels=9
)

FULL = ModelSizes(
    SDXL_BASE,
    TextEncoderSizes(768, 12, 768),
    TextEncoderSizes(1280, 32, 1280),
    (128, 256, 512, 512),
)


def _tiny(
    down_depths: Sequence[int],
    up_depths: Sequence[Sequence[int]],
    middle_depth: int | None,
    in_channels: int = 4,
) -> ModelSizes:
    unet = unet_config(
        32,
        (1, 2, 4),
        down_depths,
        up_depths,
        middle_depth,
        64 + 128,
        128 + 6 * SIZE_CHANNELS,
        in_channels,
    )
    return ModelSizes(
        unet, TextEncoderSizes(64, 3, 64), TextEncoderSizes(128, 3, 128), (32, 32, 64, 64)
    )


# The same topology in four million numbers, for runs of many steps.
SMALLEST = ModelSizes(
    unet_config(
        32, (1, 2, 2), (0, 1, 1), ((1,) * 3, (1,) * 3, (0,) * 3), 1, 64 + 64, 64 + 6 * SIZE_CHANNELS
    ),
    TextEncoderSizes(64, 1, 64),
    TextEncoderSizes(64, 2, 64),
    (32, 32, 32, 32),
)

# A tiny twin of each: the topology of the real one, with attention depths of 1 and 2 where that has more.
TINY = _tiny((0, 1, 2), ((2,) * 3, (1,) * 3, (0,) * 3), 2)
TINY_SSD_1B = _tiny((0, 2, 2), ((2, 2, 3), (2, 1, 1), (0,) * 3), None)
TINY_VEGA = _tiny((0, 1, 2), ((2,) * 3, (1,) * 3, (0,) * 3), None)
TINY_INPAINTING = _tiny((0, 1, 2), ((2,) * 3, (1,) * 3, (0,) * 3), 2, in_channels=9)
TINY_REFINER = replace(
    TINY,
    unet=unet_config(
        32,
        (1, 2, 4, 4),
        (0, 1, 1, 0),
        ((0,) * 3, (1,) * 3, (1,) * 3, (0,) * 3),
        1,
        128,
        128 + 5 * SIZE_CHANNELS,
    ),
    text_encoder_1=None,
)
TWINS = {
    "base": TINY,
    "ssd-1b": TINY_SSD_1B,
    "vega": TINY_VEGA,
    "refiner": TINY_REFINER,
    "inpainting": TINY_INPAINTING,
}


def random_checkpoint(
    sizes: ModelSizes, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A whole single-file checkpoint with random weights in PyTorch's usual ranges, on the CPU."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        modules = {"unet": UNet(sizes.unet), "vae": _vae(sizes.vae_channels)}
        encoders = {1: sizes.text_encoder_1, 2: sizes.text_encoder_2}
        modules |= {
            f"text_encoder_{n}": _text_encoder(n, own)
            for n, own in encoders.items()
            if own is not None
        }
    prefixes = REFINER_PREFIXES if sizes.text_encoder_1 is None else FILE_PREFIXES
    tensors: dict[str, Tensor] = {}
    for part, module in modules.items():
        filled = {
            name: _filled(name, tensor.shape, dtype) for name, tensor in module.state_dict().items()
        }
        named = {_module_name(module, part, name): tensor for name, tensor in filled.items()}
        tensors |= {
            prefixes[part] + name: tensor
            for name, tensor in layouts.file_from_module(part, named).items()
        }
    tensors[prefixes["text_encoder_2"] + "logit_scale"] = torch.tensor(4.6052).to(dtype)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def tiny_checkpoint(
    seed: int, *, twin: str = "base", v_prediction: bool = False
) -> dict[str, Tensor]:
    """The tiny twin of an SDXL, float32; with the keys that mark velocity models if asked for."""
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)} if v_prediction else {}
    return random_checkpoint(TWINS[twin], seed) | marks


def _filled(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Norms start as the identity, biases at 0, embeddings small, other weights with variance 1 / inputs."""
    tensor = torch.empty(shape, dtype=dtype)
    if len(shape) < 2:
        return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    if "embedding" in name:
        return tensor.normal_(std=0.02)
    return tensor.normal_(std=shape[1:].numel() ** -0.5)


def _module_name(module: nn.Module, part: str, name: str) -> str:
    from library.models.text_encoders import module_name

    return module_name(module, name) if part.startswith("text_encoder") else name


def _text_encoder(number: int, sizes: TextEncoderSizes) -> nn.Module:
    from library.imports import import_transformers

    transformers = import_transformers()
    config = transformers.CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 64,
        max_position_embeddings=sizes.positions,
        projection_dim=sizes.projection,
    )
    return (
        transformers.CLIPTextModel if number == 1 else transformers.CLIPTextModelWithProjection
    )(config)


def _vae(channels: tuple[int, ...]) -> nn.Module:
    from library.imports import import_diffusers

    return import_diffusers().AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=2,
        latent_channels=4,
    )
