"""Does a ControlNet-LLLite control? Squares are drawn where the outlines of held-out conditions are.

A tiny base that predicts velocity is fine-tuned by sdxl_train.py on pictures of one square at a random place, then a ControlNet-LLLite is trained by
sdxl_train_control_net_lllite.py with each picture's outline as its condition. For 64 conditions that neither has seen pictures are drawn, and
the square's place in their latents is compared with the condition's.

python benchmarks/lllite_learns.py [--base_steps 1000] [--steps 1000] [--folder work]
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import numpy as np
    import torch

    from library.models.control import ControlInputs
    from library.models.sdxl import SdxlModels

SIDE, SQUARE, CAPTION = 64, 24, "a square"  # pixels
IMAGES, HELD_OUT, SHUFFLES, BATCH, DRAWING_STEPS = 256, 64, 100, 16, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_steps", type=int, default=1000, help="steps of the base's fine-tuning")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the control net's training")
    parser.add_argument("--folder", type=Path, help="where models and pictures are kept; unset: they aren't")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        make_images(folder)
        train(folder, chosen.base_steps, chosen.steps)
        own, shuffled, without = compare(folder)
    print(f"correlation of the square's place with its condition's: {own:.3f}")
    print(f"with {SHUFFLES} shuffles of the conditions: {max(shuffled):.3f} at most, {sum(shuffled) / len(shuffled):.3f} on average")  # fmt: skip
    print(f"drawn without the control net: {without:.3f}")
    controls = own >= 0.5 and sum(own > other for other in shuffled) >= 0.99 * SHUFFLES
    print("it controls" if controls else "it does NOT control")
    raise SystemExit(not controls)


def places(count: int, name: str) -> list[tuple[int, int]]:
    """Random (left, top) of squares, in pixels."""
    from library.rng import python_rng

    draw = python_rng(0, name, 0, 0)
    return [(draw.randint(0, SIDE - SQUARE), draw.randint(0, SIDE - SQUARE)) for _ in range(count)]


def image(place: tuple[int, int], *, text_encoder_skeleton: bool) -> "np.ndarray":
    """A bright square on dark, or its outline: [H, W, 3], uint8."""
    import numpy as np

    left, top = place
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[top : top + SQUARE, left : left + SQUARE] = 255
    if text_encoder_skeleton:
        pixels[top + 2 : top + SQUARE - 2, left + 2 : left + SQUARE - 2] = 0
    return pixels


def make_images(folder: Path) -> None:
    """The model, the pictures with captions, and their conditions."""
    from PIL import Image

    from benchmarks.memorises import make_model
    from tools.tiny_models import SMALLEST, random_checkpoint

    for name in ("pictures/1_square", "conditions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(places(IMAGES, "trained")):
        Image.fromarray(image(place, text_encoder_skeleton=False)).save(
            folder / "pictures" / "1_square" / f"{number:03d}.png"
        )
        Image.fromarray(image(place, text_encoder_skeleton=True)).save(folder / "conditions" / f"{number:03d}.png")
        (folder / "pictures" / "1_square" / f"{number:03d}.txt").write_text(CAPTION, encoding="utf-8")
    tensors = random_checkpoint(SMALLEST, 0)
    keep_places(tensors)
    make_model(folder / "tiny.safetensors", tensors, sorted((folder / "pictures" / "1_square").glob("*.png")))


def keep_places(tensors: dict[str, "torch.Tensor"]) -> None:
    """Make the encoder shrink pictures by averaging. A random one turns a square that is moved by four pixels into other noise."""
    import torch

    encoder = "first_stage_model.encoder."
    for name, tensor in tensors.items():
        if name.startswith(encoder) and ("conv2." in name or "proj_out." in name):
            tensor.zero_()  # residual blocks add nothing
        elif name.startswith(encoder) and name.endswith("downsample.conv.weight"):
            tensor.copy_(torch.eye(len(tensor))[:, :, None, None].expand_as(tensor) / 9)


def train(folder: Path, base_steps: int, steps: int) -> None:
    common = [
        "--train_data_dir", folder / "pictures", "--output_dir", folder / "out", "--resolution", SIDE, "--train_batch_size", BATCH,
        "--cache_latents", "--cache_text_encoder_outputs", "--learning_rate", "2e-3", "--lr_scheduler", "cosine", "--seed", "1",
        "--max_data_loader_n_workers", "0", "--no_half_vae",
    ]  # fmt: skip
    base = folder / "out" / "base.safetensors"
    fine_tune = ["--pretrained_model_name_or_path", folder / "tiny.safetensors", "--output_name", "base", "--max_train_steps", base_steps]  # fmt: skip
    lllite = [
        "--pretrained_model_name_or_path", base, "--output_name", "lllite", "--max_train_steps", steps,
        "--conditioning_data_dir", folder / "conditions",
    ]  # fmt: skip
    for script, own in (("sdxl_train.py", fine_tune), ("sdxl_train_control_net_lllite.py", lllite)):
        subprocess.run([sys.executable, ROOT / script, *map(str, (*common, *own))], check=True)


def compare(folder: Path) -> tuple[float, list[float], float]:
    """(correlation with the conditions, with shuffled ones, without the control net)."""
    import numpy as np
    import torch

    from library.device import Precision
    from library.models.checkpoint.reader import open_checkpoint
    from library.models.sdxl import SdxlModels
    from networks.lllite import by_block
    from networks.lllite import places as net_places
    from networks.lllite_file import lllite_from_file

    checkpoint = open_checkpoint(str(folder / "out" / "base.safetensors"))
    models = SdxlModels(checkpoint, Precision.decide("no", None, no_half_vae=True), torch.device("cpu"))
    held_out = places(HELD_OUT, "held out")
    net = lllite_from_file(folder / "out" / "lllite.safetensors", net_places(models.unet), flag="--control_net_lllite_models")  # fmt: skip
    with torch.no_grad():
        extra = by_block(net(as_tensor(held_out, text_encoder_skeleton=True)))
    controlled, free = (drawn_places(models, own) for own in (extra, None))
    wanted, random = np.array(held_out, float), np.random.default_rng(0)
    shuffled = [correlation(controlled, wanted[random.permutation(HELD_OUT)]) for _ in range(SHUFFLES)]
    return correlation(controlled, wanted), shuffled, correlation(free, wanted)


def correlation(found: "np.ndarray", wanted: "np.ndarray") -> float:
    """The mean of both coordinates' correlations; 0 where every square is at one place."""
    import numpy as np

    own = [np.corrcoef(found[:, i], wanted[:, i])[0, 1] if found[:, i].std() else 0.0 for i in (0, 1)]
    return float(np.mean(own))


