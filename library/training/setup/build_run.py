"""Start: from options to everything that the loop touches: processes, models, caches, task, optimizer, saver."""

import dataclasses
import os
import random
import secrets
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from library.data.loader import Batches, group_samples
from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.generation.sample_prompts import SamplePrompt, at_size, read_sample_prompts
from library.log import log, silence_logging
from library.models.compile import compile_blocks
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.options import Options
from library.param_group import ParamGroup
from library.training.distributed.launch import start_processes
from library.training.distributed.sharding import Shards, shard
from library.training.monitoring.metrics import MetricsLogger, saved_files
from library.training.monitoring.preview import Preview, encode_prompts
from library.training.monitoring.sanity_checks import GradientFlowCheck
from library.training.monitoring.slowdown import SlowdownDetector
from library.training.monitoring.trackers import Trackers, logged_config, open_trackers
from library.training.monitoring.validation import Best, Validation, fixed_timesteps, validation_batches
from library.training.optim.build import build_optimizer_step
from library.training.optim.optimizer_step import OptimizerStep
from library.training.options.distributed import ShardingOptions, sharding_config
from library.training.options.memory import CompileOptions, MemoryOptions
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import EmaOptions, UpdateOptions
from library.training.options.output import (
    PreviewOptions,
    ResumeOptions,
    SavingOptions,
    TrackerOptions,
    UploadOptions,
)
from library.training.options.run import RunOptions, ValidationOptions
from library.training.options.tasks import LLLiteOptions
from library.training.progress import Progress
from library.training.run import Run
from library.training.saving.resume import ResumePoint, initial_step, run_signature
from library.training.saving.run_file import write_run_file
from library.training.saving.saver import Saver
from library.training.saving.uploads import open_uploads
from library.training.setup.build import (
    build_ema,
    build_loss_module,
    build_on_meta,
    build_task,
    fit_memory,
    open_models,
)
from library.training.setup.build_saver import build_saver
from library.training.setup.caches import CachedData, all_samples, fill_caches
from library.training.setup.inputs import RunInputs
from library.training.setup.plan import (
    Plan,
    buckets_of,
    check_lasting,
    encodes_images,
    estimate_memory,
    format_groups,
    format_memory,
    format_saves,
    format_steps,
    make_plan,
)
from library.training.tasks.base import Task


class TrainingState(NamedTuple):
    """What is trained, and how. Attributes: stepped: the groups as this process steps them."""

    task: Task
    groups: list[ParamGroup]
    stepped: list[ParamGroup]
    shards: Shards | None
    update: OptimizerStep


def build_run(kind: type[Task], options: Options, found: RunInputs, resumed: ResumePoint | None = None) -> Run:
    """Set a run up: fill its caches, load its models, build what it trains. Tells what is going to happen.

    Args: resumed: the state that it will go on from; here only its seed and session count.
    """
    run = options[RunOptions]
    accelerator = start_processes(
        timeout=run.ddp_timeout,
        gradient_as_bucket_view=run.ddp_gradient_as_bucket_view,
        static_graph=run.ddp_static_graph,
    )
    is_main, processes = accelerator.is_main_process, accelerator.num_processes
    trackers = _open_trackers(kind, options) if is_main else None
    seed = _shared_seed(run.seed if resumed is None else int(resumed.facts["run"]["seed"]))
    states, validating = options[ResumeOptions], options[ValidationOptions]
    models, options, begins = check_before_caching(kind, options, found, accelerator, seed)
    prepared, make_preview = fill_caches_and_encode_prompts(models, options, found, accelerator, seed)
    plan = make_plan(options[RunOptions], prepared.datasets, processes=processes, seed=seed)
    learning = _build(kind, models, options, found, plan, accelerator, seed)
    task = learning.task
    ema = build_ema(task, options[EmaOptions])
    session_id = str(secrets.randbits(32)) if resumed is None else resumed.facts["session_id"]
    saver = build_saver(
        task, options, found, prepared, plan, learning.update, ema, open_uploads(options[UploadOptions]) if is_main else None,
        session_id=session_id, processes=processes, is_main=is_main,
    )  # fmt: skip
    done = Progress() if resumed is None else Progress(resumed.facts["epoch"], resumed.facts["step"])
    if resumed is not None:
        saver.own = saved_files(saver.log_file, session_id)
    _tell(plan, prepared, learning, saver, models, options)
    if is_main:
        saver.check_space(plan.total_steps, done)
        if not states.verify_resume:
            write_run_file(options, seed)
    batches = _make_batches(prepared, options, found, seed, plan.total_steps)
    return Run(
        accelerator=accelerator,
        trainables=task.trainables,
        shards=learning.shards,
        trained={name: parameter for group in learning.stepped for name, parameter in group.parameters.items()},
        update=learning.update,
        ema=ema,
        watch=GradientFlowCheck(learning.stepped, max(begins, done.step)),
        pace=SlowdownDetector(accelerator.device),
        validation=_make_validation(prepared, batches, options, seed, plan.total_steps),
        best=Best(validating.early_stop_patience),
        keeps_best=validating.keeps_best,
        preview=make_preview(task),
        order=plan.order,
        batches=batches,
        report=MetricsLogger(
            plan.total_steps,
            plan.order.steps_per_epoch,
            is_main=is_main,
            trackers=trackers,
            log_file=None if states.verify_resume else saver.log_file,
            done=0 if resumed is None else resumed.facts["step"],
        ),
        saver=saver,
        states=states,
        facts=run_signature(options, found.datasets, seed=seed) if states.saves_states else {},
        session_id=session_id,
        shown=options.changed(),
        seed=seed,
        total_steps=plan.total_steps,
        num_workers=min(options[CacheOptions].max_data_loader_n_workers, os.cpu_count() or 1),
    )


