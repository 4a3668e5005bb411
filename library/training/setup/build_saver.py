"""MakeSaver: a run's Saver, and the metadata of its files."""

import functools
import math
import threading
from collections.abc import Callable, Mapping

from library.device import Precision
from library.log import log
from library.models.options import ModelOptions
from library.options import Options
from library.training.optim.ema import Ema
from library.training.optim.optimizer_step import OptimizerStep
from library.training.optim.optimizers import optimizer_in_words
from library.training.options.optimizer import OptimizerOptions, read_arguments
from library.training.options.output import ResumeOptions, SavingOptions, UploadOptions
from library.training.options.run import ValidationOptions
from library.training.saving.metadata import RunFacts, at_save, model_metadata, modelspec, training_metadata
from library.training.saving.saver import Saver
from library.training.saving.uploads import Uploads
from library.training.setup.caches import CachedData
from library.training.setup.inputs import RunInputs
from library.training.setup.plan import Plan, optimizer_in_state
from library.training.tasks.base import Task


def build_saver(
    task: Task,
    options: Options,
    found: RunInputs,
    prepared: CachedData,
    plan: Plan,
    update: OptimizerStep,
    ema: Ema | None,
    uploads: Uploads | None,
    *,
    session_id: str,
    processes: int,
    is_main: bool,
) -> Saver:
    model, optimizing = options[ModelOptions], options[OptimizerOptions]
    arguments, _ = read_arguments("--optimizer_args", optimizing.optimizer_args)
    facts = RunFacts(
        datasets=prepared.datasets,
        seed=plan.order.seed,
        optimizer=optimizer_in_words(update.optimizer, arguments),
        batches_per_epoch=math.ceil(plan.order.batches_per_epoch / processes),
        num_epochs=plan.num_epochs,
        total_steps=plan.total_steps,
        processes=processes,
        zero_terminal_snr=found.zero_terminal_snr,
        session_id=session_id,
        base_model=_in_background(
            lambda: model_metadata(str(model.pretrained_model_name_or_path), model.vae),
            wanted=is_main and not task.is_terse,
        ),
    )
    settled = functools.cache(lambda: task.metadata({} if task.is_terse else training_metadata(options, facts)))

    def metadata(steps: int, epoch: int) -> dict[str, str]:
        described = modelspec(
            options, task.modelspec_kind, v_prediction=found.v_prediction, default_title=task.default_title,
            is_refiner=found.checkpoint.unet.takes_score,
        )  # fmt: skip
        return {**settled(), **({} if task.is_terse else at_save(steps, epoch)), **described}

    dtype = Precision.decide("no", options[SavingOptions].save_precision, no_half_vae=True).save
    return Saver(
        options[SavingOptions], options[ResumeOptions], task.trainables, metadata, dtype, plan.num_epochs,
        session_id=session_id, is_main=is_main, keeps_best=options[ValidationOptions].keeps_best, ema=ema, uploads=uploads,
        sends_states=options[UploadOptions].save_state_to_huggingface,
        optimizer_bytes=optimizer_in_state(task, options),
    )  # fmt: skip


def _in_background(function: Callable[[], Mapping[str, str]], *, wanted: bool) -> Callable[[], Mapping[str, str]]:
    """Start it on a thread now; calling what is returned waits for the result. A run that ends doesn't wait for it."""
    found: dict[str, str] = {}

    def work() -> None:
        try:
            found.update(function())
        except OSError as error:
            log.warning("the base model's hashes are not recorded: %s", error)

    thread = threading.Thread(target=work, daemon=True)
    if wanted:
        thread.start()

    def result() -> Mapping[str, str]:
        if wanted:
            thread.join()
        return found

    return result
