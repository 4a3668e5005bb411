"""RequestBuilder: turns options and prompts into generation requests.

This module doesn't import torch, so mistakes are reported before a model is loaded.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from library.errors import OptionError
from library.generation.deep_shrink import DeepShrink, DeepShrinkOptions
from library.generation.gradual_latent import (
    GRADUAL_SAMPLERS,
    GradualLatent,
    GradualLatentOptions,
)
from library.generation.init_images import list_images, size_of
from library.generation.options import (
    DEFAULT_SIDE,
    SIDE,
    HighresFixOptions,
    ImageOptions,
    InitImageOptions,
    PromptOptions,
)
from library.generation.prompts.dynamic import variants
from library.generation.prompts.line import AND, NO_NEGATIVE_SCALE, PromptLine, read_line
from library.generation.prompts.sources import PromptSource
from library.generation.request import GenerationRequest

T = TypeVar("T")

_DEFAULT_STRENGTH = 0.8
_MAX_RANDOM_SEED = 0x7FFFFFFF


@dataclass(frozen=True)
class AdapterCounts:
    """Numbers of networks and control nets that are loaded onto the model.

    Attributes:
        networks: networks that have a multiplier.
        regional: networks that work in a region of the mask, on a sub-prompt of their own.
        control_nets: each takes one guide image per image.
    """

    networks: int = 0
    regional: int = 0
    control_nets: int = 0


class RequestBuilder:
    """Turns prompts into requests, one after another.

    It keeps what one prompt leaves to the next: the seeds, the positions in the lists of files,
    and, as in the reference, Deep Shrink and Gradual Latent once a prompt has turned them on.
    """

    def __init__(
        self,
        *,
        prompts: PromptOptions,
        image: ImageOptions,
        init_images: InitImageOptions,
        highres_fix: HighresFixOptions,
        deep_shrink: DeepShrinkOptions,
        gradual_latent: GradualLatentOptions,
        num_prompts: int,
        counts: AdapterCounts,
    ):
        """Make a builder.

        Args:
            prompts: seeds and numbers of images.
            image: sizes, steps, sampler and guidance.
            init_images: init images, masks and guide images.
            highres_fix: highres fix.
            deep_shrink: Deep Shrink.
            gradual_latent: Gradual Latent.
            num_prompts: number of prompts per iteration (--n_iter).
            counts: of networks and control nets.
        """
        self._prompts = prompts
        self._image = image
        self._highres_scale = highres_fix.highres_fix_scale
        self._strength = _first(init_images.strength, _DEFAULT_STRENGTH)
        self._init_images = _list_optional(init_images.image_path, "--image_path")
        self._masks = _list_optional(init_images.mask_path, "--mask_path")
        self._guides = list_images(init_images.guide_image_path or (), "--guide_image_path")
        self._counts = counts
        self._deep_shrink_defaults = DeepShrink.from_options(deep_shrink)
        self._gradual_latent_defaults = GradualLatent.from_options(gradual_latent)
        self._deep_shrink: DeepShrink | None = None
        self._gradual_latent: GradualLatent | None = None
        if deep_shrink.ds_depth_1 is not None:
            self._deep_shrink = self._deep_shrink_defaults
        if gradual_latent.gradual_latent_timesteps is not None:
            self._gradual_latent = self._gradual_latent_defaults
        self._seeds = _Seeds(prompts, num_prompts)
        self._index = 0
        self._prompt_index = 0

    def build_all(self, prompts: Sequence[PromptSource]) -> list[GenerationRequest]:
        """Return the requests of one iteration over all prompts.

        Raises:
            OptionError: with the mistakes of all prompts.
        """
        requests: list[GenerationRequest] = []
        mistakes = []
        for prompt in prompts:
            try:
                with self.restored_on_error():
                    requests += self.build(prompt)
            except OptionError as error:
                mistakes += error.mistakes
        if mistakes:
            raise OptionError(*mistakes)
        self._seeds.next_iteration()
        return requests

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Context manager: a prompt that is refused turns nothing on for the prompts after it."""
        before = self._deep_shrink, self._gradual_latent, self._index
        try:
            yield
        except OptionError:
            self._deep_shrink, self._gradual_latent, self._index = before
            raise

    def build(self, prompt: PromptSource) -> list[GenerationRequest]:
        """Return the requests of one prompt.

        Raises:
            OptionError: if the prompt or its options are invalid.
        """
        prompt_index = self._prompt_index
        self._prompt_index += 1
        requests = []
        for i, text in enumerate(self._expand(prompt)):
            line = read_line(text, prompt.where)
            self._turn_on(line, prompt.where)
            requests.append(self._request(line, prompt, prompt_index, i))
            self._index += 1
        return requests

    def _expand(self, prompt: PromptSource) -> list[str]:
        """Return the variants of a dynamic prompt, one per image."""
        try:
            texts, enumerates = variants(prompt.text, self._seeds.rng)
            if not enumerates:
                for _ in range(self._prompts.images_per_prompt - 1):
                    texts += variants(prompt.text, self._seeds.rng)[0]
        except ValueError as error:
            raise OptionError(f"{prompt.where}: {error}") from None
        return texts

    def _turn_on(self, line: PromptLine, where: str) -> None:
        """Apply the prompt's options of Deep Shrink and Gradual Latent."""
        changes = _given_options(line, "ds_")
        if changes:
            before = self._deep_shrink or self._deep_shrink_defaults
            self._deep_shrink = dataclasses.replace(before, **changes)
        changes = _given_options(line, "gl_")
        if changes:
            growing = self._gradual_latent or self._gradual_latent_defaults
            self._gradual_latent = dataclasses.replace(growing, **changes)
        if self._gradual_latent is not None and self._image.sampler not in GRADUAL_SAMPLERS:
            raise OptionError(
                f"{where}: Gradual Latent needs --sampler {' or '.join(GRADUAL_SAMPLERS)}, "
                f"not {self._image.sampler}"
            )
        is_resizing = self._gradual_latent is not None or self._deep_shrink is not None
        if self._counts.control_nets and is_resizing:
            raise OptionError(
                f"{where}: control nets need feature maps of the image's own size and can't be "
                "combined with Deep Shrink or Gradual Latent"
            )

    def _request(
        self, line: PromptLine, prompt: PromptSource, prompt_index: int, image_index: int
    ) -> GenerationRequest:
        """Return the request of one image.

        Args:
            line: the prompt and its options.
            prompt: the prompt as the user wrote it.
            prompt_index: of the prompt within the run.
            image_index: of the image within the prompt.
        """
        image = self._image
        self._check_regions(line.prompt, prompt.where)
        if line.multipliers and not self._counts.networks:
            raise OptionError(f"{prompt.where}: --am: no network is loaded")
        file_index = _first(prompt.init_image_index, self._index)
        init_image = _cycled(self._init_images, file_index)
        width, height = self._size(line, init_image)
        request = GenerationRequest(
            prompt=line.prompt,
            negative=line.negative or "",
            prompt2=line.prompt2 if line.prompt2 is not None else self._prompts.prompt2,
            negative2=line.negative2,
            raw_prompt=prompt.text,
            clip_prompt=line.clip_prompt,
            width=width,
            height=height,
            original_width=_first(line.original_width, image.original_width),
            original_height=_first(line.original_height, image.original_height),
            original_width_negative=_first(
                line.original_width_negative, image.original_width_negative
            ),
            original_height_negative=_first(
                line.original_height_negative, image.original_height_negative
            ),
            crop_top=_first(line.crop_top, image.crop_top),
            crop_left=_first(line.crop_left, image.crop_left),
            steps=_first(line.steps, image.steps),
            seed=self._seeds.next_seed(line.seeds, image_index),
            sampler=image.sampler,
            scale=_first(line.scale, image.scale),
            negative_scale=self._negative_scale(line),
            guidance_rescale=image.guidance_rescale,
            strength=_first(line.strength, self._strength),
            multipliers=self._multipliers(line),
            deep_shrink=self._deep_shrink,
            gradual_latent=self._gradual_latent,
            init_image=init_image,
            mask=_cycled(self._masks, file_index),
            guide_images=self._next_guide_images(),
            index=self._index,
            prompt_index=prompt_index,
        )
        problems = list(self._problems(request))
        if problems:
            raise OptionError(*(f"{prompt.where}: {problem}" for problem in problems))
        return request

    def _problems(self, request: GenerationRequest) -> Iterator[str]:
        """Yield which settings of an image are incompatible."""
        stages = [request]
        scale = self._highres_scale
        if scale is not None:
            small = request.first_stage(scale=scale, steps=1, strength=None)
            if min(small.width, small.height) < SIDE:
                least = SIDE / min(request.width, request.height)
                yield (
                    f"--highres_fix_scale {scale:g} makes {small.width}x{small.height} of "
                    f"{request.width}x{request.height}; each side needs at least {SIDE} pixels: "
                    f"use {least:g} or more"
                )
                return
            stages.insert(0, small)
        if request.gradual_latent is not None:
            if scale is not None:
                yield "Gradual Latent and --highres_fix_scale can't be combined; use one of them"
            if request.mask is not None and not self._counts.regional:
                yield (
                    "Gradual Latent changes the size of latents and can't be combined with "
                    "--mask_path"
                )
        for stage in stages:
            for technique in (stage.deep_shrink, stage.gradual_latent):
                if technique is not None:
                    reason = technique.invalid_reason(stage.width, stage.height)
                    if reason:
                        yield reason

    def _check_regions(self, prompt: str, where: str) -> None:
        num_sub_prompts = len(AND.split(prompt))
        if self._counts.regional:
            if num_sub_prompts < self._counts.regional:
                raise OptionError(
                    f"{where}: {self._counts.regional} networks need as many sub-prompts, "
                    f"separated by AND; this prompt has {num_sub_prompts}"
                )
        elif num_sub_prompts > 1:
            raise OptionError(
                f"{where}: AND separates the sub-prompts of regions, which need --mask_path and "
                "--network_weights that aren't merged; write it in lower case, or leave it out"
            )

    def _size(self, line: PromptLine, init_image: Path | None) -> tuple[int, int]:
        """Return (width, height) in pixels."""
        width = _first(line.width, self._image.W)
        height = _first(line.height, self._image.H)
        if init_image is not None and (width is None or height is None):
            return size_of(init_image, "--image_path")
        return width or DEFAULT_SIDE, height or DEFAULT_SIDE

    def _negative_scale(self, line: PromptLine) -> float | None:
        if line.negative_scale == NO_NEGATIVE_SCALE:
            return None
        return _first(line.negative_scale, self._image.negative_scale)

    def _multipliers(self, line: PromptLine) -> tuple[float, ...] | None:
        """Return one multiplier per network; the last one is repeated."""
        if line.multipliers is None:
            return None
        given = line.multipliers[: self._counts.networks]
        return given + given[-1:] * (self._counts.networks - len(given))

    def _next_guide_images(self) -> tuple[Path, ...]:
        if not self._guides:
            return ()
        count = self._counts.control_nets
        first = self._index * count
        return tuple(self._guides[(first + i) % len(self._guides)] for i in range(count))


