"""Matrix products, convolutions and attention; on CPUs without bfloat16 instructions, those of bfloat16 are taken in float32 and rounded.

PyTorch's own way there is up to a hundred times slower, most of all backward. Tensors that are kept for backward stay bfloat16,
so a float32 copy of a weight lives for one product only: in memory that the next one takes too.
"""

import functools
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def cpu_lacks_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_emulated(x: Tensor) -> bool:
    """Whether products of this dtype on this device are PyTorch's emulation."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and cpu_lacks_bfloat16()


_memory = threading.local()


@torch.no_grad()
def _for_one_product(weight: Tensor) -> Tensor:
    """The weight in float32, in memory that this thread's next call takes. New memory each time would be slow, and leave gaps."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    if extent != weight.numel():  # has gaps or overlaps
        return weight.float()
    if getattr(_memory, "wide", torch.empty(0)).numel() < extent:
        _memory.wide = torch.empty(extent)
    return torch.as_strided(_memory.wide, weight.shape, weight.stride()).copy_(weight)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, [N, K] by [K, M], without a gradient."""
    return (a.float() @ _for_one_product(b)).to(a.dtype) if is_emulated(a) else a @ b


def add_product(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """y + scale * a @ b, added where y [N, M] lies; a [N, K], b [K, M]; without a gradient."""
    if is_emulated(y):
        return y.add_(a.float() @ b.float(), alpha=scale)
    return y.addmm_(a, b, alpha=scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, all of one dtype: [..., in] -> [..., out]."""
    if not is_emulated(x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """The convolution of x [B, in, H, W], all of one dtype: [B, out, H', W']."""
    if not is_emulated(x):
        return F.conv2d(x, weight, bias, stride, padding)
    return _Conv2d.apply(x, weight, bias, stride, padding)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention: q [B, H, N, D], k and v [B, H, M, D] -> [B, H, N, D], all of one dtype."""
    if not is_emulated(q):
        return F.scaled_dot_product_attention(q, k, v)
    return _Attention.apply(q, k, v)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), _for_one_product(weight), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            matmul(grad, weight) if wants_x else None,
            matmul(grad.t(), x) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.places = stride, padding
        wide = None if bias is None else bias.float()
        return F.conv2d(x.float(), _for_one_product(weight), wide, stride, padding).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.places
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(
            grad.float(),
            x.float(),
            _for_one_product(weight),
            [len(weight)],
            stride,
            padding,
            (1, 1),
            False,
            (0, 0),
            1,
            wanted,
        )
        return (*(one if one is None else one.to(x.dtype) for one in found), None, None)


class _Attention(torch.autograd.Function):
    """Taken again for backward: what attention keeps for itself would be float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (tensor.detach().float().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            again = F.scaled_dot_product_attention(q, k, v)
        return tuple(found.to(grad.dtype) for found in torch.autograd.grad(again, (q, k, v), grad.float()))
