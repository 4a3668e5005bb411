"""Output: names of image files, which never replace an existing file, and writing them."""

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
    """The folder to which images are written.

    Attributes:
        options: how files are named and encoded.
        with_stages: whether names contain the stage of highres fix.
    """

    options: OutputOptions
    with_stages: bool
    _taken: set[str] = field(default_factory=set)

    def save(
        self,
        image: "Image",
        request: GenerationRequest,
        texts: Mapping[str, str],
        *,
        batch_index: int,
        stage: int,
    ) -> Path:
        """Write an image under the contract's name and return its path.

        Args:
            image: the image.
            request: its settings.
            texts: the metadata to store.
            batch_index: index of the image within its batch.
            stage: of highres fix, 1 or 2.

        Raises:
            RunError: if the file can't be written.
        """
        image_format = self.options.image_format
        extension = "jpg" if image_format == "jpeg" else image_format
        path = self._free_path(self._stem(request, batch_index, stage), extension)
        arguments = save_arguments(texts, image_format)
        write_atomically(
            path, lambda file: image.save(file, format=image_format.upper(), **arguments)
        )
        return path

    def save_sheet(self, image: "Image") -> Path:
        """Write a contact sheet and return its path."""
        path = self._free_path(f"contact_sheet_{_now()}", "png")
        write_atomically(path, lambda file: image.save(file, format="PNG"))
        return path

    def _stem(self, request: GenerationRequest, batch_index: int, stage: int) -> str:
        prefix = str(stage - 1) if self.with_stages else ""
        if self.options.use_original_file_name and request.init_image is not None:
            stem = request.init_image.stem
            return f"{prefix}_{stem}" if stage == 1 and self.with_stages else stem
        if self.options.sequential_file_name:
            return f"im_{prefix}{self._last_number + request.index + 1:06d}"
        return f"im_{_now()}_{prefix}{batch_index:03d}_{request.seed}"

    @cached_property
    def _last_number(self) -> int:
        """The highest number of a file in the folder when the first image is written."""
        last = 0
        for path in self.options.outdir.glob("im_*"):
            match = _SEQUENTIAL.fullmatch(path.name)
            if match:
                last = max(last, int(match[1]))
        return last

    def _free_path(self, stem: str, extension: str) -> Path:
        """Return a path that doesn't exist, with -2, -3 and so on added if necessary."""
        name = f"{stem}.{extension}"
        count = 1
        while name in self._taken or (self.options.outdir / name).exists():
            count += 1
            name = f"{stem}-{count}.{extension}"
        self._taken.add(name)
        return self.options.outdir / name


def _now() -> str:
    return time.strftime("%Y%m%d%H%M%S")
