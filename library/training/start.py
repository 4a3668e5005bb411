"""Start: from options to everything that the loop touches: processes, models, caches, task, optimizer, saver."""

import dataclasses
import functools
import math
import os
import random
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from library.data.dataset import Batches, group_samples
from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.data.subsets import Dataset
from library.devices import lacks_bf16
from library.errors import Mistake, OptionError
from library.log import log, muted
from library.models.attention import choose_attention
from library.models.checkpointing import Checkpointing
from library.models.compiling import compile_blocks
from library.models.noise_schedule import NoiseSchedule
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.options import Options
from library.param_group import ParamGroup
from library.precision import Precision
from library.sampling.prompts import SamplePrompt, at_size, read_sample_prompts
from library.training.compile_options import CompileOptions
from library.training.ema import Ema
from library.training.make_update import make_update, try_optimizer
from library.training.memory_options import MemoryOptions
from library.training.memory_plan import fit
from library.training.metadata import RunFacts, at_save, model_metadata, modelspec
from library.training.optimizers import optimizer_in_words
from library.training.options import (
    EmaOptions,
    LossOptions,
    NoiseOptions,
    OptimizerOptions,
    PreviewOptions,
    ResumeOptions,
    RunOptions,
    SavingOptions,
    TrackerOptions,
    UploadOptions,
    ValidationOptions,
    read_arguments,
)
from library.training.pace import Pace
from library.training.plan import (
    Plan,
    buckets_of,
    encodes_pictures,
    estimate_memory,
    groups_in_words,
    make_plan,
    memory_in_words,
    saves_in_words,
    steps_in_words,
    trained_groups,
)
from library.training.preflight import Preflight
from library.training.prepare import Prepared, all_samples, prepare
from library.training.preview import Preview, encode_prompts
from library.training.processes import start_processes
from library.training.report import Report
from library.training.resume import Resumed, run_facts
from library.training.run import Run
from library.training.run_file import write_run_file
from library.training.saving import Saver
from library.training.sharding import Shards, shard
from library.training.sharding_options import ShardingOptions, zero_of
from library.training.step import Step
from library.training.task import Objective, Task
from library.training.task_options import LLLiteOptions
from library.training.trackers import logged_config, open_trackers
from library.training.update import Update
from library.training.update_options import UpdateOptions
from library.training.uploads import Uploads, open_uploads
from library.training.validation import Best, Validation, fixed_timesteps, validation_batches
from library.training.watch import Watch


