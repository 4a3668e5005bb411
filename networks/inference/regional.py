"""Regional: networks that work each in a region of the picture, and on a sub-prompt of its own.

Shapes: B pictures, P parts of the U-Net's batch (guidance: negative, prompt), S sub-prompts, N positions of a feature map.

    every layer on the feature map    base(x) + sum of strength_i * mask_i * change_i(x)
    attn2 to_k, to_v                  of each sub-prompt, with network i on sub-prompt i alone; of the rest of the guidance, with none
    attn2 to_out                      (sum mask_i x_i) / (sum mask_i + 1e-4) + sum strength_i mask_i change_i,  x_i: of sub-prompt i
    layers of the timestep            base(x) + sum of strength_i / S * change_i(x)

Source: contract, training_math.md section 10.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import OptionError
from networks.inference.apply import AdaptedLayer, WeightPatch, summed
from networks.lora import UNET

_MOST_WITHOUT_CODES = 3


def masks_of(mask: Tensor, count: int, max_color_codes: int | None) -> Tensor:
    """Where each network works: [count, H, W] in 0..1, float32. An empty region means everywhere.

    Args:
        mask: uint8, [H, W, 3].
        max_color_codes: None: network i has channel i; else the colour whose bits (red 1, green 2, blue 4) are i + 1.
    """
    if max_color_codes is None:
        masks = mask[..., :count].permute(2, 0, 1).float() / 255
    else:
        code = (mask == 255).long() @ torch.tensor([1, 2, 4], device=mask.device)
        masks = torch.stack([code == i + 1 for i in range(count)]).float()
    is_empty = masks.flatten(1).sum(1) == 0
    return torch.where(is_empty[:, None, None], torch.ones_like(masks), masks)


class Places(NamedTuple):
    """What one batch is drawn with. Attributes: contexts: of each sub-prompt, [B, T, C]; masks: [S, H, W]."""

    contexts: Sequence[Tensor]
    masks: Tensor


class Regional:
    """The forwards of layers whose networks work regionally. `places` is set before a batch is drawn."""

    def __init__(self, strengths: Sequence[float], max_color_codes: int | None):
        """Args: strengths: of each network; read at each call."""
        self._strengths, self._max_color_codes = strengths, max_color_codes
        self._places: Places | None = None
        self._by_size: dict[tuple[int, int], Tensor] = {}
        self._size: tuple[int, int] | None = None  # (height, width) of the feature map that was last convolved

    def set_places(self, contexts: Sequence[Tensor], mask: Tensor) -> None:
        """Raises OptionError if there are fewer sub-prompts than networks, or more of them than the mask can tell apart."""
        networks, most = len(self._strengths), self._max_color_codes or _MOST_WITHOUT_CODES
        if len(contexts) < networks:
            raise OptionError(
                f"--mask_path: {networks} networks need as many sub-prompts, divided by AND; this prompt has {len(contexts)}"
            )
        if len(contexts) > most:
            raise OptionError(
                f"--mask_path: {len(contexts)} sub-prompts, and the mask tells {most} apart; --network_regional_mask_max_color_codes takes more"
            )
        self._places = Places(contexts, masks_of(mask.to(contexts[0].device), len(contexts), self._max_color_codes))
        self._by_size = {}

    def forward_of(self, beside: AdaptedLayer) -> WeightPatch | None:
        name = beside.target.name
        if beside.target.part != UNET:  # which network works is what the strengths say while a sub-prompt is encoded
            return summed(self._strengths, beside)
        if name.endswith(("attn2_to_k", "attn2_to_v")):
            return self._of_text(beside)
        if name.endswith("attn2_to_q"):
            return self._query(beside)
        if name.endswith("attn2_to_out_0"):
            return self._out(beside)
        # Attention sees positions in one row; the convolutions before it tell the height and width.
        return self._everywhere(beside) if beside.changes or isinstance(beside.target.layer, nn.Conv2d) else None

    def _everywhere(self, beside: AdaptedLayer) -> WeightPatch:
        def forward(x: Tensor) -> Tensor:
            y = beside.base(x)
            if y.ndim == 4:
                self._size = (y.shape[2], y.shape[3])
            for i, change in beside.changes.items():
                y = y + self._strengths[i] * self._share(i, y) * change(x)
            return y

        return forward

    def _query(self, beside: AdaptedLayer) -> WeightPatch:
        """[P * B, N, D] -> [(P - 1 + S) * B, N, D]: the prompt's queries for every sub-prompt."""
        forward = self._everywhere(beside)

        def repeated(x: Tensor) -> Tensor:
            count = len(self._now.contexts[0])
            y = forward(x)
            return torch.cat([y[:-count], y[-count:].repeat(len(self._now.contexts), 1, 1)])

        return repeated

    def _of_text(self, beside: AdaptedLayer) -> WeightPatch:
        """[P * B, T, C] -> [(P - 1 + S) * B, T, D]."""

        def forward(context: Tensor) -> Tensor:
            contexts = [own.to(context.dtype) for own in self._now.contexts]
            found = [beside.base(context[: -len(contexts[0])])] if len(context) > len(contexts[0]) else []
            for i, own in enumerate(contexts):
                y = beside.base(own)
                found.append(y + self._strengths[i] * beside.changes[i](own) if i in beside.changes else y)
            return torch.cat(found)

        return forward

    def _out(self, beside: AdaptedLayer) -> WeightPatch:
        """[(P - 1 + S) * B, N, D] -> [P * B, N, D]: the sub-prompts' regions put together."""

        def forward(x: Tensor) -> Tensor:
            places = self._now
            count, subs = len(places.contexts[0]), len(places.contexts)
            rest, own = x[: -subs * count], x[-subs * count :].split(count)
            masks = [self._share(i, own[0]) for i in range(subs)]
            bases = [mask * beside.base(one) for mask, one in zip(masks, own, strict=True)]
            mixed = torch.stack(bases).sum(0) / (torch.stack(masks).sum(0) + 1e-4)
            for i, change in beside.changes.items():
                mixed = mixed + self._strengths[i] * masks[i] * change(own[i])
            return torch.cat([beside.base(rest), mixed]) if len(rest) else mixed

        return forward

    @property
    def _now(self) -> Places:
        assert self._places is not None
        return self._places

    def _share(self, i: int, y: Tensor) -> Tensor:
        """Where network i changes this output: a mask of its size; the same share everywhere if it has no positions."""
        if y.ndim == 2:
            return y.new_full((), 1 / len(self._now.contexts))
        mask = self._masks[i].to(y.dtype)
        return mask[None, None] if y.ndim == 4 else mask.reshape(1, -1, 1)

    @property
    def _masks(self) -> Tensor:
        """Of the size of the feature map, [S, h, w]."""
        assert self._size is not None
        if self._size not in self._by_size:
            self._by_size[self._size] = F.interpolate(self._now.masks[None], size=self._size, mode="bilinear")[0]
        return self._by_size[self._size]
