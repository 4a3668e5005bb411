"""The validation of a run, and the sample images that it generates."""

import dataclasses
from typing import Any

from library.data.loader import Batches, group_samples
from library.data.options import DatasetOptions
from library.log import log
from library.training.monitoring.preview import Preview
from library.training.monitoring.validation import Validation, fixed_timesteps, validation_batches
from library.training.options.objective import NoiseOptions
from library.training.options.output import PreviewOptions, SavingOptions
from library.training.options.run import ValidationOptions
from library.training.setup.caches import CachedData
from library.training.setup.plan import RunPlan
from library.training.tasks.base import Task


def build_validation(plan: RunPlan, cached: CachedData, batches: Batches) -> Validation:
    """Return the validation of a run.

    Args:
        plan: the plan of the run.
        cached: the datasets that can be used.
        batches: the batches that the run trains on.
    """
    options, total_steps = plan.options, plan.steps.total_steps
    chosen, noise = options[ValidationOptions], options[NoiseOptions]
    seed = options[DatasetOptions].validation_seed
    if seed is None:
        seed = plan.steps.order.seed
    samples = [sample for dataset in cached.datasets for sample in dataset.validation]
    if samples:
        log.info("%d images are held out for validation", len(samples))
    elif chosen.validate_every_n_steps or chosen.validate_every_n_epochs or chosen.keeps_best:
        _warn_without_samples(cached)
    return Validation(
        dataclasses.replace(batches, samples=samples, seed=seed),
        validation_batches(
            group_samples(cached.datasets, samples), total_steps, chosen.max_validation_steps
        ),
        fixed_timesteps(noise.min_timestep, noise.max_timestep),
        seed,
        chosen.validate_every_n_steps,
        chosen.validate_every_n_epochs or 1,
    )


def _warn_without_samples(cached: CachedData) -> None:
    split = max(dataset.config.validation_split for dataset in cached.datasets)
    if split:
        log.warning(
            "there is nothing to validate on: validation_split %g of the images rounds to none",
            split,
        )
    else:
        log.warning(
            "there is nothing to validate on: give --validation_split, or validation_split in the dataset file"
        )


def build_preview(plan: RunPlan, cached: CachedData, task: Task[Any]) -> Preview:
    """Return what generates sample images during the run.

    Args:
        plan: the plan of the run.
        cached: the prompts, encoded if the text encoders have been released.
        task: what is trained.
    """
    sampling, saving = plan.options[PreviewOptions], plan.options[SavingOptions]
    assert saving.output_dir is not None
    return Preview(
        cached.prompts,
        plan.models,
        task.unet,
        cached.prompt_texts,
        task.num_tokens,
        folder=saving.output_dir / "sample",
        name=saving.output_name,
        sampler=sampling.sample_sampler,
        seed=plan.steps.order.seed,
        keeps_vae=cached.keeps_vae,
        v_prediction=plan.inputs.v_prediction,
        zero_terminal_snr=plan.inputs.zero_terminal_snr,
        every_steps=sampling.sample_every_n_steps,
        every_epochs=sampling.sample_every_n_epochs,
        at_first=sampling.sample_at_first,
        control_inputs=task.control_inputs,
    )
