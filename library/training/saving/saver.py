"""Saver: when a run saves, under which names, and which older files it removes.

Names and retention: contract, formats.md section 6. E is the 1-based epoch, S the optimizer step. A save that fails doesn't
end the run: what was there before stays, --emergency_dir is tried, and the run's exit status tells.
"""

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from library.errors import NotFinite, OptionError, RunError, first_line
from library.files import free_space, make_writable_folder, remove_left_over
from library.log import log
from library.safetensors_io import read_header
from library.training.optim.ema import Ema
from library.training.options.output import ResumeOptions, SavingOptions
from library.training.progress import Progress
from library.training.saving.state import State, write_state
from library.training.saving.uploads import Uploads
from library.training.trainable import Trainable

MakeMetadata = Callable[[int, int], Mapping[str, str]]
"""(steps done, epoch to record) -> the file's metadata"""

When = Literal["step", "epoch", "best", "final"]

_SESSION = "ss_session_id"
_ENDINGS = (".safetensors", ".ckpt", ".pt")
_FAILURES = (RunError, OSError, torch.OutOfMemoryError, MemoryError)  # of a save, after which training goes on


class Space(NamedTuple):
    """What lies on the disk at once, at most: so many models and states, of so many bytes each."""

    models: int
    model_bytes: int
    states: int
    state_bytes: int

    @property
    def needed(self) -> int:
        return self.models * self.model_bytes + self.states * self.state_bytes


def make_output_folder(folder: Path) -> None:
    """See that the output folder can be written in, and clear what killed runs left. Raises OptionError."""
    try:
        make_writable_folder(folder)
        remove_left_over(folder)
    except OSError as error:
        raise OptionError(f"--output_dir {folder}: can't be made or written in: {error.strerror}") from None


