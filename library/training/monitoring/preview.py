"""Preview: sample images during training, and a contact sheet of all of them.

A sample that fails is logged, and never ends the run.
"""

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
from library.generation.sample_prompts import SamplePrompt, at_size, read_sample_prompts
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
from library.training.options.output import PreviewOptions

_THUMBNAIL_SIDE = 256  # pixels
_MAX_ROWS = 128  # of the contact sheet; with more, every second older row is left out

Texts = Mapping[str, TextConditioning]
Row = Sequence[Image.Image | None]
"""Thumbnails of one step or epoch, by prompt; None where a sample failed."""


@dataclass
class Preview:
    """The sample images of a run. Names: contract, formats.md section 6.

    Attributes:
        prompts: with their sizes; without any, no image is generated.
        models: decode latents, and encode prompts and conditions.
        unet: the trained one.
        texts: conditioning by prompt, where the text encoders were released before training; None:
            they are called.
        num_tokens: of a chunk of the prompt.
        folder: where the images are saved.
        name: --output_name, the start of the files' names.
        sampler: of prompts that don't name one.
        v_prediction: the model predicts velocity.
        zero_terminal_snr: the noise schedule has it.
        seed: of prompts that don't give one.
        every_steps: steps between samples; None: none after a step.
        every_epochs: epochs between samples; None: none after an epoch. It overrides every_steps.
        at_first: whether samples are generated before the first step.
        keeps_vae: training needs the VAE too, so it stays on the device.
        control_inputs: turns a condition [1, 3, H, W] into what the task feeds to the U-Net.
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
    _rows: list[tuple[str, Row]] = field(default_factory=list, init=False)

    def is_due(self, *, step: int = 0, epoch: int = 0) -> bool:
        """Return whether samples are due after this step or epoch (1-based), or at first (both 0)."""
        if not self.prompts:
            return False
        if step:
            return (
                bool(self.every_steps)
                and not self.every_epochs
                and step % (self.every_steps or 1) == 0
            )
        if epoch:
            return bool(self.every_epochs) and epoch % (self.every_epochs or 1) == 0
        return self.at_first

    def generate(
        self,
        label: str,
        gather: Callable[[list[Any]], list[Any]],
        *,
        rank: int,
        world_size: int,
        saves: bool = True,
    ) -> list[tuple[str, np.ndarray]]:
        """Generate the images of all prompts, and save them on the first process.

        Args:
            label: epoch or step: "e000001" or "000100".
            gather: joins the lists of all processes.
            rank: of this process among those that share the prompts.
            world_size: the number of these processes.
            saves: whether this process may save; False: another one generates the same images and
                saves them.

        Returns:
            (prompt, image) on the process that saves; an empty list on the others.
        """
        generated = []
        for index in range(rank, len(self.prompts), world_size):
            try:
                generated.append((index, self._generate_one(self.prompts[index], index)))
            except Exception as error:  # whatever it is, the run is worth more than its samples
                kind = type(error).__name__
                log.warning("sample %d of %s failed: %s: %s", index, label, kind, first_line(error))
        if not self.keeps_vae:
            self.models.release("vae")
        if world_size > 1:
            generated = gather(generated)
        if rank or not saves:
            return []
        by_prompt: dict[int, np.ndarray] = dict(sorted(generated))
        try:
            self._save(label, by_prompt)
        except Exception as error:
            log.warning("the samples of %s are not saved: %s", label, first_line(error))
        return [(self.prompts[index].prompt, image) for index, image in by_prompt.items()]

    def thumbnails(self) -> list[tuple[str, str, bytes]]:
        """Return (label, prompt, JPEG) of all samples so far."""
        thumbnails = []
        for label, row in self._rows:
            for prompt, image in zip(self.prompts, row, strict=True):
                if image is not None:
                    content = BytesIO()
                    image.save(content, format="JPEG", quality=85)
                    thumbnails.append((label, prompt.prompt, content.getvalue()))
        return thumbnails

    def restore(self) -> None:
        """Fill the contact sheet with the saved samples of a run that is resumed."""
        pattern = re.compile(
            re.escape(self._file_prefix()) + r"(e?\d{6})_(\d\d)_\d{14}(_-?\d+)?\.png"
        )
        rows: dict[str, list[Image.Image | None]] = {}
        for path in sorted(self.folder.glob("*.png"), key=lambda path: path.stat().st_mtime):
            match = pattern.fullmatch(path.name)
            if match is None or int(match[2]) >= len(self.prompts):
                continue
            row = rows.setdefault(match[1], [None] * len(self.prompts))
            with Image.open(path) as image:
                row[int(match[2])] = thumbnail(np.asarray(image.convert("RGB")), _THUMBNAIL_SIDE)
        self._rows.clear()
        self._rows.extend(list(rows.items())[-_MAX_ROWS:])

    def _generate_one(self, prompt: SamplePrompt, index: int) -> np.ndarray:
        assert prompt.width and prompt.height
        size = Size(prompt.width, prompt.height)
        texts = self.texts or encode_prompts(self.models, [prompt], self.num_tokens)
        seed = prompt.seed
        if seed is None:
            seed = seed_of(self.seed, "sample", index)
        inpaint_channels, control = None, None
        if self.unet.config.is_inpainting:
            inpaint_channels = self._masked_everywhere(size)
        if prompt.controlnet_image is not None:
            control = self._control_inputs_of(prompt.controlnet_image, size)
        return generate_image(
            self.unet,
            self._decode,
            self._on_device(texts[prompt.prompt]),
            self._on_device(texts[prompt.negative_prompt]),
            width=size.width,
            height=size.height,
            steps=prompt.sample_steps,
            scale=prompt.scale,
            seed=seed,
            sampler=prompt.sample_sampler or self.sampler,
            v_prediction=self.v_prediction,
            zero_terminal_snr=self.zero_terminal_snr,
            inpaint_channels=inpaint_channels,
            control=control,
        )

    def _on_device(self, text: TextConditioning) -> TextConditioning:
        device, dtype = self.models.device, self.models.precision.compute
        return TextConditioning(*(tensor.to(device, dtype) for tensor in text))

    @torch.no_grad()
    def _control_inputs_of(self, file: Path, size: Size) -> ControlInputs | None:
        """Return the control inputs of a condition, which is stretched to the size of the image."""
        pixels = images.normalized(images.resize(images.load(file), size, None))
        return self.control_inputs(torch.from_numpy(pixels)[None].to(self.models.device))

    @torch.no_grad()
    def _masked_everywhere(self, size: Size) -> Tensor:
        """Return an inpainting model's channels for a mask over the complete image: [1, 5, H/8, W/8]."""
        width, height = size
        noise = torch.zeros(1, 4, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        gray, mask = torch.zeros(1, 3, height, width), torch.ones(1, height, width)
        channels = inpainting_channels(
            gray, mask, lambda image: self.models.encode_images(image, noise)
        )
        return channels.to(self.models.device, self.models.precision.compute)

    @torch.no_grad()
    def _decode(self, raw: Tensor) -> Tensor:
        """Decode raw latents to pixels, in tiles if there is not enough VRAM."""
        try:
            return self.models.decode_latents(raw)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            decode_in_tiles(self.models.vae)
            return self.models.decode_latents(raw)

    def _file_prefix(self) -> str:
        return f"{self.name}_" if self.name else ""

    def _save(self, label: str, by_prompt: Mapping[int, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y%m%d%H%M%S")
        row: list[Image.Image | None] = [None] * len(self.prompts)
        for index, pixels in by_prompt.items():
            seed = self.prompts[index].seed
            seed_suffix = "" if seed is None else f"_{seed}"
            name = f"{self._file_prefix()}{label}_{index:02d}_{now}{seed_suffix}.png"
            _write_png(self.folder / name, Image.fromarray(pixels))
            row[index] = thumbnail(pixels, _THUMBNAIL_SIDE)
        self._rows.append((label, row))
        if len(self._rows) > _MAX_ROWS:
            self._rows[:-1] = self._rows[:-1:2]
        _write_png(
            self.folder / f"{self._file_prefix()}contact_sheet.png", contact_sheet(self._rows)
        )
        log.info("%d samples of %s in %s", len(by_prompt), label, self.folder)


@torch.no_grad()
def encode_prompts(
    models: SdxlModels, prompts: Sequence[SamplePrompt], num_tokens: int
) -> dict[str, TextConditioning]:
    """Return the conditioning of all prompts by their text; (word:1.2) is a weight."""
    texts = {text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)}
    conditioning = {}
    for text in texts:
        conditioning[text] = TextConditioning.of(
            models.encode_texts([text], num_tokens, weighted=True)
        )
    return conditioning


def _write_png(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG"))


def read_prompts(
    options: PreviewOptions, size: Size, *, takes_conditions: bool
) -> list[SamplePrompt]:
    """Return the prompts of samples during training. Mistakes in them are logged, and the prompts used without them.

    Args:
        options: the file of prompts.
        size: the size of images for prompts that don't say it.
        takes_conditions: a control net is trained, for which prompts name conditioning images.
    """
    if not options.is_on or options.sample_prompts is None:
        return []
    prompts, problems = read_sample_prompts(options.sample_prompts)
    for problem in problems:
        log.warning(problem)
    num_conditions = sum(prompt.controlnet_image is not None for prompt in prompts)
    if num_conditions and not takes_conditions:
        log.warning(
            "--sample_prompts: %d controlnet_image (--cn) change nothing: no control net is trained",
            num_conditions,
        )
    elif takes_conditions and num_conditions < len(prompts):
        log.warning(
            "--sample_prompts: %d prompts have no condition (--cn FILE)",
            len(prompts) - num_conditions,
        )
    if not prompts:
        log.warning(
            "--sample_prompts %s: no prompts in it; no samples are generated",
            options.sample_prompts,
        )
    return [at_size(prompt, size.width, size.height) for prompt in prompts]
