"""Output: the names of picture files, which never replace another, and writing them with what they were drawn with."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library.files import write_atomically
from library.generation.metadata import save_arguments
from library.generation.options import OutputOptions
from library.generation.request import GenerationRequest

if TYPE_CHECKING:
    from PIL.Image import Image

_SEQUENTIAL = re.compile(r"im_[01]?(\d{6})(?:-\d+)?\.\w+")


@dataclass
class Output:
    """The folder that pictures go to.

    Attributes:
        with_stages: highres fix: names tell the stage.
    """

    options: OutputOptions
    with_stages: bool
    _taken: set[str] = field(default_factory=set)

    def save(
        self, image: "Image", drawing: GenerationRequest, texts: Mapping[str, str], *, place: int, stage: int
    ) -> Path:
        """Write a picture under the contract's name.

        Args:
            place: in its batch.
            stage: of highres fix, 1 or 2.

        Raises RunError if the disk refuses.
        """
        kind = self.options.image_format
        path = self._free(self._stem(drawing, place, stage), "jpg" if kind == "jpeg" else kind)
        write_atomically(path, lambda file: image.save(file, format=kind.upper(), **save_arguments(texts, kind)))
        return path

    def save_sheet(self, image: "Image") -> Path:
        path = self._free(f"contact_sheet_{_now()}", "png")
        write_atomically(path, lambda file: image.save(file, format="PNG"))
        return path

    def _stem(self, drawing: GenerationRequest, place: int, stage: int) -> str:
        prefix = str(stage - 1) if self.with_stages else ""
        if self.options.use_original_file_name and drawing.source is not None:
            return f"{prefix}_{drawing.source.stem}" if stage == 1 and self.with_stages else drawing.source.stem
        if self.options.sequential_file_name:
            return f"im_{prefix}{self._last + drawing.number + 1:06d}"
        return f"im_{_now()}_{prefix}{place:03d}_{drawing.seed}"

    @cached_property
    def _last(self) -> int:
        """The highest number that a file in the folder has when the first one is written."""
        found = (_SEQUENTIAL.fullmatch(path.name) for path in self.options.outdir.glob("im_*"))
        return max((int(match[1]) for match in found if match), default=0)

    def _free(self, stem: str, ending: str) -> Path:
        """A name that no file has: -2, -3 and so on behind it where it is taken."""
        name, number = f"{stem}.{ending}", 2
        while name in self._taken or (self.options.outdir / name).exists():
            name, number = f"{stem}-{number}.{ending}", number + 1
        self._taken.add(name)
        return self.options.outdir / name


def _now() -> str:
    return time.strftime("%Y%m%d%H%M%S")
