"""Saver: when a run saves, under which names, and which older files it removes.

Names and retention: contract, formats.md section 6. E is the 1-based epoch, S the optimizer step. A save that fails doesn't
end the run: what was there before stays, --emergency_dir is tried, and the run's exit status tells.
"""

import itertools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import torch

from library.errors import NotFinite, OptionError, RunError, first_line
from library.files import make_writable_folder, remove_left_over
from library.log import log
from library.safetensors_io import read_header
from library.training.optim.ema import Ema
from library.training.progress import Progress
from library.training.saving.schedule import SaveSchedule, When, check_free
from library.training.saving.state import State, write_state
from library.training.saving.uploads import Uploads
from library.training.trainable import Trainable

MakeMetadata = Callable[[int, int], Mapping[str, str]]
"""(steps done, epoch to record) -> the file's metadata"""

_SESSION = "ss_session_id"
_ENDINGS = (".safetensors", ".ckpt", ".pt")
_FAILURES = (RunError, OSError, torch.OutOfMemoryError, MemoryError)  # of a save, after which training goes on


def make_output_folder(folder: Path) -> None:
    """See that the output folder can be written in, and clear what killed runs left. Raises OptionError."""
    try:
        make_writable_folder(folder)
        remove_left_over(folder)
    except OSError as error:
        raise OptionError(f"--output_dir {folder}: can't be made or written in: {error.strerror}") from None


class Saver:
    """Saves the trainables of a task, and states, on the main process.

    Attributes:
        schedule: when what is saved.
        trainables: what is saved.
        own: what lies there of this run, though its state doesn't know: saved after it, before the run was broken off.
    """

    def __init__(
        self,
        schedule: SaveSchedule,
        trainables: Sequence[Trainable],
        metadata: MakeMetadata,
        dtype: torch.dtype | None,
        *,
        session_id: str,
        is_main: bool,
        ema: Ema | None = None,
        uploads: Uploads | None = None,
        sends_states: bool = False,
    ):
        """Initialize the saver.

        Args:
            schedule: when what is saved.
            trainables: what is saved.
            metadata: gives the metadata of files.
            dtype: the dtype of saved tensors; None: each tensor's own.
            session_id: of this run; files of other ones are moved aside, not replaced.
            is_main: whether this is the process that saves.
            ema: the moving average, which is saved too.
            uploads: where saved files are uploaded.
            sends_states: states are uploaded too.
        """
        self.schedule, self.trainables, self._metadata = schedule, trainables, metadata
        self._options, self._folder = schedule.saving, schedule.folder
        self._dtype, self._session_id, self._is_main = dtype, session_id, is_main
        self._ema, self._uploads, self._sends_states = ema, uploads, sends_states
        self._saved: dict[str, list[Path]] = {}
        self.own: Set[Path] = frozenset()
        self.failures: list[str] = []

    @property
    def log_file(self) -> Path:
        """Where the run's step log goes: one JSON object a line."""
        return self._folder / f"{self._options.name}-log.jsonl"

    @property
    def run_file(self) -> Path:
        """The file with which the run can be started again."""
        return self._folder / f"{self._options.name}-run.toml"

    @property
    def page_file(self) -> Path:
        """Where the run's report goes."""
        return self._folder / f"{self._options.name}-report.html"

    # ------------------------------------------------------------------------------------------------------------ saves

    def save(self, when: When, progress: Progress, total_steps: int | None = None) -> list[Path]:
        """Save all parts. Returns the files; none on other processes, or if the disk refuses.

        Args: total_steps: of the whole run, which may end before them; None: it doesn't.
        """
        # Step saves record the running epoch, counted from 0; at an epoch's end `progress` counts it already.
        ended_early = total_steps is not None and progress.step < total_steps
        epoch = self.schedule.num_epochs if when == "final" and not ended_early else progress.epoch
        paths = self._save(self.schedule.stem(when, progress), progress.step, epoch)
        if paths:
            self._remove_old(when, progress, self._options.save_last_n_steps, self._options.save_last_n_epochs, "")
        return paths

    def save_state(self, when: When, progress: Progress, state: State) -> None:
        if self._save_state(f"{self.schedule.stem(when, progress)}-state", state):
            self._remove_old(when, progress, *self.schedule.last_states, "-state")

    def stop(self) -> None:
        """Save nothing more after steps and epochs."""
        self.schedule = self.schedule.without_saves()

    def close(self) -> None:
        """Wait for what is still uploaded."""
        if self._uploads is not None:
            self._uploads.close()

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
        check_free(folder, self.schedule.model_bytes)
        self._move_aside(folder, stem)
        paths = [trainable.save(folder / stem, self._dtype, metadata) for trainable in self.trainables]
        if self._ema is not None:
            with self._ema.applied():
                paths += [
                    trainable.save(folder / f"{stem}-ema", self._dtype, metadata) for trainable in self.trainables
                ]
        return paths

    def _save_state(self, name: str, state: State) -> bool:
        for folder in self._folders:
            try:
                check_free(folder, state.nbytes)
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
        for path in (trainable.path(folder / one) for trainable in self.trainables for one in stems):
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
            name = self.schedule.stem("step", Progress()).removesuffix(f"{0:08d}")
            for stem in list(self._saved):  # those too that were saved between, when a signal ended the run
                step = re.fullmatch(rf"{re.escape(name)}(\d{{8,}}){ending}", stem)
                if step and int(step[1]) <= old:
                    self._remove(stem)
        if when == "epoch" and epochs and progress.epoch >= self.schedule.every_epochs * epochs:
            self._remove(
                self.schedule.stem("epoch", Progress(epoch=progress.epoch - self.schedule.every_epochs * epochs))
                + ending
            )

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
