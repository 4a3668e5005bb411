"""Plan: from options and lines of prompts to the pictures that are to be drawn. No torch here, so mistakes are told at once."""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from library.errors import OptionError
from library.generation.deep_shrink import DeepShrink
from library.generation.dynamic_prompts import variants
from library.generation.gradual_latent import GradualLatent
from library.generation.init_images import list_images, size_of
from library.generation.metadata import read_texts
from library.generation.options import (
    DEFAULT_SIDE,
    GRADUAL_SAMPLERS,
    SIDE,
    DeepShrinkOptions,
    GradualLatentOptions,
    HighresFixOptions,
    ImageOptions,
    InitImageOptions,
    PromptOptions,
)
from library.generation.prompt_options import AND, NO_NEGATIVE_SCALE, PromptLine, read_line
from library.generation.request import GenerationRequest
from library.options import Options

T = TypeVar("T")

_STRENGTH = 0.8
_MOST_SEED = 0x7FFFFFFF


@dataclass(frozen=True)
class PromptSource:
    """A line of prompts as it was written, and where.

    Attributes: source: which of the pictures of --image_path it was stored in, and is drawn from; None: the next one each time.
    """

    text: str
    where: str
    source: int | None = None


def read_lines(options: Options) -> list[PromptSource]:
    """The lines that the options name; none with --interactive. Raises OptionError."""
    chosen = options[PromptOptions]
    if chosen.interactive:
        return []
    if chosen.from_file is not None:
        try:
            text = chosen.from_file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise OptionError(f"--from_file {chosen.from_file}: it is not UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise OptionError(f"--from_file {chosen.from_file}: can't be read: {error.strerror}") from None
        numbered = enumerate(map(str.strip, text.splitlines()), 1)
        lines = [
            PromptSource(line, f"{chosen.from_file}, line {n}")
            for n, line in numbered
            if line and not line.startswith("#")
        ]
        if not lines:
            raise OptionError(f"--from_file {chosen.from_file}: no prompt in it")
        return lines
    if chosen.prompt is not None:
        return [PromptSource(chosen.prompt, "--prompt")]
    source = options[InitImageOptions].image_path
    if source is None:
        raise OptionError("nothing to draw: give --prompt, --from_file, --from_png or --interactive")
    return [_stored_line(path, i) for i, path in enumerate(list_images([source], "--image_path"))]


def _stored_line(path: Path, number: int) -> PromptSource:
    """The prompts that are stored in a picture."""
    texts = read_texts(path, "--image_path")
    if "prompt" not in texts:
        raise OptionError(f"--image_path {path}: no prompt is stored in it; give --prompt or --from_file")
    negative = texts.get("negative-prompt", "")
    return PromptSource(texts["prompt"] + (f" --n {negative}" if negative else ""), str(path), number)


class RequestBuilder:
    """Turns lines into drawings, one after another.

    It keeps what goes on from line to line: the seeds, the places in the lists of files, and, as in the reference, Deep
    Shrink and Gradual Latent once a line has turned them on.
    """

    def __init__(self, options: Options, num_lines: int, *, num_guides: int, num_networks: int, num_regions: int = 0):
        """Args:
        num_lines: how many lines a round has.
        num_guides, num_networks: control nets, and networks with a multiplier.
        num_regions: networks that work each in a region of the mask, and on a sub-prompt of its own.
        """
        self._prompts, self._image = options[PromptOptions], options[ImageOptions]
        self._fix = options[HighresFixOptions]
        sources = options[InitImageOptions]
        self._strength = _STRENGTH if sources.strength is None else sources.strength
        self._sources = [] if sources.image_path is None else list_images([sources.image_path], "--image_path")
        self._masks = [] if sources.mask_path is None else list_images([sources.mask_path], "--mask_path")
        self._guides = list_images(sources.guide_image_path or (), "--guide_image_path")
        self._num_guides, self._num_networks, self._num_regions = num_guides, num_networks, num_regions
        self._shrink_options, self._growth_options = options[DeepShrinkOptions], options[GradualLatentOptions]
        self._shrink = None if self._shrink_options.ds_depth_1 is None else _shrink_of(self._shrink_options)
        is_growing = self._growth_options.gradual_latent_timesteps is not None
        self._growth = _growth_of(self._growth_options) if is_growing else None
        self._seeds = _Seeds(self._prompts, num_lines)
        self._number = self._row = 0

    def round_of(self, lines: Sequence[PromptSource]) -> list[GenerationRequest]:
        """The drawings of all lines, once. Raises OptionError with the mistakes of all of them."""
        found: list[GenerationRequest] = []
        mistakes = []
        for line in lines:
            try:
                with self.unless_refused():
                    found += self.drawings_of(line)
            except OptionError as error:
                mistakes += error.mistakes
        if mistakes:
            raise OptionError(*mistakes)
        self._seeds.next_round()
        return found

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """Within it, a line that is refused turns nothing on for those behind it."""
        before = self._shrink, self._growth, self._number
        try:
            yield
        except OptionError:
            self._shrink, self._growth, self._number = before
            raise

    def drawings_of(self, line: PromptSource) -> list[GenerationRequest]:
        """The drawings of one line. Raises OptionError."""
        row, self._row = self._row, self._row + 1
        made = []
        for place, text in enumerate(self._texts(line)):
            read = read_line(text, line.where)
            self._turn_on(read, line.where)
            made.append(self._drawing(read, line, row, place))
            self._number += 1
        return made

    def _texts(self, line: PromptSource) -> list[str]:
        """The line's prompts, a picture each: its variants, as often as asked for."""
        try:
            found, enumerates = variants(line.text, self._seeds.rng)
            if enumerates:
                return found
            return found + [
                variants(line.text, self._seeds.rng)[0][0] for _ in range(self._prompts.images_per_prompt - 1)
            ]
        except ValueError as error:
            raise OptionError(f"{line.where}: {error}") from None

    def _turn_on(self, read: PromptLine, where: str) -> None:
        own = {f.name: getattr(read, f.name) for f in dataclasses.fields(read)}
        shrink = {k.removeprefix("ds_"): v for k, v in own.items() if k.startswith("ds_") and v is not None}
        if shrink:
            self._shrink = dataclasses.replace(self._shrink or _shrink_of(self._shrink_options), **shrink)
        growth = {k.removeprefix("gl_"): v for k, v in own.items() if k.startswith("gl_") and v is not None}
        if growth:
            self._growth = dataclasses.replace(self._growth or _growth_of(self._growth_options), **growth)
        if self._growth is not None and self._image.sampler not in GRADUAL_SAMPLERS:
            raise OptionError(
                f"{where}: Gradual Latent works with --sampler {' or '.join(GRADUAL_SAMPLERS)}, not {self._image.sampler}"
            )
        if self._num_guides and (self._growth is not None or self._shrink is not None):
            raise OptionError(
                f"{where}: control nets need feature maps of the picture's own size: no Deep Shrink, no Gradual Latent"
            )

    def _drawing(self, read: PromptLine, line: PromptSource, row: int, place: int) -> GenerationRequest:
        image = self._image
        self._check_regions(read.prompt, line.where)
        place_of_source = self._number if line.source is None else line.source
        source = self._sources[place_of_source % len(self._sources)] if self._sources else None
        width, height = self._size(read, source)
        if read.multipliers and not self._num_networks:
            raise OptionError(f"{line.where}: --am: no network is loaded whose multiplier it could be")
        drawing = GenerationRequest(
            prompt=read.prompt, negative=read.negative or "", prompt2=_first(read.prompt2, self._prompts.prompt2),
            negative2=read.negative2, raw_prompt=line.text, clip_prompt=read.clip_prompt, width=width, height=height,
            original_width=_first(read.original_width, image.original_width),
            original_height=_first(read.original_height, image.original_height),
            original_width_negative=_first(read.original_width_negative, image.original_width_negative),
            original_height_negative=_first(read.original_height_negative, image.original_height_negative),
            crop_top=_first(read.crop_top, image.crop_top), crop_left=_first(read.crop_left, image.crop_left),
            steps=_first(read.steps, image.steps) or 1, seed=self._seeds.of(read.seeds, place), sampler=image.sampler,
            scale=image.scale if read.scale is None else read.scale, negative_scale=self._negative_scale(read),
            guidance_rescale=image.guidance_rescale, strength=self._strength if read.strength is None else read.strength,
            multipliers=self._multipliers(read), shrink=self._shrink, growth=self._growth, source=source,
            mask=self._masks[place_of_source % len(self._masks)] if self._masks else None,
            guides=self._next_guides(), number=self._number, row=row,
        )  # fmt: skip
        if problems := list(self._problems(drawing)):
            raise OptionError(*(f"{line.where}: {problem}" for problem in problems))
        return drawing

    def _problems(self, drawing: GenerationRequest) -> Iterable[str]:
        """Settings of a picture that don't go together."""
        stages, scale = [drawing], self._fix.highres_fix_scale
        if scale is not None:
            stages.insert(0, drawing.small_stage(scale=scale, steps=1, strength=None))
            if min(stages[0].width, stages[0].height) < SIDE:
                least = SIDE / min(drawing.width, drawing.height)
                yield (
                    f"--highres_fix_scale {scale:g} makes {stages[0].width}x{stages[0].height} of {drawing.width}x{drawing.height}; "
                    f"each side needs {SIDE} pixels: take {least:g} or more"
                )
                return
        if drawing.growth is not None and scale is not None:
            yield "Gradual Latent and --highres_fix_scale: take one of them"
        if drawing.growth is not None and drawing.mask is not None and not self._num_regions:
            yield "Gradual Latent draws at sizes that --mask_path doesn't fit; leave one of them out"
        for stage in stages:
            for way in (stage.shrink, stage.growth):
                if way is not None and (problem := way.problem(stage.width, stage.height)):
                    yield problem

    def _check_regions(self, prompt: str, where: str) -> None:
        parts = len(AND.split(prompt))
        if self._num_regions:
            if parts < self._num_regions:
                raise OptionError(
                    f"{where}: {self._num_regions} networks need as many sub-prompts, divided by AND; this prompt has {parts}"
                )
        elif parts > 1:
            raise OptionError(
                f"{where}: AND divides a prompt for networks that work in regions, which need --network_weights (not merged) and --mask_path; leave it out, or write it small"
            )

    def _size(self, read: PromptLine, source: Path | None) -> tuple[int, int]:
        width, height = _first(read.width, self._image.W), _first(read.height, self._image.H)
        if source is not None and (width is None or height is None):
            return size_of(source, "--image_path")
        return width or DEFAULT_SIDE, height or DEFAULT_SIDE

    def _negative_scale(self, read: PromptLine) -> float | None:
        if read.negative_scale == NO_NEGATIVE_SCALE:
            return None
        return self._image.negative_scale if read.negative_scale is None else read.negative_scale

    def _multipliers(self, read: PromptLine) -> tuple[float, ...] | None:
        """One for each network; the last one goes on."""
        if read.multipliers is None:
            return None
        given = read.multipliers[: self._num_networks]
        return given + given[-1:] * (self._num_networks - len(given))

    def _next_guides(self) -> tuple[Path, ...]:
        if not self._guides:
            return ()
        first = self._number * self._num_guides
        return tuple(self._guides[(first + i) % len(self._guides)] for i in range(self._num_guides))


class _Seeds:
    """The seeds of a run's pictures: contract, training_math.md section 10."""

    def __init__(self, options: PromptOptions, num_lines: int):
        rounds = 1 if options.interactive else options.n_iter
        count = rounds * num_lines * options.images_per_prompt
        self.rng = random.Random(options.seed)
        self._same = options.iter_same_seed
        per_round = options.images_per_prompt if self._same else num_lines * options.images_per_prompt
        wanted = max(rounds * per_round, 0)
        only = options.seed if options.seed is not None and count == 1 else None
        self._drawn = [self.rng.randint(0, _MOST_SEED) if only is None else only for _ in range(wanted)]
        self._per_round, self._round, self._used = per_round, 0, 0

    def of(self, given: Sequence[int] | None, place: int) -> int:
        """The seed of the next picture.

        Args:
            given: the line's own seeds.
            place: of the picture within its line.
        """
        number = self._round * self._per_round + (place if self._same else self._used)
        self._used += 1
        if given:
            return given[min(place, len(given) - 1)]
        while number >= len(self._drawn):  # prompts that enumerate, and interactive ones, have more pictures
            self._drawn.append(self.rng.randint(0, _MOST_SEED))
        return self._drawn[number]

    def next_round(self) -> None:
        self._round, self._used = self._round + 1, 0


def _shrink_of(options: DeepShrinkOptions) -> DeepShrink:
    depth = DeepShrink.depth_1 if options.ds_depth_1 is None else options.ds_depth_1
    return DeepShrink(depth, options.ds_timesteps_1, options.ds_depth_2, options.ds_timesteps_2, options.ds_ratio)


def _growth_of(options: GradualLatentOptions) -> GradualLatent:
    start = options.gradual_latent_timesteps
    return GradualLatent(
        GradualLatent.timesteps if start is None else start, options.gradual_latent_ratio, options.gradual_latent_ratio_step,
        options.gradual_latent_every_n_steps, options.gradual_latent_s_noise, options.gradual_latent_unsharp_params,
    )  # fmt: skip


def _first(one: T | None, other: T | None) -> T | None:
    return other if one is None else one
