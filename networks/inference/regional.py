"""Regional networks: each network works in its region of the image, on a sub-prompt of its own.

Shapes: B images, G guidance branches ([negative, [empty,] prompt]), S sub-prompts, N positions of a
feature map, T tokens, C channels of the context, D channels of a layer's output.

    layers of the feature map   base(x) + sum of strength_i * mask_i * patch_i(x)
    attn2 to_k, to_v            of each sub-prompt, with network i for sub-prompt i; of the other
                                guidance branches, without any network
    attn2 to_out                (sum mask_i x_i) / (sum mask_i + 1e-4)
                                + sum strength_i mask_i patch_i(x_i),  x_i: of sub-prompt i
    layers of the timestep      base(x) + sum of strength_i / S * patch_i(x)

Source: contract, training_math.md section 10.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import OptionError
from networks.inference.apply import AdaptedLayer, WeightPatch, sum_of_patches
from networks.targets import UNET

_MAX_CHANNELS = 3  # regions of a mask without color codes


def masks_of(mask: Tensor, count: int, max_color_codes: int | None) -> Tensor:
    """Return the region of each network: [count, H, W] in 0..1, float32.

    An empty region means everywhere.

    Args:
        mask: uint8, [H, W, 3].
        count: number of regions.
        max_color_codes: None: network i has channel i; else network i has the color whose bits
            (red 1, green 2, blue 4) are i + 1.
    """
    if max_color_codes is None:
        masks = mask[..., :count].permute(2, 0, 1).float() / 255
    else:
        code = (mask == 255).long() @ torch.tensor([1, 2, 4], device=mask.device)
        masks = torch.stack([code == i + 1 for i in range(count)]).float()
    is_empty = masks.flatten(1).sum(1) == 0
    return torch.where(is_empty[:, None, None], torch.ones_like(masks), masks)


class RegionBatch(NamedTuple):
    """The sub-prompts and regions of one batch.

    Attributes:
        contexts: of each sub-prompt, [B, T, C].
        masks: of each region, [S, H, W].
    """

    contexts: Sequence[Tensor]
    masks: Tensor


class Regional:
    """The forwards of layers with regional networks. `set_batch` is called before each batch."""

    def __init__(self, strengths: Sequence[float], max_color_codes: int | None):
        """Make the forwards.

        Args:
            strengths: of each network; they are read at each call.
            max_color_codes: as for `masks_of`.
        """
        self._strengths = strengths
        self._max_color_codes = max_color_codes
        self._batch: RegionBatch | None = None
        self._resized_masks: dict[tuple[int, int], Tensor] = {}
        self._size: tuple[int, int] | None = None  # (h, w) of the last convolution's feature map

    def set_batch(self, contexts: Sequence[Tensor], mask: Tensor) -> None:
        """Set the sub-prompts and regions of the next batch.

        Args:
            contexts: of each sub-prompt, [B, T, C].
            mask: uint8, [H, W, 3].

        Raises:
            OptionError: if there are fewer sub-prompts than networks, or more than the mask can
                distinguish.
        """
        count = len(contexts)
        max_regions = self._max_color_codes or _MAX_CHANNELS
        if count < len(self._strengths):
            raise OptionError(
                f"--mask_path: {len(self._strengths)} networks need as many sub-prompts, "
                f"separated by AND; this prompt has {count}"
            )
        if count > max_regions:
            raise OptionError(
                f"--mask_path: this prompt has {count} sub-prompts, but the mask distinguishes "
                f"{max_regions}; use a larger --network_regional_mask_max_color_codes"
            )
        masks = masks_of(mask.to(contexts[0].device), count, self._max_color_codes)
        self._batch = RegionBatch(contexts, masks)
        self._resized_masks = {}

    def forward_of(self, layer: AdaptedLayer) -> WeightPatch | None:
        """Return the new forward of a layer; None: it keeps its own."""
        name = layer.target.name
        if layer.target.component != UNET:
            # While a sub-prompt is encoded, the strengths of other regions are 0.
            return sum_of_patches(self._strengths, layer)
        if name.endswith(("attn2_to_k", "attn2_to_v")):
            return self._text_projection(layer)
        if name.endswith("attn2_to_q"):
            return self._query_projection(layer)
        if name.endswith("attn2_to_out_0"):
            return self._output_projection(layer)
        # Attention sees positions as one row. The height and width are known from convolutions.
        if layer.patches or isinstance(layer.target.layer, nn.Conv2d):
            return self._masked(layer)
        return None

    def _masked(self, layer: AdaptedLayer) -> WeightPatch:
        def forward(x: Tensor) -> Tensor:
            y = layer.base(x)
            if y.ndim == 4:
                self._size = (y.shape[2], y.shape[3])
            for i, patch in layer.patches.items():
                y = y + self._strengths[i] * self._mask_for(i, y) * patch(x)
            return y

        return forward

    def _query_projection(self, layer: AdaptedLayer) -> WeightPatch:
        """[G * B, N, D] -> [(G - 1 + S) * B, N, D]: repeat the prompt's queries S times."""
        forward = self._masked(layer)

        def repeated(x: Tensor) -> Tensor:
            contexts = self._current.contexts
            batch_size = len(contexts[0])
            y = forward(x)
            queries = y[-batch_size:].repeat(len(contexts), 1, 1)
            return torch.cat([y[:-batch_size], queries])

        return repeated

    def _text_projection(self, layer: AdaptedLayer) -> WeightPatch:
        """[G * B, T, C] -> [(G - 1 + S) * B, T, D]."""

        def forward(context: Tensor) -> Tensor:
            contexts = self._current.contexts
            outputs = []
            other_branches = context[: -len(contexts[0])]
            if len(other_branches):
                outputs.append(layer.base(other_branches))
            for i, sub_context in enumerate(contexts):
                sub_context = sub_context.to(context.dtype)
                y = layer.base(sub_context)
                if i in layer.patches:
                    y = y + self._strengths[i] * layer.patches[i](sub_context)
                outputs.append(y)
            return torch.cat(outputs)

        return forward

    def _output_projection(self, layer: AdaptedLayer) -> WeightPatch:
        """[(G - 1 + S) * B, N, D] -> [G * B, N, D]: combine the regions of the sub-prompts."""

        def forward(x: Tensor) -> Tensor:
            contexts = self._current.contexts
            batch_size, count = len(contexts[0]), len(contexts)
            other_branches = x[: -count * batch_size]
            regions = x[-count * batch_size :].split(batch_size)
            masks = [self._mask_for(i, regions[0]) for i in range(count)]
            outputs = [masks[i] * layer.base(regions[i]) for i in range(count)]
            mixed = torch.stack(outputs).sum(0) / (torch.stack(masks).sum(0) + 1e-4)
            for i, patch in layer.patches.items():
                mixed = mixed + self._strengths[i] * masks[i] * patch(regions[i])
            if not len(other_branches):
                return mixed
            return torch.cat([layer.base(other_branches), mixed])

        return forward

    @property
    def _current(self) -> RegionBatch:
        assert self._batch is not None
        return self._batch

    def _mask_for(self, i: int, y: Tensor) -> Tensor:
        """Return the region of network i in the shape of an output.

        An output without positions gets the same share of each network.
        """
        if y.ndim == 2:
            return y.new_full((), 1 / len(self._current.contexts))
        assert self._size is not None
        if self._size not in self._resized_masks:
            masks = self._current.masks[None]
            resized = F.interpolate(masks, size=self._size, mode="bilinear")[0]
            self._resized_masks[self._size] = resized
        mask = self._resized_masks[self._size][i].to(y.dtype)
        return mask[None, None] if y.ndim == 4 else mask.reshape(1, -1, 1)
