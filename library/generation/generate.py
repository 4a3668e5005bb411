"""Generation from options to image files. Mistakes are reported before torch is imported."""

import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Mistake, OptionError
from library.files import make_writable_folder
from library.generation.deep_shrink import DeepShrinkOptions
from library.generation.gradual_latent import GradualLatentOptions
from library.generation.init_images import read_image
from library.generation.options import (
    GenerationModelOptions,
    HighresFixOptions,
    ImageOptions,
    InitImageOptions,
    OutputOptions,
    PromptOptions,
)
from library.generation.prompts.sources import PromptSource, read_prompts
from library.generation.request import GenerationRequest
from library.generation.requests import AdapterCounts, RequestBuilder
from library.log import log
from library.models.checkpoint.reader import Checkpoint, check_vae, open_checkpoint
from library.options import Options

if TYPE_CHECKING:
    from library.generation.adapters import LoadAdapters
    from library.generation.generator import ImageGenerator


def generate(
    options: Options,
    load_adapters: "LoadAdapters",
    *,
    num_networks: int,
    num_unmerged: int,
    num_control_nets: int,
) -> None:
    """Generate the images that the options ask for.

    Args:
        options: of the script.
        load_adapters: loads networks, control nets and embeddings onto the model.
        num_networks: networks that have a multiplier.
        num_unmerged: networks that aren't merged into the model. With a mask, each of them works in
            its region.
        num_control_nets: control nets.

    Raises:
        OptionError: for mistakes of the user.
        RunError: if images could not be generated.
    """
    init_images, prompt_options = options[InitImageOptions], options[PromptOptions]
    has_regions = init_images.mask_path is not None and num_unmerged > 0
    _check_mask(init_images, num_unmerged, has_precalc="network_pre_calc" in options.changed())
    prompts = read_prompts(prompt_options, init_images.image_path)
    counts = AdapterCounts(num_networks, num_unmerged if has_regions else 0, num_control_nets)
    builder = RequestBuilder(
        prompts=prompt_options,
        image=options[ImageOptions],
        init_images=init_images,
        highres_fix=options[HighresFixOptions],
        deep_shrink=options[DeepShrinkOptions],
        gradual_latent=options[GradualLatentOptions],
        num_prompts=len(prompts),
        counts=counts,
    )
    requests = []
    for _ in range(1 if prompt_options.interactive else prompt_options.n_iter):
        requests += builder.build_all(prompts)
    checkpoint = _open_checkpoint(options[GenerationModelOptions])

    def check(requests: Sequence[GenerationRequest]) -> None:
        _check_input_files(requests)
        _check_model_fits(checkpoint, requests)

    check(requests)
    log.info(checkpoint.describe())
    if checkpoint.unet.is_inpainting and (init_images.mask_path is None or has_regions):
        log.info(
            "this is an inpainting model, but there is no mask (--image_path and --mask_path): "
            "it generates complete images"
        )
    output = options[OutputOptions]
    if output.dry_run:
        _log_requests(requests, output.outdir)
        return
    _make_folder(output.outdir)
    generator = _build_generator(options, checkpoint, load_adapters)
    if prompt_options.interactive:
        for prompt in _ask_for_prompts():
            _generate_prompt(generator, builder, prompt, check)
    else:
        generator.generate(requests)
    generator.finish()


def check_generation(options: Options) -> Iterable[Mistake]:
    """Yield the contradictions between option groups."""
    guide_images = options[InitImageOptions].guide_image_path
    has_control_nets = options.given("control_net_lllite_models")
    if has_control_nets and guide_images is None:
        yield Mistake(
            "--control_net_lllite_models need --guide_image_path: the images that they follow",
            ("guide_image_path",),
        )
    if guide_images is not None and not has_control_nets:
        yield Mistake(
            "--guide_image_path needs --control_net_lllite_models, which follow the images",
            ("guide_image_path",),
        )
    has_highres_fix = options[HighresFixOptions].highres_fix_scale is not None
    if has_highres_fix and options.given("gradual_latent_timesteps"):
        yield Mistake(
            "--highres_fix_scale and --gradual_latent_timesteps can't be combined; use one of them",
            ("highres_fix_scale",),
        )
    if options[PromptOptions].from_png is not None and options.where("from_png") != "--from_png":
        yield Mistake("--from_png belongs on the command line, not in --config_file", ("from_png",))


