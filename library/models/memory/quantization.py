"""Quantized layers: frozen linear weights in fewer bits, which are dequantized for each product.

    kind   what is stored for a weight                                               bits per parameter
    fp8    e4m3 values and one scale, a power of two                                 8
    int8   integers and one scale per row                                            8
    nf4    indices of 16 quantiles of the normal distribution, and one scale per
           64 values (bitsandbytes)                                                  4.5

Products are computed in the activations' dtype. The backward pass dequantizes the weight again instead of keeping it.

Source: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3); Dettmers et al. 2022, arXiv:2208.07339 (rows); Dettmers et al.
2023, arXiv:2305.14314 (NF4).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 64  # NF4 values that share a scale
BYTES_OF = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / _BLOCK}
"""Bytes per parameter, including its share of a scale."""
_LARGEST_E4M3 = 448.0


def quantize_weight(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Quantize a weight.

    Args:
        weight: [out, in], any float dtype.
        kind: "fp8", "int8" or "nf4".

    Returns:
        The quantized values and their scales. fp8: [out, in] and []; int8: [out, in] and [out]; nf4: [out * in / 2, 1] and
        [out * in / 64].
    """
    if kind == "fp8":
        largest = weight.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST_E4M3)))
        return (weight.float() / scale).to(torch.float8_e4m3fn), scale
    if kind == "int8":
        scale = weight.abs().amax(dim=1).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
        return (weight.float() / scale[:, None]).round().to(torch.int8), scale
    import bitsandbytes  # noqa: F401 # registers the operators

    return torch.ops.bitsandbytes.quantize_4bit(weight, _BLOCK, "nf4", torch.uint8)


def dequantize_weight(
    values: Tensor, scale: Tensor, kind: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Return the weight that was quantized, up to rounding, in this shape and dtype."""
    if kind == "nf4":
        return torch.ops.bitsandbytes.dequantize_4bit(values, scale, _BLOCK, "nf4", shape, dtype)
    scale = scale.to(dtype)
    if kind == "int8":
        scale = scale[:, None]
    return values.to(dtype).mul_(scale)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a quantized weight."""

    quantized: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, weight: Tensor, kind: str):
        """Quantize a layer.

        Args:
            layer: gives the sizes and the bias.
            weight: [out, in]; it is quantized on its own device.
            kind: "fp8", "int8" or "nf4".
        """
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        del self.weight
        self.bias = layer.bias
        self.kind = kind
        self.shape = weight.shape
        quantized, scale = quantize_weight(weight, kind)
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, [out, in]."""
        return dequantize_weight(self.quantized, self.scale, self.kind, self.shape, dtype)


class _Product(torch.autograd.Function):
    """The product of a frozen layer. It saves nothing: the gradient of its input needs the weight only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


def quantize(module: nn.Module, kind: str, place: Callable[[Tensor], Tensor]) -> None:
    """Replace the large linear layers of a frozen module by quantized ones, one at a time, and move all other tensors.

    Only layers inside the U-Net's blocks and the encoders' layers are quantized: those outside are small, and matter most.

    Args:
        kind: "fp8", "int8" or "nf4".
        place: moves a tensor to the compute device, and casts weights.
    """
    quantized: set[int] = set()
    for path, layer in list(large_linears(module)):
        replacement = QuantizedLinear(layer, place(layer.weight.detach()), kind)
        module.set_submodule(path, replacement)
        quantized.update((id(replacement.quantized), id(replacement.scale)))
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in quantized:
            tensor.data = place(tensor.data)


def large_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (path, layer) for each layer that `quantize` replaces."""
    for path, layer in module.named_modules():
        is_inside = ".layers." in path or path.startswith(
            ("input_blocks.", "middle_block.", "output_blocks.")
        )
        if isinstance(layer, nn.Linear) and is_inside:
            yield path, layer


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module, quantized weights included."""
    count = sum(parameter.numel() for parameter in module.parameters())
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            count += layer.in_features * layer.out_features
    return count
