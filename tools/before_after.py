"""Draw one prompt without and with a LoRA, from the same noise, side by side: does the LoRA do anything?

python tools/before_after.py --ckpt model.safetensors --network_weights lora.safetensors --prompt "a cat" --output both.png
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import Mistake, run
from library.options import OptionGroup, option, read_options


@dataclass(frozen=True)
class BeforeAfterOptions(OptionGroup):
    """The image."""

    ckpt: str | None = option(None, "base model: a file, a Diffusers folder, or a hub id")
    network_weights: Path | None = option(None, "LoRA file")
    network_mul: float = option(1.0, "strength of the LoRA")
    prompt: str = option("", "what to draw")
    negative_prompt: str = option("", "what not to draw")
    output: Path = option(Path("before_after.png"), "image file to write")
    width: int = option(1024, "width of each image in pixels, a multiple of 32", at_least=32)
    height: int = option(1024, "height in pixels, a multiple of 32", at_least=32)
    steps: int = option(30, "denoising steps", at_least=1)
    scale: float = option(7.0, "how strongly the prompt counts")
    seed: int = option(0, "seed of the first noise")
    bf16: bool = option(False, "compute in bfloat16 instead of float32")

    def mistakes(self) -> Iterable[Mistake]:
        if self.ckpt is None:
            yield Mistake("--ckpt is missing: the base model")
        if self.network_weights is None:
            yield Mistake("--network_weights is missing: the LoRA file")
        if self.width % 32 or self.height % 32:
            yield Mistake(
                f"--width {self.width} --height {self.height}: both must be multiples of 32"
            )


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [BeforeAfterOptions], argv)[BeforeAfterOptions]
    import numpy as np
    import torch
    from PIL import Image

    from library.device import Precision
    from library.generation.single_image import generate_image
    from library.models.checkpoint.reader import open_checkpoint
    from library.models.sdxl import SdxlModels
    from library.models.text_encoders import TextConditioning
    from networks.lora import LoraNetwork
    from networks.lora_file import read_lora
    from networks.lora_settings import LoraSettings
    from networks.targets import all_targets

    assert chosen.ckpt is not None and chosen.network_weights is not None
    checkpoint = open_checkpoint(chosen.ckpt)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = Precision.decide("bf16" if chosen.bf16 else "no", None, no_half_vae=True)
    models = SdxlModels(checkpoint, precision, device)
    targets = all_targets(models.unet, models.text_encoders)
    tensors = read_lora(chosen.network_weights, models.unet)
    network = LoraNetwork.from_tensors(targets, tensors, LoraSettings())
    network.load(tensors, source=chosen.network_weights, allow_partial=False)
    network.to(device, precision.compute).eval()
    network.attach()

    images = []
    for multiplier in (0.0, chosen.network_mul):
        network.set_multiplier(multiplier)
        with torch.no_grad():
            prompt, negative = (
                TextConditioning.of(models.encode_texts([t], 75))
                for t in (chosen.prompt, chosen.negative_prompt)
            )
            image = generate_image(
                models.unet, models.decode_latents, prompt, negative, width=chosen.width, height=chosen.height, steps=chosen.steps,
                scale=chosen.scale, seed=chosen.seed, sampler="euler",
                v_prediction=bool(checkpoint.v_prediction), zero_terminal_snr=bool(checkpoint.zero_terminal_snr),
            )  # fmt: skip
        images.append(image)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(images, axis=1)).save(chosen.output)
    change = np.abs(images[0].astype(int) - images[1]).mean()
    print(
        f"{chosen.output}: without (left) and with the LoRA (right); they differ by {change:.1f} of 255 levels on average"
    )


if __name__ == "__main__":
    run(main)