def _build_generator(
    options: Options, checkpoint: Checkpoint, load_adapters: "LoadAdapters"
) -> "ImageGenerator":
    """Load the model with its networks, and make the generator of a run."""
    from library.generation.generator import (
        ClipVision,
        ImageGenerator,
        load_models,
        prepare_models,
    )
    from library.generation.output import Output
    from library.generation.pipeline import SdxlPipeline
    from library.generation.prompts.encoder import PromptEncoder
    from library.generation.writer import BatchWriter

    model_options, highres_fix = options[GenerationModelOptions], options[HighresFixOptions]
    init_images, output_options = options[InitImageOptions], options[OutputOptions]
    models = load_models(checkpoint, model_options)
    adapters = load_adapters(models)
    prepare_models(models, model_options)
    pipeline = SdxlPipeline(
        models,
        PromptEncoder(models, options[PromptOptions].max_embeddings_multiples),
        adapters,
        v_prediction=model_options.v_parameterization or bool(checkpoint.v_prediction),
        zero_terminal_snr=model_options.zero_terminal_snr or bool(checkpoint.zero_terminal_snr),
    )
    writer = BatchWriter(
        models,
        Output(output_options, with_stages=highres_fix.highres_fix_scale is not None),
        vae_batch_size=model_options.vae_batch_size,
        with_contact_sheet=output_options.contact_sheet,
        stored_options=options.changed(lambda spec: spec.stored_in_image),
    )
    clip_vision = None
    if init_images.clip_vision_strength is not None:
        clip_vision = ClipVision(init_images.clip_vision_model, init_images.clip_vision_strength)
    return ImageGenerator(
        pipeline,
        writer,
        batch_size=options[ImageOptions].batch_size,
        highres_fix=highres_fix,
        clip_vision=clip_vision,
    )


def _check_mask(init_images: InitImageOptions, num_unmerged: int, *, has_precalc: bool) -> None:
    """Check that --mask_path has a use. Raises OptionError."""
    if init_images.mask_path is None:
        return
    if init_images.image_path is None and not num_unmerged:
        raise OptionError(
            "--mask_path needs --image_path (inpainting), or --network_weights that aren't merged "
            "(the region of each network)"
        )
    if num_unmerged and has_precalc:
        raise OptionError(
            "--network_pre_calc can't be combined with --mask_path, which assigns regions to "
            "networks: weights have no regions. Use --network_merge for inpainting"
        )


def _open_checkpoint(options: GenerationModelOptions) -> Checkpoint:
    """Read the model's header. Raises OptionError."""
    name = options.ckpt
    assert name is not None
    if glob.has_magic(name) and not Path(name).exists():
        matches = sorted(glob.glob(name))
        if not matches:
            raise OptionError(f"--ckpt {name}: no file matches; exactly one must")
        if len(matches) > 1:
            raise OptionError(
                f"--ckpt {name}: {len(matches)} files match ({', '.join(matches[:3])}, …); "
                "exactly one must"
            )
        name = matches[0]
    checkpoint = open_checkpoint(name, prefer_fp16=options.fp16)
    if options.vae is not None:
        check_vae(options.vae)
    return checkpoint


def _check_model_fits(checkpoint: Checkpoint, requests: Sequence[GenerationRequest]) -> None:
    """Check that the model can generate these images. Raises OptionError."""
    has_growing = any(request.gradual_latent is not None for request in requests)
    if checkpoint.unet.is_inpainting and has_growing:
        raise OptionError(
            f"--ckpt {checkpoint.path}: an inpainting model can't be combined with Gradual Latent, "
            "which changes the size of latents; leave out --gradual_latent_timesteps and --gl..., "
            "or use another model"
        )


def _check_input_files(requests: Sequence[GenerationRequest]) -> None:
    """Read every input image once, so that a bad one is reported before generation starts."""
    files: dict[tuple[Path, str], None] = {}
    for request in requests:
        if request.init_image is not None:
            files[request.init_image, "--image_path"] = None
        if request.mask is not None:
            files[request.mask, "--mask_path"] = None
        for guide_image in request.guide_images:
            files[guide_image, "--guide_image_path"] = None
    mistakes = []
    for path, flag in files:
        try:
            read_image(path, flag)
        except OptionError as error:
            mistakes += error.mistakes
    if mistakes:
        raise OptionError(*mistakes)


def _make_folder(outdir: Path) -> None:
    try:
        make_writable_folder(outdir)
    except OSError as error:
        raise OptionError(f"--outdir {outdir}: can't be written: {error.strerror}") from None


def _log_requests(requests: Sequence[GenerationRequest], outdir: Path) -> None:
    """Log what would be generated (--dry_run)."""
    for request in requests:
        log.info(
            "%d: %dx%d, %d steps of %s, scale %g, seed %d: %s",
            request.index + 1,
            request.width,
            request.height,
            request.steps,
            request.sampler,
            request.scale,
            request.seed,
            request.prompt,
        )
    log.info("%d images would be written to %s (--dry_run)", len(requests), outdir)


def _ask_for_prompts() -> Iterator[PromptSource]:
    """Yield prompts from the keyboard until the end of input."""
    count = 0
    while True:
        if sys.stdin.isatty():
            print("prompt (an empty line ends): ", end="", flush=True)
        text = sys.stdin.readline()
        if not text.strip():
            if not text or sys.stdin.isatty():
                return
            continue
        count += 1
        yield PromptSource(text.strip(), f"prompt {count}")


def _generate_prompt(
    generator: "ImageGenerator",
    builder: RequestBuilder,
    prompt: PromptSource,
    check: Callable[[Sequence[GenerationRequest]], None],
) -> None:
    """Generate one prompt of --interactive. Mistakes in it are printed.

    Args:
        generator: of the run.
        builder: of the run.
        prompt: the prompt.
        check: raises OptionError for requests that can't be generated.
    """
    try:
        with builder.restored_on_error():
            requests = builder.build(prompt)
            check(requests)
            generator.generate(requests)
    except OptionError as error:
        for mistake in error.mistakes:
            print(f"error: {mistake.text}", file=sys.stderr)
