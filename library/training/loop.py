"""The training loop: the only one. What differs between the scripts is their Task."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.utils import gather_object

from library.data.batch import Batch
from library.errors import RunError, first_line
from library.log import is_main_process, log
from library.options import Options
from library.output_lock import OutputLock
from library.rng import SampleRng, seed_global_rng
from library.signals import Signals, end_with_parent, exit_status
from library.training.monitoring.metrics import MetricsLogger, MicrobatchLoss, read_log
from library.training.monitoring.report_page import write_report_page
from library.training.monitoring.sanity_checks import check_equal
from library.training.optim.optimizer_step import StepResult
from library.training.options.output import ResumeOptions, SavingOptions
from library.training.progress import Progress
from library.training.run import Run, capture, place_to_start, restore
from library.training.saving.resume import ResumePoint, find_resume_point
from library.training.saving.saver import When, make_output_folder
from library.training.setup.build_run import build_run
from library.training.setup.inputs import RunInputs
from library.training.tasks.base import Task

_HELP_WITH_MEMORY = "--gradient_checkpointing, --cache_latents, --cache_text_encoder_outputs, --mixed_precision bf16 or a smaller --resolution"
_NOT_SAVED = "nothing is saved; the last saved state is whole"


def train(kind: type[Task], options: Options, found: RunInputs) -> list[Path]:
    """Train what the task says, by the options, on what the preflight found. Returns the final files (main process).

    Raises SystemExit with a signal's status once the run is saved, if one asked for it.
    """
    end_with_parent()
    resumed = find_resume_point(options, found.datasets)
    if resumed is not None and resumed.is_finished and not options[ResumeOptions].verify_resume:
        steps = resumed.facts["step"]
        log.info("%s: this run is finished, after %d steps; there is nothing left to do", resumed.folder, steps)
        return []
    saving = options[SavingOptions]
    assert saving.output_dir is not None
    make_output_folder(saving.output_dir)  # by every process, so that all fail alike
    lock = OutputLock(saving.output_dir, saving.name) if is_main_process() else None
    try:
        return _train(kind, options, found, resumed)
    finally:
        if lock is not None:
            lock.release()


def _train(kind: type[Task], options: Options, found: RunInputs, resumed: ResumePoint | None) -> list[Path]:
    started = time.monotonic()
    run = build_run(kind, options, found, resumed)
    paths: list[Path] = []
    try:
        with Signals() as signals:
            progress = restore(run, resumed) if resumed is not None else place_to_start(run, options[ResumeOptions])
            if resumed is not None and options[ResumeOptions].verify_resume:
                verify(run, progress, options[ResumeOptions].verify_resume or 1, loop)
                return []
            loop(run, progress, signals)
            run.report.flush()
            is_broken_off = progress.step < run.total_steps and is_asked_to_end(run, signals)
            if is_broken_off:
                save(run, progress, "step", stopped=True)
            else:
                run.watch.run_ended()
                paths = save(run, progress, "final")
    finally:
        run.report.close()
        run.saver.close()
    seconds = time.monotonic() - started
    log.info("%d steps in %.0f s, average loss %.4f", progress.step, seconds, run.report.average())
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if run.saver.failures:
        raise RunError(f"{len(run.saver.failures)} saves failed, the first one: {run.saver.failures[0]}")
    if is_broken_off:
        raise SystemExit(0 if signals.asked is None else exit_status(signals.asked))
    return paths


def loop(run: Run, progress: Progress, signals: Signals) -> None:
    """From `progress` to the last step, to where validation has stopped to improve, or to where a signal asks for."""
    update, report = run.update, run.report
    if progress.step == 0 and run.preview.is_due():
        preview(run, progress)
    if is_at_epochs_end(run, progress):  # of a state that was saved between an epoch's last step and its end
        end_epoch(run, progress)
    for window in () if is_done(run, progress) else run.accumulations_from(progress.step):
        rates = update.learning_rates()
        seen = gradients(run, progress, window)
        updated = step(run, progress, signals)
        run.watch.note_gradients(updated.norms)
        for trainable in run.trainables:
            trainable.after_step()
        progress.step += 1
        progress.samples += window[0].place.global_batch_size
        if run.ema is not None:
            run.ema.update(progress.step)
        report.step(progress.step, window[0].place.epoch, updated, seen, rates)
        run.pace.step()
        if progress.step == 1:
            check_equal(run.replicated, run.accelerator.num_processes, progress.step)
        if all(rates.values()) and not updated.overflowed:
            run.watch.stepped()
        after_step(run, progress)
        if is_done(run, progress) or is_asked_to_end(run, signals):
            return


def is_done(run: Run, progress: Progress) -> bool:
    """Whether no step is left, or validation has stopped to improve."""
    if progress.step >= run.total_steps:
        return True
    if run.best.is_lost:
        waited = run.best.waited
        log.info("the validation loss hasn't improved %d times: the run ends at step %d", waited, progress.step)
    return run.best.is_lost


def is_at_epochs_end(run: Run, progress: Progress) -> bool:
    """Whether the last step of the epoch is done, and the epoch isn't ended yet."""
    return progress.step == (progress.epoch + 1) * run.order.steps_per_epoch


