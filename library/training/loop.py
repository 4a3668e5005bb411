"""The training loop: the only one. The scripts differ in their Task."""

import dataclasses
import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from accelerate.utils import gather_object

from library.data.batch import Batch
from library.errors import RunError, first_line
from library.log import log
from library.signals import Signals, exit_status
from library.training.forward import accumulate_gradients
from library.training.monitoring.metrics import MetricsLogger, MicrobatchLoss
from library.training.monitoring.report_page import write_report_page
from library.training.monitoring.sanity_checks import check_ranks_in_sync
from library.training.monitoring.step_log import read_log
from library.training.optim.optimizer_step import StepResult
from library.training.progress import Progress
from library.training.run import Run, capture, restore, start
from library.training.saving.resume import ResumePoint
from library.training.saving.schedule import When

_HELP_WITH_MEMORY = (
    "a smaller --train_batch_size, --gradient_checkpointing, --cache_latents, --cache_text_encoder_outputs, "
    "--mixed_precision bf16 or a smaller --resolution"
)
_NOT_SAVED = "nothing is saved; the last saved state is whole"


def train(run: Run, resumed: ResumePoint | None) -> None:
    """Train a run to its end, and save it.

    Args:
        run: the run.
        resumed: the state that it is resumed from.

    Raises:
        RunError: the run can't continue, or saves failed.
        SystemExit: a signal asked for the end, and the run is saved; the status is the signal's.
    """
    started = time.monotonic()
    is_broken_off = False
    try:
        with Signals() as signals:
            progress = start(run) if resumed is None else restore(run, resumed)
            if run.states.verify_resume:
                verify(run, progress, run.states.verify_resume)
                return
            loop(run, progress, signals)
            run.metrics.flush()
            is_broken_off = progress.step < run.total_steps and is_asked_to_end(run, signals)
            if is_broken_off:
                save(run, progress, "step", stopped=True)
            else:
                run.gradient_check.run_ended()
                save(run, progress, "final")
    finally:
        run.metrics.close()
        run.saver.close()
    seconds = time.monotonic() - started
    log.info("%d steps in %.0f s, average loss %.4f", progress.step, seconds, run.metrics.average())
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    failures = run.saver.failures
    if failures:
        raise RunError(f"{len(failures)} saves failed, the first one: {failures[0]}")
    if is_broken_off:
        raise SystemExit(0 if signals.asked is None else exit_status(signals.asked))


def loop(run: Run, progress: Progress, signals: Signals) -> None:
    """Train from `progress` to the last step, or until validation stops improving, or a signal asks for the end."""
    optimizer_step, metrics = run.optimizer_step, run.metrics
    if progress.step == 0 and run.preview.is_due():
        preview(run, progress)
    if is_at_end_of_epoch(
        run, progress
    ):  # of a state saved between an epoch's last step and its end
        end_epoch(run, progress)
    if is_done(run, progress):
        return
    for accumulation in run.accumulations_from(progress.step):
        rates = optimizer_step.learning_rates()
        losses = gradients(run, progress, accumulation)
        result = step(run, progress, signals)
        run.gradient_check.note_gradients(result.norms)
        for trainable in run.trainables:
            trainable.after_step()
        progress.step += 1
        position = accumulation[0].position
        progress.samples += position.global_batch_size
        if run.ema is not None:
            run.ema.update(progress.step)
        metrics.log_step(progress.step, position.epoch, result, losses, rates)
        run.slowdown.step_done()
        if progress.step == 1:
            check_ranks_in_sync(run.replicated, run.accelerator.num_processes, progress.step)
        if all(rates.values()) and not result.overflowed:
            run.gradient_check.step_done()
        after_step(run, progress)
        if is_done(run, progress) or is_asked_to_end(run, signals):
            return


def is_done(run: Run, progress: Progress) -> bool:
    """Return whether no step is left, or validation has stopped improving."""
    if progress.step >= run.total_steps:
        return True
    if run.best.patience_is_over:
        waited = run.best.waited
        log.info(
            "the validation loss hasn't improved %d times: the run ends at step %d",
            waited,
            progress.step,
        )
    return run.best.patience_is_over


def is_at_end_of_epoch(run: Run, progress: Progress) -> bool:
    """Return whether the last step of the epoch is done, and the epoch hasn't been ended yet."""
    return progress.step == (progress.epoch + 1) * run.order.steps_per_epoch


