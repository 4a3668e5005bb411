"""The pieces of SDXL's U-Net: residual and transformer blocks, resampling, and layers that cast trained weights.

Shapes: B batch, C channels, H and W of the feature map, N = H * W its positions, T text tokens.
Every forward is a function of tensors alone: no state, no data-dependent branch. Activations keep the dtype in which they
come; a float32 weight that is trained is cast inside its layer. GroupNorm and LayerNorm take float32 statistics inside
their kernels whatever the input's dtype.

Source: Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952.
"""

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.device import to_device
from library.models.attention import AttentionFunction
from library.models.control import AttentionControl, BlockControl, modulated
from library.models.unet_config import HEAD_CHANNELS

GROUPS = 32

Run = Callable[..., Tensor]
"""(block, *arguments) -> block(*arguments), keeping its activations for backward or computing them again there."""


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x.dtype))


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, self.weight.to(x.dtype), _cast(self.bias, x.dtype), self.stride, self.padding
        )


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled() and not x.requires_grad:
            # torch 2.13's backward on a CPU dies where a channels_last input wants no gradient but the weight does.
            x = x.detach().requires_grad_()
        return F.group_norm(
            x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


def sinusoidal_embedding(positions: Tensor, channels: int) -> Tensor:
    """Each number as cosines, then sines, of `channels / 2` frequencies from 1 down to 1/10000: [..., channels], float32.

    Args:
        positions: timesteps, or sizes in pixels; any shape and number type.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, in the order of Ho et al.'s successors (cosine first).
    """
    # The frequencies and the angles have the same bits on every machine. Cosine and sine of one float32 angle, however
    # large, are within one unit in the last place of the exact value on CPUs and within two on GPUs, so two machines differ
    # by at most 2^-22 in an element, and two CPUs by 2^-23. An exponential taken on the device, as the reference takes it,
    # can be off by one unit too, which an angle multiplies: 6e-5 in an element at 1024 pixels.
    half = channels // 2
    known = _frequencies_on.get((half, positions.device))
    if (
        known is None or type(positions) is not Tensor
    ):  # fake tensors of a rehearsal can't meet one that has values
        known = to_device(embedding_frequencies(half), positions.device)
        if type(known) is Tensor:
            _frequencies_on[half, positions.device] = known
    angles = positions[..., None].float() * known
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


_frequencies_on: dict[tuple[int, torch.device], Tensor] = {}


def embedding_frequencies(count: int) -> Tensor:
    """10000^(-i / count), [count]: float32 exponents, whose exponential is computed in float64 on the CPU and rounded once."""
    exponents = -math.log(10000) * torch.arange(count, dtype=torch.float32, device="cpu") / count
    return exponents.double().exp().float()


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions with the timestep embedding added between them, and a skip around both."""

    def __init__(self, channels_in: int, channels_out: int, time_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(GROUPS, channels_in, eps=1e-5),
            nn.SiLU(),
            Conv2d(channels_in, channels_out, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(time_channels, channels_out))
        self.out_layers = nn.Sequential(
            GroupNorm(GROUPS, channels_out, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # the original's dropout, unused; it keeps the convolution's number
            Conv2d(channels_out, channels_out, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if channels_in == channels_out else Conv2d(channels_in, channels_out, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """X [B, C_in, H, W], emb [B, 4 * model channels] -> [B, C_out, H, W]."""
        h = self.in_layers(x)
        h = h + self.emb_layers(emb)[..., None, None]  # the same for every pixel
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Every position looks at every position (or text token) of the context."""

    def __init__(self, channels: int, context_channels: int, attention: AttentionFunction):
        super().__init__()
        self.attention = attention
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_channels, channels, bias=False)
        self.to_v = Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, extra: AttentionControl | None = None) -> Tensor:
        """X [B, N, C], context [B, T, C_context] -> [B, N, C]."""
        for_q, for_k, for_v = x, context, context
        if extra is not None:
            for_q, for_k, for_v = (
                modulated(x, extra.q),
                modulated(context, extra.k),
                modulated(context, extra.v),
            )
        q, k, v = (_split_heads(t) for t in (self.to_q(for_q), self.to_k(for_k), self.to_v(for_v)))
        return self.to_out(self.attention(q, k, v).transpose(1, 2).flatten(2))


def _split_heads(x: Tensor) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (-1, HEAD_CHANNELS)).transpose(1, 2)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other. Source: Shazeer 2020, arXiv:2002.05202, equation 6."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.proj = Linear(channels_in, channels_out * 2)
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.proj(x))


class Gate(nn.Module):
    """One half of the channels gates the other: [..., 2 C] -> [..., C]."""

    def forward(self, projected: Tensor) -> Tensor:
        return _Gated.apply(projected)


class _Gated(torch.autograd.Function):
    """value * gelu(gate). Only the projection is kept: gelu(gate) is as large as the output, and cheap to take again."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        value, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        value, gate = projected.chunk(2, dim=-1)
        return torch.cat(
            [grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1
        )


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # The identity stands for the original's dropout; it keeps the last layer's number.
        self.net = nn.Sequential(
            GEGLU(channels, channels * 4), nn.Identity(), Linear(channels * 4, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a norm and with a skip connection."""

    def __init__(self, channels: int, context_channels: int, attention: AttentionFunction):
        super().__init__()
        # The order is the checkpoint's: networks and learning-rate groups list their modules by it.
        self.attn1 = CrossAttention(channels, channels, attention)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_channels, attention)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor, extra: BlockControl | None = None) -> Tensor:
        """X [B, N, C], context [B, T, C_context] -> [B, N, C]."""
        of_self, of_text = (None, None) if extra is None else extra
        h = self.norm1(x)
        x = x + self.attn1(h, h, of_self)
        x = x + self.attn2(self.norm2(x), context, of_text)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map, around a skip."""

    def __init__(
        self, channels: int, context_channels: int, depth: int, attention: AttentionFunction
    ):
        super().__init__()
        self.norm = GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_channels, attention) for _ in range(depth)
        )
        self.proj_out = Linear(channels, channels)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        run: Run,
        extra: Sequence[BlockControl | None] | None = None,
    ) -> Tensor:
        """X [B, C, H, W], context [B, T, C_context], extra: of each transformer block -> [B, C, H, W]."""
        h = (
            self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        )  # [B, N, C]: a view of channels_last memory
        h = self.proj_in(h)
        for block, own in zip(self.transformer_blocks, extra or repeat(None), strict=False):
            h = run(block, h, context, own)
        h = self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return x + h


class Downsample2D(nn.Module):
    """Halves height and width with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample2D(nn.Module):
    """Doubles height and width (nearest neighbour), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.ModuleList):
    """One numbered block of the U-Net: residual block, transformer, resampling; whichever of them it has."""

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        run: Run,
        extra: Sequence[BlockControl | None] | None = None,
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResnetBlock2D):
                x = run(layer, x, emb)
            elif isinstance(layer, Transformer2DModel):
                x = layer(x, context, run, extra)
            else:
                x = layer(x)
        return x


CHEAP = (GroupNorm, LayerNorm, nn.SiLU, Gate)
"""Modules whose results cost little to compute again: they read and write, and multiply no matrices."""