def gradients(run: Run, progress: Progress, window: Sequence[Batch]) -> list[MicrobatchLoss]:
    """Add up the gradients of an optimizer step's batches. If memory runs out, all again in smaller parts."""
    while True:
        try:
            return _gradients(run, progress, window)
        except torch.OutOfMemoryError as error:
            if run.update.is_partly_taken:
                raise _out_of_memory(
                    progress,
                    error,
                    f"some of its weights were stepped already, so it can't begin again, and {_NOT_SAVED}",
                ) from None
            if run.accelerator.num_processes > 1:  # the others wait for gradients: what takes all would wait for ever
                raise _out_of_memory(
                    progress, error, f"the other processes can't begin it again with this one, and {_NOT_SAVED}"
                ) from None
            run.update.forget()
            if progress.splits >= max(len(batch) for batch in window):
                save(run, progress, "step", stopped=True)
                raise _out_of_memory(
                    progress, error, f"the run is saved as it was after step {progress.step}"
                ) from None
            progress.splits *= 2
        gc.collect()  # the error's frames hold the tensors of the step
        torch.cuda.empty_cache()
        log.warning(
            "out of memory: from now on each batch is computed in %d parts, with the same result", progress.splits
        )


def _gradients(run: Run, progress: Progress, window: Sequence[Batch]) -> list[MicrobatchLoss]:
    update, device = run.update, run.accelerator.device
    seen = []
    for batch in window:
        parts = batch.parts(progress.splits)
        for number, part in enumerate(parts):
            part = part.to(device)
            place = part.place._replace(is_last_microbatch=part.place.is_last_microbatch and number == len(parts) - 1)
            # For what draws inside modules: dropout.
            seed_global_rng(run.seed, place.epoch, place.microbatch_index, number)
            with update.window(place):
                losses = update.loss_module(
                    part, SampleRng(run.seed, place.epoch, place.first_sample_index, len(part), device)
                )
                update.backward(losses, place)
            seen.append(MicrobatchLoss(part.paths, losses.detach()))
    return seen


def step(run: Run, progress: Progress, signals: Signals) -> StepResult:
    """Step the weights. Memory may run out here too: many optimizers make their state in the first step."""
    try:
        return run.update.step(asked=signals.asked is not None)
    except torch.OutOfMemoryError as error:
        told = f"some of its weights may be stepped already, so {_NOT_SAVED}"
        raise _out_of_memory(progress, error, told, "--optimizer_offload, an 8-bit --optimizer_type, --fused_backward_pass, ") from None  # fmt: skip


def _out_of_memory(progress: Progress, error: torch.OutOfMemoryError, told: str, advice: str = "") -> RunError:
    """Args: told: what becomes of the run. advice: what would help here before all else."""
    return RunError(
        f"step {progress.step + 1}: out of memory ({first_line(error)[:200]}): {told}. What would help: {advice}a smaller "
        f"--train_batch_size, {_HELP_WITH_MEMORY}"
    )


def is_asked_to_end(run: Run, signals: Signals) -> bool:
    """Whether a signal asked any process to end. Of several, all know it a step later, with that step's loss."""
    return signals.asked is not None if run.accelerator.num_processes == 1 else run.report.is_asked_to_end


def after_step(run: Run, progress: Progress) -> None:
    """What is done after an optimizer step."""
    if run.validation.is_due(step=progress.step):
        validate(run, progress)
    if run.preview.is_due(step=progress.step):
        preview(run, progress)
    if run.saver.step_is_due(progress.step):
        save(run, progress, "step")
    if is_at_epochs_end(run, progress):
        end_epoch(run, progress)


