"""The layers of a LoRA: the trained projections, and the layers of the model that they are added to.

y = W x + multiplier * (alpha / r) * up(down(x)),  down [r, in], up [out, r]; up starts at zero.

Shapes: B batch, N positions, r rank. Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.memory.quantization import QuantizedLinear
from library.models.unet_blocks import Conv2d, Linear
from networks.lora_linear import lora_linear


class LoraModule(nn.Module):
    """The trained projections for one layer. Their parameters belong to the network, not to the model."""

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ):
        """Create the projections.

        Args:
            layer: a linear layer or a 2-d convolution, which gives the sizes.
            rank: r.
            alpha: the result is scaled by alpha / rank.
            dropout: probability of dropping each value between the projections.
            rank_dropout: probability of dropping each rank of each sample.
            module_dropout: probability of leaving the module out for a batch.
        """
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.multiplier = 1.0
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            sizes: Any = {
                "kernel_size": layer.kernel_size,
                "stride": layer.stride,
                "padding": layer.padding,
            }
            self.lora_down = Conv2d(layer.in_channels, rank, bias=False, **sizes)
            self.lora_up = Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            assert isinstance(layer, nn.Linear)
            self.lora_down = Linear(layer.in_features, rank, bias=False)
            self.lora_up = Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5)
        nn.init.zeros_(self.lora_up.weight)

    def sample_scale(self) -> float:
        """Return the factor of up(down(x)) for this forward pass; module dropout makes it 0 at random."""
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return 0.0  # gradients become zero instead of missing, which several processes couldn't reduce
        return self.multiplier * self.alpha / self.rank

    @property
    def drops(self) -> bool:
        """Whether values between the projections are dropped in this forward pass."""
        return self.training and bool(self.dropout or self.rank_dropout)

    def low_rank(self, x: Tensor) -> Tensor:
        """Return down(x) after dropout: [B, ..., r], or [B, r, H, W] for convolutions."""
        h = self.lora_down(x)
        if not self.drops:
            return h
        if self.dropout:
            h = F.dropout(h, self.dropout)
        if self.rank_dropout:
            kept = torch.rand(len(h), self.rank, device=h.device) > self.rank_dropout
            if isinstance(self.lora_down, nn.Conv2d):
                kept = kept[:, :, None, None]
            else:
                kept = kept.view(len(h), *[1] * (h.ndim - 2), self.rank)
            h = h * (kept.to(h.dtype) / (1 - self.rank_dropout))
        return h

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> Tensor:
        """Scale both projections down so that the Frobenius norm of the weight change is at most `max_norm`.

        The norm of up @ down is computed from two r x r products, without the change itself.
        Source: contract, training_math.md section 7.

        Returns:
            The norm before, [].
        """
        up = self.lora_up.weight.flatten(1).float()
        down = self.lora_down.weight.flatten(1).float()
        norm = self.alpha / self.rank * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
        factor = (max_norm / norm.clamp(min=max_norm)).sqrt()
        self.lora_up.weight.mul_(factor)
        self.lora_down.weight.mul_(factor)
        return norm


class _LoraLayer(nn.Module):
    """Base of the layers that replace layers of the model. They keep the replaced layer's parameters and names."""

    lora: LoraModule

    def __init__(self, layer: nn.Module, lora: LoraModule):
        """Take over a layer.

        Args:
            layer: the layer to replace. Its parameters, buffers and hooks are shared, so whatever shards, moves or quantizes
                them still finds them.
            lora: the projections to add. They aren't registered here: the model's parameters stay the checkpoint's.
        """
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.__dict__["lora"] = lora


class LoraLinear(_LoraLayer, Linear):
    """A linear layer with a LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the LoRA's added, [B, ..., out] for x [B, ..., in]."""
        lora = self.lora
        scale = lora.sample_scale()
        is_trained = self.weight.requires_grad or (
            self.bias is not None and self.bias.requires_grad
        )
        if is_trained or lora.drops:
            return _add_product(Linear.forward(self, x.flatten(0, -2)), x, lora, scale)
        y = lora_linear(
            x.flatten(0, -2),
            self.weight,
            self.bias,
            lora.lora_down.weight,
            lora.lora_up.weight,
            scale,
        )
        return y.unflatten(0, x.shape[:-1])


class LoraQuantizedLinear(_LoraLayer, QuantizedLinear):
    """A quantized linear layer with a LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the LoRA's added, [B, ..., out] for x [B, ..., in]."""
        scale = self.lora.sample_scale()
        return _add_product(QuantizedLinear.forward(self, x.flatten(0, -2)), x, self.lora, scale)


class LoraConv2d(_LoraLayer, Conv2d):
    """A 2-d convolution with a LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the LoRA's added, [B, out, H', W'] for x [B, in, H, W]."""
        scale = self.lora.sample_scale()
        y = Conv2d.forward(self, x)
        return y.add_(self.lora.lora_up(self.lora.low_rank(x)), alpha=scale)


def _add_product(y: Tensor, x: Tensor, lora: LoraModule, scale: float) -> Tensor:
    """Add scale * up(down(x)) in place to a base output.

    Args:
        y: [B * N, out]. In two dimensions it is not a view, so that the product can be added in place.
        x: [B, ..., in], the layer's input.
    """
    h = lora.low_rank(x).flatten(0, -2)
    return y.addmm_(h, lora.lora_up.weight.to(h.dtype).t(), alpha=scale).unflatten(0, x.shape[:-1])


def add_lora(layer: nn.Module, lora: LoraModule) -> nn.Module:
    """Return the layer that replaces `layer`, with the LoRA added."""
    if isinstance(layer, nn.Conv2d):
        return LoraConv2d(layer, lora)
    if isinstance(layer, QuantizedLinear):
        return LoraQuantizedLinear(layer, lora)
    return LoraLinear(layer, lora)
