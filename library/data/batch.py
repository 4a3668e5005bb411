"""Batch: what the loader yields. Raw latents or pictures, captions or cached text, sizes, weights.

Shapes: B samples of one bucket, H and W its pixels, T text tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.data.batch_sampler import BatchPosition
from library.models.text_encoders import EncodedText


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        place: where it stands in the run.
        paths: the pictures' files, for messages.
        captions: processed captions; still there when `text` is cached.
        images: [B, 3, H, W], float32 in -1..1; None if all that the model sees of them is cached.
        masks: of the loss, from alpha channels, [B, H, W], float32 in 0..1; None if no sample has one.
        conditioning: images that go with the pictures, [B, 3, H, W], float32 in -1..1; None without.
        latents: raw latents, [B, 4, H/8, W/8], float32; None if not cached.
        text: the encoders' outputs; None if not cached.
        original_sizes, crop_top_lefts, target_sizes: [B, 2], int64: (height, width), (top, left), (height, width) in pixels.
        weights: [B], float32: factor of each sample's loss; 0 in an idle batch.
        aesthetic_scores: what a refiner is told of each picture, [B], float32; None where no model asks.
        paint: what an inpainting model is to paint of `images`, [B, H, W], float32 in 0..1; None for other models.
        raw_beside: what it sees of pictures whose masks are fixed, from a cache: the mask and raw latents, [B, 5, H/8, W/8].
        beside: what it sees beside the noisy latents, [B, 5, H/8, W/8]; the step puts it there.
        attributes: the custom attributes of each sample's subset.
    """

    place: BatchPosition
    paths: tuple[str, ...]
    captions: tuple[str, ...]
    images: Tensor | None
    latents: Tensor | None
    text: EncodedText | None
    original_sizes: Tensor
    crop_top_lefts: Tensor
    target_sizes: Tensor
    weights: Tensor
    masks: Tensor | None = None
    conditioning: Tensor | None = None
    aesthetic_scores: Tensor | None = None
    paint: Tensor | None = None
    raw_beside: Tensor | None = None
    beside: Tensor | None = None
    attributes: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def parts(self, count: int) -> "list[Batch]":
        """The batch in at most so many parts, each with its place: random draws and losses are those of the whole."""
        size = -(-len(self) // count)
        return [self._part(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def _part(self, start: int, end: int) -> "Batch":
        cut: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, EncodedText):
                cut[field.name] = EncodedText(*(part[start:end] for part in value))
            elif isinstance(value, Tensor) or (isinstance(value, tuple) and field.name != "place"):
                cut[field.name] = value[start:end]
        return dataclasses.replace(
            self, place=self.place._replace(first_sample_index=self.place.first_sample_index + start), **cut
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which it is copied to a card while the card computes (DataLoader calls it)."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, EncodedText):
                changed[field.name] = EncodedText(*map(change, value))
        return dataclasses.replace(self, **changed)
