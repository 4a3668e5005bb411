"""Build: models, rehearsal and step of a run, from options; dry runs and benchmarks build them too."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.data.options import CacheOptions, CaptionOptions
from library.data.scan import Dataset
from library.device import Precision, lacks_bf16
from library.errors import Mistake, OptionError
from library.log import log
from library.models.attention import choose_attention
from library.models.memory.activation_checkpointing import ActivationPolicy
from library.models.noise_schedule import NoiseSchedule
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.options import OptionGroup, Options
from library.param_group import ParamGroup
from library.training.forward import DiffusionLoss
from library.training.objective.prediction import Objective
from library.training.optim.build import try_optimizer
from library.training.optim.ema import Ema
from library.training.options.memory import MemoryOptions
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import EmaOptions, OptimizerOptions, UpdateOptions
from library.training.options.output import SavingOptions
from library.training.options.run import RunOptions
from library.training.setup.inputs import RunInputs
from library.training.setup.memory_estimate import fit
from library.training.setup.plan import buckets_of, estimate_memory, make_plan
from library.training.tasks.base import Task, TaskSettings


def open_models(kind: type[Task], options: Options, found: RunInputs, device: torch.device) -> SdxlModels:
    """The base model as the task wants it; nothing is loaded yet."""
    model, run, update = options[ModelOptions], options[RunOptions], options[UpdateOptions]
    if run.mixed_precision == "bf16" and (sentence := lacks_bf16(device)):
        log.warning("--mixed_precision bf16: %s", sentence)
    models = SdxlModels(
        found.checkpoint,
        Precision.decide(
            run.mixed_precision,
            options[SavingOptions].save_precision,
            no_half_vae=model.no_half_vae,
            full=update.full_bf16 or update.full_fp16,
        ),
        device,
        vae=None if found.no_model else model.vae,
        tokenizer_folder=model.tokenizer_cache_dir,
        attention=choose_attention(mem_eff_attn=model.mem_eff_attn, use_xformers=model.xformers),
        checkpointing=activation_policy(options[MemoryOptions]),
    )
    groups = task_options(kind, options)
    models.trained = kind.trained_components(options[OptimizerOptions].learning_rate, groups)
    # Caches are filled by whole encoders: other runs read them too.
    whole = ("text_encoder_1", "text_encoder_2") if options[CacheOptions].text else ()
    models.swapped_blocks = options[MemoryOptions].blocks_to_swap or 0
    models.quantized = {part: how for part, how in options[MemoryOptions].quantized.items() if part not in whole}
    models.change = kind.weight_patch(models.without_weights(), groups)
    return models


def task_options(kind: type[Task[Any]], options: Options) -> tuple[OptionGroup, ...]:
    """Return the option groups that only this task has."""
    return tuple(options[group] for group in kind.option_groups)


def build_task(
    kind: type[Task[Any]], models: SdxlModels, options: Options, found: RunInputs, total_steps: int
) -> Task[Any]:
    """Build the task on top of the models; on the meta device nothing is loaded."""
    settings = TaskSettings(
        lr=options[OptimizerOptions].learning_rate,
        num_tokens=options[ModelOptions].num_tokens,
        total_steps=total_steps,
        text_is_cached=options[CacheOptions].text,
        weighted_captions=options[CaptionOptions].weighted_captions,
        text_last_step=options[RunOptions].stop_text_encoder_training,
        v_prediction=found.v_prediction,
        zero_terminal_snr=found.zero_terminal_snr,
    )
    return kind(models, settings, task_options(kind, options))


def activation_policy(options: MemoryOptions) -> ActivationPolicy:
    """What is done with the activations."""
    return ActivationPolicy(
        options.checkpoint_policy if options.gradient_checkpointing else None,
        torch.device("cpu") if options.cpu_offload_checkpointing else None,
    )


def build_loss_module(task: Task, models: SdxlModels, options: Options, found: RunInputs) -> DiffusionLoss:
    objective = Objective(
        NoiseSchedule.sdxl(zero_terminal_snr=found.zero_terminal_snr).to(models.device), found.v_prediction
    )
    at_once = options[CacheOptions].vae_batch_size

    def encode_images(images: Tensor, noise: Tensor) -> Tensor:
        return torch.cat(
            [models.encode_images(*part) for part in zip(images.split(at_once), noise.split(at_once), strict=True)]
        )

    return DiffusionLoss(task, objective, options[NoiseOptions], options[LossOptions], encode_images).train()


def build_on_meta(
    kind: type[Task[Any]], models: SdxlModels, options: Options, found: RunInputs, total_steps: int
) -> Task[Any] | None:
    """Build network, optimizer and schedule without weights: what can't work is told before hours of caching.

    Returns the task, on the meta device; None if it can't be built there.
    """
    try:
        task = build_task(kind, models.without_weights(), options, found, total_steps)
    except NotImplementedError:  # another package's network that needs numbers
        return None
    groups = task.param_groups()
    if not groups:
        raise OptionError("nothing is trained: every learning rate is 0")
    fp32_params = [
        ParamGroup(group.name, {name: nn.Parameter(torch.zeros(1)) for name in group.parameters}, group.lr)
        for group in groups
    ]
    try_optimizer(fp32_params, options)
    return task


def fit_memory(
    task: Task | None, models: SdxlModels, options: Options, datasets: Sequence[Dataset], processes: int
) -> Options:
    """The options with those of --memory_plan. Args: task: on the meta device; None if it can't be built there."""
    if task is None:
        raise OptionError(
            Mistake("--memory_plan: this network's size isn't known before its weights are there", ("memory_plan",))
        )
    plan = make_plan(options[RunOptions], datasets, processes=processes, seed=0)
    groups, buckets = task.param_groups(), buckets_of(plan, datasets)
    trains_base = bool(models.trained)
    return fit(
        options, models.device, lambda tried: estimate_memory(task, models, groups, buckets, tried),
        len(task.unet.blocks), trains_base=trains_base,
    )  # fmt: skip


def build_ema(task: Task, options: EmaOptions) -> Ema | None:
    if options.ema_decay is None:
        return None
    return Ema(task.trainables, options.ema_decay, torch.device("cpu") if options.ema_device == "cpu" else None)
