"""Make a few captioned images of mixed sizes: coloured shapes on coloured grounds. For tests and a first try.

python tools/make_tiny_dataset.py --output images
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import run
from library.options import OptionGroup, option, read_options

COLOURS = {
    "red": (214, 45, 45), "green": (48, 160, 70), "blue": (40, 80, 200), "yellow": (240, 205, 50), "white": (245, 245, 240),
    "black": (25, 25, 30), "orange": (240, 130, 30), "purple": (130, 60, 170),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "stripe")
SIZES = ((128, 128), (160, 112), (96, 144), (200, 150), (150, 200), (256, 128))

if TYPE_CHECKING:
    from PIL import ImageDraw


@dataclass(frozen=True)
class DatasetOptions(OptionGroup):
    """The images."""

    output: Path = option(
        Path("images"), "folder to make; the images are written to its sub-folder N_shapes"
    )
    count: int = option(6, "how many images", at_least=1)
    repeats: int = option(10, "N: how often each image is shown in an epoch", at_least=1)
    seed: int = option(0, "seed of shapes, colors and places")
    caption_extension: str = option(".txt", "ending of the caption files")


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [DatasetOptions], argv)[DatasetOptions]
    folder = chosen.output / f"{chosen.repeats}_shapes"
    make_images(folder, chosen.count, chosen.seed, chosen.caption_extension)
    print(f"{folder}: {chosen.count} images with captions")


def make_images(
    folder: Path, count: int, seed: int = 0, caption_extension: str = ".txt"
) -> list[Path]:
    """Write `count` images and their captions, and return the images' paths."""
    import random

    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    paths = []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        ground, color = draw.sample(list(COLOURS), 2)
        shape = SHAPES[i % len(SHAPES)]
        image = Image.new("RGB", (width, height), COLOURS[ground])
        side = min(width, height) // 2
        left, top = draw.randrange(width - side), draw.randrange(height - side)
        _draw_shape(
            ImageDraw.Draw(image), shape, (left, top, left + side, top + side), COLOURS[color]
        )
        path = folder / f"picture{i}.png"
        image.save(path)
        path.with_suffix(caption_extension).write_text(
            f"a {color} {shape} on {ground}, flat colours\n", encoding="utf-8"
        )
        paths.append(path)
    return paths


def _draw_shape(
    pen: "ImageDraw.ImageDraw",
    shape: str,
    box: tuple[int, int, int, int],
    color: tuple[int, int, int],
) -> None:
    left, top, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=color)
    else:
        pen.line([(left, top), (right, bottom)], fill=color, width=(right - left) // 4)


if __name__ == "__main__":
    run(main)
