"""Control inputs of the U-Net's transformer blocks: tensors, computed before the forward pass.

Shapes: B batch, N positions of the feature map, D channels of a layer's input, M of the small network.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LLLiteModulation(NamedTuple):
    """A small network that modulates the input of a layer by a conditioning image (ControlNet-LLLite).

    x + up(dropout(relu(condition + mid(relu(down(x))))))

    Attributes:
        condition: [B, N, M], or [1, N, M] for every sample: what the conditioning image adds inside the network, including the
            middle layer's bias. It doesn't depend on x, so it is computed once per image, not once per denoising step.
        down_weight: [M, D].
        down_bias: [M].
        mid_weight: [M, M].
        up_weight: [D, M], multiplied by the strength.
        up_bias: [D], multiplied by the strength.
        dropout: probability of dropping an input value of `up`.

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
        """Return what is added to x [B, N, D]: [B, N, D]."""
        h = F.relu(F.linear(x, self.down_weight, self.down_bias))
        h = F.relu(self.condition + F.linear(h, self.mid_weight))
        if self.dropout:
            h = F.dropout(h, self.dropout)
        return F.linear(h, self.up_weight, self.up_bias)


class AttentionControl(NamedTuple):
    """Modulations of the inputs of an attention's q, k and v projections; those of one input are applied in turn."""

    q: Sequence[LLLiteModulation] = ()
    k: Sequence[LLLiteModulation] = ()
    v: Sequence[LLLiteModulation] = ()


class BlockControl(NamedTuple):
    """The control inputs of one transformer block: of its self-attention (attn1) and its cross-attention (attn2)."""

    attn1: AttentionControl = AttentionControl()
    attn2: AttentionControl = AttentionControl()


ControlInputs = Mapping[str, Sequence[BlockControl | None]]
"""Name of a U-Net block ("input_blocks.4") -> one entry for each of its transformer blocks."""


def modulated(x: Tensor, modulations: Sequence[LLLiteModulation]) -> Tensor:
    """Return x [B, N, D] after all modulations."""
    for modulation in modulations:
        x = x + modulation.added(x)
    return x
