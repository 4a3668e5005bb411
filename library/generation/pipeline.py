"""SdxlPipeline: generates the latents of one batch: prompts, initial noise, denoising.

Shapes: B images, H and W in pixels, h = H / 8 and w = W / 8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.generation.adapters import Adapters
from library.generation.denoise import (
    Conditioning,
    Guidance,
    InpaintBlend,
    aesthetic_score,
    denoise,
)
from library.generation.gradual_latent import GrowingEuler
from library.generation.prompts.encoder import PromptEncoder
from library.generation.prompts.line import AND
from library.generation.request import GenerationRequest
from library.generation.samplers import begin_at, make_sampler, set_steps
from library.log import log
from library.models.inpainting import inpainting_channels
from library.models.sdxl import SdxlModels
from library.models.text_encoders import TextConditioning
from library.models.vae import scale_latents

# Samplers for which the reference samples two noise tensors per step.
_TWO_NOISES_PER_STEP = ("dpm_2_a", "k_dpm_2_a")


class InitImage(NamedTuple):
    """The init images of a batch.

    Attributes:
        pixels: [B, 3, H, W] in -1..1. None: `latents` are given.
        latents: scaled, [B, 4, h, w]. None: `pixels` are given.
        mask: 1 where the image is repainted, [B, 1, h, w]. None: everywhere.
        kept_pixels: the image that is kept where the mask is 0, [B, 3, H, W] in -1..1.
            None: the init image.
    """

    pixels: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    kept_pixels: Tensor | None = None


class ImageNoise(NamedTuple):
    """The random tensors of one image.

    They are sampled in the reference's order: the initial noise, one tensor per step (unused), and
    the noise of the init image. The generator then samples the VAE's posterior and the noise that
    samplers add. Each image has its own generator and doesn't depend on the others of its batch.
    """

    seed: int
    generator: torch.Generator
    initial: Tensor
    for_init_image: Tensor | None

    @classmethod
    def sample(
        cls,
        seed: int,
        shape: tuple[int, ...],
        num_unused: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        has_init_image: bool,
    ) -> "ImageNoise":
        """Sample the noise of one image.

        Args:
            seed: of the generator.
            shape: [1, 4, h, w].
            num_unused: number of tensors that the reference samples for the steps.
            device: where the noise is sampled.
            dtype: of the noise.
            has_init_image: whether noise for the init image is sampled.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        initial = normal()
        for _ in range(num_unused):
            normal()
        return cls(seed, generator, initial, normal() if has_init_image else None)


class _Start(NamedTuple):
    """From where a batch is denoised: the noisy latents, the timesteps, and what is kept."""

    latents: Tensor
    timesteps: Tensor
    blend: InpaintBlend | None = None


