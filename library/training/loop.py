"""The training loop: the only one. What differs between the scripts is their Task."""

import time
from pathlib import Path

from accelerate.utils import gather_object

from library.draws import Draws, seed_modules
from library.log import log
from library.options import Options
from library.training.optimizers import as_used
from library.training.preflight import Preflight
from library.training.progress import Progress
from library.training.report import Seen
from library.training.start import Run, start
from library.training.task import Task
from library.training.watch import check_equal


def train(kind: type[Task], options: Options, found: Preflight) -> list[Path]:
    """Train what the task says, by the options, on what the preflight found. Returns the final files (main process)."""
    started = time.monotonic()
    run = start(kind, options, found)
    progress = Progress()
    try:
        loop(run, progress)
        run.report.settle()
        run.watch.run_ended()
        paths = save(run, progress, final=True)
    finally:
        run.report.close()
        run.saver.close()
    seconds = time.monotonic() - started
    log.info("done: %d steps in %.0f s, average loss %.4f", progress.step, seconds, run.report.average())
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return paths


def loop(run: Run, progress: Progress) -> None:
    """From `progress` to the last step, or to where validation has stopped to improve."""
    update, report = run.update, run.report
    seen: list[Seen] = []
    if run.preview.is_due():
        preview(run, progress)
    for batch in run.pace.batches(run.batches_from(progress.step)):
        batch = batch.to(run.accelerator.device)
        place = batch.place
        seed_modules(run.seed, place.epoch, place.micro)  # for what draws inside modules: dropout
        with update.window(place):
            losses = update.step_module(
                batch, Draws(run.seed, place.epoch, place.first, len(batch), run.accelerator.device)
            )
            update.backward(losses, place)
        seen.append(Seen(batch.paths, losses.detach()))
        if not place.closes_window:
            continue
        rates = update.learning_rates()
        run.watch.note_gradients()
        updated = update.step(progress.step)
        for part in run.parts:
            part.after_step()
        progress.step += 1
        progress.samples += place.window_samples
        if run.ema is not None:
            run.ema.update(progress.step)
        report.step(progress.step, place.epoch, updated, seen, rates)
        seen = []
        run.pace.step()
        if progress.step == 1:
            check_equal(run.trained, run.accelerator.num_processes, progress.step)
        if all(rates.values()) and not updated.overflowed:
            run.watch.stepped()
        if run.validation.is_due(step=progress.step):
            validate(run, progress)
        if run.preview.is_due(step=progress.step):
            preview(run, progress)
        if run.saver.step_is_due(progress.step):
            save(run, progress)
        if progress.step % run.order.steps_per_epoch == 0:
            end_epoch(run, progress)
        if progress.step >= run.total_steps:
            return
        if run.best.is_lost:
            log.info(
                "the validation loss hasn't improved %d times: the run ends at step %d", run.best.waited, progress.step
            )
            return


def end_epoch(run: Run, progress: Progress) -> None:
    """What is done after an epoch's last step."""
    progress.epoch += 1
    run.report.epoch_ended(progress.epoch, progress.step)
    if run.validation.is_due(epoch=progress.epoch):
        validate(run, progress, epoch_ended=True)
    if run.preview.is_due(epoch=progress.epoch):
        preview(run, progress, epoch_ended=True)
    if run.saver.epoch_is_due(progress.epoch):
        save(run, progress, epoch_ended=True)


def validate(run: Run, progress: Progress, *, epoch_ended: bool = False) -> None:
    """Take and tell the loss of the pictures that are held out; save if it is the best."""
    accelerator, update = run.accelerator, run.update
    share = (accelerator.process_index, accelerator.num_processes)
    with as_used(update.optimizer):
        loss = run.validation.loss(update.step_module, accelerator.device, share)
    run.report.validated(loss, progress.step, progress.epoch if epoch_ended else None)
    if run.best.is_new(loss, progress.step) and run.keeps_best:
        save(run, progress, best=True)
    run.pace.paused()


def preview(run: Run, progress: Progress, *, epoch_ended: bool = False) -> None:
    """Draw the sample pictures."""
    accelerator, step_module = run.accelerator, run.update.step_module
    label = f"e{progress.epoch:06d}" if epoch_ended or not progress.step else f"{progress.step:06d}"
    step_module.eval()
    with as_used(run.update.optimizer):
        pictures = run.preview.draw(label, (accelerator.process_index, accelerator.num_processes), gather_object)
    step_module.train()
    run.report.sampled(pictures, progress.step)
    run.pace.paused()


def save(
    run: Run, progress: Progress, *, epoch_ended: bool = False, best: bool = False, final: bool = False
) -> list[Path]:
    """Save what is trained, once the last step's numbers are known to be finite and the same everywhere."""
    run.report.settle()
    check_equal(run.trained, run.accelerator.num_processes, progress.step)
    with as_used(run.update.optimizer):
        if final:
            paths = run.saver.save_final(progress)
        elif best:
            paths = run.saver.save_best(progress)
        else:
            paths = run.saver.save_epoch(progress) if epoch_ended else run.saver.save_step(progress)
    run.pace.paused()
    return paths