def gradients(run: Run, progress: Progress, accumulation: Sequence[Batch]) -> list[MicrobatchLoss]:
    """Accumulate the gradients of an optimizer step. If memory runs out, start again with smaller micro-batches."""
    while True:
        try:
            return accumulate_gradients(
                run.optimizer_step,
                accumulation,
                splits=progress.splits,
                seed=run.seed,
                device=run.accelerator.device,
            )
        except torch.OutOfMemoryError as error:
            if run.optimizer_step.is_partly_taken:
                outcome = f"some of its weights were stepped already, so it can't begin again, and {_NOT_SAVED}"
                raise _out_of_memory(progress, error, outcome) from None
            if (
                run.accelerator.num_processes > 1
            ):  # the others wait for gradients: collective work would wait for ever
                outcome = (
                    f"the other processes can't begin it again with this one, and {_NOT_SAVED}"
                )
                raise _out_of_memory(progress, error, outcome) from None
            run.optimizer_step.discard()
            if progress.splits >= max(len(batch) for batch in accumulation):
                save(run, progress, "step", stopped=True)
                outcome = f"the run is saved as it was after step {progress.step}"
                raise _out_of_memory(progress, error, outcome) from None
            progress.splits *= 2
        gc.collect()  # the error's frames hold the tensors of the step
        torch.cuda.empty_cache()
        log.warning(
            "out of memory: from now on each batch is computed in %d parts, with the same result",
            progress.splits,
        )


def step(run: Run, progress: Progress, signals: Signals) -> StepResult:
    """Step the weights. Memory may run out here too: many optimizers make their state in the first step."""
    try:
        return run.optimizer_step.step(stop_requested=signals.asked is not None)
    except torch.OutOfMemoryError as error:
        outcome = f"some of its weights may be stepped already, so {_NOT_SAVED}"
        advice = "--optimizer_offload, an 8-bit --optimizer_type, --fused_backward_pass, "
        raise _out_of_memory(progress, error, outcome, advice) from None


def _out_of_memory(
    progress: Progress, error: torch.OutOfMemoryError, outcome: str, advice: str = ""
) -> RunError:
    """Return the error that ends the run.

    Args:
        progress: how far the run is.
        error: torch's error.
        outcome: what happens to the run.
        advice: what would help most here.
    """
    return RunError(
        f"step {progress.step + 1}: out of memory ({first_line(error)[:200]}): {outcome}. What would help: {advice}"
        f"{_HELP_WITH_MEMORY}"
    )


def is_asked_to_end(run: Run, signals: Signals) -> bool:
    """Return whether a signal asked any process to end. Several processes learn it a step later, with the loss."""
    return (
        signals.asked is not None
        if run.accelerator.num_processes == 1
        else run.metrics.stop_requested
    )


def after_step(run: Run, progress: Progress) -> None:
    """Validate, generate samples and save, if they are due after this optimizer step."""
    if run.validation.is_due(step=progress.step):
        validate(run, progress)
    if run.preview.is_due(step=progress.step):
        preview(run, progress)
    if run.saver.schedule.step_is_due(progress.step):
        save(run, progress, "step")
    if is_at_end_of_epoch(run, progress):
        end_epoch(run, progress)


def end_epoch(run: Run, progress: Progress) -> None:
    """Validate, generate samples and save, if they are due after this epoch."""
    progress.epoch += 1
    run.metrics.log_epoch(progress.epoch, progress.step)
    if run.validation.is_due(epoch=progress.epoch):
        validate(run, progress, epoch_ended=True)
    if run.preview.is_due(epoch=progress.epoch):
        preview(run, progress, epoch_ended=True)
    if run.saver.schedule.epoch_is_due(progress.epoch):
        save(run, progress, "epoch")


def validate(run: Run, progress: Progress, *, epoch_ended: bool = False) -> None:
    """Log the loss of the images that are held out; save if it is the lowest."""
    accelerator, optimizer_step = run.accelerator, run.optimizer_step
    rank, world_size = run.rank_and_size
    try:
        with optimizer_step.eval_weights():
            loss = run.validation.loss(
                optimizer_step.loss_module, accelerator.device, rank=rank, world_size=world_size
            )
    except torch.OutOfMemoryError:
        if accelerator.num_processes > 1:
            raise
        torch.cuda.empty_cache()
        log.warning(
            "step %d: no memory to validate; take a smaller batch for the validation", progress.step
        )
        return
    run.metrics.log_validation(loss, progress.step, progress.epoch if epoch_ended else None)
    if run.best.is_new(loss, progress.step) and run.keeps_best:
        save(run, progress, "best")
    run.slowdown.paused()


def preview(run: Run, progress: Progress, *, epoch_ended: bool = False) -> None:
    """Generate the sample images."""
    loss_module = run.optimizer_step.loss_module
    label = f"{progress.step:06d}"
    if epoch_ended or progress.step == 0:
        label = f"e{progress.epoch:06d}"
    loss_module.eval()
    rank, world_size = run.rank_and_size
    with run.optimizer_step.eval_weights():
        images = run.preview.generate(
            label,
            gather_object,
            rank=rank,
            world_size=world_size,
            saves=run.accelerator.is_main_process,
        )
    loss_module.train()
    run.metrics.log_samples(images, progress.step)
    run.slowdown.paused()