def check_before_caching(
    kind: type[Task], options: Options, found: RunInputs, accelerator: Accelerator, seed: int
) -> tuple[SdxlModels, Options, int]:
    """See, before caches take their time, what can't be trained.

    Returns the models, unloaded; the options, as --memory_plan makes them; and the step at which a run without a state begins.
    """
    processes = accelerator.num_processes
    # Of all pictures: those that turn out to be bad may be left out.
    plan = make_plan(options[RunOptions], found.datasets, processes=processes, seed=seed)
    begins = initial_step(
        options[ResumeOptions], steps_per_epoch=plan.order.steps_per_epoch, total_steps=plan.total_steps
    )
    models = open_models(kind, options, found, accelerator.device)
    with silence_logging():
        rehearsed = build_on_meta(kind, models, options, found, plan.total_steps)
    if rehearsed is not None:
        check_lasting(rehearsed.param_groups(), plan.total_steps)
    if options[MemoryOptions].memory_plan is not None:
        options = fit_memory(rehearsed, models, options, found.datasets, processes)
        models = open_models(kind, options, found, accelerator.device)
    return models, options, begins


def fill_caches_and_encode_prompts(
    models: SdxlModels, options: Options, found: RunInputs, accelerator: Accelerator, seed: int
) -> tuple[CachedData, Callable[[Task], Preview]]:
    """Fill the caches, encode the samples' prompts, and let go of models that the run doesn't need.

    Returns what is trained on, and how a task's samples are made.
    """
    model, sampling = options[ModelOptions], options[PreviewOptions]
    prompts = sample_prompts(options, found)
    prepared = fill_caches(
        found.datasets, models, options[CacheOptions], accelerator, found.known,
        num_tokens=model.num_tokens, weighted_captions=options[CaptionOptions].weighted_captions, skip_bad_images=options[DatasetOptions].skip_bad_images,
    )  # fmt: skip
    if options[LossOptions].masked_loss and not any(
        sample.conditioning or sample.subset.pixels.alpha_mask for sample in prepared.samples
    ):
        log.warning("--masked_loss changes nothing: no picture has a mask; give conditioning_data_dir")
    # Once captions are encoded, the text encoders go; so do prompts that they would have to encode later.
    texts = encode_prompts(models, prompts, model.num_tokens) if prepared.text and prompts else None
    are_masked = all(sample.has_mask for sample in all_samples(prepared.datasets))
    keeps_vae = encodes_images(models, options[CacheOptions], are_masked=are_masked)
    models.release(*([] if keeps_vae else ["vae"]), *(["text_encoders"] if prepared.text else []))
    folder = options[SavingOptions].output_dir
    assert folder is not None

    def make_preview(task: Task) -> Preview:
        return Preview(
            prompts, models, task.unet, texts, model.num_tokens,
            folder=folder / "sample", name=options[SavingOptions].output_name, sampler=sampling.sample_sampler, seed=seed, keeps_vae=keeps_vae,
            v_prediction=found.v_prediction, zero_terminal_snr=found.zero_terminal_snr,
            every_steps=sampling.sample_every_n_steps, every_epochs=sampling.sample_every_n_epochs, at_first=sampling.sample_at_first,
            control_inputs=task.control_inputs,
        )  # fmt: skip

    return prepared, make_preview


def _build(
    kind: type[Task],
    models: SdxlModels,
    options: Options,
    found: RunInputs,
    plan: Plan,
    accelerator: Accelerator,
    seed: int,
) -> TrainingState:
    """Load what is trained, cut it or wrap it for several processes, and make its optimizer."""
    device, processes = accelerator.device, accelerator.num_processes
    torch.manual_seed(seed)
    zero = sharding_config(options[ShardingOptions])
    if zero.stage:
        shard(models.unet, device, processes, zero)
    task = build_task(kind, models, options, found, plan.total_steps)
    groups = task.param_groups()
    check_lasting(groups, plan.total_steps)  # again, for networks that can't be rehearsed
    compiling = options[CompileOptions]
    if compiling.torch_compile:
        compile_blocks(task.unet, compiling.dynamo_backend, device)
    shards = None
    if zero.stage:
        # ZeRO-2 and 3, and steps within backward, are there to spare gradients: whole ones would be in their way.
        adds_up_parts = zero.stage > 1 or options[UpdateOptions].is_fused
        shards = Shards(models.unet, groups, device, processes, zero, adds_up_parts=adds_up_parts)
    step: nn.Module = build_loss_module(task, models, options, found)
    if shards is None and processes > 1:  # a launcher may start one alone
        step = _wrapped(step, accelerator)
    stepped = groups if shards is None else shards.groups
    update = build_optimizer_step(
        step, stepped, options, plan.total_steps, seed=seed, processes=processes, shards=shards
    )
    return TrainingState(task, groups, stepped, shards, update)


