"""TrainingState: what is trained, on the device, with its training forward and its optimizer step."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from library.data.options import CacheOptions
from library.models.compile import compile_blocks
from library.param_group import ParamGroup
from library.training.distributed.sharding import Shards, shard
from library.training.optim.build import build_optimizer_step
from library.training.optim.ema import Ema
from library.training.optim.optimizer_step import OptimizerStep
from library.training.options.distributed import ShardingOptions, sharding_config
from library.training.options.memory import CompileOptions
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import EmaOptions, UpdateOptions
from library.training.setup.build_task import build_loss_module
from library.training.setup.plan import RunPlan
from library.training.setup.step_plan import check_trains_to_the_end
from library.training.tasks.base import Task


class TrainingState(NamedTuple):
    """What is trained, and how.

    Attributes:
        task: the task on top of the loaded models.
        local_groups: the parameters as this process steps them; of sharded ones its shards.
        shards: the sharded U-Net, if it is.
        optimizer_step: gradients to new weights; it has the training forward.
        ema: the moving average, if one is kept.
    """

    task: Task[Any]
    local_groups: list[ParamGroup]
    shards: Shards | None
    optimizer_step: OptimizerStep
    ema: Ema | None


def build_training_state(plan: RunPlan, accelerator: Accelerator) -> TrainingState:
    """Load what is trained, shard or wrap it for several processes, and build its optimizer.

    Args:
        plan: the plan of the run.
        accelerator: this process.

    Raises:
        OptionError: the task can't be built.
    """
    options, models, total_steps = plan.options, plan.models, plan.steps.total_steps
    device, world_size, seed = accelerator.device, accelerator.num_processes, plan.steps.order.seed
    torch.manual_seed(seed)
    sharding = sharding_config(options[ShardingOptions])
    if sharding.stage:
        shard(models.unet, device, world_size, sharding)
    task = plan.build_task()
    groups = task.param_groups()
    check_trains_to_the_end(groups, total_steps)  # again, for networks that need weights
    compiling = options[CompileOptions]
    if compiling.torch_compile:
        compile_blocks(task.unet, compiling.dynamo_backend, device)
    shards, local_groups = None, groups
    if sharding.stage:
        # ZeRO-2 and ZeRO-3, and steps within backward, exist to save gradients: full ones would defeat them.
        reduces_microbatches = sharding.stage > 1 or options[UpdateOptions].is_fused
        shards = Shards(
            models.unet,
            groups,
            device,
            world_size,
            sharding,
            reduces_microbatches=reduces_microbatches,
        )
        local_groups = shards.groups
    loss_module: nn.Module = build_loss_module(
        task,
        models,
        plan.inputs,
        options[NoiseOptions],
        options[LossOptions],
        vae_batch_size=options[CacheOptions].vae_batch_size,
    )
    if shards is None and world_size > 1:  # a launcher may start one process alone
        loss_module = _wrapped(loss_module, accelerator)
    optimizer_step = build_optimizer_step(
        loss_module,
        local_groups,
        plan.optimizer_settings,
        total_steps,
        seed=seed,
        processes=world_size,
        shards=shards,
    )
    return TrainingState(
        task, local_groups, shards, optimizer_step, _build_ema(task, options[EmaOptions])
    )


def _build_ema(task: Task[Any], options: EmaOptions) -> Ema | None:
    if options.ema_decay is None:
        return None
    device = torch.device("cpu") if options.ema_device == "cpu" else None
    return Ema(task.trainables, options.ema_decay, device)


def _wrapped(loss_module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the loss module wrapped for several processes.

    Frozen weights are left out of what the wrapper synchronizes: all processes read the same file.
    """
    frozen = [
        name for name, parameter in loss_module.named_parameters() if not parameter.requires_grad
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss_module, frozen)
    return accelerator.prepare(
        loss_module, device_placement=[False]
    )  # everything is on its device already
