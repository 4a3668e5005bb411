"""Quantised layers: frozen linear weights in fewer bits, made whole for each product and forgotten again.

    kind   a weight keeps                                                            bits a number
    fp8    e4m3 numbers and one scale, a power of two                                8
    int8   whole numbers and a scale for each row                                    8
    nf4    places among 16 quantiles of the normal distribution, and a scale for
           each 64 numbers (bitsandbytes)                                            4.5

Products are computed in the activations' dtype, and backward makes the weight whole again rather than keep it.

Source: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3); Dettmers et al. 2022, arXiv:2208.07339 (rows); Dettmers et al.
2023, arXiv:2305.14314 (NF4).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 64  # numbers of NF4 that share a scale
BYTES_OF = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / _BLOCK}
"""Bytes that a number takes, its share of a scale with it."""
_LARGEST_E4M3 = 448.0


def pack(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(numbers, scale) of a weight. fp8: its shape and []; int8: its shape and [out]; nf4: [n / 2, 1] and [n / 64]."""
    if kind == "fp8":
        largest = weight.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST_E4M3)))
        return (weight.float() / scale).to(torch.float8_e4m3fn), scale
    if kind == "int8":
        scale = weight.abs().amax(dim=1).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
        return (weight.float() / scale[:, None]).round().to(torch.int8), scale
    import bitsandbytes  # noqa: F401 # registers the operators

    return torch.ops.bitsandbytes.quantize_4bit(weight, _BLOCK, "nf4", torch.uint8)


def unpack(numbers: Tensor, scale: Tensor, kind: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that pack was given, nearly: of this shape and dtype."""
    if kind == "nf4":
        return torch.ops.bitsandbytes.dequantize_4bit(numbers, scale, _BLOCK, "nf4", shape, dtype)
    scale = scale.to(dtype)
    return numbers.to(dtype).mul_(scale if kind == "fp8" else scale[:, None])


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that keeps its weight packed."""

    numbers: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, weight: Tensor, kind: str):
        """Args: layer: whose sizes and bias it has. weight: packed on its own device."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        del self.weight
        self.bias = layer.bias
        self.kind, self.shape = kind, weight.shape
        numbers, scale = pack(weight, kind)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in]."""
        return unpack(self.numbers, self.scale, self.kind, self.shape, dtype)


class _Product(torch.autograd.Function):
    """A frozen layer's product, which keeps nothing: its input's gradient needs the weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.whole(grad.dtype), None


def quantize(module: nn.Module, kind: str, place: Callable[[Tensor], Tensor]) -> None:
    """Replace a frozen module's large linear layers by quantised ones, one after another, and put all else in its place.

    Those of the U-Net's blocks and of the encoders' layers: what is outside of them is small, and matters most.

    Args:
        place: moves a tensor to the device that computes with it, and casts a weight.
    """
    packed: set[int] = set()
    for path, layer in list(large_linears(module)):
        own = QuantizedLinear(layer, place(layer.weight.detach()), kind)
        module.set_submodule(path, own)
        packed.update((id(own.numbers), id(own.scale)))
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in packed:
            tensor.data = place(tensor.data)


def large_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path, layer) of the layers that are quantised."""
    for path, layer in module.named_modules():
        is_inside = ".layers." in path or path.startswith(("input_blocks.", "middle_block.", "output_blocks."))
        if isinstance(layer, nn.Linear) and is_inside:
            yield path, layer


def numbers_of(module: nn.Module) -> int:
    """How many weights a module has, packed ones too."""
    packed = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    whole = sum(parameter.numel() for parameter in module.parameters())
    return whole + sum(layer.in_features * layer.out_features for layer in packed)