def save(run: Run, progress: Progress, when: When, *, stopped: bool = False) -> None:
    """Save models and states, once the last step's metrics are known to be finite and the same on all processes.

    Args:
        run: the run.
        progress: how far it is.
        when: what the save is for.
        stopped: the run ends early, and needs a state to be resumed from.
    """
    run.metrics.flush()
    check_ranks_in_sync(run.replicated, run.accelerator.num_processes, progress.step)
    with ExitStack() as gathered:
        for trainable in run.trainables:
            gathered.enter_context(trainable.gathered())
        with run.optimizer_step.eval_weights():
            paths = run.saver.save(when, progress, run.total_steps)
        if paths:
            run.metrics.log_saved(paths, progress.step, run.session_id)
        at_end = when == "final" or stopped
        wants_state = run.states.save_state or (run.states.save_state_on_train_end and at_end)
        if (
            wants_state
            and when != "best"
            and (run.accelerator.is_main_process or run.shards is not None)
        ):
            state = capture(run, progress, finished=when == "final" and bool(paths))
            if run.accelerator.is_main_process:
                run.saver.save_state(when, progress, state)
    if run.accelerator.is_main_process:
        write_page(run, progress)
    run.slowdown.paused()


def write_page(run: Run, progress: Progress) -> None:
    """Write the report next to the output. If it can't be written, that is only logged."""
    numel = 0
    for trainable in run.trainables:
        for group in trainable.groups():
            numel += sum(parameter.numel() for parameter in group.parameters.values())
    facts = [
        ("steps", f"{progress.step} of {run.total_steps}, {run.order.steps_per_epoch} an epoch"),
        ("trained", f"{numel:,} parameters"),
        ("processes", str(run.accelerator.num_processes)),
        ("device", str(run.accelerator.device)),
        ("seed", str(run.seed)),
    ]
    try:
        write_report_page(
            run.saver.log_file,
            run.saver.page_file,
            title=run.saver.page_file.stem.removesuffix("-report"),
            options=run.options,
            facts=facts,
            samples=run.preview.thumbnails(),
        )
    except (RunError, OSError) as error:
        log.warning("the report isn't written: %s", error)


_COMPARED = ("loss/current", "grad_norm")


def verify(run: Run, progress: Progress, steps: int) -> None:
    """Repeat up to `steps` steps that were done after the state was saved, and compare them with the log.

    Nothing is saved.

    Raises:
        RunError: a value differs, or the log has no step after the state's.
    """
    log_file = run.saver.log_file
    logged = {}
    for line in read_log(log_file):
        if "loss/current" in line and line["step"] > progress.step:
            logged[line["step"]] = line
    last = min(progress.step + steps, max(logged, default=0), run.total_steps)
    if last <= progress.step:
        raise RunError(
            f"{log_file}: it has no steps after the state's {progress.step}; resume from an older state"
        )
    replayed = _replay(run, progress, last)
    if not run.accelerator.is_main_process:  # which alone has a log
        return
    for step in range(progress.step - len(replayed) + 1, last + 1):
        for name in _COMPARED:
            if replayed[step][name] != logged[step][name]:
                raise RunError(
                    f"step {step}: {name} is {replayed[step][name]!r}, the log says {logged[step][name]!r}: "
                    "the run doesn't repeat itself"
                )
    log.info(
        "verified: %d steps up to step %d give the log's losses and gradient norms, bit by bit",
        len(replayed),
        last,
    )


def _replay(run: Run, progress: Progress, last: int) -> dict[int, dict]:
    """Train up to a step without validation, samples and saves. Returns the logged lines by step."""
    temporary = run.saver.log_file.with_name(f".{run.saver.log_file.name}.replay")
    metrics = MetricsLogger(
        last,
        run.order.steps_per_epoch,
        is_main=run.accelerator.is_main_process,
        trackers=None,
        log_file=temporary,
    )
    replay = dataclasses.replace(
        run,
        metrics=metrics,
        validation=dataclasses.replace(run.validation, every_steps=None, every_epochs=None),
        preview=dataclasses.replace(run.preview, prompts=()),
        total_steps=last,
    )
    run.saver.stop()
    try:
        loop(replay, progress, Signals())
        metrics.flush()
        return {line["step"]: line for line in read_log(temporary) if "loss/current" in line}
    finally:
        metrics.close()
        temporary.unlink(missing_ok=True)
