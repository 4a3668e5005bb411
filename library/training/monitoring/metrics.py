"""Report: what a run tells while it goes on: the progress bar, TensorBoard, and the log file beside the output.

Losses and norms are read from the device one step late, so that the loop never waits for it.
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
from library.training.monitoring.trackers import Trackers
from library.training.optim.optimizer_step import StepResult


class MicrobatchLoss(NamedTuple):
    """A micro-batch of the step: its pictures' files and their losses [B]."""

    paths: Sequence[str]
    losses: Tensor


class _Pending(NamedTuple):
    step: int
    epoch: int
    scalars: PendingScalars
    overflowed: bool
    seen: Sequence[MicrobatchLoss]
    rates: Mapping[str, float]
    seconds: float  # since the run started, when the step was done


class MetricsLogger:
    """Speaks on the main process; on every process it stops the run when a number isn't finite."""

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
        """Args: log_file: None for no log. done: steps of a run that goes on, whose lines stay."""
        self._bar = progress_bar("steps", total_steps)
        self._recent: deque[float] = deque(maxlen=steps_per_epoch)
        self._epoch_losses: list[float] = []
        self._trackers = trackers
        self._pending: _Pending | None = None
        self._log: IO[str] | None = None
        if is_main and log_file is not None:
            self._open_log(log_file, done)
        self._started = time.monotonic()
        self.overflows = 0
        self.is_asked_to_end = False

    def _open_log(self, path: Path, done: int) -> None:
        """Begin the log file, or go on behind the lines up to a step; those behind it are of a run that was broken off.

        But what that run has saved still lies there.
        """
        kept = [line for line in read_log(path) if line["step"] <= done or "saved" in line] if done else []
        try:
            self._log = open(path, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            log.warning("%s: can't be written: %s", path, error.strerror)
        for line in kept:
            self._write(line)

    def state(self) -> dict[str, Any]:
        return {"recent": list(self._recent), "epoch_losses": self._epoch_losses, "overflows": self.overflows}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Go on behind an optimizer step."""
        self._recent.extend(state["recent"])
        self._epoch_losses = list(state["epoch_losses"])
        self.overflows = state["overflows"]
        self._bar.update(step)

    def step(
        self, step: int, epoch: int, updated: StepResult, seen: Sequence[MicrobatchLoss], rates: Mapping[str, float]
    ) -> None:
        """Take note of a step (counted from 1); tell of the one before it."""
        self.flush()
        self._pending = _Pending(
            step, epoch, PendingScalars(updated.loss, updated.grad_norm, updated.stop_requested), updated.overflowed, seen, rates,
            time.monotonic() - self._started,
        )  # fmt: skip

    def flush(self) -> None:
        """Read what is pending. Raises RunError, naming step and pictures, if the loss or the gradient isn't finite."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, norm, asked = pending.scalars.read()
        self.is_asked_to_end = asked > 0
        if not math.isfinite(loss) or not (pending.overflowed or math.isfinite(norm)):
            self._stop(pending, loss, norm)
        self.overflows += pending.overflowed
        self._tell(pending, loss, norm)

    def _stop(self, pending: _Pending, loss: float, norm: float) -> None:
        bad = [
            path
            for seen in pending.seen
            for path, one in zip(seen.paths, seen.losses.tolist(), strict=True)
            if not math.isfinite(one)
        ]
        if bad:
            cause = f"the loss of {', '.join(sorted(set(bad)))} is not finite"
        elif not math.isfinite(loss):
            cause = "the loss of a picture on another process is not finite"
        else:
            paths = sorted({path for seen in pending.seen for path in seen.paths})
            cause = f"the loss is {loss:.4g}, but its gradient's norm is {norm}; the pictures were {', '.join(paths)}"
        raise RunError(
            f"step {pending.step}: {cause}. The weights of that step were not changed, and nothing was saved after it; "
            "what was saved before is whole. Try a lower learning rate or --mixed_precision no, and look at these pictures"
        )

    def _tell(self, pending: _Pending, loss: float, norm: float) -> None:
        if not pending.overflowed:
            self._recent.append(loss)
            self._epoch_losses.append(loss)
        average = sum(self._recent) / max(1, len(self._recent))
        self._bar.update()
        self._bar.set_postfix(refresh=False, avr_loss=f"{average:.4f}", epoch=pending.epoch + 1)
        values = {
            "loss/current": loss,
            "loss/average": average,
            **{f"lr/{name}": rate for name, rate in pending.rates.items()},
        }
        if self._trackers is not None:
            self._trackers.log(values, pending.step)
        self._write(
            {
                "step": pending.step,
                "epoch": pending.epoch + 1,
                "grad_norm": norm if math.isfinite(norm) else None,
                "seconds": round(pending.seconds, 3),
                **_memory(),
                **values,
            }
        )

    def _write(self, line: Mapping[str, object]) -> None:
        """Add a line to the log file. A full disk there doesn't end the run."""
        if self._log is None:
            return
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        except OSError as error:
            log.warning("%s: can't be written, and is left as it is: %s", self._log.name, error.strerror)
            self._log = None

    def epoch_ended(self, epoch: int, step: int) -> None:
        """Tell the epoch's mean loss; `epoch` is counted from 1, `step` is its last."""
        self.flush()
        if self._trackers is not None and self._epoch_losses:
            mean = sum(self._epoch_losses) / len(self._epoch_losses)
            self._trackers.log({"loss/epoch_average": mean}, step, epoch=epoch)
        self._epoch_losses = []

    def validated(self, loss: float, step: int, epoch: int | None) -> None:
        """Tell a validation loss, and how far it is above the training loss. Args: epoch: counted from 1, at its end."""
        self.flush()
        kind, number = ("step", step) if epoch is None else ("epoch", epoch)
        values = {
            f"loss/validation/{kind}_average": loss,
            f"loss/validation/{kind}_divergence": loss - self.average(),
        }
        log.info("%s %d: validation loss %.4f, training loss %.4f", kind, number, loss, self.average())
        if self._trackers is not None:
            self._trackers.log(values, step, epoch=epoch)
        self._write({"step": step, **values})

    def saved(self, paths: Sequence[Path], step: int, session_id: str) -> None:
        """Note in the log what a run has saved: not every file says whose it is."""
        self._write({"step": step, "session": session_id, "saved": [path.name for path in paths]})

    def log_samples(self, images: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        """Send sample pictures to the trackers."""
        if self._trackers is not None and images:
            self._trackers.images(images, step)

    def average(self) -> float:
        """Mean loss of the last epoch's worth of steps."""
        return sum(self._recent) / max(1, len(self._recent))

    def close(self) -> None:
        self._bar.close()
        if self._trackers is not None:
            self._trackers.close()
        if self._log is not None:
            self._log.close()
        if self.overflows:
            log.warning("%d steps were left out because float16 gradients overflowed", self.overflows)


def _memory() -> dict[str, float]:
    """The most memory of the card that tensors have taken so far, in GiB."""
    if not torch.cuda.is_available():
        return {}
    return {"memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a step log; a torn one, of a run that was killed, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            int(line["step"])
        except (ValueError, KeyError, TypeError):
            continue
        lines.append(line)
    return lines


def saved_files(path: Path, session_id: str) -> set[Path]:
    """The files beside a step log that it says this run was the last to save."""
    lines = [line for line in read_log(path) if isinstance(line.get("saved"), list)]
    sessions = {str(name): line.get("session") for line in lines for name in line["saved"]}
    return {path.parent / name for name, session in sessions.items() if session == session_id}
