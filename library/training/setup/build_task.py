"""The base model, the task on top of it, and the training forward, from the options of a run."""

from typing import Any

import torch
from torch import Tensor, nn

from library.data.options import CacheOptions
from library.device import Precision, lacks_bf16
from library.errors import OptionError
from library.log import log, silence_logging
from library.models.attention import choose_attention
from library.models.memory.activation_checkpointing import ActivationPolicy
from library.models.noise_schedule import NoiseSchedule
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.options import OptionGroup, Options
from library.param_group import ParamGroup
from library.training.forward import DiffusionLoss
from library.training.objective.prediction import Objective
from library.training.options.memory import MemoryOptions
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import OptimizerOptions, UpdateOptions
from library.training.options.output import SavingOptions
from library.training.options.run import RunOptions
from library.training.setup.inputs import RunInputs
from library.training.tasks.base import Task, TaskSettings

_TEXT_ENCODERS = ("text_encoder_1", "text_encoder_2")


def open_models(
    kind: type[Task[Any]],
    groups: tuple[OptionGroup, ...],
    options: Options,
    inputs: RunInputs,
    device: torch.device,
) -> SdxlModels:
    """Return the base model as the task needs it. Nothing is loaded yet.

    Args:
        kind: the class of the task.
        groups: the option groups that only this task has.
        options: the options of the run.
        inputs: the base model's header.
        device: the device that trains.
    """
    model, run, update = options[ModelOptions], options[RunOptions], options[UpdateOptions]
    memory = options[MemoryOptions]
    if run.mixed_precision == "bf16":
        warning = lacks_bf16(device)
        if warning:
            log.warning("--mixed_precision bf16: %s", warning)
    models = SdxlModels(
        inputs.checkpoint,
        Precision.decide(
            run.mixed_precision,
            options[SavingOptions].save_precision,
            no_half_vae=model.no_half_vae,
            full=update.full_bf16 or update.full_fp16,
        ),
        device,
        vae=None if inputs.model_mistakes else model.vae,
        tokenizer_folder=model.tokenizer_cache_dir,
        attention=choose_attention(mem_eff_attn=model.mem_eff_attn, use_xformers=model.xformers),
        checkpointing=activation_policy(memory),
    )
    models.trained = kind.trained_components(options[OptimizerOptions].learning_rate, groups)
    models.swapped_blocks = memory.blocks_to_swap or 0
    models.quantized = dict(memory.quantized)
    if options[CacheOptions].text:
        # Caches are filled by text encoders that aren't quantized: other runs read them too.
        for component in _TEXT_ENCODERS:
            models.quantized.pop(component, None)
    models.change = kind.weight_patch(models.without_weights(), groups)
    return models


def activation_policy(options: MemoryOptions) -> ActivationPolicy:
    """Return which activations are kept for backward, and where."""
    return ActivationPolicy(
        options.checkpoint_policy if options.gradient_checkpointing else None,
        torch.device("cpu") if options.cpu_offload_checkpointing else None,
    )


def build_on_meta(
    kind: type[Task[Any]],
    models: SdxlModels,
    settings: TaskSettings,
    groups: tuple[OptionGroup, ...],
) -> Task[Any] | None:
    """Build the task without weights, so that what can't work is reported before hours of caching.

    Returns:
        The task, on the meta device; None if it can't be built there.

    Raises:
        OptionError: the task can't be built, or nothing is trained.
    """
    try:
        with silence_logging():
            task = kind(models.without_weights(), settings, groups)
    except NotImplementedError:  # another package's network that computes with weights
        return None
    if not task.param_groups():
        raise OptionError("nothing is trained: every learning rate is 0")
    return task


def single_element_groups(groups: list[ParamGroup]) -> list[ParamGroup]:
    """Return the groups with parameters of one element each, which is enough to see that an optimizer can be built."""
    small = []
    for group in groups:
        parameters = {name: nn.Parameter(torch.zeros(1)) for name in group.parameters}
        small.append(ParamGroup(group.name, parameters, group.lr))
    return small


def build_loss_module(
    task: Task[Any],
    models: SdxlModels,
    inputs: RunInputs,
    noise: NoiseOptions,
    loss: LossOptions,
    *,
    vae_batch_size: int,
) -> DiffusionLoss:
    """Return the training forward of a task.

    Args:
        task: what is trained.
        models: the base model.
        inputs: what the model predicts, and its schedule.
        noise: the options of noise and timesteps.
        loss: the options of the loss.
        vae_batch_size: images that the VAE encodes at a time.
    """
    schedule = NoiseSchedule.sdxl(zero_terminal_snr=inputs.zero_terminal_snr).to(models.device)

    def encode_images(images: Tensor, noise: Tensor) -> Tensor:
        latents = []
        for pixels, pixel_noise in zip(
            images.split(vae_batch_size), noise.split(vae_batch_size), strict=True
        ):
            latents.append(models.encode_images(pixels, pixel_noise))
        return torch.cat(latents)

    objective = Objective(schedule, inputs.v_prediction)
    return DiffusionLoss(task, objective, noise, loss, encode_images).train()
