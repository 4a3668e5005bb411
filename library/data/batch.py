"""Batch: what the loader yields. Raw latents or images, captions or cached text, sizes, weights.

Shapes: B samples of one bucket, H and W its pixels.
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
        position: its position in the run.
        paths: the images' files, for messages.
        captions: processed captions. They are there when `text` is cached, too.
        images: [B, 3, H, W], float32 in -1..1. None if all of the model's inputs are cached.
        latents: raw latents, [B, 4, H/8, W/8], float32. None if not cached.
        text: text encoder outputs. None if not cached.
        original_sizes: [B, 2], int64: (height, width) in pixels.
        crop_top_lefts: [B, 2], int64: (top, left) in pixels.
        target_sizes: [B, 2], int64: (height, width) in pixels.
        weights: [B], float32: factor of each sample's loss. It is 0 in a padding batch.
        masks: loss masks from alpha channels, [B, H, W], float32 in 0..1. None if no sample has one.
        conditioning: conditioning images, [B, 3, H, W], float32 in -1..1. None if there are none.
        aesthetic_scores: the scores that a refiner gets, [B], float32. None for other models.
        inpaint_masks: the areas of `images` to inpaint, [B, H, W], float32 in 0..1. None for models
            that don't inpaint, and where they are cached.
        cached_inpaint_channels: cached inputs of an inpainting model: masks and raw latents of the
            masked images, [B, 5, H/8, W/8].
        inpaint_channels: the additional input channels of an inpainting model, [B, 5, H/8, W/8].
            The training forward sets them.
        attributes: the custom attributes of each sample's subset.
    """

    position: BatchPosition
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
    inpaint_masks: Tensor | None = None
    cached_inpaint_channels: Tensor | None = None
    inpaint_channels: Tensor | None = None
    attributes: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def split(self, count: int) -> "list[Batch]":
        """Return the batch in at most `count` slices.

        Their positions are those of their samples, so that random numbers and losses are those of
        the complete batch.
        """
        size = -(-len(self) // count)
        return [self._slice(start, start + size) for start in range(0, len(self), size)]

    def _slice(self, start: int, end: int) -> "Batch":
        first = self.position.first_sample_index + start
        sliced: dict[str, Any] = {"position": self.position._replace(first_sample_index=first)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, EncodedText):
                sliced[field.name] = EncodedText(*(tensor[start:end] for tensor in value))
            elif isinstance(value, Tensor | tuple) and not isinstance(value, BatchPosition):
                sliced[field.name] = value[start:end]
        return dataclasses.replace(self, **sliced)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, for asynchronous copies to a GPU.

        DataLoader calls it.
        """
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        mapped: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                mapped[field.name] = function(value)
            elif isinstance(value, EncodedText):
                mapped[field.name] = EncodedText(*map(function, value))
        return dataclasses.replace(self, **mapped)
