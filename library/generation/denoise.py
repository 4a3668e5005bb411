"""Denoise: from noise to scaled latents, with guidance.

Shapes: B pictures, H and W in pixels, h = H / 8 and w = W / 8.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.generation.adapters import ControlAt
from library.generation.deep_shrink import DeepShrink
from library.models.size_conditioning import conditioning_vector
from library.models.text_encoders import TextConditioning
from library.models.unet import Shrink, UNet
from library.models.unet_config import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE

Generators = torch.Generator | list[torch.Generator] | None
"""Of the noise that samplers like euler_a add at each step: one, or one for each picture; None: the global one."""


class Conditioning(NamedTuple):
    """What the U-Net is told of each picture: context [B, T, 2048], vector [B, 2816]."""

    context: Tensor
    vector: Tensor

    @classmethod
    def of(
        cls,
        text: TextConditioning,
        *,
        original: tuple[int, int],
        target: tuple[int, int],
        crop: tuple[int, int] = (0, 0),
        score: float | None = None,
    ) -> "Conditioning":
        """Args:
        original, target: (height, width) in pixels.
        crop: (top, left).
        score: what models that know scores are told in place of the target (score_of).
        """
        pairs = (original, crop, target if score is None else (score,))
        sizes = [torch.tensor([pair], device=text.pooled.device).expand(len(text.pooled), -1) for pair in pairs]
        return cls(text.context, conditioning_vector(text.pooled, *sizes))


def score_of(unet: UNet, *, is_negative: bool) -> float | None:
    """How beautiful a picture is said to be, to the refiner; None: the model isn't told."""
    if not unet.config.takes_score:
        return None
    return NEGATIVE_AESTHETIC_SCORE if is_negative else AESTHETIC_SCORE


class Guidance(NamedTuple):
    """How predictions become one.

    Attributes:
        scale: strength of the prompt against the negative one; 1 or below leaves the negative one out.
        negative_scale: None, or the negative prompt's own strength, both as seen from the empty prompt.
        rescale: share of the guided prediction that gets the prompt's own spread back.
    """

    scale: float
    negative_scale: float | None = None
    rescale: float = 0.0

    @property
    def parts(self) -> int:
        """Predictions of each picture: [negative, [empty,] prompt]."""
        return 1 if self.scale <= 1 else 2 if self.negative_scale is None else 3

    def applied(self, predicted: Tensor) -> Tensor:
        """[parts * B, 4, h, w] -> [B, 4, h, w].

        Source: Ho & Salimans 2022, arXiv:2207.12598, equation 6; Lin et al. 2023, arXiv:2305.08891, equations 14-16.
        """
        if self.parts == 1:
            return predicted
        negative, *between, prompt = predicted.chunk(self.parts)
        if self.negative_scale is None:
            guided = negative + self.scale * (prompt - negative)
        else:
            empty = between[0]
            guided = empty + self.scale * (prompt - empty) - self.negative_scale * (negative - empty)
        if self.rescale:
            spreads = [part.float().std(dim=(1, 2, 3), keepdim=True) for part in (prompt, guided)]
            factor = self.rescale * (spreads[0] / spreads[1]) + (1 - self.rescale)
            guided = guided * factor.to(guided.dtype)
        return guided


class InpaintBlend(NamedTuple):
    """What stays of a picture that is painted over in part.

    Attributes:
        latents: its own, scaled, [B, 4, h, w]; noise: that which it gets, the same shape.
        mask: 1 where it is repainted, 0 where it stays, [B, 1, h, w].
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor

    def laid_over(self, drawn: Tensor, sampler: Any, timestep: Tensor | None) -> Tensor:
        """The drawn latents with what stays, at the noise of the timestep; None: at none."""
        own = self.latents if timestep is None else sampler.add_noise(self.latents, self.noise, timestep[None])
        return drawn * self.mask + own.to(drawn.dtype) * (1 - self.mask)


@torch.no_grad()
def denoise(
    unet: UNet,
    sampler: Any,
    latents: Tensor,
    told: Sequence[Conditioning],
    guidance: Guidance,
    *,
    timesteps: Tensor,
    generators: Generators = None,
    control_at: ControlAt = lambda step, steps: None,
    shrink: DeepShrink | None = None,
    kept: InpaintBlend | None = None,
    beside: Tensor | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Draw pictures: scaled latents, [B, 4, h, w], in the dtype of `latents`.

    Nothing waits for the device: what the host must know lies on the host.

    Args:
        sampler: of make_sampler, its timesteps set on the CPU.
        latents: at the noise of the first timestep.
        told: for each part of the guidance, [negative, [empty,] prompt].
        timesteps: those of the sampler that are gone through, whole steps of them (`sampler.order`), on the CPU.
        extra_at: what else reaches the U-Net in a step.
        beside: what an inpainting model sees beside the latents, [B, 5, h, w] (models/inpainting.py).
    """
    context, vector = (torch.cat(parts) for parts in zip(*told, strict=True))
    rng = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
    on_device = timesteps.to(latents.device)
    steps = -(-len(timesteps) // sampler.order)  # the last step has one timestep with every sampler
    for i, timestep in enumerate(timesteps):
        scaled = sampler.scale_model_input(latents, timestep).to(latents.dtype)
        if beside is not None:
            scaled = torch.cat([scaled, beside], dim=1)
        many = torch.cat([scaled] * guidance.parts) if guidance.parts > 1 else scaled
        block = None if shrink is None else shrink.block_at(float(timestep))
        predicted = unet(
            many,
            on_device[i].expand(len(many)),
            context,
            vector,
            control_at(i // sampler.order, steps),
            None if shrink is None or block is None else Shrink(block, shrink.ratio),
        )
        latents = sampler.step(guidance.applied(predicted), timestep, latents, return_dict=False, **rng)[0]
        following = timesteps[i + 1] if i + 1 < len(timesteps) else None
        if following is not None and (i + 1) % sampler.order:
            continue  # in the midst of a step, whose noise isn't always that of a timestep
        if kept is not None:
            latents = kept.laid_over(latents, sampler, following)
        on_step()
    if kept is not None and not len(timesteps):
        latents = kept.laid_over(latents, sampler, None)
    return latents
