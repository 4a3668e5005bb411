"""Studio: a model made ready, drawing batch after batch, and files of what came out of it.

While one batch is drawn, the one before is decoded and written by a thread of its own.
"""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from library.device import Precision
from library.errors import OptionError, RunError
from library.generation.adapters import LoadAdapters
from library.generation.image_grid import as_bytes, contact_sheet
from library.generation.init_images import as_images, as_mask, as_tensor, read_image, resized
from library.generation.metadata import texts_of
from library.generation.options import (
    GenerationModelOptions,
    HighresFixOptions,
    ImageOptions,
    InitImageOptions,
    OutputOptions,
    PromptOptions,
)
from library.generation.output import Output
from library.generation.pipeline import InitImage, SdxlPipeline
from library.generation.prompt_encoder import PromptEncoder
from library.generation.request import GenerationRequest
from library.log import log, progress_bar
from library.models.attention import choose_attention
from library.models.checkpoint.reader import Checkpoint
from library.models.compile import compile_blocks
from library.models.sdxl import SdxlModels
from library.models.vae import decode_in_slices, decode_in_tiles, finite_samples, unscale_latents
from library.options import Options

_THUMBNAIL = 256  # pixels
_WORST_BLACK = -1 + 2 / 255  # a picture that is nowhere brighter is black