class _Seeds:
    """The seeds of a run's images. Source: contract, training_math.md section 10."""

    def __init__(self, options: PromptOptions, num_prompts: int):
        iterations = 1 if options.interactive else options.n_iter
        images = options.images_per_prompt
        self._is_shared = options.iter_same_seed
        self._per_iteration = images if self._is_shared else num_prompts * images
        self._iteration = 0
        self._num_used = 0
        self.rng = random.Random(options.seed)
        count = iterations * self._per_iteration
        if options.seed is not None and iterations * num_prompts * images == 1:
            self._sampled = [options.seed] * count
        else:
            self._sampled = [self.rng.randint(0, _MAX_RANDOM_SEED) for _ in range(count)]

    def next_seed(self, given: Sequence[int] | None, image_index: int) -> int:
        """Return the seed of the next image.

        Args:
            given: seeds of the prompt; the last one is repeated.
            image_index: of the image within its prompt.
        """
        i = self._iteration * self._per_iteration
        i += image_index if self._is_shared else self._num_used
        self._num_used += 1
        if given:
            return given[min(image_index, len(given) - 1)]
        # Prompts that enumerate variants, and interactive ones, need more seeds.
        while i >= len(self._sampled):
            self._sampled.append(self.rng.randint(0, _MAX_RANDOM_SEED))
        return self._sampled[i]

    def next_iteration(self) -> None:
        self._iteration += 1
        self._num_used = 0


def _given_options(line: PromptLine, prefix: str) -> dict[str, Any]:
    """Return the options of a prompt that begin with a prefix, without it."""
    given = {}
    for field in dataclasses.fields(line):
        value = getattr(line, field.name)
        if field.name.startswith(prefix) and value is not None:
            given[field.name.removeprefix(prefix)] = value
    return given


def _list_optional(path: Path | None, flag: str) -> list[Path]:
    return [] if path is None else list_images([path], flag)


def _cycled(paths: Sequence[Path], i: int) -> Path | None:
    return paths[i % len(paths)] if paths else None


def _first(value: T | None, default: T) -> T:
    return default if value is None else value
