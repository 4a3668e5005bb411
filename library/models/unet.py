"""SDXL's U-Net: noisy latents in, predicted noise (or velocity) out.

Shapes: B batch, T text tokens (75 a chunk, + 2), H and W of the latents (pixels / 8).
Parameter names are those of the original checkpoint, so loading is load_state_dict and nothing is renamed.

    level   channels   input_blocks        attention depth   output_blocks
    0       320        0 conv, 1-2         none              6-8
    1       640        3 down, 4-5         2                 3-5 (5 up)
    2       1280       6 down, 7-8         10                0-2 (2 up)
    middle  1280       Res, attention, Res 10

Source: Podell et al. 2023, arXiv:2307.01952, table 1; Stability-AI/generative-models sd_xl_base.yaml.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionFunction, sdpa
from library.models.control import ControlInputs
from library.models.memory.activation_checkpointing import KEPT, ActivationPolicy, ActivationStore
from library.models.unet_blocks import (
    CHEAP,
    GROUPS,
    BasicTransformerBlock,
    Conv2d,
    Downsample2D,
    GroupNorm,
    Linear,
    ResnetBlock2D,
    Stage,
    Transformer2DModel,
    Upsample2D,
    sinusoidal_embedding,
)
from library.models.unet_config import BlockPlan, UNetConfig


class Shrink(NamedTuple):
    """Before this input block the feature map's sides are multiplied by the ratio (Deep Shrink)."""

    block: int
    ratio: float


class UNet(nn.Module):
    """The U-Net of any SDXL. Weights are left as PyTorch makes them: checkpoint.py loads over them."""

    def __init__(
        self,
        config: UNetConfig,
        attention: AttentionFunction = sdpa,
        checkpointing: ActivationPolicy = KEPT,
    ):
        super().__init__()
        self.config = config
        emb = config.time_channels

        def stage(plan: BlockPlan, *resampling: nn.Module) -> Stage:
            layers: list[nn.Module] = [ResnetBlock2D(plan.channels_in, plan.channels_out, emb)]
            if plan.depth:
                layers.append(transformer(plan.channels_out, plan.depth))
            return Stage([*layers, *resampling])

        def transformer(channels: int, depth: int) -> Transformer2DModel:
            return Transformer2DModel(channels, config.context_channels, depth, attention)

        # The order is the checkpoint's: it decides the order of learning-rate groups and of network modules.
        self.time_embed = nn.Sequential(
            Linear(config.model_channels, emb), nn.SiLU(), Linear(emb, emb)
        )
        self.label_emb = nn.Sequential(
            nn.Sequential(Linear(config.vector_channels, emb), nn.SiLU(), Linear(emb, emb))
        )
        self.input_blocks = nn.ModuleList(
            [Stage([Conv2d(config.in_channels, config.model_channels, 3, padding=1)])]
        )
        for plan in config.input_blocks:
            self.input_blocks.append(
                Stage([Downsample2D(plan.channels_out)]) if plan.resample else stage(plan)
            )
        middle = config.input_blocks[-1].channels_out
        self.middle_block = Stage([ResnetBlock2D(middle, middle, emb)])
        if config.middle_depth is not None:
            self.middle_block += [
                transformer(middle, config.middle_depth),
                ResnetBlock2D(middle, middle, emb),
            ]
        self.output_blocks = nn.ModuleList()
        for plan in config.output_blocks:
            self.output_blocks.append(
                stage(plan, *([Upsample2D(plan.channels_out)] if plan.resample else []))
            )
        last = config.output_blocks[-1].channels_out
        self.out = nn.Sequential(
            GroupNorm(GROUPS, last, eps=1e-5),
            nn.SiLU(),
            Conv2d(last, config.out_channels, 3, padding=1),
        )
        self.activations = ActivationStore(
            checkpointing, (m for m in self.modules() if isinstance(m, CHEAP))
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual and transformer blocks, in the order in which a forward comes to them."""
        return [
            module
            for module in self.modules()
            if isinstance(module, ResnetBlock2D | BasicTransformerBlock)
        ]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        vector: Tensor,
        extra: ControlInputs | None = None,
        shrink: Shrink | None = None,
    ) -> Tensor:
        """Predict the noise in `x`.

        Args:
            x: noisy scaled latents, [B, 4, H, W], in the dtype in which to compute.
            timesteps: 0..999, [B], any number type.
            context: text tokens, [B, T, 2048].
            vector: pooled text and sizes, [B, 2816].
            extra: what else reaches the transformer blocks; None: nothing does.
            shrink: where the feature map becomes smaller; on the way up it is as large as each skip again.

        Returns:
            [B, 4, H, W], in the dtype of x.
        """
        with self.activations.saved(x.device):
            return self._forward(x, timesteps, context, vector, extra or {}, shrink)

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        vector: Tensor,
        extra: ControlInputs,
        shrink: Shrink | None,
    ) -> Tensor:
        dtype, run = x.dtype, self.activations.run
        time = sinusoidal_embedding(timesteps, self.config.model_channels).to(dtype)
        emb = self.time_embed(time) + self.label_emb(vector.to(dtype))
        context = context.to(dtype)
        h = x.to(memory_format=torch.channels_last)
        skips = []
        for number, block in enumerate(self.input_blocks):
            if shrink is not None and number == shrink.block:
                h = F.interpolate(h, scale_factor=shrink.ratio, mode="bicubic")
            h = block(h, emb, context, run, extra.get(f"input_blocks.{number}"))
            skips.append(h)
        h = self.middle_block(h, emb, context, run, extra.get("middle_block"))
        for number, block in enumerate(self.output_blocks):
            joined = torch.cat([_as_large_as(skips[-1], h), skips.pop()], dim=1)
            h = block(joined, emb, context, run, extra.get(f"output_blocks.{number}"))
        return _as_large_as(x, self.out(h))


def _as_large_as(other: Tensor, x: Tensor) -> Tensor:
    """X at the other's height and width, which differ where the map was shrunk, or where halving left a remainder."""
    return (
        x
        if x.shape[2:] == other.shape[2:]
        else F.interpolate(x, size=other.shape[2:], mode="bicubic")
    )


def block_of(name: str) -> int:
    """The learning-rate block, 0..22, of a parameter or module name (`input_blocks.4.1...`, or with `_` for the dots).

    0: time_embed, label_emb; 1-9: input_blocks; 10-12: middle_block; 13-21: output_blocks; 22: out.

    >>> block_of("middle_block.1.proj_in.weight"), block_of("output_blocks_8_0_out_layers_3"), block_of("out.2.bias")
    (11, 21, 22)
    """
    parts = name.replace(".", "_").split("_")
    first = {"input": 1, "middle": 10, "output": 13}.get(parts[0])
    if first is not None:
        return first + int(parts[2])
    return 22 if parts[0] == "out" else 0