class ImageGenerator:
    """Draws with one model, and writes."""

    def __init__(self, options: Options, checkpoint: Checkpoint, open_changes: LoadAdapters):
        """Load the model and put the networks on it."""
        self._options = options
        chosen = options[GenerationModelOptions]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = Precision.decide(chosen.mixed_precision, None, no_half_vae=chosen.no_half_vae)
        attention = choose_attention(mem_eff_attn=False, use_xformers=chosen.xformers and not chosen.sdpa)
        self._models = SdxlModels(
            checkpoint, precision, device, vae=chosen.vae, tokenizer_folder=chosen.tokenizer_cache_dir, attention=attention
        )  # fmt: skip
        self._changes = open_changes(self._models)
        self._painter = SdxlPipeline(
            self._models,
            PromptEncoder(self._models, options[PromptOptions].max_embeddings_multiples),
            self._changes,
            v_prediction=chosen.v_parameterization or bool(checkpoint.v_prediction),
            zero_terminal_snr=chosen.zero_terminal_snr or bool(checkpoint.zero_terminal_snr),
            on_step=lambda images: self._bar.update(),
        )
        if chosen.vae_tiling:
            self._models.change_vae(decode_in_tiles)
        elif chosen.vae_slices is not None:
            self._models.change_vae(functools.partial(decode_in_slices, slices=chosen.vae_slices))
        if chosen.compile:
            compile_blocks(self._models.unet, "inductor", device, flag="--compile")
        fix = options[HighresFixOptions]
        self._output = Output(options[OutputOptions], with_stages=fix.highres_fix_scale is not None)
        self._upscaler = None if fix.highres_fix_upscaler is None else _open_upscaler(fix, self._models)
        self._seen: dict[Path | None, Tensor] = {}
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._rows: dict[int, tuple[str, list[Image | None]]] = {}
        self._failed = 0
        self._bar = progress_bar("drawing", 0)

    def draw(self, drawings: Sequence[GenerationRequest]) -> None:
        """Draw all of them, in batches of those that have everything but prompts, seeds and files in common."""
        self._see_sources(drawings)
        batches = list(self._batches(drawings))
        self._bar = progress_bar("drawing", sum(self._steps_of(batch[0]) for batch in batches))
        try:
            for batch in batches:
                self._draw_batch(batch)
            self._wait()
        finally:
            self._bar.close()

    def finish(self) -> None:
        """Wait for what is still written, and write the contact sheet. Raises RunError if pictures failed."""
        self._wait()
        self._writer.shutdown()
        if self._options[OutputOptions].contact_sheet and self._rows:
            rows = [(str(row + 1), images) for row, (_, images) in sorted(self._rows.items())]
            log.info("contact sheet: %s", self._output.save_sheet(contact_sheet(rows)))
        if self._failed:
            raise RunError(f"{self._failed} pictures could not be drawn; see above")

    def _batches(self, drawings: Sequence[GenerationRequest]) -> Iterator[list[GenerationRequest]]:
        size = self._options[ImageOptions].batch_size
        painter = self._painter
        for _, group in itertools.groupby(
            drawings, key=lambda d: (d.settings, painter.chunks(d), len(painter.sub_prompts(d)))
        ):
            same = list(group)
            for first in range(0, len(same), size):
                yield same[first : first + size]

    def _steps_of(self, drawing: GenerationRequest) -> int:
        """About how many steps a batch takes, for the progress bar; pndm takes more."""
        fix = self._options[HighresFixOptions]
        if fix.highres_fix_scale is None:
            return int(drawing.steps * drawing.strength) if drawing.source else drawing.steps
        small = drawing.small_stage(scale=1, steps=fix.highres_fix_steps, strength=fix.highres_fix_strength)
        first = int(small.steps * small.strength) if drawing.source else small.steps
        return first + int(drawing.steps * drawing.strength)

    # ------------------------------------------------------------------------------------------------------ one batch

    def _draw_batch(self, drawings: Sequence[GenerationRequest]) -> None:
        fix = self._options[HighresFixOptions]
        if fix.highres_fix_scale is None:
            latents = self._latents(drawings, self._start(drawings), with_guides=True)
        else:
            scale, steps, strength = fix.highres_fix_scale, fix.highres_fix_steps, fix.highres_fix_strength
            small = [drawing.small_stage(scale=scale, steps=steps, strength=strength) for drawing in drawings]
            first = self._latents(small, self._start(small), with_guides=True)
            if fix.highres_fix_save_1st:
                self._write(drawings, first, stage=1)
            start = self._enlarged(first, drawings[0].width, drawings[0].height)
            source = self._start(drawings)
            if source is not None and source.mask is not None:
                start = start._replace(mask=source.mask, stays=source.pixels)
            again = [dataclasses.replace(d, seed=d.seed + 1) for d in drawings]
            latents = self._latents(again, start, with_guides=not fix.highres_fix_disable_control_net)
        self._wait()
        self._writing = self._writer.submit(self._write, drawings, latents, 2)

    def _latents(self, drawings: Sequence[GenerationRequest], start: InitImage | None, *, with_guides: bool) -> Tensor:
        first = drawings[0]
        count = self._changes.num_guides if with_guides else 0
        guides = [self._pixels([d.guides[i] for d in drawings], first, "--guide_image_path") for i in range(count)]
        regions = None
        if self._changes.is_regional and first.mask is not None:
            region = self._resized([first.mask], first, "--mask_path")[0]
            regions = as_bytes(as_tensor([region]))[0]
        return self._painter.latents(
            drawings, start, guides, None if regions is None else torch.from_numpy(regions), self._pooled(drawings)
        )

    def _start(self, drawings: Sequence[GenerationRequest]) -> InitImage | None:
        """What the pictures are drawn from; None: noise alone."""
        first = drawings[0]
        if first.source is None:
            return None
        mask = None
        if not self._changes.is_regional and first.mask is not None:
            mask = as_mask(self._resized([d.mask for d in drawings if d.mask], first, "--mask_path"))
        return InitImage(
            pixels=self._pixels([d.source for d in drawings if d.source], first, "--image_path"), mask=mask
        )

    def _pixels(self, paths: Sequence[Any], first: GenerationRequest, flag: str) -> Tensor:
        return as_tensor(self._resized(paths, first, flag))

    def _resized(self, paths: Sequence[Any], first: GenerationRequest, flag: str) -> list[Image]:
        return [resized(read_image(path, flag), first.width, first.height) for path in paths]

    def _see_sources(self, drawings: Sequence[GenerationRequest]) -> None:
        """--clip_vision_strength: what CLIP sees in each source, before the first is drawn; its encoder's memory is free then."""
        chosen = self._options[InitImageOptions]
        new = [
            path for path in dict.fromkeys(d.source for d in drawings) if path is not None and path not in self._seen
        ]
        if chosen.clip_vision_strength is None or not new:
            return
        from library.generation.clip_vision import image_vectors

        vectors = image_vectors(
            chosen.clip_vision_model, (read_image(path, "--image_path") for path in new),
            width=self._models.checkpoint.unet.pooled_channels, device=self._models.device, dtype=self._models.precision.compute,
        )  # fmt: skip
        self._seen.update(zip(new, vectors, strict=True))

    def _pooled(self, drawings: Sequence[GenerationRequest]) -> Tensor | None:
        """What CLIP sees in the sources, in place of the pooled text."""
        strength = self._options[InitImageOptions].clip_vision_strength
        return None if strength is None else strength * torch.cat([self._seen[d.source] for d in drawings])

    def _enlarged(self, latents: Tensor, width: int, height: int) -> InitImage:
        """What the second stage of highres fix is drawn from."""
        fix = self._options[HighresFixOptions]
        if self._upscaler is not None:
            pixels = None if self._upscaler.support_latents() else self._decode(latents)
            made = self._upscaler.upscale(
                self._models.vae, pixels, latents, self._models.precision.compute, width, height, len(latents), None
            )
            is_latents = isinstance(made, Tensor) and made.shape[1] == 4
            return (
                InitImage(latents=made)
                if is_latents
                else InitImage(pixels=made if isinstance(made, Tensor) else as_tensor(made))
            )
        if fix.highres_fix_latents_upscaling:
            size = (height // 8, width // 8)
            return InitImage(latents=torch.nn.functional.interpolate(latents.float(), size=size, mode="bilinear"))
        images = as_images(as_bytes(self._decode(latents)))
        return InitImage(pixels=as_tensor([resized(image, width, height) for image in images]))

    # ---------------------------------------------------------------------------------------------------- what comes out

    def _decode(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] in about -1..1, float32."""
        chosen = self._options[GenerationModelOptions]
        wanted = len(latents) if chosen.vae_batch_size is None else chosen.vae_batch_size
        size = max(1, int(wanted if wanted >= 1 else wanted * len(latents)))
        return torch.cat([self._decode_some(part) for part in unscale_latents(latents).split(size)])

    @torch.no_grad()
    def _decode_some(self, raw: Tensor) -> Tensor:
        try:
            return self._models.decode_latents(raw, black=_WORST_BLACK)
        except torch.OutOfMemoryError:
            log.warning("the VAE finds no memory for whole pictures and decodes tiles (--vae_tiling, --vae_batch_size)")
            torch.cuda.empty_cache()
            self._models.change_vae(decode_in_tiles)
            return self._models.decode_latents(raw, black=_WORST_BLACK)

    def _write(self, drawings: Sequence[GenerationRequest], latents: Tensor, stage: int) -> None:
        """Decode and write a batch."""
        pixels = self._decode(latents)
        whole = finite_samples(pixels).tolist()
        for place, (drawing, image) in enumerate(zip(drawings, as_images(as_bytes(pixels)), strict=True)):
            if not whole[place]:
                self._failed += 1
                log.error(
                    "picture %d (seed %d) isn't finite and isn't saved; try --bf16 or no --fp16: %s",
                    drawing.number + 1, drawing.seed, drawing.prompt,
                )  # fmt: skip
                continue
            texts = texts_of(drawing, self._options)
            path = self._output.save(image, drawing, texts, place=place, stage=stage)
            log.info("%s", path)
            if stage == 2 and self._options[OutputOptions].contact_sheet:
                small = image.copy()
                small.thumbnail((_THUMBNAIL, _THUMBNAIL))
                self._rows.setdefault(drawing.row, (drawing.prompt, []))[1].append(small)

    def _wait(self) -> None:
        """For the batch that is being written. Raises what went wrong with it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _open_upscaler(options: HighresFixOptions, models: SdxlModels) -> Any:
    name = options.highres_fix_upscaler
    assert name is not None
    try:
        upscaler = importlib.import_module(name).create_upscaler(**options.upscaler_arguments)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise OptionError(f"--highres_fix_upscaler {name}: can't be used: {error}") from None
    upscaler.to(models.device, models.precision.compute)
    return upscaler