def _tell(
    plan: Plan, prepared: CachedData, learning: TrainingState, saver: Saver, models: SdxlModels, options: Options
) -> None:
    """What is going to happen, in a few lines."""
    buckets = buckets_of(plan, prepared.datasets)
    for line in (
        *format_steps(plan, prepared.datasets),
        *format_groups(learning.groups),
        *format_saves(saver, plan),
        format_memory(estimate_memory(learning.task, models, learning.groups, buckets, options))
        + ("" if learning.shards is None else "; of the U-Net each process has its part"),
    ):
        log.info(line)


def _make_batches(prepared: CachedData, options: Options, found: RunInputs, seed: int, total_steps: int) -> Batches:
    return Batches(
        prepared.samples,
        prepared.latents,
        prepared.text,
        seed,
        total_steps,
        options[DatasetOptions].prior_loss_weight,
        options[DatasetOptions].aesthetic_score,
        for_inpainting=found.checkpoint.unet.is_inpainting,
        reads_conditioning=options[LossOptions].masked_loss or LLLiteOptions in options,
    )


def sample_prompts(options: Options, found: RunInputs) -> list[SamplePrompt]:
    """The prompts of samples during training, with sizes. What is wrong with some is told, and they are drawn without it."""
    chosen = options[PreviewOptions]
    if not chosen.is_on or chosen.sample_prompts is None:
        return []
    prompts, problems = read_sample_prompts(chosen.sample_prompts)
    for problem in problems:
        log.warning(problem)
    with_condition = sum(prompt.controlnet_image is not None for prompt in prompts)
    if with_condition and LLLiteOptions not in options:
        log.warning(
            "--sample_prompts: %d controlnet_image (--cn) change nothing: no control net is trained", with_condition
        )
    elif with_condition < len(prompts) and LLLiteOptions in options:
        log.warning("--sample_prompts: %d prompts have no condition (--cn FILE)", len(prompts) - with_condition)
    if not prompts:
        log.warning("--sample_prompts %s: no prompts in it; no samples are drawn", chosen.sample_prompts)
    size = found.datasets[0].plan.buckets.resolution
    return [at_size(prompt, size.width, size.height) for prompt in prompts]


def _open_trackers(kind: type[Task], options: Options) -> Trackers:
    config = logged_config(options) if options[TrackerOptions].log_config else {}
    return open_trackers(options[TrackerOptions], kind.tracker_name, config)


def _shared_seed(seed: int | None) -> int:
    """The run's seed: the one given, or one drawn for all processes."""
    if seed is not None:
        return seed
    drawn = [random.SystemRandom().randrange(2**32)]
    broadcast_object_list(drawn)
    log.info("--seed is not set; this run draws from seed %d", drawn[0])
    return drawn[0]


def _wrapped(step: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The Step, wrapped for several processes. Frozen weights are left out of what the wrapper keeps equal: all read one file."""
    frozen = [name for name, parameter in step.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, frozen)
    return accelerator.prepare(step, device_placement=[False])  # all is where it belongs


def _make_validation(
    prepared: CachedData, batches: Batches, options: Options, seed: int, total_steps: int
) -> Validation:
    chosen, noise = options[ValidationOptions], options[NoiseOptions]
    own_seed = options[DatasetOptions].validation_seed
    samples = prepared.validation
    if samples:
        log.info("%d pictures are held out for validation", len(samples))
    elif chosen.validate_every_n_steps or chosen.validate_every_n_epochs or chosen.keeps_best:
        shares = [dataset.plan.validation_split for dataset in prepared.datasets]
        if any(shares):
            log.warning("there is nothing to validate on: validation_split %g of the pictures is none", max(shares))
        else:
            log.warning(
                "there is nothing to validate on: give --validation_split, or validation_split in the dataset file"
            )
    return Validation(
        dataclasses.replace(batches, samples=samples, seed=seed if own_seed is None else own_seed),
        validation_batches(group_samples(prepared.datasets, samples), total_steps, chosen.max_validation_steps),
        fixed_timesteps(noise.min_timestep, noise.max_timestep),
        seed if own_seed is None else own_seed,
        chosen.validate_every_n_steps,
        chosen.validate_every_n_epochs or 1,
    )
