"""Saver: writes a run's models and states, and removes older ones.

Names and retention: contract, formats.md section 6. A save that fails doesn't end the run: the
older file stays, --emergency_dir is tried, and the run ends with exit status 1.
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
from library.training.monitoring.step_log import saved_files
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
# Errors of a save, after which training continues.
_FAILURES = (RunError, OSError, torch.OutOfMemoryError, MemoryError)


def make_output_folder(folder: Path) -> None:
    """Create the output folder, check that it is writable, and remove left-over files.

    Raises OptionError if it isn't writable.
    """
    try:
        make_writable_folder(folder)
        remove_left_over(folder)
    except OSError as error:
        raise OptionError(
            f"--output_dir {folder}: can't be created or written to: {error.strerror}"
        ) from None


class Saver:
    """Saves the trainables of a task, and states, on the main process.

    Attributes:
        schedule: when the run saves, and what.
        trainables: what is saved.
        failures: the messages of saves that failed.
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
            schedule: when the run saves, and what.
            trainables: what is saved.
            metadata: gives the metadata of files.
            dtype: the dtype of saved tensors; None: each tensor's own.
            session_id: of this run; files of other runs are renamed, not replaced.
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
        self.failures: list[str] = []
        self._logged: Set[Path] = frozenset()
        if is_main:
            # The state of a resumed run doesn't list the files that were saved after it.
            self._logged = saved_files(self.log_file, session_id)

    @property
    def log_file(self) -> Path:
        """The step log of the run: one JSON object per line."""
        return self._folder / f"{self._options.name}-log.jsonl"

    @property
    def run_file(self) -> Path:
        """The config file that repeats the run."""
        return self._folder / f"{self._options.name}-run.toml"

    @property
    def page_file(self) -> Path:
        """The report of the run."""
        return self._folder / f"{self._options.name}-report.html"

    # Saving

    def save(self, when: When, progress: Progress, total_steps: int | None = None) -> list[Path]:
        """Save all trainables, and remove what retention no longer keeps.

        Args:
            when: the occasion, which decides the names.
            progress: how far the run is.
            total_steps: optimizer steps of the complete run, which may end earlier; None: it
                doesn't.

        Returns:
            The files; none on other processes than the main one, or if the save failed.
        """
        # Step saves record the running epoch, counted from 0. At an epoch's end, `progress`
        # includes that epoch.
        epoch = progress.epoch
        is_complete = total_steps is None or progress.step >= total_steps
        if when == "final" and is_complete:
            epoch = self.schedule.num_epochs
        paths = self._save(self.schedule.stem(when, progress), progress.step, epoch)
        if paths:
            self._remove_old(
                when,
                progress,
                self._options.save_last_n_steps,
                self._options.save_last_n_epochs,
                "",
            )
        return paths

    def save_state(self, when: When, progress: Progress, state: State) -> None:
        """Save a state, and remove those that retention no longer keeps."""
        if self._save_state(f"{self.schedule.stem(when, progress)}-state", state):
            self._remove_old(when, progress, *self.schedule.last_states, "-state")

    def stop(self) -> None:
        """Save nothing more after steps and epochs."""
        self.schedule = self.schedule.without_saves()

    def close(self) -> None:
        """Wait for uploads that are not finished."""
        if self._uploads is not None:
            self._uploads.close()

    def _save(self, stem: str, steps: int, epoch: int) -> list[Path]:
        """Save all trainables under this stem. A failure is logged and recorded."""
        if not self._is_main:
            return []
        metadata = self._metadata(steps, epoch)
        for folder in self._folders():
            try:
                paths = self._write(folder, stem, metadata)
            except NotFinite:
                raise
            except _FAILURES as error:
                self._record_failure(error)
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

    def _folders(self) -> list[Path]:
        """Return the folders in which a save is tried, in order."""
        folders = [self._folder]
        if self._options.emergency_dir:
            folders.append(self._options.emergency_dir)
        return folders

    def _record_failure(self, error: Exception) -> None:
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        message = first_line(error) if is_out_of_memory else str(error)
        self.failures.append(message)
        log.error("NOT SAVED: %s", message)

    def _write(self, folder: Path, stem: str, metadata: Mapping[str, str]) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        check_free(folder, self.schedule.model_bytes)
        self._rename_foreign_files(folder, stem)
        paths = self._write_trainables(folder / stem, metadata)
        if self._ema is not None:
            with self._ema.applied():
                paths += self._write_trainables(folder / f"{stem}-ema", metadata)
        return paths

    def _write_trainables(self, stem: Path, metadata: Mapping[str, str]) -> list[Path]:
        return [trainable.save(stem, self._dtype, metadata) for trainable in self.trainables]

    def _save_state(self, name: str, state: State) -> bool:
        """Save a state. Returns whether it is in the output folder."""
        for folder in self._folders():
            try:
                check_free(folder, state.nbytes)
                write_state(folder / name, state)
            except _FAILURES as error:
                self._record_failure(error)
                continue
            log.info("saved state %s", folder / name)
            if self._uploads is not None and self._sends_states:
                self._uploads.send(folder / name)
            if folder == self._folder:
                self._saved[name] = [folder / name]
            return folder == self._folder
        return False

    # Files of other runs

    def _rename_foreign_files(self, folder: Path, stem: str) -> None:
        """Rename the files that another run saved under this stem."""
        if self._saved.get(stem):
            return
        stems = [stem] if self._ema is None else [stem, f"{stem}-ema"]
        for trainable in self.trainables:
            for name in stems:
                path = trainable.path(folder / name)
                if path.exists() and not self._is_ours(path):
                    _rename_by_session(path)

    def _is_ours(self, path: Path) -> bool:
        session = _session_of(path)
        if session is None:  # the file doesn't say which run saved it
            return path in self._logged
        return session == self._session_id

    # Retention

    def _remove_old(
        self, when: When, progress: Progress, steps: int | None, epochs: int | None, ending: str
    ) -> None:
        """Remove what retention no longer keeps after a save.

        Args:
            when: the occasion of the save.
            progress: how far the run is.
            steps: how many steps old kept saves may be; None or 0: any.
            epochs: how many epochs old kept saves may be; None or 0: any.
            ending: of the names that are removed: "-state" or "".
        """
        if when == "step" and steps:
            oldest = progress.step - steps - 1
            oldest -= oldest % (self._options.save_every_n_steps or 1)
            name = self.schedule.stem("step", Progress()).removesuffix(f"{0:08d}")
            # A signal can cause a save between two scheduled steps.
            for stem in list(self._saved):
                match = re.fullmatch(rf"{re.escape(name)}(\d{{8,}}){ending}", stem)
                if match and int(match[1]) <= oldest:
                    self._remove(stem)
        if when == "epoch" and epochs:
            epoch = progress.epoch - self.schedule.every_epochs * epochs
            if epoch >= 0:
                self._remove(self.schedule.stem("epoch", Progress(epoch=epoch)) + ending)

    def remember(self, saved: Mapping[str, list[str]]) -> None:
        """Take over the list of saved files from a state, for retention after a resume.

        Only files in the output folder whose names begin with their stem are accepted, whatever the
        state says.
        """
        for stem, paths in saved.items():
            names = [Path(path).name for path in paths]
            self._saved[stem] = [self._folder / name for name in names if name.startswith(stem)]

    @property
    def saved(self) -> dict[str, list[str]]:
        """The paths of this run's saved files that still exist, by stem."""
        return {stem: [str(path) for path in paths] for stem, paths in self._saved.items()}

    def _remove(self, stem: str) -> None:
        """Remove what this run saved under the stem."""
        for path in self._saved.pop(stem, []):
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:  # open in another program
                log.warning("%s: can't be removed: %s", path, error.strerror)
                continue
            log.info("removed %s", path)


def _rename_by_session(path: Path) -> None:
    """Rename NAME.safetensors to NAME.SESSION.safetensors, or NAME.TIME without a session."""
    ending = path.suffix
    if ending not in _ENDINGS:  # a folder, whose name may contain a dot
        ending = ""
    label = _session_of(path) or int(path.stat().st_mtime)
    stem = f"{path.name.removesuffix(ending)}.{label}"
    new_path = path.with_name(f"{stem}{ending}")
    for count in itertools.count(2):
        if not new_path.exists():
            break
        new_path = path.with_name(f"{stem}-{count}{ending}")
    path.rename(new_path)
    log.warning("%s was saved by another run; it is renamed to %s", path, new_path.name)


def _session_of(path: Path) -> str | None:
    """Return the session id in a file's metadata, or None if it has none."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        session = read_header(path).metadata.get(_SESSION, "")
    except RunError:
        return None
    is_valid = re.fullmatch(r"\w{1,40}", session)  # it becomes part of a file name
    return session if is_valid else None