def start(kind: type[Task], options: Options, found: Preflight, resumed: Resumed | None = None) -> Run:
    """Set a run up: fill its caches, load its models, build what it trains. Tells what is going to happen.

    Args: resumed: the state that it will go on from; here only its seed and session count.
    """
    run = options[RunOptions]
    accelerator = start_processes(
        timeout=run.ddp_timeout,
        gradient_as_bucket_view=run.ddp_gradient_as_bucket_view,
        static_graph=run.ddp_static_graph,
    )
    folder = options[SavingOptions].output_dir
    assert folder is not None
    trackers = None
    if accelerator.is_main_process:
        config = logged_config(options) if options[TrackerOptions].log_config else {}
        trackers = open_trackers(options[TrackerOptions], kind.tracker_name, config)
    seed = _shared_seed(options[RunOptions].seed if resumed is None else int(resumed.facts["run"]["seed"]))
    models = open_models(kind, options, found, accelerator.device)
    with muted():
        task = rehearse(kind, models, options)
    if options[MemoryOptions].memory_plan is not None:
        options = fit_memory(task, models, options, found.datasets, accelerator.num_processes)
        models = open_models(kind, options, found, accelerator.device)
    prompts = sample_prompts(options, found)
    prepared = prepare(
        found.datasets, models, options[CacheOptions], accelerator, found.known,
        num_tokens=options[ModelOptions].num_tokens, weighted_captions=options[CaptionOptions].weighted_captions, skip_bad_images=options[DatasetOptions].skip_bad_images,
    )  # fmt: skip
    # Once captions are encoded, the text encoders go; so do prompts that they would have to encode later.
    texts = encode_prompts(models, prompts, options[ModelOptions].num_tokens) if prepared.text and prompts else None
    are_masked = all(sample.has_mask for sample in all_samples(prepared.datasets))
    keeps_vae = encodes_pictures(models, options[CacheOptions], are_masked=are_masked)
    models.release(*([] if keeps_vae else ["vae"]), *(["text_encoders"] if prepared.text else []))
    plan = make_plan(options[RunOptions], prepared.datasets, processes=accelerator.num_processes, seed=seed)
    if options[LossOptions].masked_loss and not any(
        sample.conditioning or sample.subset.pixels.alpha_mask for sample in prepared.samples
    ):
        log.warning("--masked_loss changes nothing: no picture has a mask; give conditioning_data_dir")

    torch.manual_seed(seed)
    zero = zero_of(options[ShardingOptions])
    if zero.stage:
        shard(models.unet, accelerator.device, accelerator.num_processes, zero)
    task = kind.from_options(models, options)
    groups = trained_groups(task, plan.total_steps)
    compiling = options[CompileOptions]
    if compiling.torch_compile:
        compile_blocks(task.unet, compiling.dynamo_backend, accelerator.device)
    shards = None
    if zero.stage:
        # ZeRO-2 and 3, and steps within backward, are there to spare gradients: whole ones would be in their way.
        shards = Shards(
            models.unet, groups, accelerator.device, accelerator.num_processes, zero,
            adds_up_parts=zero.stage > 1 or options[UpdateOptions].is_fused,
        )  # fmt: skip
    step: nn.Module = make_step(task, models, options, found)
    if shards is None and accelerator.num_processes > 1:  # a launcher may start one alone
        step = _wrapped(step, accelerator)
    stepped = groups if shards is None else shards.groups
    update = make_update(
        step, stepped, options, plan.total_steps, seed=seed, processes=accelerator.num_processes, shards=shards
    )
    ema = make_ema(task, options[EmaOptions])
    uploads = open_uploads(options[UploadOptions]) if accelerator.is_main_process else None
    session_id = str(secrets.randbits(32)) if resumed is None else resumed.facts["session_id"]
    saver = _make_saver(task, options, found, prepared, plan, update, accelerator, ema, uploads, session_id)
    buckets = buckets_of(plan, prepared.datasets)
    for line in (
        *steps_in_words(plan, prepared.datasets),
        *groups_in_words(groups),
        *saves_in_words(saver, plan),
        memory_in_words(estimate_memory(task, models, groups, buckets, options)),
    ):
        log.info(line)
    if accelerator.is_main_process:
        saver.check_space(plan.total_steps)
        if not options[ResumeOptions].verify_resume:
            write_run_file(options, seed)
    report = Report(
        plan.total_steps,
        plan.order.steps_per_epoch,
        is_main=accelerator.is_main_process,
        trackers=trackers,
        log_file=None if options[ResumeOptions].verify_resume else saver.log_file,
        done=0 if resumed is None else resumed.facts["step"],
    )
    batches = Batches(
        prepared.samples,
        prepared.latents,
        prepared.text,
        seed,
        plan.total_steps,
        options[DatasetOptions].prior_loss_weight,
        options[DatasetOptions].aesthetic_score,
        for_inpainting=found.checkpoint.unet.is_inpainting,
        reads_conditioning=options[LossOptions].masked_loss or LLLiteOptions in options,
    )
    sampling, saving, validating = options[PreviewOptions], options[SavingOptions], options[ValidationOptions]
    preview = Preview(
        prompts, models, task.unet, texts, options[ModelOptions].num_tokens,
        folder=folder / "sample", name=saving.output_name, sampler=sampling.sample_sampler, seed=seed, keeps_vae=keeps_vae,
        v_prediction=found.v_prediction, zero_terminal_snr=found.zero_terminal_snr,
        every_steps=sampling.sample_every_n_steps, every_epochs=sampling.sample_every_n_epochs, at_first=sampling.sample_at_first,
        steered_by=task.steered_by,
    )  # fmt: skip
    return Run(
        accelerator=accelerator,
        parts=task.parts,
        shards=shards,
        trained={name: parameter for group in stepped for name, parameter in group.parameters.items()},
        update=update,
        ema=ema,
        watch=Watch(stepped),
        pace=Pace(accelerator.device),
        validation=_make_validation(prepared, batches, options, seed, plan.total_steps),
        best=Best(validating.early_stop_patience),
        keeps_best=validating.keeps_best,
        preview=preview,
        order=plan.order,
        batches=batches,
        report=report,
        saver=saver,
        states=options[ResumeOptions],
        facts=run_facts(options, found.datasets, seed=seed) if options[ResumeOptions].saves_states else {},
        session_id=session_id,
        shown=options.changed(),
        seed=seed,
        total_steps=plan.total_steps,
        num_workers=min(options[CacheOptions].max_data_loader_n_workers, os.cpu_count() or 1),
    )


def fit_memory(
    task: Task | None, models: SdxlModels, options: Options, datasets: Sequence[Dataset], processes: int
) -> Options:
    """The options with those of --memory_plan. Args: task: on the meta device; None if it can't be built there."""
    if task is None:
        raise OptionError(
            Mistake("--memory_plan: this network's size isn't known before its weights are there", ("memory_plan",))
        )
    plan = make_plan(options[RunOptions], datasets, processes=processes, seed=0)
    groups, buckets = trained_groups(task, plan.total_steps), buckets_of(plan, datasets)
    trains_base = bool(models.trained)
    return fit(
        options, models.device, lambda tried: estimate_memory(task, models, groups, buckets, tried),
        len(task.unet.blocks), trains_base=trains_base,
    )  # fmt: skip


def sample_prompts(options: Options, found: Preflight) -> list[SamplePrompt]:
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


def make_ema(task: Task, options: EmaOptions) -> Ema | None:
    if options.ema_decay is None:
        return None
    return Ema(task.parts, options.ema_decay, torch.device("cpu") if options.ema_device == "cpu" else None)


