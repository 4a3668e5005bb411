"""How long an image takes compared with Diffusers' StableDiffusionXLPipeline, and that both are equal.

    python benchmarks/generate.py                      the tiny model on a CPU
    python benchmarks/generate.py --model sdxl.safetensors --width 1024 --height 1024 --precision fp16
                                                       SDXL on a GPU

Both use the same weights, sampler, steps, initial noise and guidance, and alternate in one process, so
that a machine whose speed drifts doesn't matter. A ratio above 1 means that ours is faster. Prompts
are encoded again for each image, and images are decoded.
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
from library.generation.samplers import SAMPLERS
from library.options import OptionGroup, option, read_options

if TYPE_CHECKING:
    import torch

    from library.models.sdxl import SdxlModels

PROMPT, NEGATIVE, SCALE, SEED = "a red cat on a sofa, detailed", "blurry", 7.0, 1


@dataclass(frozen=True)
class GenerateOptions(OptionGroup):
    """Measurement"""

    model: Path | None = option(None, "an SDXL single file; unset: the tiny model")
    width: int = option(256, "in pixels", at_least=32)
    height: int = option(256, "in pixels", at_least=32)
    steps: int = option(10, "denoising steps", at_least=1)
    sampler: str = option("ddim", "sampler of both pipelines", choices=tuple(SAMPLERS))
    precision: str = option("no", "dtype to compute in", choices=("no", "fp16", "bf16"))
    pairs: int = option(9, "pairs of images, after one to warm up", at_least=1)
    threads: int | None = option(
        None, "CPU threads; use 1 if the machine runs other programs", at_least=1
    )


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
        pipelines = [ours(models, chosen), theirs(models, chosen, Path(folder) / "diffusers")]
        times: list[list[tuple[float, float]]] = [[], []]
        images = []
        for i in range(chosen.pairs + 1):
            images = []
            for generate, own_times in zip(pipelines, times, strict=True):
                image, seconds = timed(generate)
                images.append(image)
                if i > 0:
                    own_times.append(seconds)
    difference = float((images[0] - images[1]).abs().max())
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; {chosen}")
    for name, clock in (("elapsed", 0), ("of all threads", 1)):
        medians = [
            statistics.median(seconds[clock] for seconds in own_times) for own_times in times
        ]
        ratio = statistics.median(b[clock] / a[clock] for a, b in zip(*times, strict=True))
        print(
            f"seconds {name}: ours {medians[0]:.3f}, Diffusers {medians[1]:.3f}; "
            f"median of the pairs' ratios {ratio:.2f}"
        )
    print(f"largest difference of the images, 0..1: {difference:.2g}")
    if chosen.precision == "no" and difference > 1e-3:
        raise RunError("the images differ by more than 1e-3")


def tiny_model(folder: Path) -> Path:
    from library.safetensors_io import write_safetensors
    from tools.tiny_models import tiny_checkpoint

    write_safetensors(folder / "tiny.safetensors", tiny_checkpoint(0), {"format": "pt"})
    return folder / "tiny.safetensors"


def ours(models: "SdxlModels", chosen: GenerateOptions) -> Callable[[], "torch.Tensor"]:
    """Return a function that generates an image: [3, H, W] in 0..1."""
    from library.generation.pipeline import SdxlPipeline
    from library.generation.prompts.encoder import PromptEncoder
    from library.models.vae import unscale_latents
    from networks.inference.adapters import AppliedNetworks
    from networks.inference.options import AppliedNetworkOptions

    request = GenerationRequest(
        prompt=PROMPT,
        negative=NEGATIVE,
        prompt2=None,
        negative2=None,
        raw_prompt=PROMPT,
        clip_prompt=None,
        width=chosen.width,
        height=chosen.height,
        original_width=None,
        original_height=None,
        original_width_negative=None,
        original_height_negative=None,
        crop_top=None,
        crop_left=None,
        steps=chosen.steps,
        seed=SEED,
        sampler=chosen.sampler,
        scale=SCALE,
        negative_scale=None,
        guidance_rescale=0.0,
        strength=0.8,
        multipliers=None,
        deep_shrink=None,
        gradual_latent=None,
        init_image=None,
        mask=None,
        guide_images=(),
        index=0,
        prompt_index=0,
    )
    adapters = AppliedNetworks(AppliedNetworkOptions(), models)

    def generate() -> "torch.Tensor":
        pipeline = SdxlPipeline(
            models,
            PromptEncoder(models, None),
            adapters,
            v_prediction=False,
            zero_terminal_snr=False,
        )
        pixels = models.decode_latents(unscale_latents(pipeline.latents([request])))[0]
        return (pixels / 2 + 0.5).clamp(0, 1)

    return generate


def theirs(
    models: "SdxlModels", chosen: GenerateOptions, folder: Path
) -> Callable[[], "torch.Tensor"]:
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

    def generate() -> "torch.Tensor":
        generator = torch.Generator(models.device).manual_seed(SEED)
        shape = (1, 4, chosen.height // 8, chosen.width // 8)
        noise = torch.randn(
            shape, generator=generator, device=models.device, dtype=models.precision.compute
        )
        result = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            width=chosen.width,
            height=chosen.height,
            num_inference_steps=chosen.steps,
            guidance_scale=SCALE,
            latents=noise,
            output_type="pt",
        )
        return result.images[0]

    return generate


def timed(
    generate: Callable[[], "torch.Tensor"],
) -> tuple["torch.Tensor", tuple[float, float]]:
    """Return an image, and the seconds that passed on the clock and in all threads."""
    start, threads_start = time.perf_counter(), time.process_time()
    image = generate().float().cpu()  # waits for the GPU
    return image, (time.perf_counter() - start, time.process_time() - threads_start)


if __name__ == "__main__":
    run(main)
