"""Extra: what reaches the U-Net's transformer blocks beside the feature map and the text. Tensors alone, made before the forward.

Shapes: B batch, N positions of the feature map, D channels of a layer's input, M of the small network.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LLLiteModulation(NamedTuple):
    """A small network that changes what a layer sees, by a condition (ControlNet-LLLite).

    x + up(dropout(relu(condition + mid(relu(down(x))))))

    Attributes:
        condition: [B, N, M], or [1, N, M] for every sample: what the condition adds within the network, the middle layer's bias
            with it. It doesn't depend on x, so it is made once per picture and not once per denoising step.
        down_weight [M, D], down_bias [M], mid_weight [M, M], up_weight [D, M], up_bias [D]: the strength is in the last two.
        dropout: probability of leaving out a value in front of `up`.

    Source: contract, training_math.md section 9.
    """

    condition: Tensor
    down_weight: Tensor
    down_bias: Tensor
    mid_weight: Tensor
    up_weight: Tensor
    up_bias: Tensor
    dropout: float = 0.0

    def added(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> what is added to it, [B, N, D]."""
        h = F.relu(F.linear(x, self.down_weight, self.down_bias))
        h = F.relu(self.condition + F.linear(h, self.mid_weight))
        if self.dropout:
            h = F.dropout(h, self.dropout)
        return F.linear(h, self.up_weight, self.up_bias)


class AttentionExtra(NamedTuple):
    """How the inputs of an attention's projections are steered; several steerings of one input add up."""

    q: Sequence[LLLiteModulation] = ()
    k: Sequence[LLLiteModulation] = ()
    v: Sequence[LLLiteModulation] = ()


class BlockControl(NamedTuple):
    """What reaches one transformer block: of its self-attention, and of its attention to the text."""

    attn1: AttentionExtra = AttentionExtra()
    attn2: AttentionExtra = AttentionExtra()


ControlInputs = Mapping[str, Sequence[BlockControl | None]]
"""By the name of a U-Net's block ("input_blocks.4"): one entry for each of its transformer blocks."""


def steered(x: Tensor, steerings: Sequence[LLLiteModulation]) -> Tensor:
    """x [B, N, D] as the steered layer sees it."""
    for steering in steerings:
        x = x + steering.added(x)
    return x
