"""Build the optimizer, its schedule, and the step that uses both."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from library.errors import Mistake, OptionError
from library.offload import OffloadStream
from library.param_group import ParamGroup, split_groups
from library.training.distributed.sharding import Shards
from library.training.optim.backward_step import OptimizerInBackward, param_buckets
from library.training.optim.lr_schedules import make_scheduler
from library.training.optim.master_weights import (
    MasterWeightOptimizer,
    compute_device,
    fp32_params,
    is_separable,
)
from library.training.optim.optimizer_step import GradientStep, OptimizerStep, StandardStep
from library.training.optim.optimizers import is_schedule_free, make_optimizer, start_training
from library.training.optim.rounding import StochasticSums
from library.training.optim.state_offload import OffloadedOptimizerState
from library.training.options.compatibility import check_ema, check_schedule_free
from library.training.options.distributed import ShardingOptions, offloads_optimizer
from library.training.options.memory import MemoryOptions
from library.training.options.optimizer import (
    EmaOptions,
    OptimizerOptions,
    ScheduleOptions,
    UpdateOptions,
)


class OptimizerSettings(NamedTuple):
    """The options that say how gradients become optimizer steps.

    Attributes:
        optimizing: the optimizer.
        schedule: its learning-rate schedule.
        update: how weights are stepped.
        ema: the moving average, which some optimizers rule out.
        memory: whether the optimizer's state is offloaded.
        sharding: whether sharding offloads it.
        scales_loss: gradients are float16.
    """

    optimizing: OptimizerOptions
    schedule: ScheduleOptions
    update: UpdateOptions
    ema: EmaOptions
    memory: MemoryOptions
    sharding: ShardingOptions
    scales_loss: bool

    @property
    def offloads_state(self) -> bool:
        """Whether the optimizer's state is in RAM."""
        return offloads_optimizer(self.memory, self.sharding)


def build_optimizer_step(
    loss_module: nn.Module,
    groups: Sequence[ParamGroup],
    settings: OptimizerSettings,
    total_steps: int,
    *,
    seed: int,
    processes: int,
    shards: Shards | None = None,
) -> OptimizerStep:
    """Build the optimizer step of these groups.

    Args:
        loss_module: what the loop calls for losses, wrapped for several processes.
        groups: the parameters that are trained.
        settings: how gradients become optimizer steps.
        total_steps: optimizer steps of the run.
        seed: seed of stochastic rounding.
        processes: the world size.
        shards: of the groups' parameters, where weights are sharded.
    """
    update, optimizing = settings.update, settings.optimizing
    if update.fused_optimizer_groups:
        groups = split_groups(groups, update.fused_optimizer_groups)
    optimizer, scheduler = _make(fp32_params(groups), optimizing, settings.schedule, total_steps)
    start_training(optimizer)
    device = compute_device(groups) if shards is None else shards.device
    offloaded_state = None
    if settings.offloads_state:
        offloaded_state = OffloadedOptimizerState(
            optimizer, OffloadStream(torch.device("cpu"), device)
        )
    master_optimizer = MasterWeightOptimizer(
        optimizer,
        groups,
        rounding=update.rounding_used,
        seed=seed,
        is_separable=not (update.is_16_bit or settings.offloads_state) or _is_separable(optimizing),
        device=None if shards is None else shards.device,
        offloaded_state=offloaded_state,
    )
    gradient_step: GradientStep
    if update.is_fused:
        buckets = param_buckets(groups, shards)
        if update.fused_optimizer_groups:
            buckets = [list(group.parameters.values()) for group in groups]
        gradient_step = OptimizerInBackward(
            master_optimizer,
            buckets,
            max_grad_norm=optimizing.max_grad_norm,
            clips_by_previous=update.fused_clip == "previous_norm",
            shards=shards,
        )
    else:
        gradient_step = StandardStep(
            master_optimizer,
            max_grad_norm=optimizing.max_grad_norm,
            scales_loss=settings.scales_loss,
            full_norms=None if shards is None else shards.norms,
        )
    sums = None if update.rounding_used == "nearest" else StochasticSums(groups, seed)
    return OptimizerStep(
        loss_module, groups, gradient_step, scheduler, sums, world_size=processes, shards=shards
    )


def try_optimizer(groups: Sequence[ParamGroup], settings: OptimizerSettings) -> None:
    """Build the optimizer and its schedule to see that they can do what the options ask for.

    Args:
        groups: the parameters that will be trained, of any shape.
        settings: how gradients become optimizer steps.

    Raises:
        OptionError: they can't.
    """
    optimizing = settings.optimizing
    optimizer, _ = _make(groups, optimizing, settings.schedule, total_steps=1000)
    name, mistakes = optimizing.name, []
    if not optimizing.spec.is_known and is_schedule_free(optimizer):
        mistakes += [
            *check_ema(name, settings.ema),
            *check_schedule_free(name, settings.memory, settings.sharding),
        ]
    if settings.offloads_state and not _is_separable(optimizing):
        mistakes.append(
            Mistake(
                f"--optimizer_offload: --optimizer_type {name} looks at all gradients together, so "
                "its complete state is needed "
                "at once; leave it out",
                ("optimizer_offload", "optimizer_type"),
            )
        )
    if settings.update.fused_backward_pass and not _is_separable(optimizing):
        mistakes.append(
            Mistake(
                f"--fused_backward_pass: --optimizer_type {name} looks at all gradients together, "
                "so it can't step one tensor "
                "alone; leave it out, or use --fused_optimizer_groups, where each group is "
                "stepped as if it were the only one",
                ("fused_backward_pass", "optimizer_type"),
            )
        )
    if mistakes:
        raise OptionError(*mistakes)


def _make(
    groups: Sequence[ParamGroup],
    options: OptimizerOptions,
    schedule: ScheduleOptions,
    total_steps: int,
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    optimizer = _make_optimizer(groups, options)
    return optimizer, make_scheduler(optimizer, schedule, total_steps, options.learning_rate)


def _make_optimizer(
    groups: Sequence[ParamGroup], options: OptimizerOptions
) -> torch.optim.Optimizer:
    return make_optimizer(options.name, options.arguments, groups, options.learning_rate)


def _is_separable(options: OptimizerOptions) -> bool:
    """Return whether the optimizer may step parameters one by one; unknown ones are tried."""
    if options.spec.is_known:
        return not options.spec.finds_lr
    return is_separable(lambda groups: _make_optimizer(groups, options))