@dataclass(frozen=True)
class SdxlPipeline:
    """Generates batches with one model.

    Attributes:
        models: the U-Net, text encoders and VAE.
        encoder: of prompts.
        adapters: networks, control nets and embeddings on the model.
        v_prediction: whether the U-Net predicts velocity.
        zero_terminal_snr: whether the last timestep is pure noise.
        on_step: called after each step with the batch size.
    """

    models: SdxlModels
    encoder: PromptEncoder
    adapters: Adapters
    v_prediction: bool
    zero_terminal_snr: bool
    on_step: Callable[[int], object] = lambda batch_size: None

    def chunks(self, request: GenerationRequest) -> int:
        """Return the number of chunks of 75 tokens that all prompts of an image need."""
        texts = self.sub_prompts(request)
        if request.prompt2 is not None:
            texts.append(request.prompt2)
        if request.is_guided:
            texts.append(request.negative)
            if request.negative2 is not None:
                texts.append(request.negative2)
        return self.encoder.chunks(*texts)

    def sub_prompts(self, request: GenerationRequest) -> list[str]:
        """Return one prompt per region; the complete prompt if there are no regions."""
        return AND.split(request.prompt) if self.adapters.is_regional else [request.prompt]

    def latents(
        self,
        requests: Sequence[GenerationRequest],
        init_image: InitImage | None = None,
        guide_images: Sequence[Tensor] = (),
        regions: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Generate a batch and return its scaled latents, [B, 4, h, w].

        Args:
            requests: with the same settings (`batch_key`), chunks and number of sub-prompts.
            init_image: None: the images start from noise.
            guide_images: one per control net, [B, 3, H, W] in -1..1.
            regions: the region of each network, uint8 [H, W, 3].
            pooled: replaces the pooled text embeddings of the prompts, [B, 1280].
        """
        first = requests[0]
        self.adapters.set_multipliers(first.multipliers)
        prompts, sub_contexts = self.encode_prompts(requests)
        if pooled is not None:
            prompts = prompts._replace(pooled=pooled.to(prompts.pooled))
        conditioning = self.conditioning(requests, prompts)
        self.adapters.set_multipliers(first.multipliers)
        sampler = self._sampler(first, has_init_image=init_image is not None)
        noises = self._sample_noise(requests, has_init_image=init_image is not None)
        inpaint_channels = None
        if self.models.unet.config.is_inpainting:
            inpaint_channels = self._inpaint_channels(first, init_image, noises)
        start = self._start(sampler, first, init_image, noises)
        latents = start.latents
        if first.gradual_latent is not None:
            latents = first.gradual_latent.shrink(latents)
        guidance = Guidance(first.scale, first.negative_scale, first.guidance_rescale)
        control_at = self.adapters.prepare_batch(
            guide_images=guide_images,
            sub_contexts=sub_contexts,
            mask=regions,
            num_branches=guidance.num_branches,
        )
        return denoise(
            self.models.unet,
            sampler,
            latents,
            conditioning,
            guidance,
            timesteps=start.timesteps,
            generators=[noise.generator for noise in noises],
            control_at=control_at,
            shrink=first.deep_shrink,
            blend=start.blend,
            inpaint_channels=inpaint_channels,
            on_step=lambda: self.on_step(len(requests)),
        )

    # ------------------------------------------------------------------------------------ prompts

    def encode_prompts(
        self, requests: Sequence[GenerationRequest]
    ) -> tuple[TextConditioning, list[Tensor]]:
        """Encode the prompts of a batch.

        Returns:
            The conditioning, [B, ...], and the context of each sub-prompt, [B, T, 2048]. With
            regions the conditioning is that of the last sub-prompts; without, the list is empty.
        """
        if not self.adapters.is_regional:
            return _stack([self._encode(r.prompt, r, r.prompt2) for r in requests]), []
        encoded: list[TextConditioning] = []
        sub_prompts = [self.sub_prompts(request) for request in requests]
        for i in range(len(sub_prompts[0])):
            self.adapters.set_multipliers(requests[0].multipliers, sub_prompt=i)
            rows = []
            for request, prompts in zip(requests, sub_prompts, strict=True):
                rows.append(self._encode(prompts[i], request, None, i))
            encoded.append(_stack(rows))
        # The negative prompt belongs to no region: it is encoded next, without any network.
        self.adapters.set_multipliers(requests[0].multipliers, sub_prompt=len(encoded))
        return encoded[-1], [text.context for text in encoded]

    def conditioning(
        self, requests: Sequence[GenerationRequest], prompts: TextConditioning
    ) -> list[Conditioning]:
        """Return the conditioning of each guidance branch: [negative, [empty,] prompt].

        Args:
            requests: of a batch.
            prompts: the encoded prompts, [B, ...].
        """
        first = requests[0]
        original = (
            _default(first.original_height, first.height),
            _default(first.original_width, first.width),
        )
        negative_original = (
            _default(first.original_height_negative, original[0]),
            _default(first.original_width_negative, original[1]),
        )
        branches = [self._branch(first, prompts, original, is_negative=False)]
        if first.is_guided:
            if first.negative_scale is not None:
                empty = _stack([self._encode("", r, None) for r in requests])
                branches.insert(0, self._branch(first, empty, negative_original, is_negative=True))
            negative = _stack([self._encode(r.negative, r, r.negative2) for r in requests])
            branches.insert(0, self._branch(first, negative, negative_original, is_negative=True))
        return branches

    def _branch(
        self,
        request: GenerationRequest,
        text: TextConditioning,
        original: tuple[int, int],
        *,
        is_negative: bool,
    ) -> Conditioning:
        return Conditioning.of(
            text,
            original=original,
            crop=(request.crop_top or 0, request.crop_left or 0),
            target=(request.height, request.width),
            score=aesthetic_score(self.models.unet, is_negative=is_negative),
        )

    def _encode(
        self,
        text: str,
        request: GenerationRequest,
        text2: str | None,
        sub_prompt: int | None = None,
    ) -> TextConditioning:
        encoder_state = (request.multipliers, sub_prompt)
        return self.encoder.encode(text, text2, self.chunks(request), encoder_state)

    # ---------------------------------------------------------------------------- noise and start

    def _sampler(self, request: GenerationRequest, *, has_init_image: bool) -> Any:
        sampler: Any = make_sampler(
            request.sampler,
            v_prediction=self.v_prediction,
            zero_terminal_snr=self.zero_terminal_snr,
            from_init_image=has_init_image,
        )
        if request.gradual_latent is not None:
            height, width = request.height // 8, request.width // 8
            sampler = GrowingEuler(sampler, request.gradual_latent, height, width)
        set_steps(sampler, request.steps)
        return sampler

    def _sample_noise(
        self, requests: Sequence[GenerationRequest], *, has_init_image: bool
    ) -> list[ImageNoise]:
        noises = []
        for request in requests:
            per_step = 2 if request.sampler in _TWO_NOISES_PER_STEP else 1
            noise = ImageNoise.sample(
                request.seed,
                (1, 4, request.height // 8, request.width // 8),
                request.steps * per_step,
                self.models.device,
                self.models.precision.compute,
                has_init_image=has_init_image,
            )
            noises.append(noise)
        return noises

    def _start(
        self,
        sampler: Any,
        request: GenerationRequest,
        init_image: InitImage | None,
        noises: Sequence[ImageNoise],
    ) -> _Start:
        if init_image is None:
            noise = torch.cat([noise.initial for noise in noises])
            return _Start(noise * sampler.init_noise_sigma, sampler.timesteps)
        generators = [noise.generator for noise in noises]
        init_latents = self._init_latents(init_image, generators)
        added = [noise.for_init_image for noise in noises if noise.for_init_image is not None]
        noise = torch.cat(added)
        latents, timesteps = noise_init_latents(
            sampler, init_latents, noise, request.steps, request.strength
        )
        if init_image.mask is None:
            return _Start(latents, timesteps)
        kept = init_latents
        if init_image.kept_pixels is not None:
            kept = self._scaled_latents(init_image.kept_pixels, generators)
        blend = InpaintBlend(kept, noise, init_image.mask.to(init_latents))
        return _Start(latents, timesteps, blend)

    def _init_latents(self, init_image: InitImage, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the scaled latents of init images in the compute dtype."""
        if init_image.latents is not None:
            return init_image.latents.to(self.models.device, self.models.precision.compute)
        assert init_image.pixels is not None
        return self._scaled_latents(init_image.pixels, generators)

    def _scaled_latents(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        raw = self._raw_latents(pixels, generators)
        return scale_latents(raw).to(self.models.device, self.models.precision.compute)

    def _raw_latents(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Encode images; each image's generator samples its posterior."""
        shape = (1, 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        device, dtype = self.models.device, self.models.precision.vae
        noise = [torch.randn(shape, generator=g, device=device, dtype=dtype) for g in generators]
        return self.models.encode_images(pixels.to(device), torch.cat(noise))

    def _inpaint_channels(
        self,
        request: GenerationRequest,
        init_image: InitImage | None,
        noises: Sequence[ImageNoise],
    ) -> Tensor:
        """Return the additional input of an inpainting model: mask and masked image.

        Without a mask the complete image is repainted.
        """
        pixels = None
        masks = torch.ones(len(noises), request.height, request.width)
        if init_image is not None:
            pixels = init_image.pixels
            if init_image.kept_pixels is not None:
                pixels = init_image.kept_pixels
            if init_image.mask is not None:
                mask = init_image.mask.cpu()
                masks = torch.nn.functional.interpolate(mask, scale_factor=8)[:, 0]
        if pixels is None:
            pixels = torch.zeros(len(noises), 3, request.height, request.width)
        device = self.models.device
        generators = [torch.Generator(device).manual_seed(noise.seed) for noise in noises]
        channels = inpainting_channels(
            pixels.cpu(), masks, lambda images: self._raw_latents(images, generators)
        )
        return channels.to(device, self.models.precision.compute)


def noise_init_latents(
    sampler: Any, latents: Tensor, noise: Tensor, steps: int, strength: float
) -> tuple[Tensor, Tensor]:
    """Add noise to the latents of init images.

    As in the reference, denoising begins one step below the noise level of the latents. If no step
    would follow, no noise is added: differs from sd-scripts, whose images keep that noise. Samplers
    with more timesteps than steps begin at the noise level itself: differs from sd-scripts, which
    counts each timestep as a step. Source: contract, training_math.md section 10.

    Args:
        sampler: a scheduler with its timesteps set.
        latents: scaled, [B, 4, h, w].
        noise: [B, 4, h, w].
        steps: number of steps from pure noise.
        strength: share of the steps to run.

    Returns:
        The noisy latents and the remaining timesteps.
    """
    has_extra_timesteps = sampler.order > 1 or "skip_prk_steps" in sampler.config
    offset = 0 if has_extra_timesteps else sampler.config.get("steps_offset", 0)
    count = min(int(steps * strength) + offset, steps)
    if count <= offset:
        if strength:
            log.warning(
                "strength %g of %d steps leaves no step to run: the init image isn't changed",
                strength,
                steps,
            )
        return latents, sampler.timesteps[:0]
    noised = sampler.add_noise(latents, noise, begin_at(sampler, steps - count)[:1])
    return noised, begin_at(sampler, steps - count + offset)


def _stack(texts: Sequence[TextConditioning]) -> TextConditioning:
    return TextConditioning(
        torch.cat([text.context for text in texts]), torch.cat([text.pooled for text in texts])
    )


def _default(value: int | None, default: int) -> int:
    return default if value is None else value
