"""Width and height in pixels. Imports nothing heavy, so that options and dataset files are read without numpy."""

from typing import NamedTuple

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


class Size(NamedTuple):
    """Size of an image or bucket in pixels; latents have an eighth of it. Tensors are height first."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        return self.width / self.height

    @property
    def area(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"
