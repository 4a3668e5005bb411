"""Preview: sample pictures during training, and one sheet of all of them over time. A failure is told and never ends the run."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library import images
from library.errors import first_line
from library.files import write_atomically
from library.generation.image_grid import contact_sheet, thumbnail
from library.generation.sample_prompts import SamplePrompt
from library.generation.single_image import generate_image
from library.log import log
from library.models.control import ControlInputs
from library.models.inpainting import inpainting_channels
from library.models.sdxl import SdxlModels
from library.models.text_encoders import TextConditioning
from library.models.unet import UNet
from library.models.vae import PIXELS_PER_LATENT, decode_in_tiles
from library.rng import seed_of
from library.size import Size

_THUMBNAIL = 256  # pixels
_MOST_ROWS = 128  # of the sheet; beyond, every second older one is left out

Texts = Mapping[str, TextConditioning]


@dataclass(frozen=True)
class Preview:
    """The samples of a run. Names: contract, formats.md section 6.

    Attributes:
        prompts: with their sizes; none, and nothing is ever drawn.
        texts: conditioning by prompt, where captions were encoded before training; None: the encoders are asked each time.
        keeps_vae: training needs it too, so it stays on the device.
        steered_by: how the prompts' conditions steer the U-Net: of the task.
        every_steps, every_epochs: when; None: never. Epochs win.
    """

    prompts: Sequence[SamplePrompt]
    models: SdxlModels
    unet: UNet
    texts: Texts | None
    num_tokens: int
    folder: Path
    name: str | None
    sampler: str
    v_prediction: bool
    zero_terminal_snr: bool
    seed: int
    every_steps: int | None
    every_epochs: int | None
    at_first: bool
    keeps_vae: bool
    control_inputs: Callable[[Tensor], ControlInputs | None]
    _rows: list[tuple[str, Sequence[Image.Image | None]]] = field(default_factory=list)

    def is_due(self, *, step: int = 0, epoch: int = 0) -> bool:
        """Whether it is time after this optimizer step, or after this epoch (both count from 1); before the first if 0."""
        if not self.prompts:
            return False
        if step:
            return bool(self.every_steps and not self.every_epochs and step % self.every_steps == 0)
        return epoch % self.every_epochs == 0 if epoch and self.every_epochs else not epoch and self.at_first

    def draw(
        self, label: str, share: tuple[int, int], gather: Callable[[list[Any]], list[Any]], *, saves: bool = True
    ) -> list[tuple[str, np.ndarray]]:
        """Draw all prompts and save them. Returns (prompt, picture) on the main process.

        Args:
            label: e000001 or 000100: epoch or step.
            share: (rank, processes): each process draws some, and the first one saves all.
            saves: whether this process may; False: another one draws the same.
            gather: the lists of all processes as one.
        """
        rank, processes = share
        drawn = []
        for number in range(rank, len(self.prompts), processes):
            try:
                drawn.append((number, self._draw_one(self.prompts[number], number)))
            except Exception as error:  # whatever it is, the run is worth more than its samples
                log.warning(
                    "sample %d of %s is left out: %s: %s", number, label, type(error).__name__, first_line(error)
                )
        if not self.keeps_vae:
            self.models.release("vae")
        images = dict(gather(drawn) if processes > 1 else drawn)
        if rank or not saves:
            return []
        try:
            self._save(label, images)
        except Exception as error:
            log.warning("the samples of %s are not saved: %s", label, first_line(error))
        return [(self.prompts[number].prompt, image) for number, image in sorted(images.items())]

    def small(self) -> list[tuple[str, str, bytes]]:
        """(label, prompt, JPEG) of all samples so far, small."""
        found = []
        for label, row in self._rows:
            for prompt, image in zip(self.prompts, row, strict=True):
                if image is not None:
                    content = BytesIO()
                    image.save(content, format="JPEG", quality=85)
                    found.append((label, prompt.prompt, content.getvalue()))
        return found

    def recall(self) -> None:
        """Take the pictures of before into the sheet, when a run is resumed."""
        start = f"{self.name}_" if self.name else ""
        found: dict[str, list[Image.Image | None]] = {}
        pattern = re.compile(re.escape(start) + r"(e?\d{6})_(\d\d)_\d{14}(_-?\d+)?\.png")
        for path in sorted(self.folder.glob("*.png"), key=lambda path: path.stat().st_mtime):
            match = pattern.fullmatch(path.name)
            if match and int(match[2]) < len(self.prompts):
                row = found.setdefault(match[1], [None] * len(self.prompts))
                with Image.open(path) as image:
                    row[int(match[2])] = thumbnail(np.asarray(image.convert("RGB")), _THUMBNAIL)
        self._rows[:] = list(found.items())[-_MOST_ROWS:]

    def _draw_one(self, prompt: SamplePrompt, number: int) -> np.ndarray:
        texts = self.texts or encode_prompts(self.models, [prompt], self.num_tokens)
        device, dtype = self.models.device, self.models.precision.compute
        wanted, unwanted = (
            TextConditioning(*(part.to(device, dtype) for part in texts[text]))
            for text in (prompt.prompt, prompt.negative_prompt)
        )
        assert prompt.width and prompt.height
        return generate_image(
            self.unet, self._decode, wanted, unwanted, width=prompt.width, height=prompt.height, steps=prompt.sample_steps, scale=prompt.scale,
            seed=seed_of(self.seed, "sample", number) if prompt.seed is None else prompt.seed, sampler=prompt.sample_sampler or self.sampler,
            v_prediction=self.v_prediction, zero_terminal_snr=self.zero_terminal_snr,
            inpaint_channels=self._all_hidden(prompt.width, prompt.height) if self.unet.config.is_inpainting else None,
            control=None if prompt.controlnet_image is None else self._steered(prompt.controlnet_image, Size(prompt.width, prompt.height)),
        )  # fmt: skip

    @torch.no_grad()
    def _steered(self, file: Path, size: Size) -> ControlInputs | None:
        """How a condition steers the U-Net, stretched to the picture's size."""
        pixels = images.normalized(images.resize(images.load(file), size, None))
        return self.control_inputs(torch.from_numpy(pixels)[None].to(self.models.device))

    @torch.no_grad()
    def _all_hidden(self, width: int, height: int) -> Tensor:
        """What an inpainting model sees beside the latents where the whole picture is to be painted: [1, 5, H/8, W/8]."""
        noise = torch.zeros(1, 4, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        grey, everything = torch.zeros(1, 3, height, width), torch.ones(1, height, width)
        channels = inpainting_channels(grey, everything, lambda image: self.models.encode_images(image, noise))
        return channels.to(self.models.device, self.models.precision.compute)

    @torch.no_grad()
    def _decode(self, raw: Tensor) -> Tensor:
        """Pixels; in tiles where the whole picture finds no memory beside the training."""
        try:
            return self.models.decode_latents(raw)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            decode_in_tiles(self.models.vae)
            return self.models.decode_latents(raw)

    def _save(self, label: str, images: Mapping[int, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        start = f"{self.name}_" if self.name else ""
        now = time.strftime("%Y%m%d%H%M%S")
        for number, image in sorted(images.items()):
            seed = self.prompts[number].seed
            end = "" if seed is None else f"_{seed}"
            _write_png(self.folder / f"{start}{label}_{number:02d}_{now}{end}.png", Image.fromarray(image))
        small = [thumbnail(images[n], _THUMBNAIL) if n in images else None for n in range(len(self.prompts))]
        self._rows.append((label, small))
        if len(self._rows) > _MOST_ROWS:
            self._rows[:-1] = self._rows[:-1:2]
        _write_png(self.folder / f"{start}contact_sheet.png", contact_sheet(self._rows))
        log.info("%d samples of %s in %s", len(images), label, self.folder)


@torch.no_grad()
def encode_prompts(models: SdxlModels, prompts: Sequence[SamplePrompt], num_tokens: int) -> dict[str, TextConditioning]:
    """The conditioning of all prompts and negative prompts, by their text, with (word:1.2) read as weights."""
    texts = {text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)}
    return {text: TextConditioning.of(models.encode_texts([text], num_tokens, weighted=True)) for text in texts}


def _write_png(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG"))
