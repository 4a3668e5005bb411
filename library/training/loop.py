"""The training loop: the only one. What differs between the scripts is their Task."""

from pathlib import Path

from library.draws import Draws, seed_modules
from library.log import log
from library.options import Options
from library.training.optimizers import switch_mode
from library.training.preflight import Preflight
from library.training.progress import Progress
from library.training.report import Seen
from library.training.start import Run, start
from library.training.task import Task


def train(kind: type[Task], options: Options, found: Preflight) -> list[Path]:
    """Train what the task says, by the options, on what the preflight found. Returns the final files (main process)."""
    run = start(kind, options, found)
    progress = Progress()
    try:
        loop(run, progress)
        paths = save(run, progress, final=True)
    finally:
        run.report.close()
    log.info("done: %d steps, average loss %.4f", progress.step, run.report.average())
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return paths


def loop(run: Run, progress: Progress) -> None:
    """From `progress` to the last step."""
    update, report = run.update, run.report
    seen: list[Seen] = []
    for batch in run.batches_from(progress.step):
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
        updated = update.step()
        for part in run.parts:
            part.after_step()
        progress.step += 1
        progress.samples += place.window_samples
        report.step(progress.step, place.epoch, updated, seen, rates)
        seen = []
        if run.validation.is_due(step=progress.step):
            validate(run, progress)
        if run.saver.step_is_due(progress.step):
            save(run, progress)
        if progress.step % run.order.steps_per_epoch == 0:
            progress.epoch += 1
            report.epoch_ended(progress.epoch)
            if run.validation.is_due(epoch=progress.epoch):
                validate(run, progress, epoch_ended=True)
            if run.saver.epoch_is_due(progress.epoch):
                save(run, progress, epoch_ended=True)
        if progress.step >= run.total_steps:
            return


def validate(run: Run, progress: Progress, *, epoch_ended: bool = False) -> None:
    """Take and tell the loss of the pictures that are held out."""
    accelerator, update = run.accelerator, run.update
    switch_mode(update.optimizer, "eval")
    share = (accelerator.process_index, accelerator.num_processes)
    loss = run.validation.loss(update.step_module, accelerator.device, share)
    switch_mode(update.optimizer, "train")
    run.report.validated(loss, progress.step, progress.epoch if epoch_ended else None)


def save(run: Run, progress: Progress, *, epoch_ended: bool = False, final: bool = False) -> list[Path]:
    """Save what is trained, once the last step's numbers are known to be finite."""
    run.report.settle()
    switch_mode(run.update.optimizer, "eval")
    if final:
        paths = run.saver.save_final(progress)
    else:
        paths = run.saver.save_epoch(progress) if epoch_ended else run.saver.save_step(progress)
    switch_mode(run.update.optimizer, "train")
    return paths
