"""SaveSchedule: when a run saves, the names, how many saves it keeps, and the disk space.

Names and retention: contract, formats.md section 6. E is the 1-based epoch, S the optimizer step.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from library.errors import OptionError, RunError
from library.files import format_bytes, free_space
from library.training.options.output import ResumeOptions, SavingOptions
from library.training.progress import Progress
from library.training.trainable import Trainable

_SHOWN = 6  # names of saves in a line

When = Literal["step", "epoch", "best", "final"]


class DiskSpace(NamedTuple):
    """The most models and states that are on the disk at once, and the bytes of each."""

    models: int
    model_bytes: int
    states: int
    state_bytes: int

    @property
    def needed(self) -> int:
        """Bytes of all of them."""
        return self.models * self.model_bytes + self.states * self.state_bytes


@dataclass(frozen=True)
class SaveSchedule:
    """When a run saves what.

    Attributes:
        saving: the options of saved models.
        states: the options of saved states.
        num_epochs: epochs of the run.
        keeps_best: the weights with the lowest validation loss are saved too.
        model_bytes: approximate size of a saved model, with the moving average's file.
        state_bytes: approximate size of a saved state.
    """

    saving: SavingOptions
    states: ResumeOptions
    num_epochs: int
    keeps_best: bool = False
    model_bytes: int = 0
    state_bytes: int = 0

    @property
    def folder(self) -> Path:
        """--output_dir."""
        assert self.saving.output_dir is not None
        return self.saving.output_dir

    @property
    def every_epochs(self) -> int:
        """Epochs between saves; 0: none is saved after an epoch."""
        if self.saving.save_n_epoch_ratio:
            return self.num_epochs // self.saving.save_n_epoch_ratio or 1
        return self.saving.save_every_n_epochs or 0

    @property
    def last_states(self) -> tuple[int | None, int | None]:
        """The most steps and epochs of age of kept states; by default, those of models."""
        steps, epochs = self.states.save_last_n_steps_state, self.states.save_last_n_epochs_state
        if steps is None:
            steps = self.saving.save_last_n_steps
        if epochs is None:
            epochs = self.saving.save_last_n_epochs
        return steps, epochs

    def without_saves(self) -> "SaveSchedule":
        """Return a schedule by which nothing is saved after a step or an epoch."""
        saving = dataclasses.replace(
            self.saving, save_every_n_steps=None, save_every_n_epochs=None, save_n_epoch_ratio=None
        )
        return dataclasses.replace(self, saving=saving)

    def step_is_due(self, step: int) -> bool:
        """Return whether a model is saved after this optimizer step (1-based)."""
        every = self.saving.save_every_n_steps
        return bool(every) and step % (every or 1) == 0

    def epoch_is_due(self, epoch: int) -> bool:
        """Return whether a model is saved after this epoch (1-based).

        The last one is saved as the final model.
        """
        every = self.every_epochs
        return bool(every) and epoch % every == 0 and epoch < self.num_epochs

    def stem(self, when: When, progress: Progress) -> str:
        """Return the name, without ending, of what is saved now."""
        name = self.saving.output_name
        match when:
            case "step":
                return f"{name or 'at'}-step{progress.step:08d}"
            case "epoch":
                return f"{name or 'epoch'}-{progress.epoch:06d}"
            case "best":
                return f"{self.saving.name}-best"
            case "final":
                return self.saving.name

    def planned_names(self, total_steps: int, steps_per_epoch: int) -> list[str]:
        """Return the names, without endings, of all models that a complete run saves, in order.

        Those that retention removes again are among them.
        """
        due: list[tuple[int, When]] = []
        every = self.saving.save_every_n_steps
        if every:
            due += [(step, "step") for step in range(every, total_steps + 1, every)]
        for epoch in range(1, total_steps // steps_per_epoch + 1):
            if self.epoch_is_due(epoch):
                due.append((epoch * steps_per_epoch, "epoch"))
        due.sort(key=lambda entry: entry[0])
        due.append((total_steps, "final"))
        return [
            self.stem(when, Progress(epoch=step // steps_per_epoch, step=step))
            for step, when in due
        ]

    def disk_space(self, total_steps: int, done: Progress | None = None) -> DiskSpace:
        """Return what will be on the disk at once.

        Args:
            total_steps: optimizer steps of the run.
            done: the progress of a resumed run; its earlier saves are on the disk already and don't
                count.
        """
        done = done or Progress()
        models = self._models_at_once(
            total_steps, done, self.saving.save_last_n_steps, self.saving.save_last_n_epochs
        )
        if self.keeps_best:
            models += 1
        states = 0
        if self.states.save_state:
            states = self._models_at_once(total_steps, done, *self.last_states)
        elif self.states.save_state_on_train_end:
            states = 1
        return DiskSpace(models, self.model_bytes, states, self.state_bytes)

    def _models_at_once(
        self, total_steps: int, done: Progress, last_steps: int | None, last_epochs: int | None
    ) -> int:
        every = self.saving.save_every_n_steps
        kept_steps = last_steps // every + 1 if every and last_steps else None
        of_steps = _still_to_save(total_steps, done.step, every, kept_steps)
        of_epochs = _still_to_save(
            self.num_epochs - 1, done.epoch, self.every_epochs, last_epochs or None
        )
        return of_steps + of_epochs + 1  # the final one

    def check_space(self, total_steps: int, done: Progress) -> None:
        """Raise OptionError if everything still to be saved doesn't fit on the disk."""
        space, free = self.disk_space(total_steps, done), free_space(self.folder)
        if space.needed > free:
            raise OptionError(
                f"--output_dir {self.folder}: {format_bytes(free)} are free, but {space.models} models "
                f"of {format_bytes(space.model_bytes)} and {space.states} states of "
                f"{format_bytes(space.state_bytes)} need {format_bytes(space.needed)}; save less often, "
                "or keep fewer with --save_last_n_steps or --save_last_n_epochs"
            )


