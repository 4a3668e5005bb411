"""Metrics during training: progress bar, trackers (TensorBoard, W&B) and step log.

Losses and gradient norms are read from the device one step late, so that the loop never waits for
it.
"""

import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.device import PendingScalars
from library.errors import RunError
from library.log import log, progress_bar
from library.training.monitoring.step_log import read_log
from library.training.monitoring.trackers import Trackers
from library.training.optim.optimizer_step import StepResult


class MicrobatchLoss(NamedTuple):
    """The paths of a micro-batch's images, and their losses [B]."""

    paths: Sequence[str]
    losses: Tensor


class _PendingStep(NamedTuple):
    """A step whose loss and gradient norm are still on their way from the device."""

    step: int
    epoch: int
    scalars: PendingScalars
    overflowed: bool
    microbatches: Sequence[MicrobatchLoss]
    rates: Mapping[str, float]
    seconds: float  # from the start of the run to the end of the step


class MetricsLogger:
    """Logs on the main process, and raises RunError on every process for NaN or Inf.

    Attributes:
        overflows: the number of steps that were skipped because float16 gradients overflowed.
        stop_requested: whether a signal had asked any process to stop, at the last step that was
            read.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        *,
        is_main: bool,
        trackers: Trackers | None,
        log_file: Path | None,
        done: int = 0,
    ):
        """Open the step log.

        Args:
            total_steps: optimizer steps of the run.
            steps_per_epoch: the average loss is over this many steps.
            is_main: whether this is the process that logs.
            trackers: where values are sent; None: nowhere.
            log_file: the step log; None: none is written.
            done: steps done by a run that is resumed; their lines remain in the log.
        """
        self._bar = progress_bar("steps", total_steps)
        self._recent: deque[float] = deque(maxlen=steps_per_epoch)
        self._epoch_losses: list[float] = []
        self._trackers = trackers
        self._pending: _PendingStep | None = None
        self._log: IO[str] | None = None
        if is_main and log_file is not None:
            self._open_log(log_file, done)
        self._started = time.monotonic()
        self.overflows = 0
        self.stop_requested = False

    def _open_log(self, path: Path, done: int) -> None:
        """Create the step log, or keep its lines up to step `done`.

        Later lines belong to a run that was interrupted. Those that name saved files remain, as the
        files exist.
        """
        kept = []
        if done:
            kept = [line for line in read_log(path) if line["step"] <= done or "saved" in line]
        try:
            self._log = open(path, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            log.warning("%s: can't be written: %s", path, error.strerror)
        for line in kept:
            self._write(line)

    def state(self) -> dict[str, Any]:
        """Return what a state stores of the metrics."""
        return {
            "recent": list(self._recent),
            "epoch_losses": self._epoch_losses,
            "overflows": self.overflows,
        }

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Restore the metrics from a state that was saved after this step."""
        self._recent.extend(state["recent"])
        self._epoch_losses = list(state["epoch_losses"])
        self.overflows = state["overflows"]
        self._bar.update(step)

    def log_step(
        self,
        step: int,
        epoch: int,
        result: StepResult,
        microbatches: Sequence[MicrobatchLoss],
        rates: Mapping[str, float],
    ) -> None:
        """Log the step before this one, and start to read this one from the device.

        Args:
            step: 1-based.
            epoch: 0-based.
            result: of the optimizer step.
            microbatches: the losses of the step's micro-batches.
            rates: learning rates by the names of their groups.
        """
        self.flush()
        scalars = PendingScalars(result.loss, result.grad_norm, result.stop_requested)
        seconds = time.monotonic() - self._started
        self._pending = _PendingStep(
            step, epoch, scalars, result.overflowed, microbatches, rates, seconds
        )

    def flush(self) -> None:
        """Log the step that is pending.

        Raises RunError that names the step and its images if the loss or the gradient norm is NaN
        or Inf.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, norm, stop_requests = pending.scalars.read()
        self.stop_requested = stop_requests > 0
        is_norm_valid = pending.overflowed or math.isfinite(norm)
        if not (math.isfinite(loss) and is_norm_valid):
            raise _non_finite_error(pending, loss, norm)
        if pending.overflowed:
            self.overflows += 1
        self._log_values(pending, loss, norm)

    def _log_values(self, pending: _PendingStep, loss: float, norm: float) -> None:
        if not pending.overflowed:
            self._recent.append(loss)
            self._epoch_losses.append(loss)
        average = self.average()
        self._bar.update()
        self._bar.set_postfix(refresh=False, avr_loss=f"{average:.4f}", epoch=pending.epoch + 1)
        values = {"loss/current": loss, "loss/average": average}
        for name, rate in pending.rates.items():
            values[f"lr/{name}"] = rate
        if self._trackers is not None:
            self._trackers.log(values, pending.step)
        line = {
            "step": pending.step,
            "epoch": pending.epoch + 1,
            "grad_norm": norm if math.isfinite(norm) else None,
            "seconds": round(pending.seconds, 3),
        }
        self._write({**line, **_peak_memory(), **values})

    def _write(self, line: Mapping[str, object]) -> None:
        """Append a line to the step log. A full disk does not end the run."""
        if self._log is None:
            return
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        except OSError as error:
            log.warning("%s: can't be written, and ends here: %s", self._log.name, error.strerror)
            self._log = None

    def log_epoch(self, epoch: int, step: int) -> None:
        """Send the mean loss of an epoch to the trackers.

        Args:
            epoch: 1-based.
            step: the last one of the epoch.
        """
        self.flush()
        if self._trackers is not None and self._epoch_losses:
            mean = sum(self._epoch_losses) / len(self._epoch_losses)
            self._trackers.log({"loss/epoch_average": mean}, step, epoch=epoch)
        self._epoch_losses = []

    def log_validation(self, loss: float, step: int, epoch: int | None) -> None:
        """Log a validation loss, and its difference from the training loss.

        Args:
            loss: the validation loss.
            step: the last one done.
            epoch: 1-based, for a validation at an epoch's end; None after a step.
        """
        self.flush()
        kind, index = ("step", step) if epoch is None else ("epoch", epoch)
        values = {
            f"loss/validation/{kind}_average": loss,
            f"loss/validation/{kind}_divergence": loss - self.average(),
        }
        log.info(
            "%s %d: validation loss %.4f, training loss %.4f", kind, index, loss, self.average()
        )
        if self._trackers is not None:
            self._trackers.log(values, step, epoch=epoch)
        self._write({"step": step, **values})

    def log_saved(self, paths: Sequence[Path], step: int, session_id: str) -> None:
        """Record in the step log which files the run has saved, as not every file names its run."""
        self._write({"step": step, "session": session_id, "saved": [path.name for path in paths]})

    def log_samples(self, images: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        """Send sample images, as (prompt, image), to the trackers."""
        if self._trackers is not None and images:
            self._trackers.images(images, step)

    def average(self) -> float:
        """Return the mean loss over the last steps, as many as an epoch has; 0 before the first."""
        return sum(self._recent) / max(1, len(self._recent))

    def close(self) -> None:
        """Close the progress bar, the trackers and the step log."""
        self._bar.close()
        if self._trackers is not None:
            self._trackers.close()
        if self._log is not None:
            self._log.close()
        if self.overflows:
            log.warning(
                "%d steps were skipped because float16 gradients overflowed", self.overflows
            )


def _non_finite_error(pending: _PendingStep, loss: float, norm: float) -> RunError:
    """Return the error for NaN or Inf in a step, which names the images that caused it."""
    paths: set[str] = set()
    causes: set[str] = set()
    for microbatch in pending.microbatches:
        paths.update(microbatch.paths)
        for path, image_loss in zip(microbatch.paths, microbatch.losses.tolist(), strict=True):
            if not math.isfinite(image_loss):
                causes.add(path)
    if causes:
        cause = f"the loss of {', '.join(sorted(causes))} is NaN or Inf"
    elif not math.isfinite(loss):
        cause = "the loss of an image on another process is NaN or Inf"
    else:
        images = ", ".join(sorted(paths))
        cause = f"the loss is {loss:.4g}, but its gradient norm is {norm}; the images were {images}"
    return RunError(
        f"step {pending.step}: {cause}. The weights were not changed by this step, and nothing was "
        "saved after it; earlier saves are complete. Try a lower learning rate or --mixed_precision "
        "no, and check these images"
    )


def _peak_memory() -> dict[str, float]:
    """Return the most VRAM that tensors have taken so far, in GiB; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {"memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}
