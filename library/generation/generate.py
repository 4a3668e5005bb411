"""Generate: from options to picture files. What can be wrong is told before torch is imported."""

import functools
import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Mistake, OptionError
from library.files import make_writable_folder
from library.generation.init_images import read_image
from library.generation.options import (
    GenerationModelOptions,
    HighresFixOptions,
    InitImageOptions,
    OutputOptions,
    PromptOptions,
)
from library.generation.request import GenerationRequest
from library.generation.requests import PromptSource, RequestBuilder, read_lines
from library.log import log
from library.models.checkpoint.reader import Checkpoint, check_vae, open_checkpoint
from library.options import Options

if TYPE_CHECKING:
    from library.generation.adapters import LoadAdapters
    from library.generation.generator import ImageGenerator


def generate(
    options: Options, open_changes: "LoadAdapters", *, num_networks: int, num_beside: int, num_guides: int
) -> None:
    """Draw what the options ask for. Raises OptionError for the user's mistakes, RunError for pictures that failed.

    Args:
        num_networks, num_guides: networks with a multiplier, and control nets, that `open_changes` will put on the model.
        num_beside: networks that aren't merged into it, for which a mask has regions.
    """
    sources = options[InitImageOptions]
    if sources.mask_path is not None and sources.image_path is None and not num_beside:
        raise OptionError(
            "--mask_path needs --image_path, of which it says what is repainted, or --network_weights that aren't merged, of which it says where they work"
        )
    if sources.mask_path is not None and num_beside and "network_pre_calc" in options.changed():
        raise OptionError(
            "--network_pre_calc can't go with --mask_path, which says where networks work: weights have no regions; "
            "--network_merge leaves the mask to --image_path"
        )
    lines = read_lines(options)
    planner = RequestBuilder(
        options, len(lines), num_guides=num_guides, num_networks=num_networks, num_regions=num_beside if sources.mask_path else 0
    )  # fmt: skip
    rounds = 1 if options[PromptOptions].interactive else options[PromptOptions].n_iter
    drawings = [drawing for _ in range(rounds) for drawing in planner.round_of(lines)]
    checkpoint = _open(options[GenerationModelOptions])
    _look_at_files(drawings)
    is_painted_over = sources.mask_path is not None and not num_beside
    fits = functools.partial(_check_fits, checkpoint)
    fits(drawings)
    log.info(checkpoint.describe())
    if checkpoint.unet.is_inpainting and not is_painted_over:
        log.info(
            "no mask says what this inpainting model is to paint (--image_path and --mask_path): it paints whole pictures"
        )
    if options[OutputOptions].dry_run:
        _tell(drawings, options)
        return
    try:
        make_writable_folder(options[OutputOptions].outdir)
    except OSError as error:
        raise OptionError(f"--outdir {options[OutputOptions].outdir}: can't be written: {error.strerror}") from None
    from library.generation.generator import ImageGenerator

    studio = ImageGenerator(options, checkpoint, open_changes)
    if options[PromptOptions].interactive:
        for line in _asked_for():
            _draw_line(studio, planner, line, fits)
    else:
        studio.draw(drawings)
    studio.finish()


def check_generation(options: Options) -> Iterable[Mistake]:
    """Contradictions between the groups of options."""
    sources, fix = options[InitImageOptions], options[HighresFixOptions]
    if options.given("control_net_lllite_models") and sources.guide_image_path is None:
        yield Mistake("--control_net_lllite_models need --guide_image_path: what they follow", ("guide_image_path",))
    if sources.guide_image_path is not None and not options.given("control_net_lllite_models"):
        yield Mistake("--guide_image_path needs --control_net_lllite_models, which follow it", ("guide_image_path",))
    if fix.highres_fix_scale is not None and options.given("gradual_latent_timesteps"):
        yield Mistake("--highres_fix_scale and --gradual_latent_timesteps: take one of them", ("highres_fix_scale",))
    if options[PromptOptions].from_png is not None and options.where("from_png") != "--from_png":
        yield Mistake("--from_png belongs on the command line, not in --config_file", ("from_png",))


def _open(options: GenerationModelOptions) -> Checkpoint:
    """The model's header. Raises OptionError."""
    name = options.ckpt
    assert name is not None
    if glob.has_magic(name) and not Path(name).exists():
        found = sorted(glob.glob(name))
        if len(found) != 1:
            told = "no file fits" if not found else f"{len(found)} files fit ({', '.join(found[:3])}, …)"
            raise OptionError(f"--ckpt {name}: {told}; exactly one must")
        name = found[0]
    checkpoint = open_checkpoint(name, prefer_fp16=options.fp16)
    if options.vae is not None:
        check_vae(options.vae)
    return checkpoint


def _check_fits(checkpoint: Checkpoint, drawings: Sequence[GenerationRequest]) -> None:
    """Raises OptionError for drawings that the model can't draw."""
    if checkpoint.unet.is_inpainting and any(drawing.growth is not None for drawing in drawings):
        raise OptionError(
            f"--ckpt {checkpoint.path}: Gradual Latent draws at sizes that what an inpainting model sees doesn't fit; "
            "leave out --gradual_latent_timesteps and --gl..., or take another model"
        )


def _look_at_files(drawings: Sequence[GenerationRequest]) -> None:
    """Read every picture that is drawn from, so that a bad one is told before anything is drawn."""
    named: dict[tuple[Path, str], None] = {}
    for drawing in drawings:
        of_drawing = [(drawing.source, "--image_path"), (drawing.mask, "--mask_path")]
        of_drawing += [(guide, "--guide_image_path") for guide in drawing.guides]
        named |= {(path, flag): None for path, flag in of_drawing if path is not None}
    mistakes = []
    for path, flag in named:
        try:
            read_image(path, flag)
        except OptionError as error:
            mistakes += error.mistakes
    if mistakes:
        raise OptionError(*mistakes)


def _tell(drawings: Sequence[GenerationRequest], options: Options) -> None:
    """--dry_run: what would be drawn."""
    for drawing in drawings:
        log.info(
            "%d: %dx%d, %d steps of %s, scale %g, seed %d: %s", drawing.number + 1, drawing.width, drawing.height, drawing.steps,
            drawing.sampler, drawing.scale, drawing.seed, drawing.prompt,
        )  # fmt: skip
    log.info("%d pictures would go to %s (--dry_run)", len(drawings), options[OutputOptions].outdir)


def _asked_for() -> Iterator[PromptSource]:
    """Lines from the keyboard, until it ends."""
    number = 0
    while True:
        if sys.stdin.isatty():
            print("prompt (an empty line ends): ", end="", flush=True)
        text = sys.stdin.readline()
        if not text.strip():
            if not text or sys.stdin.isatty():
                return
            continue
        number += 1
        yield PromptSource(text.strip(), f"prompt {number}")


def _draw_line(
    studio: "ImageGenerator",
    planner: RequestBuilder,
    line: PromptSource,
    fits: Callable[[Sequence[GenerationRequest]], None],
) -> None:
    """One line of --interactive: a mistake in it is told, and the next one is asked for. Args: fits: raises OptionError."""
    try:
        with planner.unless_refused():
            drawings = planner.drawings_of(line)
            fits(drawings)
            _look_at_files(drawings)
            studio.draw(drawings)
    except OptionError as error:
        for mistake in error.mistakes:
            print(f"error: {mistake.text}", file=sys.stderr)