def saved_model_bytes(
    trainables: Sequence[Trainable], dtype: torch.dtype | None, *, has_ema: bool
) -> int:
    """Return the approximate size of a saved model, with the moving average's file.

    Args:
        trainables: what is saved.
        dtype: the dtype of saved tensors; None: each tensor's own.
        has_ema: a moving average is kept.
    """
    size = sum(trainable.file_bytes(dtype) for trainable in trainables)
    return size * 2 if has_ema else size


def saved_state_bytes(
    trainables: Sequence[Trainable], optimizer_bytes: int, *, has_ema: bool
) -> int:
    """Return the approximate size of a state: weights, optimizer state and moving average.

    Args:
        trainables: what is trained.
        optimizer_bytes: what the optimizer keeps.
        has_ema: a moving average, which is float32, is kept of what is trained.
    """
    size = optimizer_bytes
    for trainable in trainables:
        for parameter in trainable.tensors().values():
            size += parameter.nbytes
            if has_ema and parameter.requires_grad:
                size += parameter.numel() * torch.float32.itemsize
    return size


def format_saves(schedule: SaveSchedule, total_steps: int, steps_per_epoch: int) -> list[str]:
    """Return two lines: the names of all saves of a run, and the disk space that they need."""
    names = schedule.planned_names(total_steps, steps_per_epoch)
    space = schedule.disk_space(total_steps)
    shown = names
    if len(names) > _SHOWN:
        shown = [*names[: _SHOWN - 2], "…", *names[-2:]]
    states = ""
    if space.states:
        states = f" and {space.states} states of about {format_bytes(space.state_bytes)}"
    return [
        f"saves: {len(names)} of {format_bytes(space.model_bytes)}: {', '.join(shown)}",
        f"on the disk at once: at most {space.models} saves{states}, {format_bytes(space.needed)}",
    ]


def check_free(folder: Path, needed: int) -> None:
    """Raise RunError if the folder's disk has fewer free bytes than needed."""
    free = free_space(folder)
    if needed > free:
        raise RunError(
            f"{folder}: {format_bytes(needed)} are needed, {format_bytes(free)} are free"
        )


def _still_to_save(last: int, done: int, every: int | None, kept: int | None) -> int:
    """Return the most remaining saves, at multiples of `every`, on the disk at once.

    Args:
        last: the last step or epoch.
        done: the steps or epochs done; their saves may be elsewhere.
        every: steps or epochs between saves; None or 0: there are none.
        kept: how many retention keeps in addition to the one being saved; None: all.
    """
    if not every:
        return 0
    saves = max(0, last // every - done // every)
    return saves if kept is None else min(saves, kept + 1)