def as_tensor(chosen: Sequence[tuple[int, int]], *, text_encoder_skeleton: bool) -> "torch.Tensor":
    """The pictures of squares at these places, or their outlines: [B, 3, H, W] in -1..1."""
    import numpy as np
    import torch

    pixels = np.stack([image(place, text_encoder_skeleton=text_encoder_skeleton) for place in chosen])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn_places(models: "SdxlModels", extra: "ControlInputs | None") -> "np.ndarray":
    """Where the squares are in pictures that are drawn: [64, 2], pixels. By the nearest latents of squares on a grid of 4 pixels."""
    import numpy as np
    import torch

    from library.generation.denoise import Conditioning, Guidance, denoise
    from library.generation.samplers import make_sampler
    from library.models.text_encoders import TextConditioning
    from library.models.vae import scale_latents
    from library.rng import generator

    with torch.no_grad():
        text = TextConditioning.of(models.encode_texts([CAPTION], 75))
    text = TextConditioning(*(part.expand(HELD_OUT, *part.shape[1:]) for part in text))
    sampler = make_sampler("euler", v_prediction=True, zero_terminal_snr=True)
    sampler.set_timesteps(DRAWING_STEPS)
    noise = (
        torch.randn(HELD_OUT, 4, SIDE // 8, SIDE // 8, generator=generator("lllite_learns")) * sampler.init_noise_sigma
    )
    told = [Conditioning.of(text, original=(SIDE, SIDE), target=(SIDE, SIDE))]
    drawn = denoise(
        models.unet, sampler, noise, told, Guidance(1.0), timesteps=sampler.timesteps, generators=generator("steps"),
        control_at=lambda step, steps: extra,
    )  # fmt: skip
    grid = [(left, top) for left in range(0, SIDE - SQUARE + 1, 4) for top in range(0, SIDE - SQUARE + 1, 4)]
    nothing = torch.zeros(len(grid), 4, SIDE // 8, SIDE // 8)
    with torch.no_grad():
        looks = scale_latents(models.encode_images(as_tensor(grid, text_encoder_skeleton=False), nothing))
    nearest = (drawn.flatten(1)[:, None] - looks.flatten(1)[None]).square().sum(-1).argmin(1)
    return np.array([grid[i] for i in nearest.tolist()], float)


if __name__ == "__main__":
    main()
