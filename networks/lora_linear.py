"""A linear layer with its LoRA as one autograd function: base product, down, up and scale, with its own backward.

As separate operations, the full-size gradient of the input would be computed twice and added, the input would be saved twice
if anything in between casts it, and a dozen nodes would be recorded. Here the low-rank products are added in place.

Shapes: N rows, r rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """Return x W^T + bias + scale * (x down^T) up^T, where W and bias are frozen.

    Args:
        x: [N, in], in the compute dtype.
        weight: [out, in].
        bias: [out].
        down: [r, in], of any floating dtype; its gradient has the same dtype.
        up: [out, r], likewise.
        scale: multiplier * alpha / r.

    Returns:
        [N, out], in x's dtype.
    """
    return _LoraLinear.apply(x, weight, bias, down, up, scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        narrow_down, narrow_up, weight = down.to(x.dtype), up.to(x.dtype), weight.to(x.dtype)
        h = x @ narrow_down.t()
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        y.addmm_(h, narrow_up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, narrow_down, narrow_up, h)
        ctx.scale = scale
        ctx.dtypes = down.dtype, up.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, h = ctx.saved_tensors
        needs_x, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        grad_x = grad_down = grad_up = None
        grad_h = (grad @ up).mul_(ctx.scale)  # [N, r]
        if needs_x:
            grad_x = (grad @ weight).addmm_(grad_h, down)
        if needs_down:
            grad_down = (grad_h.t() @ x).to(ctx.dtypes[0])
        if needs_up:
            grad_up = (grad.t() @ h).to(ctx.dtypes[1]).mul_(ctx.scale)
        return grad_x, None, None, grad_down, grad_up, None
