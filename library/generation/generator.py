"""ImageGenerator: batches of requests, the stages of highres fix, and init images."""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.device import Precision
from library.errors import OptionError
from library.generation.image_grid import to_uint8
from library.generation.init_images import read_image, resized, to_latent_mask, to_tensor
from library.generation.options import GenerationModelOptions, HighresFixOptions
from library.generation.pipeline import InitImage, SdxlPipeline
from library.generation.request import GenerationRequest
from library.generation.writer import BatchWriter
from library.log import progress_bar
from library.models.attention import choose_attention
from library.models.checkpoint.reader import Checkpoint
from library.models.compile import compile_blocks
from library.models.sdxl import SdxlModels
from library.models.vae import decode_in_slices, decode_in_tiles
from library.size import Size


@dataclasses.dataclass(frozen=True)
class ClipVision:
    """Replaces the pooled text embedding by the CLIP embedding of the init image.

    Attributes:
        model: folder or hub id of the image encoder.
        strength: factor of the embedding.
    """

    model: str
    strength: float


class ImageGenerator:
    """Generates the images of requests and writes them."""

    def __init__(
        self,
        pipeline: SdxlPipeline,
        writer: BatchWriter,
        *,
        batch_size: int,
        highres_fix: HighresFixOptions,
        clip_vision: ClipVision | None,
    ):
        """Make a generator.

        Args:
            pipeline: generates the latents of a batch.
            writer: decodes latents and writes images.
            batch_size: largest number of images per batch.
            highres_fix: the two stages, if any.
            clip_vision: None: the pooled text embedding is used.

        Raises:
            OptionError: if --highres_fix_upscaler can't be used.
        """
        self._models = pipeline.models
        # The progress bar of each call counts the steps.
        self._pipeline = dataclasses.replace(pipeline, on_step=lambda images: self._bar.update())
        self._writer = writer
        self._batch_size = batch_size
        self._highres_fix = highres_fix
        self._clip_vision = clip_vision
        self._upscaler = None
        if highres_fix.highres_fix_upscaler is not None:
            self._upscaler = _open_upscaler(highres_fix, self._models)
        self._embeddings: dict[Path | None, Tensor] = {}
        self._bar = progress_bar("generating", 0)

    def generate(self, requests: Sequence[GenerationRequest]) -> None:
        """Generate all requests, in batches that share all settings but prompts, seeds and files.

        Raises:
            OptionError: if an input file can't be used.
        """
        self._embed_init_images(requests)
        batches = list(split_into_batches(requests, self._batch_size, self._batch_key))
        num_steps = sum(self._num_steps(batch[0]) for batch in batches)
        self._bar = progress_bar("generating", num_steps)
        try:
            for batch in batches:
                self._generate_batch(batch)
            self._writer.wait()
        finally:
            self._bar.close()

    def finish(self) -> None:
        """Wait until all images are written.

        Raises:
            RunError: if images failed.
        """
        self._writer.finish()

    def _batch_key(self, request: GenerationRequest) -> tuple[Any, ...]:
        chunks = self._pipeline.chunks(request)
        return (*request.batch_key, chunks, len(self._pipeline.sub_prompts(request)))

    def _num_steps(self, request: GenerationRequest) -> int:
        steps = _steps_to_run(request, has_init_image=request.init_image is not None)
        if self._highres_fix.highres_fix_scale is None:
            return steps
        small = self._first_stage(request)
        first_stage_steps = _steps_to_run(small, has_init_image=small.init_image is not None)
        return first_stage_steps + _steps_to_run(request, has_init_image=True)

    def _first_stage(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request of the small image of highres fix."""
        fix = self._highres_fix
        assert fix.highres_fix_scale is not None
        return request.first_stage(
            scale=fix.highres_fix_scale,
            steps=fix.highres_fix_steps,
            strength=fix.highres_fix_strength,
        )

    def _generate_batch(self, requests: Sequence[GenerationRequest]) -> None:
        fix = self._highres_fix
        if fix.highres_fix_scale is None:
            latents = self._latents(requests, self._init_image(requests), with_control_nets=True)
        else:
            small = [self._first_stage(request) for request in requests]
            first = self._latents(small, self._init_image(small), with_control_nets=True)
            if fix.highres_fix_save_1st:
                self._writer.write(requests, first, stage=1)
            start = self._enlarge(first, Size(requests[0].width, requests[0].height))
            inputs = self._init_image(requests)
            if inputs is not None and inputs.mask is not None:
                start = start._replace(mask=inputs.mask, kept_pixels=inputs.pixels)
            second = [dataclasses.replace(r, seed=r.seed + 1) for r in requests]
            with_control_nets = not fix.highres_fix_disable_control_net
            latents = self._latents(second, start, with_control_nets=with_control_nets)
        self._writer.submit(requests, latents)

    def _latents(
        self,
        requests: Sequence[GenerationRequest],
        init_image: InitImage | None,
        *,
        with_control_nets: bool,
    ) -> Tensor:
        """Generate a batch in one stage and return its scaled latents."""
        adapters = self._pipeline.adapters
        first = requests[0]
        size = Size(first.width, first.height)
        guide_images = []
        if with_control_nets:
            for i in range(adapters.num_control_nets):
                paths = [request.guide_images[i] for request in requests]
                guide_images.append(to_tensor(_read_resized(paths, size, "--guide_image_path")))
        regions = None
        if adapters.is_regional and first.mask is not None:
            regions = torch.from_numpy(_read_resized([first.mask], size, "--mask_path")[0].copy())
        pooled = None
        if self._clip_vision is not None:
            embeddings = [self._embeddings[request.init_image] for request in requests]
            pooled = self._clip_vision.strength * torch.cat(embeddings)
        return self._pipeline.latents(requests, init_image, guide_images, regions, pooled)

    def _init_image(self, requests: Sequence[GenerationRequest]) -> InitImage | None:
        """Read the init images and masks of a batch; None if images start from noise."""
        first = requests[0]
        if first.init_image is None:
            return None
        size = Size(first.width, first.height)
        paths = [request.init_image for request in requests if request.init_image]
        pixels = to_tensor(_read_resized(paths, size, "--image_path"))
        mask = None
        if not self._pipeline.adapters.is_regional and first.mask is not None:
            masks = [request.mask for request in requests if request.mask]
            mask = to_latent_mask(_read_resized(masks, size, "--mask_path"))
        return InitImage(pixels=pixels, mask=mask)

    def _embed_init_images(self, requests: Sequence[GenerationRequest]) -> None:
        """Compute the CLIP embeddings of all init images, so that the encoder is then released."""
        if self._clip_vision is None:
            return
        paths: list[Path] = []
        for request in requests:
            path = request.init_image
            if path is not None and path not in self._embeddings and path not in paths:
                paths.append(path)
        if not paths:
            return
        from library.generation.clip_vision import image_embeddings

        embeddings = image_embeddings(
            self._clip_vision.model,
            (read_image(path, "--image_path") for path in paths),
            width=self._models.checkpoint.unet.pooled_channels,
            device=self._models.device,
            dtype=self._models.precision.compute,
        )
        self._embeddings.update(zip(paths, embeddings, strict=True))

    def _enlarge(self, latents: Tensor, size: Size) -> InitImage:
        """Enlarge the result of highres fix's first stage to the init image of the second."""
        if self._upscaler is not None:
            return self._upscale(self._upscaler, latents, size)
        if self._highres_fix.highres_fix_latents_upscaling:
            latent_size = (size.height // 8, size.width // 8)
            enlarged = torch.nn.functional.interpolate(
                latents.float(), size=latent_size, mode="bilinear"
            )
            return InitImage(latents=enlarged)
        images = to_uint8(self._writer.decode(latents))
        return InitImage(pixels=to_tensor([resized(image, size) for image in images]))

    def _upscale(self, upscaler: Any, latents: Tensor, size: Size) -> InitImage:
        pixels = None if upscaler.support_latents() else self._writer.decode(latents)
        result = upscaler.upscale(
            self._models.vae,
            pixels,
            latents,
            self._models.precision.compute,
            size.width,
            size.height,
            len(latents),
            None,
        )
        if not isinstance(result, Tensor):  # images of Pillow
            return InitImage(pixels=to_tensor([np.asarray(image) for image in result]))
        if result.shape[1] == 4:
            return InitImage(latents=result)
        return InitImage(pixels=result)


def split_into_batches(
    requests: Sequence[GenerationRequest],
    batch_size: int,
    key: Callable[[GenerationRequest], tuple[Any, ...]],
) -> Iterator[list[GenerationRequest]]:
    """Yield batches of consecutive requests.

    Args:
        requests: in the order of the run.
        batch_size: largest number of requests per batch.
        key: requests of one batch have the same key.
    """
    for _, group in itertools.groupby(requests, key):
        members = list(group)
        for first in range(0, len(members), batch_size):
            yield members[first : first + batch_size]


def load_models(checkpoint: Checkpoint, options: GenerationModelOptions) -> SdxlModels:
    """Load the models on the GPU if there is one, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return SdxlModels(
        checkpoint,
        Precision.decide(options.mixed_precision, None, no_half_vae=options.no_half_vae),
        device,
        vae=options.vae,
        tokenizer_folder=options.tokenizer_cache_dir,
        attention=choose_attention(
            mem_eff_attn=False, use_xformers=options.xformers and not options.sdpa
        ),
    )


def prepare_models(models: SdxlModels, options: GenerationModelOptions) -> None:
    """Apply the options of the VAE, and compile the U-Net with its networks."""
    if options.vae_tiling:
        models.change_vae(decode_in_tiles)
    elif options.vae_slices is not None:
        models.change_vae(functools.partial(decode_in_slices, slices=options.vae_slices))
    if options.compile:
        compile_blocks(models.unet, "inductor", models.device, flag="--compile")


def _steps_to_run(request: GenerationRequest, *, has_init_image: bool) -> int:
    return int(request.steps * request.strength) if has_init_image else request.steps


def _read_resized(paths: Sequence[Path], size: Size, flag: str) -> list[np.ndarray]:
    return [resized(read_image(path, flag), size) for path in paths]


def _open_upscaler(options: HighresFixOptions, models: SdxlModels) -> Any:
    name = options.highres_fix_upscaler
    assert name is not None
    try:
        upscaler = importlib.import_module(name).create_upscaler(**options.upscaler_arguments)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise OptionError(f"--highres_fix_upscaler {name}: can't be used: {error}") from None
    upscaler.to(models.device, models.precision.compute)
    return upscaler
