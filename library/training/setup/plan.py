"""RunPlan: what a run is going to do, known before anything is loaded."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from library.data.options import CacheOptions, CaptionOptions
from library.data.scan import Dataset
from library.errors import Mistake, MistakeCollector, OptionError
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.options import OptionGroup, Options
from library.training.optim.build import OptimizerSettings, try_optimizer
from library.training.options.distributed import (
    ShardingOptions,
    offloads_optimizer,
    sharding_config,
)
from library.training.options.memory import MemoryOptions
from library.training.options.optimizer import (
    EmaOptions,
    OptimizerOptions,
    ScheduleOptions,
    UpdateOptions,
)
from library.training.options.output import ResumeOptions, SavingOptions
from library.training.options.run import RunOptions, ValidationOptions
from library.training.saving.resume import initial_step
from library.training.saving.schedule import (
    SaveSchedule,
    format_saves,
    saved_model_bytes,
    saved_state_bytes,
)
from library.training.setup.build_task import build_on_meta, open_models, single_element_groups
from library.training.setup.inputs import RunInputs
from library.training.setup.memory_estimate import (
    MemoryEstimate,
    estimate_memory,
    format_memory,
    optimizer_bytes_in_state,
)
from library.training.setup.memory_plan import choose_memory_options, format_memory_options
from library.training.setup.step_plan import (
    Bucket,
    StepPlan,
    buckets_of,
    check_trains_to_the_end,
    format_steps,
    plan_steps,
)
from library.training.tasks.base import Task, TaskSettings


@dataclass(frozen=True)
class RunPlan:
    """What a run is going to do.

    Attributes:
        kind: the class of the task.
        groups: the option groups that only this task has.
        options: the options of the run, as --memory_plan completes them.
        inputs: the base model's header, the scanned datasets, and the state to resume from.
        datasets: the datasets that are trained on, without images that turned out to be unusable.
        models: the base model; nothing is loaded yet.
        steps: the order of batches and the number of steps.
        task: what is trained, on the meta device until the run is built; None if it needs the weights.
        mistakes: what keeps the run from starting, with --dry_run; without, it is raised.
    """

    kind: type[Task[Any]]
    groups: tuple[OptionGroup, ...]
    options: Options
    inputs: RunInputs
    datasets: Sequence[Dataset]
    models: SdxlModels
    steps: StepPlan
    task: Task[Any] | None
    mistakes: tuple[Mistake, ...] = ()

    def for_datasets(self, datasets: Sequence[Dataset]) -> "RunPlan":
        """Return the plan for these datasets, from which unusable images were removed."""
        order = self.steps.order
        steps = plan_steps(
            self.options[RunOptions], datasets, world_size=order.world_size, seed=order.seed
        )
        return dataclasses.replace(self, datasets=datasets, steps=steps)

    def for_task(self, task: Task[Any]) -> "RunPlan":
        """Return the plan with the task that is trained in place of the one on the meta device."""
        return dataclasses.replace(self, task=task)

    @property
    def task_settings(self) -> TaskSettings:
        """What the task takes from options that all scripts have."""
        options = self.options
        return TaskSettings(
            lr=options[OptimizerOptions].learning_rate,
            num_tokens=options[ModelOptions].num_tokens,
            total_steps=self.steps.total_steps,
            text_is_cached=options[CacheOptions].text,
            weighted_captions=options[CaptionOptions].weighted_captions,
            text_last_step=options[RunOptions].stop_text_encoder_training,
            v_prediction=self.inputs.v_prediction,
            zero_terminal_snr=self.inputs.zero_terminal_snr,
        )

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        """How gradients become optimizer steps."""
        options = self.options
        return OptimizerSettings(
            options[OptimizerOptions],
            options[ScheduleOptions],
            options[UpdateOptions],
            options[EmaOptions],
            options[MemoryOptions],
            options[ShardingOptions],
            scales_loss=options[RunOptions].mixed_precision == "fp16",
        )

    def build_task(self) -> Task[Any]:
        """Build the task on top of the models, which loads them."""
        return self.kind(self.models, self.task_settings, self.groups)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The buckets of all datasets."""
        return buckets_of(self.steps.order, self.datasets)

    @property
    def first_step(self) -> int:
        """The optimizer steps that a run which isn't resumed takes as done.

        Raises:
            OptionError: none are left.
        """
        return initial_step(
            self.options[ResumeOptions],
            steps_per_epoch=self.steps.order.steps_per_epoch,
            total_steps=self.steps.total_steps,
        )

    def memory(self, options: MemoryOptions | None = None) -> MemoryEstimate:
        """Return the estimated peak of a training step.

        Args:
            options: other memory options than the run's.
        """
        assert self.task is not None
        memory = self.options[MemoryOptions] if options is None else options
        return estimate_memory(
            self.task,
            self.models,
            self.buckets,
            cache=self.options[CacheOptions],
            memory=memory,
            optimizing=self.options[OptimizerOptions],
            update=self.options[UpdateOptions],
            ema=self.options[EmaOptions],
            num_tokens=self.task.num_tokens,
            accumulation=self.options[RunOptions].gradient_accumulation_steps,
            offloads_state=offloads_optimizer(memory, self.options[ShardingOptions]),
        )

    @cached_property
    def saves(self) -> SaveSchedule:
        """When the run saves what, and the size of its files."""
        assert self.task is not None
        trainables, groups = self.task.trainables, self.task.param_groups()
        optimizer_bytes = optimizer_bytes_in_state(
            groups, self.options[OptimizerOptions], self.options[UpdateOptions]
        )
        has_ema = self.options[EmaOptions].ema_decay is not None
        return SaveSchedule(
            self.options[SavingOptions],
            self.options[ResumeOptions],
            self.steps.num_epochs,
            keeps_best=self.options[ValidationOptions].keeps_best,
            model_bytes=saved_model_bytes(trainables, self.models.precision.save, has_ema=has_ema),
            state_bytes=saved_state_bytes(trainables, optimizer_bytes, has_ema=has_ema),
        )

    def describe(self) -> list[str]:
        """Return what is printed before a run: its steps, what is trained, its saves and its memory."""
        lines = format_steps(self.steps, self.datasets)
        if self.task is None:
            return [*lines, "what is trained is known once the weights are loaded"]
        lines += self.task.describe()
        lines += format_saves(self.saves, self.steps.total_steps, self.steps.order.steps_per_epoch)
        if self.options[MemoryOptions].memory_plan is not None:
            lines.append(f"memory plan: {format_memory_options(self.options[MemoryOptions])}")
        memory = format_memory(self.memory())
        if sharding_config(self.options[ShardingOptions]).stage:
            memory += "; the U-Net is sharded over the processes"
        return [*lines, memory]