def end_epoch(run: Run, progress: Progress) -> None:
    progress.epoch += 1
    run.report.epoch_ended(progress.epoch, progress.step)
    if run.validation.is_due(epoch=progress.epoch):
        validate(run, progress, epoch_ended=True)
    if run.preview.is_due(epoch=progress.epoch):
        preview(run, progress, epoch_ended=True)
    if run.saver.epoch_is_due(progress.epoch):
        save(run, progress, "epoch")


def validate(run: Run, progress: Progress, *, epoch_ended: bool = False) -> None:
    """Take and tell the loss of the pictures that are held out; save if it is the best."""
    accelerator, update = run.accelerator, run.update
    try:
        with update.eval_weights():
            loss = run.validation.loss(update.loss_module, accelerator.device, run.share)
    except torch.OutOfMemoryError:
        if accelerator.num_processes > 1:
            raise
        torch.cuda.empty_cache()
        log.warning("step %d: no memory to validate; take a smaller batch for the validation", progress.step)
        return
    run.report.validated(loss, progress.step, progress.epoch if epoch_ended else None)
    if run.best.is_new(loss, progress.step) and run.keeps_best:
        save(run, progress, "best")
    run.pace.paused()


def preview(run: Run, progress: Progress, *, epoch_ended: bool = False) -> None:
    """Draw the sample pictures."""
    loss_module = run.update.loss_module
    label = f"e{progress.epoch:06d}" if epoch_ended or not progress.step else f"{progress.step:06d}"
    loss_module.eval()
    with run.update.eval_weights():
        images = run.preview.draw(label, run.share, gather_object, saves=run.accelerator.is_main_process)
    loss_module.train()
    run.report.log_samples(images, progress.step)
    run.pace.paused()


def save(run: Run, progress: Progress, when: When, *, stopped: bool = False) -> list[Path]:
    """Save what is trained, once the last step's numbers are known to be finite and the same everywhere.

    Args: stopped: the run ends before its time, and needs a state to be resumed from.
    """
    run.report.flush()
    check_equal(run.replicated, run.accelerator.num_processes, progress.step)
    with ExitStack() as whole:
        for trainable in run.trainables:
            whole.enter_context(trainable.gathered())
        with run.update.eval_weights():
            paths = run.saver.save(when, progress, run.total_steps)
        if paths:
            run.report.saved(paths, progress.step, run.session_id)
        at_end = when == "final" or stopped
        wants_state = run.states.save_state or (run.states.save_state_on_train_end and at_end)
        if wants_state and when != "best" and (run.accelerator.is_main_process or run.shards is not None):
            state = capture(run, progress, finished=when == "final" and bool(paths))
            if run.accelerator.is_main_process:
                run.saver.save_state(when, progress, state)
    if run.accelerator.is_main_process:
        write_page(run, progress)
    run.pace.paused()
    return paths


def write_page(run: Run, progress: Progress) -> None:
    """The report beside the output. If it can't be written, that is told and no more."""
    name = run.saver.page_file.stem.removesuffix("-report")
    facts = [
        ("steps", f"{progress.step} of {run.total_steps}, {run.order.steps_per_epoch} an epoch"),
        (
            "trained",
            f"{sum(p.numel() for trainable in run.trainables for group in trainable.groups() for p in group.parameters.values()):,} numbers",
        ),
        ("processes", str(run.accelerator.num_processes)),
        ("device", str(run.accelerator.device)),
        ("seed", str(run.seed)),
    ]
    try:
        write_report_page(
            run.saver.log_file, run.saver.page_file, title=name, options=run.shown, facts=facts, samples=run.preview.small()
        )  # fmt: skip
    except (RunError, OSError) as error:
        log.warning("the report isn't written: %s", error)


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
    report = MetricsLogger(
        last, run.order.steps_per_epoch, is_main=run.accelerator.is_main_process, trackers=None, log_file=temporary
    )
    nothing = dataclasses.replace(run.validation, every_steps=None, every_epochs=None)
    replay = dataclasses.replace(
        run, report=report, validation=nothing, preview=dataclasses.replace(run.preview, prompts=()), total_steps=last
    )  # fmt: skip
    run.saver.stop()
    try:
        loop(replay, progress, Signals())
        report.flush()
        return {line["step"]: line for line in read_log(Path(temporary)) if "loss/current" in line}
    finally:
        report.close()
        temporary.unlink(missing_ok=True)
