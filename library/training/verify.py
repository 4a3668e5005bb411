"""Verify: replay steps from a state and compare them with what the step log says of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from library.errors import RunError
from library.log import log
from library.signals import Signals
from library.training.progress import Progress
from library.training.report import Report, read_log
from library.training.run import Run

_COMPARED = ("loss/current", "grad_norm")


def verify(run: Run, progress: Progress, steps: int, loop: Callable[[Run, Progress, Signals], None]) -> None:
    """Do up to so many steps again, as they were done after the state was saved. Saves nothing.

    Raises RunError at the first number that differs, or if the log has no step behind the state.
    """
    log_file = run.saver.log_file
    logged = {
        line["step"]: line for line in read_log(log_file) if "loss/current" in line and line["step"] > progress.step
    }
    last = min(progress.step + steps, max(logged, default=0), run.total_steps)
    if last <= progress.step:
        raise RunError(f"{log_file}: it has no steps behind the state's {progress.step}; resume from an older state")
    replayed = _replay(run, progress, last, loop)
    if not run.accelerator.is_main_process:  # which alone has a log
        return
    for step in range(progress.step - len(replayed) + 1, last + 1):
        for name in _COMPARED:
            if replayed[step][name] != logged[step][name]:
                raise RunError(
                    f"step {step}: {name} is {replayed[step][name]!r}, the log says {logged[step][name]!r}: the run doesn't repeat itself"
                )
    log.info(
        "verified: %d steps up to step %d give the log's losses and gradient norms, bit by bit", len(replayed), last
    )


def _replay(run: Run, progress: Progress, last: int, loop: Callable[[Run, Progress, Signals], None]) -> dict[int, dict]:
    temporary = run.saver.log_file.with_name(f".{run.saver.log_file.name}.replay")
    report = Report(
        last, run.order.steps_per_epoch, is_main=run.accelerator.is_main_process, trackers=None, log_file=temporary
    )
    nothing = dataclasses.replace(run.validation, every_steps=None, every_epochs=None)
    replay = dataclasses.replace(
        run, report=report, validation=nothing, preview=dataclasses.replace(run.preview, prompts=()), total_steps=last
    )  # fmt: skip
    run.saver.stop()
    try:
        loop(replay, progress, Signals())
        report.settle()
        return {line["step"]: line for line in read_log(Path(temporary)) if "loss/current" in line}
    finally:
        report.close()
        temporary.unlink(missing_ok=True)
