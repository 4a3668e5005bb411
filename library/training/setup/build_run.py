"""build_run: the last stage of set-up. It makes the Run that the training loop touches."""

import os
import secrets
from typing import Any

from accelerate import Accelerator

from library.data.loader import Batches
from library.data.options import CacheOptions, DatasetOptions
from library.log import log
from library.training.monitoring.metrics import MetricsLogger
from library.training.monitoring.sanity_checks import GradientFlowCheck
from library.training.monitoring.slowdown import SlowdownDetector
from library.training.monitoring.trackers import Trackers
from library.training.monitoring.validation import Best
from library.training.options.objective import LossOptions
from library.training.options.output import ResumeOptions
from library.training.options.run import ValidationOptions
from library.training.progress import Progress
from library.training.run import Run
from library.training.saving.run_file import write_run_file
from library.training.setup.build_evaluation import build_preview, build_validation
from library.training.setup.build_saver import build_saver
from library.training.setup.caches import CachedData
from library.training.setup.plan import RunPlan
from library.training.setup.step_plan import training_samples
from library.training.setup.training_state import build_training_state


def build_run(
    plan: RunPlan, cached: CachedData, accelerator: Accelerator, trackers: Trackers | None
) -> Run:
    """Load the models, build what is trained, and log what the run is going to do.

    Args:
        plan: the plan of the run.
        cached: the datasets that can be used, and the complete caches.
        accelerator: this process.
        trackers: where the main process sends metrics.

    Raises:
        OptionError: the run can't work.
    """
    plan = plan.for_datasets(cached.datasets)
    training = build_training_state(plan, accelerator)
    plan = plan.for_task(training.task)
    options, steps, resume = plan.options, plan.steps, plan.inputs.resume
    is_main, world_size = accelerator.is_main_process, accelerator.num_processes
    session_id, done = str(secrets.randbits(32)), Progress()
    if resume is not None:
        session_id = resume.metadata.session_id
        done = Progress(resume.metadata.epoch, resume.metadata.step)
    saver = build_saver(
        plan, training, session_id=session_id, world_size=world_size, is_main=is_main
    )
    for line in plan.describe():
        log.info(line)
    states = options[ResumeOptions]
    if is_main:
        saver.schedule.check_space(steps.total_steps, done)
        if not states.verify_resume:
            write_run_file(saver.run_file, {**options.changed(), "seed": steps.order.seed})
    batches, validating = _build_batches(plan, cached), options[ValidationOptions]
    first_step = 0 if resume is not None else plan.first_step
    return Run(
        accelerator=accelerator,
        trainables=training.task.trainables,
        shards=training.shards,
        parameters={
            name: p for group in training.local_groups for name, p in group.parameters.items()
        },
        optimizer_step=training.optimizer_step,
        ema=training.ema,
        gradient_check=GradientFlowCheck(training.local_groups, max(first_step, done.step)),
        slowdown=SlowdownDetector(accelerator.device),
        validation=build_validation(plan, cached, batches),
        best=Best(validating.early_stop_patience),
        keeps_best=validating.keeps_best,
        preview=build_preview(plan, cached, training.task),
        order=steps.order,
        batches=batches,
        metrics=MetricsLogger(
            steps.total_steps,
            steps.order.steps_per_epoch,
            is_main=is_main,
            trackers=trackers,
            log_file=None if states.verify_resume else saver.log_file,
            done=done.step,
        ),
        saver=saver,
        states=states,
        signature=_state_signature(plan),
        session_id=session_id,
        options=options.changed(),
        seed=steps.order.seed,
        first_step=first_step,
        total_steps=steps.total_steps,
        num_workers=min(options[CacheOptions].max_data_loader_n_workers, os.cpu_count() or 1),
    )


def _state_signature(plan: RunPlan) -> dict[str, Any]:
    """Return what must be the same when the run is resumed, with the seed that was given or chosen."""
    if not plan.options[ResumeOptions].saves_states:
        return {}
    return {**plan.inputs.signature, "seed": str(plan.steps.order.seed)}


def _build_batches(plan: RunPlan, cached: CachedData) -> Batches:
    data, loss = plan.options[DatasetOptions], plan.options[LossOptions]
    takes_conditions = plan.kind.conditioning_kind == "conditions"
    return Batches(
        training_samples(cached.datasets),
        cached.latents,
        cached.text,
        plan.steps.order.seed,
        plan.steps.total_steps,
        data.prior_loss_weight,
        data.aesthetic_score,
        for_inpainting=plan.inputs.checkpoint.unet.is_inpainting,
        reads_conditioning=loss.masked_loss or takes_conditions,
    )
