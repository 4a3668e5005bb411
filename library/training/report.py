"""Report: what a run tells while it goes on: the progress bar, TensorBoard, and the log file beside the output.

Losses and norms are read from the device one step late, so that the loop never waits for it.
"""

import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from torch import Tensor

from library.devices import Arriving
from library.errors import OptionError, RunError
from library.log import log, progress_bar
from library.training.options import TrackerOptions
from library.training.update import Updated


class Seen(NamedTuple):
    """A micro-batch of the step: its pictures' files and their losses [B]."""

    paths: Sequence[str]
    losses: Tensor


class _Pending(NamedTuple):
    step: int
    epoch: int
    numbers: Arriving
    overflowed: bool
    seen: Sequence[Seen]
    rates: Mapping[str, float]


class Report:
    """Speaks on the main process; on every process it stops the run when a number isn't finite."""

    def __init__(
        self, total_steps: int, steps_per_epoch: int, *, is_main: bool, tracker: "Tracker | None", log_file: Path
    ):
        self._bar = progress_bar("steps", total_steps)
        self._recent: deque[float] = deque(maxlen=steps_per_epoch)
        self._epoch_losses: list[float] = []
        self._tracker = tracker
        self._pending: _Pending | None = None
        self._log: IO[str] | None = open(log_file, "w", encoding="utf-8") if is_main else None  # noqa: SIM115
        self._started = time.monotonic()
        self.overflows = 0

    def step(self, step: int, epoch: int, updated: Updated, seen: Sequence[Seen], rates: Mapping[str, float]) -> None:
        """Take note of a step (counted from 1); tell of the one before it."""
        self.settle()
        self._pending = _Pending(
            step, epoch, Arriving(updated.loss, updated.grad_norm), updated.overflowed, seen, rates
        )

    def settle(self) -> None:
        """Read what is pending. Raises RunError, naming step and pictures, if the loss or the gradient isn't finite."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, norm = pending.numbers.read()
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
        if self._tracker is not None:
            self._tracker.log(values, pending.step)
        if self._log is not None:
            line = {
                "step": pending.step,
                "epoch": pending.epoch + 1,
                "grad_norm": norm if math.isfinite(norm) else None,
                "seconds": round(time.monotonic() - self._started, 3),
                **values,
            }
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()

    def epoch_ended(self, epoch: int) -> None:
        """Tell the epoch's mean loss; `epoch` is counted from 1."""
        self.settle()
        if self._tracker is not None and self._epoch_losses:
            self._tracker.log({"loss/epoch_average": sum(self._epoch_losses) / len(self._epoch_losses)}, epoch)
        self._epoch_losses = []

    def validated(self, loss: float, step: int, epoch: int | None) -> None:
        """Tell a validation loss, and how far it is above the training loss. Args: epoch: counted from 1, at its end."""
        self.settle()
        kind, number = ("step", step) if epoch is None else ("epoch", epoch)
        values = {
            f"loss/validation/{kind}_average": loss,
            f"loss/validation/{kind}_divergence": loss - self.average(),
        }
        log.info("%s %d: validation loss %.4f, training loss %.4f", kind, number, loss, self.average())
        if self._tracker is not None:
            self._tracker.log(values, number)
        if self._log is not None:
            self._log.write(json.dumps({"step": step, **values}) + "\n")
            self._log.flush()

    def average(self) -> float:
        """Mean loss of the last epoch's worth of steps."""
        return sum(self._recent) / max(1, len(self._recent))

    def close(self) -> None:
        self._bar.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._log is not None:
            self._log.close()
        if self.overflows:
            log.warning("%d steps were left out because float16 gradients overflowed", self.overflows)


class Tracker:
    """TensorBoard's log of one run."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise OptionError("--log_with tensorboard: TensorBoard isn't installed; pip install tensorboard") from None
        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise OptionError(f"--logging_dir {folder}: can't be written in: {error.strerror}") from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def open_tracker(options: TrackerOptions, default_name: str) -> Tracker | None:
    """The tracker asked for, in a folder of its own: LOGGING_DIR/PREFIXYYYYmmddHHMMSS/NAME."""
    if options.logging_dir is None:
        return None
    run = options.logging_dir / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
    folder = run / (options.log_tracker_name or default_name)
    log.info("TensorBoard: %s (tensorboard --logdir %s)", folder, options.logging_dir)
    return Tracker(folder)
