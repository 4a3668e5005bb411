"""BatchWriter: decodes the latents of batches and writes the images, in its own thread."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from library.errors import RunError
from library.generation.image_grid import contact_sheet, thumbnail, to_uint8
from library.generation.metadata import texts_of
from library.generation.output import Output
from library.generation.request import GenerationRequest
from library.log import log
from library.models.sdxl import SdxlModels
from library.models.vae import decode_in_tiles, finite_samples, unscale_latents

_THUMBNAIL = 256  # pixels
_BLACK = -1 + 2 / 255  # an image without a brighter pixel is black


class BatchWriter:
    """Writes batches while the next one is generated."""

    def __init__(
        self,
        models: SdxlModels,
        output: Output,
        *,
        vae_batch_size: float | None,
        with_contact_sheet: bool,
        stored_options: Mapping[str, Any],
    ):
        """Make a writer.

        Args:
            models: whose VAE decodes.
            output: names and saves the files.
            vae_batch_size: images to decode at once; below 1: a fraction of the batch; None: all.
            with_contact_sheet: whether `finish` writes a contact sheet.
            stored_options: options of the run that image files store.
        """
        self._models = models
        self._output = output
        self._vae_batch_size = vae_batch_size
        self._with_contact_sheet = with_contact_sheet
        self._stored_options = stored_options
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._thumbnails: dict[int, list[Image.Image | None]] = {}
        self._num_failed = 0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents: [B, 3, H, W] in about -1..1, float32."""
        size = len(latents)
        if self._vae_batch_size is not None:
            size = int(self._vae_batch_size)
            if self._vae_batch_size < 1:
                size = int(self._vae_batch_size * len(latents))
        raw = unscale_latents(latents).split(max(1, size))
        return torch.cat([self._decode_raw(part) for part in raw])

    def _decode_raw(self, raw: Tensor) -> Tensor:
        try:
            return self._models.decode_latents(raw, black=_BLACK)
        except torch.OutOfMemoryError:
            log.warning(
                "out of memory (OOM) in the VAE: it decodes tiles from now on "
                "(--vae_tiling, --vae_batch_size)"
            )
            torch.cuda.empty_cache()
            self._models.change_vae(decode_in_tiles)
            return self._models.decode_latents(raw, black=_BLACK)

    def submit(self, requests: Sequence[GenerationRequest], latents: Tensor) -> None:
        """Decode and write a batch in the thread, after the previous batch is written."""
        self.wait()
        self._pending = self._thread.submit(self.write, requests, latents, stage=2)

    def write(self, requests: Sequence[GenerationRequest], latents: Tensor, *, stage: int) -> None:
        """Decode and write a batch.

        Args:
            requests: of the batch.
            latents: scaled, [B, 4, H/8, W/8].
            stage: of highres fix: 1 for the small images, else 2.
        """
        pixels = self.decode(latents)
        is_finite = finite_samples(pixels).tolist()
        images = to_uint8(pixels)
        for i, request in enumerate(requests):
            if not is_finite[i]:
                self._num_failed += 1
                log.error(
                    "image %d (seed %d) contains NaN or Inf and isn't saved; "
                    "use --bf16, or leave --fp16 out: %s",
                    request.index + 1,
                    request.seed,
                    request.prompt,
                )
                continue
            texts = texts_of(request, self._stored_options)
            image = Image.fromarray(images[i])
            path = self._output.save(image, request, texts, batch_index=i, stage=stage)
            log.info("%s", path)
            if stage == 2 and self._with_contact_sheet:
                row = self._thumbnails.setdefault(request.prompt_index, [])
                row.append(thumbnail(images[i], _THUMBNAIL))

    def wait(self) -> None:
        """Wait until the last batch is written, and raise its error if it failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def finish(self) -> None:
        """Wait for the last batch and write the contact sheet.

        Raises:
            RunError: if images failed.
        """
        self.wait()
        self._thread.shutdown()
        if self._thumbnails:
            rows = [(str(row + 1), images) for row, images in sorted(self._thumbnails.items())]
            log.info("contact sheet: %s", self._output.save_sheet(contact_sheet(rows)))
        if self._num_failed:
            raise RunError(f"{self._num_failed} images could not be generated; see above")