def make_plan(
    kind: type[Task[Any]],
    options: Options,
    inputs: RunInputs,
    device: torch.device,
    *,
    world_size: int,
    seed: int,
) -> RunPlan:
    """Plan a run, and check everything that can be checked before anything is loaded.

    Args:
        kind: the class of the task.
        options: the options of the run.
        inputs: the base model's header, the scanned datasets, and the state to resume from.
        device: the device that trains.
        world_size: the number of processes.
        seed: seed of the order of batches.

    Raises:
        OptionError: the run can't work. With --dry_run, the plan has the mistakes instead.
    """
    collector = MistakeCollector(raises=not options[RunOptions].dry_run)
    steps = plan_steps(options[RunOptions], inputs.datasets, world_size=world_size, seed=seed)
    groups = tuple(options[group] for group in kind.option_groups)
    models = open_models(kind, groups, options, inputs, device)
    plan = RunPlan(kind, groups, options, inputs, inputs.datasets, models, steps, task=None)
    with collector.collected():
        assert plan.first_step >= 0
    with collector.collected():
        task = build_on_meta(kind, models, plan.task_settings, groups)
        plan = dataclasses.replace(plan, task=task)
        if task is not None:
            try_optimizer(single_element_groups(task.param_groups()), plan.optimizer_settings)
            check_trains_to_the_end(task.param_groups(), steps.total_steps)
    with collector.collected():
        plan = _with_memory_plan(plan)
    return dataclasses.replace(plan, mistakes=tuple(collector.mistakes))


def _with_memory_plan(plan: RunPlan) -> RunPlan:
    """Return the plan with the memory options that --memory_plan chooses."""
    options, task = plan.options, plan.task
    memory = options[MemoryOptions]
    if memory.memory_plan is None:
        return plan
    if task is None:
        message = "--memory_plan: this network's size isn't known before its weights are loaded; leave it out"
        raise OptionError(Mistake(message, ("memory_plan",)))
    chosen = choose_memory_options(
        memory,
        options[UpdateOptions],
        plan.models.device,
        plan.memory,
        len(task.unet.blocks),
        given=[name for name in vars(memory) if options.given(name)],
        trains_base=bool(plan.models.trained),
    )
    options = options.replaced(chosen)
    models = open_models(plan.kind, plan.groups, options, plan.inputs, plan.models.device)
    return dataclasses.replace(plan, options=options, models=models)
