"""run_training: what every training script does once its options are read and its files are inspected."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from library.data.options import CacheOptions, DatasetOptions
from library.files import OutputLock
from library.log import is_main_process, log
from library.models.options import ModelOptions
from library.options import Options
from library.signals import end_with_parent
from library.training.distributed.launch import shared_seed, start_processes
from library.training.loop import train
from library.training.monitoring.trackers import logged_config, open_trackers
from library.training.options.output import ResumeOptions, SavingOptions, TrackerOptions
from library.training.options.run import RunOptions
from library.training.saving.saver import make_output_folder
from library.training.setup.build_run import build_run
from library.training.setup.caches import fill_caches
from library.training.setup.debug_dataset import show_dataset
from library.training.setup.dry_run import dry_run
from library.training.setup.inputs import RunInputs
from library.training.setup.plan import make_plan
from library.training.tasks.base import Task


def run_training(kind: type[Task[Any]], options: Options, inputs: RunInputs) -> None:
    """Show the datasets, print what would happen, or train: whatever the options ask for.

    Args:
        kind: the class of the task.
        options: the options of the run.
        inputs: the base model's header, the scanned datasets, and the state to resume from.

    Raises:
        OptionError: the run can't work.
        RunError: the run failed.
    """
    run, saving, tracking, resume = (
        options[RunOptions],
        options[SavingOptions],
        options[TrackerOptions],
        inputs.resume,
    )
    assert saving.output_dir is not None
    if options[DatasetOptions].debug_dataset:
        page_file = saving.output_dir / f"{saving.name}-dataset.html"
        augments = not options[CacheOptions].latents
        show_dataset(inputs, options[ModelOptions], run, page_file, augments=augments)
        return
    verifies = options[ResumeOptions].verify_resume is not None
    if resume is not None and resume.is_finished and not (verifies or run.dry_run):
        steps = resume.metadata.step
        log.info(
            "%s: this run is finished, after %d steps; there is nothing left to do",
            resume.folder,
            steps,
        )
        return
    with nullcontext() if run.dry_run else _locked_output(saving.output_dir, saving.name):
        accelerator = start_processes(
            timeout=run.ddp_timeout,
            gradient_as_bucket_view=run.ddp_gradient_as_bucket_view,
            static_graph=run.ddp_static_graph,
        )
        device, world_size = accelerator.device, accelerator.num_processes
        if run.dry_run:
            plan = make_plan(
                kind, options, inputs, device, world_size=world_size, seed=run.seed or 0
            )
            dry_run(plan, accelerator)
            return
        trackers = None
        if accelerator.is_main_process:
            config = logged_config(options.specs()) if tracking.log_config else {}
            trackers = open_trackers(tracking, kind.tracker_name, config)
        seed = shared_seed(run.seed if resume is None else resume.metadata.seed)
        plan = make_plan(kind, options, inputs, device, world_size=world_size, seed=seed)
        cached = fill_caches(plan, accelerator)
        train(build_run(plan, cached, accelerator, trackers), resume)


@contextmanager
def _locked_output(folder: Path, name: str) -> Iterator[None]:
    """Context manager: no other run saves under this name. Every process checks the folder, so that all fail alike."""
    end_with_parent()
    make_output_folder(folder)
    lock = OutputLock(folder, name) if is_main_process() else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
