"""Saver: when a run saves, under which names, and which older files it removes.

Names and retention: contract, formats.md section 6. E is the 1-based epoch, S the optimizer step.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from library.errors import OptionError
from library.files import make_writable_folder
from library.log import log
from library.training.ema import Ema
from library.training.options import SavingOptions
from library.training.progress import Progress
from library.training.task import Part
from library.training.uploads import Uploads

MakeMetadata = Callable[[int, int], Mapping[str, str]]
"""(steps done, epoch to record) -> the file's metadata"""


def make_output_folder(folder: Path) -> None:
    """See that the output folder can be written in. Raises OptionError."""
    try:
        make_writable_folder(folder)
    except OSError as error:
        raise OptionError(f"--output_dir {folder}: can't be made or written in: {error.strerror}") from None


class Saver:
    """Saves the parts of a task on the main process."""

    def __init__(
        self,
        options: SavingOptions,
        parts: list[Part],
        metadata: MakeMetadata,
        dtype: torch.dtype | None,
        num_epochs: int,
        *,
        is_main: bool,
        ema: Ema | None = None,
        uploads: Uploads | None = None,
    ):
        assert options.output_dir is not None
        self._options, self._parts, self._metadata, self._dtype = options, parts, metadata, dtype
        self._folder, self._num_epochs, self._is_main = options.output_dir, num_epochs, is_main
        self._every_epochs = options.save_every_n_epochs or 0
        if options.save_n_epoch_ratio:
            self._every_epochs = num_epochs // options.save_n_epoch_ratio or 1
        self._ema, self._uploads = ema, uploads
        self._saved: dict[str, list[Path]] = {}

    @property
    def log_file(self) -> Path:
        """Where the run's step log goes: one JSON object a line."""
        return self._folder / f"{self._options.output_name or 'last'}-log.jsonl"

    def step_is_due(self, step: int) -> bool:
        return bool(self._options.save_every_n_steps) and step % (self._options.save_every_n_steps or 1) == 0

    def epoch_is_due(self, epoch: int) -> bool:
        """epoch: counted from 1. The last one is saved as the final model alone."""
        return bool(self._every_epochs) and epoch % self._every_epochs == 0 and epoch < self._num_epochs

    def save_step(self, progress: Progress) -> list[Path]:
        """Step saves record the running epoch, counted from 0."""
        paths = self._save(self._step_stem(progress.step), progress.step, progress.epoch)
        last, every = self._options.save_last_n_steps, self._options.save_every_n_steps
        if last and every:
            old = progress.step - last - 1
            old -= old % every
            if old >= 0:
                self._remove(self._step_stem(old))
        return paths

    def save_epoch(self, progress: Progress) -> list[Path]:
        """At the end of an epoch, which `progress` counts already."""
        paths = self._save(self._epoch_stem(progress.epoch), progress.step, progress.epoch)
        last = self._options.save_last_n_epochs
        if last and progress.epoch - self._every_epochs * last >= 0:
            self._remove(self._epoch_stem(progress.epoch - self._every_epochs * last))
        return paths

    def save_final(self, progress: Progress) -> list[Path]:
        return self._save(self._options.output_name or "last", progress.step, self._num_epochs)

    def save_best(self, progress: Progress) -> list[Path]:
        """In the place of the best one before."""
        return self._save(f"{self._options.output_name or 'last'}-best", progress.step, progress.epoch)

    def close(self) -> None:
        """Wait for what is still uploaded."""
        if self._uploads is not None:
            self._uploads.close()

    def _step_stem(self, step: int) -> str:
        return f"{self._options.output_name or 'at'}-step{step:08d}"

    def _epoch_stem(self, epoch: int) -> str:
        return f"{self._options.output_name or 'epoch'}-{epoch:06d}"

    def _save(self, stem: str, steps: int, epoch: int) -> list[Path]:
        if not self._is_main:
            return []
        metadata = self._metadata(steps, epoch)
        paths = [part.save(self._folder / stem, self._dtype, metadata) for part in self._parts]
        if self._ema is not None:
            with self._ema.applied():
                paths += [part.save(self._folder / f"{stem}-ema", self._dtype, metadata) for part in self._parts]
        self._saved[stem] = paths
        if self._uploads is not None:
            for path in paths:
                self._uploads.send(path)
        log.info("saved %s", ", ".join(map(str, paths)))
        return paths

    def _remove(self, stem: str) -> None:
        """Remove what this run saved under that stem."""
        for path in self._saved.pop(stem, []):
            path.unlink(missing_ok=True)
            log.info("removed %s", path)
