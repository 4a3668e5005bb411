"""UNetConfig: the sizes of a U-Net, read off the shapes in its checkpoint.

SDXL base, SSD-1B, Vega, the refiner, a 9-channel inpainting model and the tiny test model differ only in these numbers.
Needs no torch: a header is enough.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

NUM_LR_BLOCKS = (
    23  # learning rate blocks of the U-Net, as library/models/unet.py: block_of numbers them
)
HEAD_CHANNELS = (
    64  # attention: channels per head; no shape shows it, and every SDXL has this number
)
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = (
    6.0,
    2.5,
)  # the refiner's scores for prompts and negative prompts (Diffusers)
SIZE_CHANNELS = 256  # channels of the embedding of each size (models/size_conditioning.py)


class BlockPlan(NamedTuple):
    """One numbered block. `depth` transformer blocks follow the residual block; `resample` halves or doubles the size."""

    channels_in: int
    channels_out: int
    depth: int = 0
    resample: bool = False


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net.

    Attributes:
        in_channels: 4 latent channels; 9 with an inpainting model's mask and masked latents (models/inpainting.py).
        model_channels: width of level 0 (320 in SDXL base).
        context_channels: width of a text token (2048).
        vector_channels: width of the pooled text and size vector (2816).
        input_blocks: blocks 1.. of input_blocks (block 0 is the first convolution). One that resamples holds nothing else.
        middle_depth: transformer blocks in the middle; None where the middle is a lone residual block (SSD-1B, Vega).
        output_blocks: blocks 0.. of output_blocks; channels_in includes the skip connection's.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    time_channels: int
    context_channels: int
    vector_channels: int
    input_blocks: tuple[BlockPlan, ...]
    middle_depth: int | None
    output_blocks: tuple[BlockPlan, ...]

    @property
    def takes_score(self) -> bool:
        """Whether an aesthetic score stands where others have the target size: the refiner, with one encoder for all of its text."""
        return self.vector_channels == self.context_channels + 5 * SIZE_CHANNELS

    @property
    def pooled_channels(self) -> int:
        """Width of the pooled text (1280), which the size vectors follow."""
        return self.vector_channels - (5 if self.takes_score else 6) * SIZE_CHANNELS

    @property
    def is_inpainting(self) -> bool:
        return self.in_channels == 9

    @property
    def family(self) -> str:
        """The model's name in words, by its block depths."""
        depths = (tuple(block.depth for block in self.input_blocks), self.middle_depth)
        name = _FAMILIES.get(
            (self.model_channels, depths), f"SDXL-like, {self.model_channels} channels"
        )
        return f"{name}, inpainting (9 channels)" if self.is_inpainting else name

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "UNetConfig":
        """Read the sizes. `shapes` has single-file names without prefix. Raises KeyError if a block isn't there at all."""
        first = shapes["input_blocks.0.0.weight"]
        return cls(
            in_channels=first[1],
            out_channels=shapes["out.2.weight"][0],
            model_channels=first[0],
            time_channels=shapes["time_embed.0.weight"][0],
            context_channels=next(
                shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")
            ),
            vector_channels=shapes["label_emb.0.0.weight"][1],
            input_blocks=tuple(
                _input_block(shapes, i) for i in range(1, _count(shapes, "input_blocks"))
            ),
            middle_depth=_count(shapes, "middle_block.1.transformer_blocks")
            if "middle_block.1.norm.weight" in shapes
            else None,
            output_blocks=tuple(
                _output_block(shapes, i) for i in range(_count(shapes, "output_blocks"))
            ),
        )


_FAMILIES = {
    (320, ((0, 0, 0, 2, 2, 0, 10, 10), 10)): "SDXL base",
    (320, ((0, 0, 0, 2, 2, 0, 4, 4), None)): "SSD-1B",
    (320, ((0, 0, 0, 1, 1, 0, 2, 2), None)): "Segmind Vega",
    (384, ((0, 0, 0, 4, 4, 0, 4, 4, 0, 0, 0), 4)): "SDXL refiner",
    (32, ((0, 0, 0, 1, 1, 0, 2, 2), 2)): "tiny SDXL (for tests)",
}


def _count(shapes: Shapes, prefix: str) -> int:
    """1 + the highest number that follows `prefix.`; 0 if none does."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return max((int(match[1]) + 1 for name in shapes if (match := pattern.match(name))), default=0)


def _input_block(shapes: Shapes, i: int) -> BlockPlan:
    name = f"input_blocks.{i}"
    if (down := shapes.get(f"{name}.0.op.weight")) is not None:
        return BlockPlan(down[1], down[0], resample=True)
    return _residual(shapes, name)


def _output_block(shapes: Shapes, i: int) -> BlockPlan:
    name = f"output_blocks.{i}"
    upsamples = f"{name}.1.conv.weight" in shapes or f"{name}.2.conv.weight" in shapes
    return _residual(shapes, name)._replace(resample=upsamples)


def _residual(shapes: Shapes, name: str) -> BlockPlan:
    channels_out, channels_in = shapes[f"{name}.0.in_layers.2.weight"][:2]
    return BlockPlan(
        channels_in, channels_out, depth=_count(shapes, f"{name}.1.transformer_blocks")
    )
