"""Does Textual Inversion learn? A word trained on one picture against random words, by that picture's loss at fixed noise.

python benchmarks/token_learns.py [--steps 150] [--words 20]
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CAPTION, TIMESTEPS, NOISES = "a photo of zyx", (200, 400, 600, 800), 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument("--words", type=int, default=20, help="random words to compare with")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, trained, others = compare(Path(folder), chosen.steps, chosen.words)
    print(f"loss of the picture with the word as it started {before:.5f}, trained {trained:.5f}")
    print(f"with {len(others)} random words: {min(others):.5f} at best, {sum(others) / len(others):.5f} on average")
    print("the trained word is better than all of them" if trained < min(others) else "NOT better than all of them")
    raise SystemExit(trained >= min(others))


def compare(folder: Path, steps: int, words: int) -> tuple[float, float, list[float]]:
    """(loss with the first values, with the trained ones, with each random word's)."""
    import sdxl_train_textual_inversion
    from library.safetensors_io import load_tensors
    from tools import make_tiny_sdxl
    from tools.make_tiny_dataset import make_images

    model, images = folder / "model.safetensors", folder / "pictures" / "1_shape"
    make_tiny_sdxl.main(["--output", str(model)])
    make_images(images, 1)
    next(images.glob("*.txt")).write_text(CAPTION, encoding="utf-8")
    train = [
        "--pretrained_model_name_or_path", model, "--train_data_dir", images.parent, "--output_dir", folder / "out", "--token_string", "zyx",
        "--init_word", "thing", "--resolution", "64", "--cache_latents", "--max_train_steps", steps, "--learning_rate", "0.02",
        "--save_model_as", "safetensors", "--seed", "1", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    sdxl_train_textual_inversion.main(list(map(str, train)))
    rows, _ = load_tensors(folder / "out" / "zyx.safetensors")
    return losses_of(model, next(images.glob("*.png")), rows, words)


def losses_of(model: Path, image: Path, rows: dict, words: int) -> tuple[float, float, list[float]]:
    import torch

    from library import images
    from library.device import Precision
    from library.models.checkpoint.reader import open_checkpoint
    from library.models.noise_schedule import NoiseSchedule
    from library.models.sdxl import SdxlModels
    from library.models.size_conditioning import conditioning_vector
    from library.models.text_encoders import TextConditioning
    from library.models.vae import scale_latents
    from library.rng import generator
    from library.training.objective.noise import add_noise
    from library.training.tasks.embedding import add_placeholder_token

    models = SdxlModels(
        open_checkpoint(str(model)), Precision.decide("no", None, no_half_vae=True), torch.device("cpu")
    )
    token = add_placeholder_token(models, "zyx", "thing", 1)
    pixels = torch.from_numpy(images.normalized(images.load(image)))[None]
    pixels = torch.nn.functional.interpolate(pixels, size=(64, 64), mode="area")
    noise = torch.randn(NOISES * len(TIMESTEPS), 4, 8, 8, generator=generator("token_learns"))
    timesteps = torch.tensor(TIMESTEPS).repeat(NOISES)

    @torch.no_grad()
    def loss() -> float:
        latents = scale_latents(models.encode_images(pixels, torch.zeros(1, 4, 8, 8)))
        text = TextConditioning.of(models.encode_texts([CAPTION], 75))
        size = torch.tensor([[64, 64]])
        vector = conditioning_vector(text.pooled, size, torch.zeros_like(size), size)
        noisy = add_noise(latents, noise, NoiseSchedule.sdxl().at(timesteps))
        count = len(noise)
        predicted = models.unet(noisy, timesteps, text.context.expand(count, -1, -1), vector.expand(count, -1))
        return (predicted - noise).square().mean().item()

    before = loss()

    def with_rows(values: dict) -> float:
        for name, own in token.rows.items():
            own.data.copy_(values[name])
        return loss()

    tables = dict(zip(("clip_l", "clip_g"), token.tables, strict=True))
    others = []
    for number in range(words):  # of the spread that the tables' own rows have
        random = {
            name: table.weight.mean(0) + table.weight.std(0) * torch.randn(1, table.weight.shape[1], generator=generator("word", number, name))
            for name, table in tables.items()
        }  # fmt: skip
        others.append(with_rows(random))
    return before, with_rows(rows), others


if __name__ == "__main__":
    main()
