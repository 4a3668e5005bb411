"""Painter: draws a batch of pictures with one model: texts, first noise, denoising, and back to pixels.

Shapes: B pictures, H and W in pixels, h = H / 8 and w = W / 8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.generation.adapters import Adapters
from library.generation.denoise import Conditioning, Guidance, InpaintBlend, denoise, score_of
from library.generation.gradual_latent import GrowingEuler
from library.generation.prompt_encoder import PromptEncoder
from library.generation.prompt_options import AND
from library.generation.request import GenerationRequest
from library.generation.samplers import begin_at, make_sampler, set_steps
from library.log import log
from library.models.inpainting import inpainting_channels
from library.models.sdxl import SdxlModels
from library.models.text_encoders import TextConditioning
from library.models.vae import scale_latents

_DRAWS_TWICE = ("dpm_2_a", "k_dpm_2_a")  # the reference draws two noises a step for these


class InitImage(NamedTuple):
    """What pictures are drawn from, where it isn't noise alone.

    Attributes:
        pixels: [B, 3, H, W] in -1..1; or latents: scaled, [B, 4, h, w].
        mask: 1 where it is repainted, [B, 1, h, w].
        stays: what stays where the mask is 0, if that isn't what is drawn from: [B, 3, H, W] in -1..1.
    """

    pixels: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    stays: Tensor | None = None


@dataclass(frozen=True)
class SdxlPipeline:
    """Draws with one model.

    Attributes:
        on_step: called after each step of a batch with its pictures.
    """

    models: SdxlModels
    encoder: PromptEncoder
    changes: Adapters
    v_prediction: bool
    zero_terminal_snr: bool
    on_step: Callable[[int], object] = lambda images: None

    def chunks(self, drawing: GenerationRequest) -> int:
        """Into how many chunks of 75 tokens its prompts fit."""
        texts = [*self.sub_prompts(drawing), drawing.prompt2]
        if drawing.is_guided:
            texts += [drawing.negative, drawing.negative2]
        return self.encoder.chunks(*(text for text in texts if text is not None))

    def latents(
        self,
        drawings: Sequence[GenerationRequest],
        start: InitImage | None = None,
        guides: Sequence[Tensor] = (),
        regions: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Scaled latents, [B, 4, h, w].

        Args:
            drawings: of the same settings, and of as many chunks and sub-prompts each.
            guides: for each control net, [B, 3, H, W] in -1..1.
            regions: which network works where, uint8 [H, W, 3].
            pooled: takes the place of the prompts' pooled text, [B, 1280].
        """
        first = drawings[0]
        self.changes.set_multipliers(first.multipliers)
        prompts, subs = self._prompts(drawings)
        if pooled is not None:
            prompts = prompts._replace(pooled=pooled.to(prompts.pooled))
        told = self._told(first, prompts, drawings)
        self.changes.set_multipliers(first.multipliers)
        sampler: Any = make_sampler(
            first.sampler, v_prediction=self.v_prediction, zero_terminal_snr=self.zero_terminal_snr, from_source=start is not None
        )  # fmt: skip
        height, width = first.height // 8, first.width // 8
        if first.growth is not None:
            sampler = GrowingEuler(sampler, first.growth, height, width)
        set_steps(sampler, first.steps)
        noises = [self._noise(drawing, (1, 4, height, width), for_source=start is not None) for drawing in drawings]
        generators = [noise.generator for noise in noises]
        guidance = Guidance(first.scale, first.negative_scale, first.guidance_rescale)
        kept, beside = None, None
        if self.models.unet.config.is_inpainting:
            beside = self._beside(first, start, noises)
        if start is None:
            latents = torch.cat([noise.start for noise in noises]) * sampler.init_noise_sigma
            timesteps = sampler.timesteps
        else:
            own = self._own_latents(start, generators)
            noise = torch.cat([noise.for_source for noise in noises if noise.for_source is not None])
            latents, timesteps = _noised(sampler, own, noise, first.steps, first.strength)
            if start.mask is not None:
                stays = own if start.stays is None else self._scaled_latents(start.stays, generators)
                kept = InpaintBlend(stays, noise, start.mask.to(own))
        if first.growth is not None:
            latents = first.growth.shrunk(latents)
        control_at = self.changes.conditions(guides=guides, sub_contexts=subs, mask=regions, parts=guidance.parts)
        return denoise(
            self.models.unet, sampler, latents, told, guidance, timesteps=timesteps, generators=generators, control_at=control_at,
            shrink=first.shrink, kept=kept, beside=beside, on_step=lambda: self.on_step(len(drawings)),
        )  # fmt: skip

    def sub_prompts(self, drawing: GenerationRequest) -> list[str]:
        """One for each region; the whole prompt where there are none."""
        return AND.split(drawing.prompt) if self.changes.is_regional else [drawing.prompt]

    def _prompts(self, drawings: Sequence[GenerationRequest]) -> tuple[TextConditioning, list[Tensor]]:
        """The prompts' conditioning, [B, ...]: of the last sub-prompts; and the contexts of all of them, where there are regions."""
        if not self.changes.is_regional:
            return _stacked([self._text(d.prompt, d, d.prompt2) for d in drawings]), []
        columns = []
        for number, texts in enumerate(zip(*map(self.sub_prompts, drawings), strict=True)):
            self.changes.set_multipliers(drawings[0].multipliers, sub_prompt=number)
            columns.append(
                _stacked([self._text(text, d, None, number) for text, d in zip(texts, drawings, strict=True)])
            )
        # The negative prompt is no network's: it is encoded next, with none of them.
        self.changes.set_multipliers(drawings[0].multipliers, sub_prompt=len(columns))
        return columns[-1], [column.context for column in columns]

    def _text(
        self, text: str, drawing: GenerationRequest, second: str | None, sub_prompt: int | None = None
    ) -> TextConditioning:
        return self.encoder.encode(text, second, self.chunks(drawing), (drawing.multipliers, sub_prompt))

    def _told(
        self, first: GenerationRequest, prompts: TextConditioning, drawings: Sequence[GenerationRequest]
    ) -> list[Conditioning]:
        """What each part of the guidance is told: [negative, [empty,] prompt]."""
        target, crop = (first.height, first.width), (first.crop_top or 0, first.crop_left or 0)
        original = (_or(first.original_height, first.height), _or(first.original_width, first.width))
        negative_original = (
            _or(first.original_height_negative, original[0]),
            _or(first.original_width_negative, original[1]),
        )
        parts = [(prompts, original)]
        if first.is_guided:
            if first.negative_scale is not None:
                parts.insert(0, (_stacked([self._text("", d, None) for d in drawings]), negative_original))
            parts.insert(0, (_stacked([self._text(d.negative, d, d.negative2) for d in drawings]), negative_original))
        scores = [score_of(self.models.unet, is_negative=text is not prompts) for text, _ in parts]
        return [
            Conditioning.of(text, original=own, crop=crop, target=target, score=score)
            for (text, own), score in zip(parts, scores, strict=True)
        ]

    def _noise(self, drawing: GenerationRequest, shape: tuple[int, ...], *, for_source: bool) -> "ImageNoise":
        per_step = 2 if drawing.sampler in _DRAWS_TWICE else 1
        return ImageNoise.drawn(
            drawing.seed, shape, drawing.steps * per_step, self.models.device, self.models.precision.compute, for_source=for_source
        )  # fmt: skip

    def _own_latents(self, start: InitImage, generators: Sequence[torch.Generator]) -> Tensor:
        """The scaled latents of what is drawn from, in the dtype in which is drawn."""
        if start.latents is not None:
            return start.latents.to(self.models.device, self.models.precision.compute)
        assert start.pixels is not None
        return self._scaled_latents(start.pixels, generators)

    def _scaled_latents(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        raw = self._raw(pixels, generators)
        return scale_latents(raw).to(self.models.device, self.models.precision.compute)

    def _raw(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Raw latents, samples of the posterior drawn by each picture's generator."""
        shape = (1, 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        noise = [
            torch.randn(shape, generator=g, device=self.models.device, dtype=self.models.precision.vae) for g in generators
        ]  # fmt: skip
        return self.models.encode_images(pixels.to(self.models.device), torch.cat(noise))

    def _beside(self, first: GenerationRequest, start: InitImage | None, noises: "Sequence[ImageNoise]") -> Tensor:
        """What an inpainting model sees beside the latents: the picture without what is repainted; all is, where there is no mask."""
        shape = (len(noises), 3, first.height, first.width)
        shown = None if start is None else start.pixels if start.stays is None else start.stays
        pixels = torch.zeros(shape) if shown is None else shown.cpu()
        masks = torch.ones(len(noises), *shape[2:])
        if start is not None and start.mask is not None:
            masks = torch.nn.functional.interpolate(start.mask.cpu(), scale_factor=8)[:, 0]
        seeds = [torch.Generator(self.models.device).manual_seed(noise.seed) for noise in noises]
        channels = inpainting_channels(pixels, masks, lambda images: self._raw(images, seeds))
        return channels.to(self.models.device, self.models.precision.compute)


class ImageNoise(NamedTuple):
    """The random numbers of one picture, in the reference's order: start, one for each step (unused), for its source.

    The generator goes on from there, for the source's latents and then for samplers that add noise, so a picture doesn't
    depend on the others of its batch.
    """

    seed: int
    generator: torch.Generator
    start: Tensor
    for_source: Tensor | None

    @classmethod
    def drawn(
        cls,
        seed: int,
        shape: tuple[int, ...],
        unused: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        for_source: bool,
    ) -> "ImageNoise":
        generator = torch.Generator(device).manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        start = normal()
        for _ in range(unused):
            normal()
        return cls(seed, generator, start, normal() if for_source else None)


def _noised(sampler: Any, latents: Tensor, noise: Tensor, steps: int, strength: float) -> tuple[Tensor, Tensor]:
    """The latents at the noise from which they are drawn anew, and the timesteps that are gone through.

    As in the reference, those begin one step below that noise. Where no step would follow, nothing is noised: differs from
    sd-scripts, whose pictures keep that noise. Samplers with more timesteps than steps begin at that noise: differs from
    sd-scripts, which takes each timestep for a step. Source: contract, training_math.md section 10.
    """
    has_more = sampler.order > 1 or "skip_prk_steps" in sampler.config
    offset = 0 if has_more else sampler.config.get("steps_offset", 0)
    count = min(int(steps * strength) + offset, steps)
    if count <= offset:
        if strength:
            log.warning(
                "%d steps at strength %g: none of them is gone through, the picture stays as it is", steps, strength
            )
        return latents, sampler.timesteps[:0]
    noised = sampler.add_noise(latents, noise, begin_at(sampler, steps - count)[:1])
    return noised, begin_at(sampler, steps - count + offset)


def _stacked(texts: Sequence[TextConditioning]) -> TextConditioning:
    return TextConditioning(*(torch.cat(parts) for parts in zip(*texts, strict=True)))


def _or(value: int | None, other: int) -> int:
    return other if value is None else value
