"""Denoising: from noise to scaled latents, with guidance.

Shapes: B images, H and W in pixels, h = H / 8 and w = W / 8, G guidance branches.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.generation.adapters import ControlSchedule
from library.generation.deep_shrink import DeepShrink
from library.models.size_conditioning import conditioning_vector
from library.models.text_encoders import TextConditioning
from library.models.unet import Shrink, UNet
from library.models.unet_config import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE

Generators = torch.Generator | list[torch.Generator] | None
"""Random generators of samplers that add noise at each step (euler_a): one, or one per image.
None: PyTorch's global generator."""


class Conditioning(NamedTuple):
    """The U-Net's conditioning in one guidance branch: context [B, T, 2048], vector [B, 2816]."""

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
        """Combine encoded prompts with the size conditioning.

        Args:
            text: the encoded prompts.
            original: (height, width) of the original image in pixels.
            target: (height, width) of the generated image in pixels.
            crop: (top, left) in pixels.
            score: aesthetic score that takes the place of the target size, for models that are
                conditioned on it (`aesthetic_score`).
        """
        last = target if score is None else (score,)
        sizes = [
            torch.tensor([values], device=text.pooled.device).expand(len(text.pooled), -1)
            for values in (original, crop, last)
        ]
        return cls(text.context, conditioning_vector(text.pooled, *sizes))


def aesthetic_score(unet: UNet, *, is_negative: bool) -> float | None:
    """Return the score that the refiner is conditioned on; None for models without a score."""
    if not unet.config.takes_score:
        return None
    return NEGATIVE_AESTHETIC_SCORE if is_negative else AESTHETIC_SCORE


class Guidance(NamedTuple):
    """Classifier-free guidance: how the predictions of the branches are combined.

    Attributes:
        scale: strength of the prompt against the negative prompt. 1 or less: the negative prompt
            isn't used.
        negative_scale: strength of the negative prompt, if both prompts are guided relative to the
            empty prompt. None: guidance is relative to the negative prompt.
        rescale: 0..1, how much of the guided prediction's standard deviation is set back to that of
            the prompt's prediction.
    """

    scale: float
    negative_scale: float | None = None
    rescale: float = 0.0

    @property
    def num_branches(self) -> int:
        """Number of predictions per image: [negative, [empty,] prompt]."""
        if self.scale <= 1:
            return 1
        return 2 if self.negative_scale is None else 3

    def combine(self, predicted: Tensor) -> Tensor:
        """Combine the predictions of all branches: [G * B, 4, h, w] -> [B, 4, h, w].

        Source: Ho & Salimans 2022, arXiv:2207.12598, equation 6; Lin et al. 2023,
        arXiv:2305.08891, equations 14-16.
        """
        if self.num_branches == 1:
            return predicted
        negative, *between, prompt = predicted.chunk(self.num_branches)
        if self.negative_scale is None:
            guided = negative + self.scale * (prompt - negative)
        else:
            empty = between[0]
            guided = (
                empty + self.scale * (prompt - empty) - self.negative_scale * (negative - empty)
            )
        if self.rescale:
            factor = self.rescale * (_std(prompt) / _std(guided)) + (1 - self.rescale)
            guided = guided * factor.to(guided.dtype)
        return guided


def _std(prediction: Tensor) -> Tensor:
    """Return the standard deviation of each image's prediction: [B, 1, 1, 1], float32."""
    return prediction.float().std(dim=(1, 2, 3), keepdim=True)


class InpaintBlend(NamedTuple):
    """The latents that inpainting keeps.

    Attributes:
        latents: of the init image, scaled, [B, 4, h, w].
        noise: the noise that is added to them, [B, 4, h, w].
        mask: 1 where the image is repainted, 0 where it is kept, [B, 1, h, w].
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor

    def apply(self, latents: Tensor, sampler: Any, timestep: Tensor | None) -> Tensor:
        """Return the latents with the kept ones blended in.

        Args:
            latents: the denoised latents, [B, 4, h, w].
            sampler: the scheduler that adds the noise.
            timestep: the noise level of the kept latents. None: no noise.
        """
        kept = self.latents
        if timestep is not None:
            kept = sampler.add_noise(self.latents, self.noise, timestep[None])
        return latents * self.mask + kept.to(latents.dtype) * (1 - self.mask)


@torch.no_grad()
def denoise(
    unet: UNet,
    sampler: Any,
    latents: Tensor,
    conditioning: Sequence[Conditioning],
    guidance: Guidance,
    *,
    timesteps: Tensor,
    generators: Generators = None,
    control_at: ControlSchedule = lambda step, steps: None,
    shrink: DeepShrink | None = None,
    blend: InpaintBlend | None = None,
    inpaint_channels: Tensor | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Denoise latents and return them: scaled, [B, 4, h, w], in the dtype of `latents`.

    The loop never waits for the device, because the host works on copies in RAM.

    Args:
        unet: predicts noise or velocity.
        sampler: scheduler of `make_sampler`, with its timesteps set on the CPU.
        latents: at the noise level of the first timestep.
        conditioning: one per guidance branch, [negative, [empty,] prompt].
        guidance: how the predictions of the branches are combined.
        timesteps: the sampler's timesteps to run, `sampler.order` for each step, on the CPU.
        generators: for samplers that add noise.
        control_at: the control inputs of each step.
        shrink: Deep Shrink.
        blend: the latents that inpainting keeps.
        inpaint_channels: additional input of an inpainting model, [B, 5, h, w]
            (models/inpainting.py).
        on_step: called after each step.
    """
    context = torch.cat([branch.context for branch in conditioning])
    vector = torch.cat([branch.vector for branch in conditioning])
    step_arguments = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        step_arguments["generator"] = generators
    device_timesteps = timesteps.to(latents.device)
    steps = -(-len(timesteps) // sampler.order)  # every sampler's last step has one timestep
    for i, timestep in enumerate(timesteps):
        unet_input = sampler.scale_model_input(latents, timestep).to(latents.dtype)
        if inpaint_channels is not None:
            unet_input = torch.cat([unet_input, inpaint_channels], dim=1)
        if guidance.num_branches > 1:
            unet_input = torch.cat([unet_input] * guidance.num_branches)
        predicted = unet(
            unet_input,
            device_timesteps[i].expand(len(unet_input)),
            context,
            vector,
            control_at(i // sampler.order, steps),
            _shrink_at(shrink, timestep),
        )
        guided = guidance.combine(predicted)
        latents = sampler.step(guided, timestep, latents, return_dict=False, **step_arguments)[0]
        is_last = i + 1 == len(timesteps)
        if not is_last and (i + 1) % sampler.order:
            continue  # within a step, whose noise level isn't always that of a timestep
        if blend is not None:
            latents = blend.apply(latents, sampler, None if is_last else timesteps[i + 1])
        on_step()
    if blend is not None and not len(timesteps):
        latents = blend.apply(latents, sampler, None)
    return latents


def _shrink_at(shrink: DeepShrink | None, timestep: Tensor) -> Shrink | None:
    """Return where the U-Net shrinks its feature map at this timestep."""
    if shrink is None:
        return None
    block = shrink.block_at(float(timestep))
    return None if block is None else Shrink(block, shrink.ratio)