class Saver:
    """Saves the parts of a task, and states, on the main process.

    Attributes:
        own: what lies there of this run, though its state doesn't know: saved after it, before the run was broken off.
    """

    def __init__(
        self,
        options: SavingOptions,
        states: ResumeOptions,
        parts: Sequence[Trainable],
        metadata: MakeMetadata,
        dtype: torch.dtype | None,
        num_epochs: int,
        *,
        session_id: str,
        is_main: bool,
        keeps_best: bool = False,
        ema: Ema | None = None,
        uploads: Uploads | None = None,
        sends_states: bool = False,
        optimizer_bytes: int = 0,
    ):
        """Args:
        session_id: of this run; files of other ones are moved aside, not replaced.
        keeps_best: the weights of the lowest validation loss are saved too.
        optimizer_bytes: about those of the optimizer in a state.
        """
        assert options.output_dir is not None
        self._options, self._states, self._parts, self._metadata = options, states, parts, metadata
        self._dtype, self._session_id = dtype, session_id
        self._folder, self._num_epochs, self._is_main = options.output_dir, num_epochs, is_main
        self._every_epochs = options.save_every_n_epochs or 0
        if options.save_n_epoch_ratio:
            self._every_epochs = num_epochs // options.save_n_epoch_ratio or 1
        self._ema, self._uploads, self._sends_states, self._keeps_best = ema, uploads, sends_states, keeps_best
        self._optimizer_bytes = optimizer_bytes
        self._saved: dict[str, list[Path]] = {}
        self.own: Set[Path] = frozenset()
        self.failures: list[str] = []

    @property
    def log_file(self) -> Path:
        """Where the run's step log goes: one JSON object a line."""
        return self._folder / f"{self._options.name}-log.jsonl"

    @property
    def page_file(self) -> Path:
        """Where the run's report goes."""
        return self._folder / f"{self._options.name}-report.html"

    def step_is_due(self, step: int) -> bool:
        return bool(self._options.save_every_n_steps) and step % (self._options.save_every_n_steps or 1) == 0

    def epoch_is_due(self, epoch: int) -> bool:
        """epoch: counted from 1. The last one is saved as the final model alone."""
        return bool(self._every_epochs) and epoch % self._every_epochs == 0 and epoch < self._num_epochs

    def planned(self, total_steps: int, steps_per_epoch: int) -> list[str]:
        """The names, without endings, that a whole run saves under, in order; those too that retention removes again."""
        due: list[tuple[int, When]] = []
        if every := self._options.save_every_n_steps:
            due += [(step, "step") for step in range(every, total_steps + 1, every)]
        epochs = range(1, total_steps // steps_per_epoch + 1)
        due += [(epoch * steps_per_epoch, "epoch") for epoch in epochs if self.epoch_is_due(epoch)]
        due = [*sorted(due, key=lambda entry: entry[0]), (total_steps, "final")]
        return [self._stem(when, Progress(epoch=step // steps_per_epoch, step=step)) for step, when in due]

    def space(self, total_steps: int, done: Progress | None = None) -> Space:
        """What will lie there at once. Args: done: where a resumed run goes on; its earlier saves, which lie there already, don't count."""

        def at_once(last_steps: int | None, last_epochs: int | None) -> int:
            every, begins = self._options.save_every_n_steps, done or Progress()
            kept = last_steps // every + 1 if every and last_steps else None
            epochs = _to_come(self._num_epochs - 1, begins.epoch, self._every_epochs, last_epochs or None)
            return _to_come(total_steps, begins.step, every, kept) + epochs + 1  # the final one

        models = at_once(self._options.save_last_n_steps, self._options.save_last_n_epochs) + self._keeps_best
        states = at_once(*self._last_states) if self._states.save_state else int(self._states.save_state_on_train_end)
        return Space(models, self.model_bytes(), states, self.state_bytes())

    def check_space(self, total_steps: int, done: Progress) -> None:
        """See that everything that is still to lie there at once fits the disk. Raises OptionError with what would help."""
        space, free = self.space(total_steps, done), free_space(self._folder)
        if space.needed > free:
            raise OptionError(
                f"--output_dir {self._folder}: {format_bytes(free)} are free, but {space.models} models of "
                f"{format_bytes(space.model_bytes)} and {space.states} states of {format_bytes(space.state_bytes)} need "
                f"{format_bytes(space.needed)}; save less often, or keep fewer with --save_last_n_steps or --save_last_n_epochs"
            )

    def model_bytes(self) -> int:
        """Of one save, the moving average's file too."""
        size = sum(part.file_bytes(self._dtype) for part in self._parts)
        return size * (2 if self._ema is not None else 1)

    def state_bytes(self) -> int:
        """About those of a state: weights, what the optimizer keeps, and the moving average."""
        weights = sum(tensor.nbytes for part in self._parts for tensor in part.tensors().values())
        averages = () if self._ema is None else self._ema.averages.values()
        return weights + self._optimizer_bytes + sum(average.nbytes for average in averages)

    # ------------------------------------------------------------------------------------------------------------ saves

    def save(self, when: When, progress: Progress, total_steps: int | None = None) -> list[Path]:
        """Save all parts. Returns the files; none on other processes, or if the disk refuses.

        Args: total_steps: of the whole run, which may end before them; None: it doesn't.
        """
        # Step saves record the running epoch, counted from 0; at an epoch's end `progress` counts it already.
        ended_early = total_steps is not None and progress.step < total_steps
        epoch = self._num_epochs if when == "final" and not ended_early else progress.epoch
        paths = self._save(self._stem(when, progress), progress.step, epoch)
        if paths:
            self._remove_old(when, progress, self._options.save_last_n_steps, self._options.save_last_n_epochs, "")
        return paths

    def save_state(self, when: When, progress: Progress, state: State) -> None:
        if self._save_state(f"{self._stem(when, progress)}-state", state):
            self._remove_old(when, progress, *self._last_states, "-state")

    @property
    def _last_states(self) -> tuple[int | None, int | None]:
        """How many steps and epochs old states may be: as they are told, or as models."""
        steps, epochs = self._states.save_last_n_steps_state, self._states.save_last_n_epochs_state
        return (
            self._options.save_last_n_steps if steps is None else steps,
            self._options.save_last_n_epochs if epochs is None else epochs,
        )

    def stop(self) -> None:
        """No step and no epoch is due any more."""
        self._options = dataclasses.replace(self._options, save_every_n_steps=None)
        self._every_epochs = 0

    def close(self) -> None:
        """Wait for what is still uploaded."""
        if self._uploads is not None:
            self._uploads.close()

    def _stem(self, when: When, progress: Progress) -> str:
        name = self._options.output_name
        return {
            "step": f"{name or 'at'}-step{progress.step:08d}",
            "epoch": f"{name or 'epoch'}-{progress.epoch:06d}",
            "best": f"{self._options.name}-best",
            "final": self._options.name,
        }[when]

    def _save(self, stem: str, steps: int, epoch: int) -> list[Path]:
        """Save all parts under that stem. What can't be saved is told and remembered."""
        if not self._is_main:
            return []
        metadata = self._metadata(steps, epoch)
        for folder in self._folders:
            try:
                paths = self._write(folder, stem, metadata)
            except NotFinite:
                raise
            except _FAILURES as error:
                self._failed(error)
                continue
            log.info("saved %s", ", ".join(map(str, paths)))
            if self._uploads is not None:
                for path in paths:
                    self._uploads.send(path)
            if folder == self._folder:
                self._saved[stem] = paths
                return paths
            break
        return []

    @property
    def _folders(self) -> list[Path]:
        """Where saves are tried."""
        return [self._folder, *([self._options.emergency_dir] if self._options.emergency_dir else [])]

    def _failed(self, error: Exception) -> None:
        text = first_line(error) if isinstance(error, torch.OutOfMemoryError | MemoryError) else str(error)
        self.failures.append(text)
        log.error("NOT SAVED: %s", text)

    def _write(self, folder: Path, stem: str, metadata: Mapping[str, str]) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, self.model_bytes())
        self._move_aside(folder, stem)
        paths = [part.save(folder / stem, self._dtype, metadata) for part in self._parts]
        if self._ema is not None:
            with self._ema.applied():
                paths += [part.save(folder / f"{stem}-ema", self._dtype, metadata) for part in self._parts]
        return paths

    def _save_state(self, name: str, state: State) -> bool:
        for folder in self._folders:
            try:
                _check_space(folder, state.nbytes)
                write_state(folder / name, state)
            except _FAILURES as error:
                self._failed(error)
                continue
            log.info("saved state %s", folder / name)
            if self._uploads is not None and self._sends_states:
                self._uploads.send(folder / name)
            if folder == self._folder:
                self._saved[name] = [folder / name]
            return folder == self._folder
        return False

    def _move_aside(self, folder: Path, stem: str) -> None:
        """What another run saved under this name gets a name of its own."""
        if self._saved.get(stem):
            return
        stems = [stem] if self._ema is None else [stem, f"{stem}-ema"]
        for path in (part.path(folder / one) for part in self._parts for one in stems):
            session = _session_of(path)
            is_own = path in self.own if session is None else session == self._session_id
            if path.exists() and not is_own:
                ending = path.suffix if path.suffix in _ENDINGS else ""  # a folder's name may hold a dot
                name = f"{path.name.removesuffix(ending)}.{session or int(path.stat().st_mtime)}"
                names = (f"{name}{'' if number == 1 else f'-{number}'}{ending}" for number in itertools.count(1))
                aside = next(free for free in map(path.with_name, names) if not free.exists())
                path.rename(aside)
                log.warning("%s is of another run; it is %s now", path, aside.name)

    def _remove_old(self, when: When, progress: Progress, steps: int | None, epochs: int | None, ending: str) -> None:
        """Remove what retention no longer wants after a save. Args: ending: of states, "-state"."""
        if when == "step" and steps:
            old = progress.step - steps - 1
            old -= old % (self._options.save_every_n_steps or 1)
            name = self._stem("step", Progress()).removesuffix(f"{0:08d}")
            for stem in list(self._saved):  # those too that were saved between, when a signal ended the run
                step = re.fullmatch(rf"{re.escape(name)}(\d{{8,}}){ending}", stem)
                if step and int(step[1]) <= old:
                    self._remove(stem)
        if when == "epoch" and epochs and progress.epoch >= self._every_epochs * epochs:
            self._remove(self._stem("epoch", Progress(epoch=progress.epoch - self._every_epochs * epochs)) + ending)

    def remember(self, saved: Mapping[str, list[str]]) -> None:
        """Take over what the run had saved before it was resumed, so that retention goes on."""
        for stem, paths in saved.items():  # nothing else is ever removed, whatever a state says
            self._saved[stem] = [self._folder / name for path in paths if (name := Path(path).name).startswith(stem)]

    @property
    def saved(self) -> dict[str, list[str]]:
        """What lies there of this run, by stem."""
        return {stem: [str(path) for path in paths] for stem, paths in self._saved.items()}

    def _remove(self, stem: str) -> None:
        """Remove what this run saved under that stem."""
        for path in self._saved.pop(stem, []):
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:  # open in another program
                log.warning("%s: can't be removed: %s", path, error.strerror)
                continue
            log.info("removed %s", path)


def _session_of(path: Path) -> str | None:
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        session = read_header(path).metadata.get(_SESSION, "")
        return session if re.fullmatch(r"\w{1,40}", session) else None  # it becomes part of a name
    except RunError:
        return None


def _to_come(last: int, done: int, every: int | None, kept: int | None) -> int:
    """How many more saves lie there at once, of those at every so many behind `done` and up to `last`.

    Those up to `done` may lie elsewhere. Args: kept: how many retention leaves beside the one that is being saved; None: all.
    """
    if not every:
        return 0
    to_come = max(0, last // every - done // every)
    return to_come if kept is None else min(to_come, kept + 1)


def _check_space(folder: Path, needed: int) -> None:
    """Raises RunError if that many bytes can't be free there."""
    free = free_space(folder)
    if needed > free:
        raise RunError(f"{folder}: {format_bytes(needed)} are needed, {format_bytes(free)} are free")


def format_bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
