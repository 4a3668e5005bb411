"""How long a picture takes, and that it is the right one: ours beside Diffusers' StableDiffusionXLPipeline.

    python benchmarks/generate.py                                          the tiny model on a CPU
    python benchmarks/generate.py --model sdxl.safetensors --width 1024 --height 1024 --precision fp16        on a card

Same weights, sampler, steps, first noise and guidance, in one process and in turn, so that a machine whose speed drifts is no
matter; a ratio above 1 means that ours is faster. Prompts are encoded anew for each picture, and pictures are decoded.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import RunError, run
from library.generation.request import GenerationRequest
from library.generation.sampler_options import SAMPLERS
from library.options import OptionGroup, option, read_options

if TYPE_CHECKING:
    import torch

    from library.models.sdxl import SdxlModels

PROMPT, NEGATIVE, SCALE, SEED = "a red cat on a sofa, detailed", "blurry", 7.0, 1


@dataclass(frozen=True)
class GenerateOptions(OptionGroup):
    """What is measured"""

    model: Path | None = option(None, "an SDXL single file; unset: the tiny model")
    width: int = option(256, "in pixels", at_least=32)
    height: int = option(256, "in pixels", at_least=32)
    steps: int = option(10, "denoising steps", at_least=1)
    sampler: str = option("ddim", "of both", choices=tuple(SAMPLERS))
    precision: str = option("no", "dtype to compute in", choices=("no", "fp16", "bf16"))
    pairs: int = option(9, "pairs of pictures, after one to warm up", at_least=1)
    threads: int | None = option(None, "threads of a CPU; 1 on a machine that does other things too", at_least=1)


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [GenerateOptions], argv)[GenerateOptions]
    import torch

    from library.device import Precision
    from library.models.checkpoint.reader import open_checkpoint
    from library.models.sdxl import SdxlModels

    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.model or tiny_model(Path(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = Precision.decide(chosen.precision, None, no_half_vae=True)
        models = SdxlModels(open_checkpoint(str(path)), precision, device)
        contenders = [ours(models, chosen), theirs(models, chosen, Path(folder) / "diffusers")]
        taken: list[list[tuple[float, float]]] = [[], []]
        images = []
        for number in range(chosen.pairs + 1):
            images = [timed(draw, kept, device, number) for draw, kept in zip(contenders, taken, strict=True)]
    difference = float((images[0] - images[1]).abs().max())
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; {chosen}")
    for name, which in (("on the clock", 0), ("of all threads", 1)):
        medians = [statistics.median(times[which] for times in kept) for kept in taken]
        ratio = statistics.median(b[which] / a[which] for a, b in zip(*taken, strict=True))
        print(
            f"seconds {name}: ours {medians[0]:.3f}, Diffusers {medians[1]:.3f}; median of the pairs' ratios {ratio:.2f}"
        )
    print(f"largest difference of the pictures, 0..1: {difference:.2g}")
    if chosen.precision == "no" and difference > 1e-3:
        raise RunError("the pictures differ by more than 1e-3")


def tiny_model(folder: Path) -> Path:
    from library.safetensors_io import write_safetensors
    from tools.tiny_models import tiny_checkpoint

    write_safetensors(folder / "tiny.safetensors", tiny_checkpoint(0), {"format": "pt"})
    return folder / "tiny.safetensors"


def ours(models: "SdxlModels", chosen: GenerateOptions) -> Callable[[], "torch.Tensor"]:
    """Draws a picture: [3, H, W] in 0..1."""
    from library.generation.pipeline import SdxlPipeline
    from library.generation.prompt_encoder import PromptEncoder
    from library.models.vae import unscale_latents
    from networks.inference.adapters import AppliedNetworks
    from networks.inference.options import AppliedNetworkOptions

    drawing = GenerationRequest(
        prompt=PROMPT, negative=NEGATIVE, prompt2=None, negative2=None, raw_prompt=PROMPT, clip_prompt=None, width=chosen.width,
        height=chosen.height, original_width=None, original_height=None, original_width_negative=None,
        original_height_negative=None, crop_top=None, crop_left=None, steps=chosen.steps, seed=SEED, sampler=chosen.sampler,
        scale=SCALE, negative_scale=None, guidance_rescale=0.0, strength=0.8, multipliers=None, shrink=None, growth=None,
        source=None, mask=None, guides=(), number=0, row=0,
    )  # fmt: skip

    changes = AppliedNetworks(AppliedNetworkOptions(), models)

    def draw() -> "torch.Tensor":
        painter = SdxlPipeline(
            models, PromptEncoder(models, None), changes, v_prediction=False, zero_terminal_snr=False
        )
        pixels = models.decode_latents(unscale_latents(painter.latents([drawing])))[0]
        return (pixels / 2 + 0.5).clamp(0, 1)

    return draw


def theirs(models: "SdxlModels", chosen: GenerateOptions, folder: Path) -> Callable[[], "torch.Tensor"]:
    """The same by Diffusers, from a folder that holds the same weights."""
    import torch

    from library.generation.samplers import make_sampler
    from library.imports import import_diffusers
    from library.models.checkpoint.writer import save_diffusers

    save_diffusers(folder, models.checkpoint, {}, models.tokenizers)
    pipeline: Any = import_diffusers().StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=models.precision.compute, force_zeros_for_empty_prompt=False
    )
    pipeline.to(models.device)
    pipeline.vae.to(models.precision.vae)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_sampler(chosen.sampler, v_prediction=False, zero_terminal_snr=False)

    def draw() -> "torch.Tensor":
        generator = torch.Generator(models.device).manual_seed(SEED)
        shape = (1, 4, chosen.height // 8, chosen.width // 8)
        noise = torch.randn(shape, generator=generator, device=models.device, dtype=models.precision.compute)
        return pipeline(
            PROMPT, negative_prompt=NEGATIVE, width=chosen.width, height=chosen.height, num_inference_steps=chosen.steps,
            guidance_scale=SCALE, latents=noise, output_type="pt",
        ).images[0]  # fmt: skip

    return draw


def timed(
    draw: Callable[[], "torch.Tensor"], kept: list[tuple[float, float]], device: "torch.device", number: int
) -> "torch.Tensor":
    """The picture; its seconds on the clock and of all threads are kept, those of the first one apart."""
    start, start_of_all = time.perf_counter(), time.process_time()
    image = draw().float().cpu()  # waits for a card
    if number:
        kept.append((time.perf_counter() - start, time.process_time() - start_of_all))
    return image


if __name__ == "__main__":
    run(main)
