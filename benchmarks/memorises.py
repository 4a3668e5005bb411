"""Does full fine-tuning learn? A tiny velocity model memorises three pictures, and draws each by its caption.

python benchmarks/memorises.py [--steps 300] [--full_bf16]

What is drawn, less the mean of the three, is correlated with the latents that were trained, less theirs: each drawing should be
nearest to its own picture. The VAE is random, so the pictures themselves show nothing; its latents are brought to the spread
that SDXL's have.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Random text encoders tell single words hardly apart.
CAPTIONS = ("a red circle on white paper", "wide river at night, lanterns, fog", "steam engine")
SIDE, REPEATS, SEEDS, SAMPLING_STEPS = 64, 4, 4, 20
IMAGES = len(CAPTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--learning_rate", default="3e-3", help="of AdamW, falling to 0 as a cosine does")
    parser.add_argument("--full_bf16", action="store_true", help="train bfloat16 weights, rounded by chance")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        losses, correlations = memorise(Path(folder), chosen.steps, chosen.learning_rate, full_bf16=chosen.full_bf16)
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"loss: {first:.3f} in the first tenth of {len(losses)} steps, {last:.3f} in the last")
    print("drawn \\ trained" + "".join(f"{number:8d}" for number in range(IMAGES)))
    for number, row in enumerate(correlations):
        print(f"{number:15d}" + "".join(f"{value:8.3f}" for value in row))
    learnt = all(max(row) == row[number] for number, row in enumerate(correlations))
    print("each drawing is nearest to its own picture" if learnt else "NOT each drawing is nearest to its own picture")
    raise SystemExit(not learnt)


def memorise(folder: Path, steps: int, learning_rate: str, *, full_bf16: bool) -> tuple[list[float], list[list[float]]]:
    """(the loss of each step, the correlation of each caption's drawings with each picture)."""
    from tools.make_tiny_dataset import make_images
    from tools.tiny_models import SMALLEST, random_checkpoint

    model, images = folder / "model.safetensors", folder / "pictures" / f"{REPEATS}_shape"
    paths = make_images(images, IMAGES, seed=1)
    for path, caption in zip(paths, CAPTIONS, strict=True):
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    make_model(model, random_checkpoint(SMALLEST, 0), paths)
    words = [
        "--pretrained_model_name_or_path", model, "--train_data_dir", images.parent, "--output_dir", folder / "out", "--output_name", "tuned",
        "--resolution", SIDE, "--train_batch_size", IMAGES * REPEATS, "--cache_latents_to_disk", "--cache_text_encoder_outputs",
        "--max_train_steps", steps, "--learning_rate", learning_rate, "--lr_scheduler", "cosine", "--max_data_loader_n_workers", "0", "--seed", "1",
        *(["--mixed_precision", "bf16", "--full_bf16", "--no_half_vae"] if full_bf16 else []),
    ]  # fmt: skip
    subprocess.run([sys.executable, ROOT / "sdxl_train.py", *map(str, words)], check=True)
    rows = map(json.loads, (folder / "out" / "tuned-log.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [row["loss/current"] for row in rows if "loss/current" in row]
    return losses, correlations(folder / "out" / "tuned.safetensors", paths)


def make_model(path: Path, tensors: dict[str, "torch.Tensor"], images: Sequence[Path]) -> None:
    """Write a model that predicts velocity. Its latents of the pictures have mean 0 and spread 1 when they are scaled, and next to no noise."""
    import torch

    from library import images
    from library.device import Precision
    from library.models.checkpoint.reader import open_checkpoint
    from library.models.sdxl import SdxlModels
    from library.models.vae import LATENT_SCALE
    from library.safetensors_io import write_safetensors

    tensors = tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    last = "first_stage_model.quant_conv"  # gives means and log variances, four channels each
    tensors[f"{last}.weight"][4:], tensors[f"{last}.bias"][4:] = 0.0, -12.0
    write_safetensors(path, tensors, {})
    models = SdxlModels(open_checkpoint(str(path)), Precision.decide("no", None, no_half_vae=True), torch.device("cpu"))
    pixels = torch.cat([torch.from_numpy(images.normalized(images.load(own)))[None, :, :SIDE, :SIDE] for own in images])
    means = models.encode_images(pixels, torch.zeros(len(images), 4, SIDE // 8, SIDE // 8))
    factor = 1 / LATENT_SCALE / means.std(dim=(0, 2, 3))
    tensors[f"{last}.weight"][:4] *= factor[:, None, None, None]
    tensors[f"{last}.bias"][:4] = -means.mean(dim=(0, 2, 3)) * factor
    write_safetensors(path, tensors, {"format": "pt"})


def correlations(model: Path, paths: list[Path]) -> list[list[float]]:
    """Of each caption's drawing, the mean over some seeds, with each picture's latents."""
    import numpy as np
    import torch

    from library.device import Precision
    from library.generation.denoise import Conditioning, Guidance, denoise
    from library.generation.samplers import make_sampler
    from library.models.checkpoint.reader import open_checkpoint
    from library.models.sdxl import SdxlModels
    from library.models.text_encoders import TextConditioning
    from library.models.vae import scale_latents
    from library.rng import generator

    models = SdxlModels(
        open_checkpoint(str(model)), Precision.decide("no", None, no_half_vae=True), torch.device("cpu")
    )
    trained = []
    for path in paths:
        (cache,) = path.parent.glob(f"{path.stem}_*_sdxl.npz")
        with np.load(cache) as arrays:
            trained.append(scale_latents(torch.from_numpy(arrays["latents"])).flatten())
    drawn = []
    for number, caption in enumerate(CAPTIONS):
        noise = torch.randn(SEEDS, 4, SIDE // 8, SIDE // 8, generator=generator("memorises", number))
        with torch.no_grad():
            text = TextConditioning.of(models.encode_texts([caption] * SEEDS, 75))
        sampler = make_sampler("euler", v_prediction=True, zero_terminal_snr=True)
        sampler.set_timesteps(SAMPLING_STEPS)
        told = [Conditioning.of(text, original=(SIDE, SIDE), target=(SIDE, SIDE))]
        noise = noise * sampler.init_noise_sigma
        latents = denoise(models.unet, sampler, noise, told, Guidance(1), timesteps=sampler.timesteps)
        drawn.append(latents.mean(dim=0).flatten())
    ours, theirs = (_less_their_mean(torch.stack(rows)) for rows in (drawn, trained))
    return (ours @ theirs.T).tolist()


def _less_their_mean(rows):  # noqa: ANN001, ANN202 - torch is imported late
    """Unit vectors of the rows without what they share."""
    rows = rows - rows.mean(dim=0)
    return rows / rows.norm(dim=1, keepdim=True)


if __name__ == "__main__":
    main()
