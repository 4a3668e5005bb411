"""From nothing to a LoRA: make a tiny SDXL and images, train a LoRA, and generate an image without and with it.

    make quickstart        (or: python tools/quickstart.py)

Everything is made in ./quickstart. The model is random, so the images show patterns; what counts is that the loss falls
and that the LoRA changes the image.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("quickstart")


def main() -> None:
    model, lora = FOLDER / "tiny_sdxl.safetensors", FOLDER / "output" / "shapes.safetensors"
    call("tools/make_tiny_sdxl.py", "--output", model)
    call("tools/make_tiny_dataset.py", "--output", FOLDER / "pictures")
    call(
        "sdxl_train_network.py", "--config_file", ROOT / "configs" / "quickstart.toml", "--pretrained_model_name_or_path", model,
        "--train_data_dir", FOLDER / "pictures", "--output_dir", FOLDER / "output",
    )  # fmt: skip
    image = FOLDER / "before_after.png"
    call(
        "tools/before_after.py", "--ckpt", model, "--network_weights", lora, "--prompt", "a red circle on blue", "--output", image,
        "--width", 128, "--height", 128, "--steps", 12, "--scale", 3,
    )  # fmt: skip
    rows = map(
        json.loads, lora.with_name("shapes-log.jsonl").read_text(encoding="utf-8").splitlines()
    )
    losses = [row["loss/current"] for row in rows if "loss/current" in row]
    fifth = len(losses) // 5
    first, last = (sum(part) / fifth for part in (losses[:fifth], losses[-fifth:]))
    print(
        f"\nThe loss fell from {first:.3f} to {last:.3f} (means of the first and last fifth of {len(losses)} steps)."
    )
    print(f"Your LoRA:   {lora}\nThe image: {image}")
    print(
        "Train on your own: give sdxl_train_network.py your model and your images; README.md says how."
    )


def call(script: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
