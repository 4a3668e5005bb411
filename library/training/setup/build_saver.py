"""The Saver of a run, and the metadata of its files."""

import functools
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from library.log import log
from library.models.options import ModelOptions
from library.training.optim.optimizers import format_optimizer
from library.training.options.optimizer import OptimizerOptions, read_arguments
from library.training.options.output import MetadataOptions, UploadOptions
from library.training.saving.metadata import (
    RunFacts,
    at_save,
    model_metadata,
    modelspec,
    training_metadata,
)
from library.training.saving.saver import MakeMetadata, Saver
from library.training.saving.uploads import open_uploads
from library.training.setup.plan import RunPlan
from library.training.setup.training_state import TrainingState
from library.training.tasks.base import Task


def build_saver(
    plan: RunPlan, training: TrainingState, *, session_id: str, world_size: int, is_main: bool
) -> Saver:
    """Return the run's Saver.

    Args:
        plan: the plan of the run, with the task that is trained.
        training: what is saved.
        session_id: of this run; a resumed run keeps it.
        world_size: the number of processes.
        is_main: whether this is the process that saves.
    """
    options, task, order = plan.options, training.task, plan.steps.order
    optimizing, model = options[OptimizerOptions], options[ModelOptions]
    arguments, _ = read_arguments("--optimizer_args", optimizing.optimizer_args)
    hashes: Callable[[], Mapping[str, str]] = dict
    if is_main and not task.is_terse:
        hashes = _in_background(
            lambda: model_metadata(str(model.pretrained_model_name_or_path), model.vae)
        )
    facts = RunFacts(
        datasets=plan.datasets,
        seed=order.seed,
        optimizer=format_optimizer(training.optimizer_step.optimizer, arguments),
        batches_per_epoch=math.ceil(order.batches_per_epoch / world_size),
        num_epochs=plan.steps.num_epochs,
        total_steps=plan.steps.total_steps,
        processes=world_size,
        zero_terminal_snr=plan.inputs.zero_terminal_snr,
        session_id=session_id,
        base_model=hashes,
    )
    uploads = options[UploadOptions]
    return Saver(
        plan.saves,
        task.trainables,
        _metadata_maker(plan, task, facts),
        plan.models.precision.save,
        session_id=session_id,
        is_main=is_main,
        ema=training.ema,
        uploads=open_uploads(uploads) if is_main else None,
        sends_states=uploads.save_state_to_huggingface,
    )


def _metadata_maker(plan: RunPlan, task: Task[Any], facts: RunFacts) -> MakeMetadata:
    """Return the function that gives the metadata of a file when it is saved."""
    values = dict(plan.options.items())

    @functools.cache
    def unchanging() -> dict[str, str]:
        return task.metadata({} if task.is_terse else training_metadata(values, facts))

    def metadata(steps: int, epoch: int) -> dict[str, str]:
        described = modelspec(
            plan.options[MetadataOptions],
            values,
            task.modelspec_kind,
            v_prediction=plan.inputs.v_prediction,
            default_title=task.default_title,
            is_refiner=plan.inputs.checkpoint.unet.takes_score,
        )
        when = {} if task.is_terse else at_save(steps, epoch)
        return {**unchanging(), **when, **described}

    return metadata


def _in_background(function: Callable[[], Mapping[str, str]]) -> Callable[[], Mapping[str, str]]:
    """Start a function on a thread, for which a run that ends doesn't wait.

    Returns:
        A function that waits for the result and returns it; {} if a file couldn't be read.
    """
    results: dict[str, str] = {}

    def work() -> None:
        try:
            results.update(function())
        except OSError as error:
            log.warning("the base model's hashes are not recorded: %s", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> Mapping[str, str]:
        thread.join()
        return results

    return result
