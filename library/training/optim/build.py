"""Make the update that the options ask for: its optimizer, its schedule, and the way down."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from library.errors import Mistake, OptionError
from library.offload import OffloadStream
from library.options import Options
from library.param_group import ParamGroup, split_groups
from library.training.distributed.sharding import Shards
from library.training.optim.backward_step import OptimizerInBackward, bunches_of
from library.training.optim.lr_schedules import make_scheduler
from library.training.optim.master_weights import MasterWeightOptimizer, fp32_params, is_separable
from library.training.optim.optimizer_step import GradientStep, OptimizerStep, StandardStep
from library.training.optim.optimizers import make_optimizer, start_training
from library.training.optim.rounding import StochasticSums
from library.training.optim.state_offload import OffloadedOptimizerState
from library.training.options.distributed import keeps_state_in_ram
from library.training.options.optimizer import OptimizerOptions, ScheduleOptions, UpdateOptions, read_arguments
from library.training.options.run import RunOptions


def build_optimizer_step(
    step: nn.Module,
    groups: Sequence[ParamGroup],
    options: Options,
    total_steps: int,
    *,
    seed: int,
    processes: int,
    shards: Shards | None = None,
) -> OptimizerStep:
    """The update of these groups. Args: step: the wrapped Step. shards: whose groups they are, where weights are sharded."""
    chosen, most = options[UpdateOptions], options[OptimizerOptions].max_grad_norm
    if chosen.fused_optimizer_groups:
        groups = split_groups(groups, chosen.fused_optimizer_groups)
    optimizer, scheduler = _make_optimizer(fp32_params(groups), options, total_steps)
    start_training(optimizer)
    offloads = keeps_state_in_ram(options)
    alone = not (chosen.full_bf16 or chosen.full_fp16 or offloads) or _is_separable(options)
    stepper = MasterWeightOptimizer(
        optimizer,
        groups,
        rounding=chosen.rounding_used,
        seed=seed,
        is_separable=alone,
        device=None if shards is None else shards.device,
    )
    if offloads:
        stepper.lodging = OffloadedOptimizerState(optimizer, OffloadStream(torch.device("cpu"), stepper.device))
    gradient_step: GradientStep
    if chosen.is_fused:
        whole = [list(group.parameters.values()) for group in groups]
        buckets_of_params = whole if chosen.fused_optimizer_groups else bunches_of(groups, shards)
        by_previous = chosen.fused_clip == "previous_norm"
        gradient_step = OptimizerInBackward(
            stepper, buckets_of_params, max_grad_norm=most, clips_by_previous=by_previous, shards=shards
        )
    else:
        gradient_step = StandardStep(
            stepper,
            max_grad_norm=most,
            scales_loss=options[RunOptions].mixed_precision == "fp16",
            whole_norms=None if shards is None else shards.norms,
        )
    sums = None if chosen.rounding_used == "nearest" else StochasticSums(groups, seed)
    return OptimizerStep(step, groups, gradient_step, scheduler, sums, processes=processes, shards=shards)


def try_optimizer(groups: Sequence[ParamGroup], options: Options) -> None:
    """Raises OptionError if optimizer or schedule can't be made, or can't do what they are to. Args: groups: of any shapes."""
    _make_optimizer(groups, options, total_steps=1000)
    name = options[OptimizerOptions].name
    if keeps_state_in_ram(options) and not _is_separable(options):
        raise OptionError(
            Mistake(
                f"--optimizer_offload: --optimizer_type {name} looks at all gradients together, so its state is needed at once; leave it out",
                ("optimizer_offload", "optimizer_type"),
            )
        )
    if options[UpdateOptions].fused_backward_pass and not _is_separable(options):
        raise OptionError(
            Mistake(
                f"--fused_backward_pass: --optimizer_type {name} looks at all gradients together, so it can't step "
                "one alone; leave it out, or take --fused_optimizer_groups, in which each group is stepped as if there were no other",
                ("fused_backward_pass", "optimizer_type"),
            )
        )


def _make_optimizer(
    groups: Sequence[ParamGroup], options: Options, total_steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    lr = options[OptimizerOptions].learning_rate
    optimizer = _optimizer(groups, options)
    return optimizer, make_scheduler(optimizer, options[ScheduleOptions], total_steps, lr)


def _optimizer(groups: Sequence[ParamGroup], options: Options) -> torch.optim.Optimizer:
    optimizing = options[OptimizerOptions]
    arguments, _ = read_arguments("--optimizer_args", optimizing.optimizer_args)
    return make_optimizer(optimizing.name, arguments, groups, optimizing.learning_rate)


def _is_separable(options: Options) -> bool:
    return is_separable(lambda groups: _optimizer(groups, options))