def rehearse(kind: type[Task], models: SdxlModels, options: Options) -> Task | None:
    """Build network, optimizer and schedule without weights: what can't work is told before hours of caching.

    Returns the task, on the meta device; None if it can't be built there.
    """
    try:
        task = kind.from_options(models.without_weights(), options)
    except NotImplementedError:  # another package's network that needs numbers
        return None
    groups = [group for part in task.parts for group in part.groups()]
    if not groups:
        raise OptionError("nothing is trained: every learning rate is 0")
    stand_ins = [
        ParamGroup(group.name, {name: nn.Parameter(torch.zeros(1)) for name in group.parameters}, group.lr)
        for group in groups
    ]
    try_optimizer(stand_ins, options)
    return task


def _shared_seed(seed: int | None) -> int:
    """The run's seed: the one given, or one drawn for all processes."""
    if seed is not None:
        return seed
    drawn = [random.SystemRandom().randrange(2**32)]
    broadcast_object_list(drawn)
    log.info("--seed is not set; this run draws from seed %d", drawn[0])
    return drawn[0]


def open_models(kind: type[Task], options: Options, found: Preflight, device: torch.device) -> SdxlModels:
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
        checkpointing=checkpointing_of(options[MemoryOptions]),
    )
    models.trained = kind.trained_parts(options)
    # Caches are filled by whole encoders: other runs read them too.
    whole = ("text_encoder_1", "text_encoder_2") if options[CacheOptions].text else ()
    models.swapped_blocks = options[MemoryOptions].blocks_to_swap or 0
    models.quantized = {part: how for part, how in options[MemoryOptions].quantized.items() if part not in whole}
    models.change = kind.change(models.without_weights(), options)
    return models


def checkpointing_of(options: MemoryOptions) -> Checkpointing:
    """What is done with the activations."""
    return Checkpointing(
        options.checkpoint_policy if options.gradient_checkpointing else None,
        torch.device("cpu") if options.cpu_offload_checkpointing else None,
    )


def make_step(task: Task, models: SdxlModels, options: Options, found: Preflight) -> Step:
    objective = Objective(
        NoiseSchedule.sdxl(zero_terminal_snr=found.zero_terminal_snr).to(models.device), found.v_prediction
    )
    at_once = options[CacheOptions].vae_batch_size

    def encode_images(images: Tensor, noise: Tensor) -> Tensor:
        return torch.cat(
            [models.encode_images(*part) for part in zip(images.split(at_once), noise.split(at_once), strict=True)]
        )

    return Step(task, objective, options[NoiseOptions], options[LossOptions], encode_images).train()


def _wrapped(step: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The Step, wrapped for several processes. Frozen weights are left out of what the wrapper keeps equal: all read one file."""
    frozen = [name for name, parameter in step.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, frozen)
    return accelerator.prepare(step, device_placement=[False])  # all is where it belongs


def _make_validation(prepared: Prepared, batches: Batches, options: Options, seed: int, total_steps: int) -> Validation:
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


def _make_saver(
    task: Task,
    options: Options,
    found: Preflight,
    prepared: Prepared,
    plan: Plan,
    update: Update,
    accelerator: Accelerator,
    ema: Ema | None,
    uploads: Uploads | None,
    session_id: str,
) -> Saver:
    model, optimizing = options[ModelOptions], options[OptimizerOptions]
    arguments, _ = read_arguments("--optimizer_args", optimizing.optimizer_args)
    facts = RunFacts(
        datasets=prepared.datasets,
        seed=plan.order.seed,
        optimizer=optimizer_in_words(update.optimizer, arguments),
        batches_per_epoch=math.ceil(plan.order.batches_per_epoch / accelerator.num_processes),
        num_epochs=plan.num_epochs,
        total_steps=plan.total_steps,
        processes=accelerator.num_processes,
        zero_terminal_snr=found.zero_terminal_snr,
        session_id=session_id,
        base_model=_in_background(
            lambda: model_metadata(str(model.pretrained_model_name_or_path), model.vae),
            wanted=accelerator.is_main_process and not task.is_terse,
        ),
    )
    settled = functools.cache(lambda: task.metadata(options, facts))

    def metadata(steps: int, epoch: int) -> dict[str, str]:
        described = modelspec(
            options, task.modelspec_kind, v_prediction=found.v_prediction, default_title=task.default_title,
            is_refiner=found.checkpoint.unet.takes_score,
        )  # fmt: skip
        return {**settled(), **({} if task.is_terse else at_save(steps, epoch)), **described}

    dtype = Precision.decide("no", options[SavingOptions].save_precision, no_half_vae=True).save
    return Saver(
        options[SavingOptions], options[ResumeOptions], task.parts, metadata, dtype, plan.num_epochs,
        session_id=session_id, is_main=accelerator.is_main_process, keeps_best=options[ValidationOptions].keeps_best, ema=ema, uploads=uploads,
        sends_states=options[UploadOptions].save_state_to_huggingface,
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
