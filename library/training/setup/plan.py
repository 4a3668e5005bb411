"""Plan: how much work a run is, what it trains, what it writes and what memory it takes, known before the first step."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from library.data.batch_sampler import BatchSampler
from library.data.loader import group_samples
from library.data.options import CacheOptions
from library.data.samples import Sample
from library.data.scan import Dataset
from library.errors import Mistake, OptionError
from library.models.memory.block_swap import largest_blocks
from library.models.memory.quantization import BYTES_OF, large_linears, numbers_of
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import text_encoder_config
from library.models.unet import UNet
from library.options import Options
from library.param_group import ParamGroup, split_groups
from library.size import Size
from library.training.optim.master_weights import AT_ONCE
from library.training.options.distributed import keeps_state_in_ram
from library.training.options.memory import MemoryOptions
from library.training.options.optimizer import EmaOptions, OptimizerOptions, UpdateOptions
from library.training.options.run import RunOptions
from library.training.saving.saver import Saver, format_bytes
from library.training.setup.memory_estimate import Estimate, Frozen, Work, estimate, optimizer_bytes, state_bytes
from library.training.tasks.base import Task

_SHOWN = 6  # names of saves


class Plan(NamedTuple):
    """How much work there is."""

    order: BatchSampler
    total_steps: int
    num_epochs: int


class Bucket(NamedTuple):
    """Pictures that share batches: how many, how often they are shown in an epoch, and at most at once; whether all have masks."""

    size: Size
    images: int
    shown: int
    batch_size: int
    are_masked: bool = False

    @property
    def largest(self) -> int:
        """Pictures of its largest batch."""
        return min(self.shown, self.batch_size)


def make_plan(options: RunOptions, datasets: Sequence[Dataset], *, processes: int, seed: int) -> Plan:
    order = BatchSampler(
        group_samples(datasets, samples_of(datasets)), seed, processes, options.gradient_accumulation_steps
    )
    total = options.max_train_epochs * order.steps_per_epoch if options.max_train_epochs else options.max_train_steps
    return Plan(order, total, math.ceil(total / order.steps_per_epoch))


def samples_of(datasets: Sequence[Dataset]) -> list[Sample]:
    return [sample for dataset in datasets for sample in dataset.samples]


def buckets_of(plan: Plan, datasets: Sequence[Dataset]) -> list[Bucket]:
    """The buckets of all datasets; one of the same size in two datasets is there twice, as they share no batch."""
    samples = samples_of(datasets)
    return [
        Bucket(
            samples[members[0]].fit.bucket,
            len(set(members)),
            len(members),
            batch_size,
            are_masked=all(samples[member].has_mask for member in members),
        )
        for members, batch_size in plan.order.groups
    ]


def largest_of(buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of the batch with the most pixels."""
    return max(buckets, key=lambda bucket: bucket.size.area * bucket.largest)


def check_lasting(groups: Sequence[ParamGroup], total_steps: int) -> None:
    """Raises OptionError if all that is trained stops before the run ends."""
    ends = [total_steps if group.last_step is None else group.last_step for group in groups]
    last = max(ends, default=total_steps)
    if last < total_steps:
        names = dict.fromkeys(
            "ti_stop_ratio" if g.component == "token" else "stop_text_encoder_training" for g in groups
        )
        flags = " and ".join(f"--{name}" for name in names)
        raise OptionError(
            Mistake(
                f"{flags}: nothing is left to train after step {last} of {total_steps}; leave it out, or train something beside",
                tuple(names),
            )
        )


def estimate_memory(
    task: Task, models: SdxlModels, groups: Sequence[ParamGroup], buckets: Sequence[Bucket], options: Options
) -> Estimate:
    """The peak of a step on the largest batch. Reads headers of the model alone, so the task may be on the meta device."""
    cache, ema = options[CacheOptions], options[EmaOptions]
    largest, are_masked = largest_of(buckets), all(bucket.are_masked for bucket in buckets)
    trains_text = any(group.needs_text_gradients for group in groups)
    memory = options[MemoryOptions]
    shapes = [parameter.shape for group in groups for parameter in group.parameters.values()]
    swapped = _swapped_numbers(task.unet, memory.blocks_to_swap or 0)
    trains_unet = "unet" in models.trained
    frozen = [
        one
        for part, numbers in frozen_parts(task, models, cache, are_masked=are_masked)
        for one in _frozen(part, numbers - (swapped if part == "unet" and not trains_unet else 0), task.unet, models)
    ]
    work = Work(
        models.checkpoint.unet,
        largest.size.area,
        largest.largest,
        models.precision.compute.itemsize,
        policy=memory.checkpoint_policy if memory.gradient_checkpointing else None,
        waits_at_home=memory.cpu_offload_checkpointing,
        text_channels=_text_channels(models) if trains_text else 0,
        text_tokens=options[ModelOptions].num_tokens + 2,
        vae_channels=models.stored("vae")["encoder.conv_in.weight"].shape[0]
        if encodes_images(models, cache, are_masked=are_masked)
        else 0,
        vae_batch=cache.vae_batch_size,
    )
    return estimate(
        frozen,
        work,
        trained=sum(map(math.prod, shapes)),
        optimizer=_state_on_device(options[OptimizerOptions].name, shapes, at_home=keeps_state_in_ram(options)),
        average_on_device=ema.ema_decay is not None and ema.ema_device != "cpu",
        bytes_each=models.precision.trained.itemsize,
        has_rests=options[UpdateOptions].rounding == "kahan",
        fused=_most_at_once(groups, options),
        away=swapped if trains_unet else 0,
    )


def optimizer_in_state(task: Task, options: Options) -> int:
    """About the bytes that a saved state has of the optimizer, and of what Kahan's rounding keeps."""
    parameters = [p for group in task.param_groups() for p in group.parameters.values()]
    rests = sum(p.nbytes for p in parameters) if options[UpdateOptions].rounding == "kahan" else 0
    return state_bytes(options[OptimizerOptions].name, [p.shape for p in parameters]) + rests


def _state_on_device(optimizer: str, shapes: Sequence[Sequence[int]], *, at_home: bool) -> int:
    """Bytes of an optimizer's state on the device; what visits it for a step, if it lies at home."""
    if not at_home:
        return state_bytes(optimizer, shapes)
    return max(AT_ONCE * optimizer_bytes(optimizer), *(state_bytes(optimizer, [shape]) for shape in shapes))


def _swapped_numbers(unet: UNet, count: int) -> int:
    """The numbers of the blocks that lie in RAM, without the two that visit the device at once."""
    sizes = [numbers_of(block) for block in largest_blocks(unet.blocks, count)]
    return max(0, sum(sizes) - 2 * max(sizes, default=0))


def _frozen(part: str, numbers: int, unet: UNet, models: SdxlModels) -> Iterator[Frozen]:
    """A part's frozen numbers: those of quantised layers, and the others."""
    kind = models.quantized.get(part)
    if kind is not None:
        if part == "unet":
            whole = sum(layer.in_features * layer.out_features for _, layer in large_linears(unet))
            share = whole / numbers_of(unet)
        else:
            stored = models.stored(part)
            share = sum(t.numel() for n, t in stored.items() if ".layers." in n and t.ndim == 2) / sum(
                t.numel() for t in stored.values()
            )
        yield Frozen(part, round(numbers * share), BYTES_OF[kind])
        numbers = round(numbers * (1 - share))
    yield Frozen(part, numbers, dtype_of(part, models).itemsize)


def _most_at_once(groups: Sequence[ParamGroup], options: Options) -> int:
    """The most numbers that step together within backward, if no gradient is kept until then; else 0."""
    chosen = options[UpdateOptions]
    if not chosen.is_fused or options[RunOptions].gradient_accumulation_steps > 1:
        return 0
    count = sum(len(group.parameters) for group in groups)
    buckets_of_params = split_groups(groups, chosen.fused_optimizer_groups or count)
    return max(
        sum(parameter.numel() for parameter in param_bucket.parameters.values()) for param_bucket in buckets_of_params
    )


def frozen_parts(task: Task, models: SdxlModels, cache: CacheOptions, *, are_masked: bool) -> Iterator[tuple[str, int]]:
    """(part, numbers) of the parts that are on the device while it trains, without what is trained of them.

    Args: are_masked: as for encodes_pictures.
    """
    trained = {name: parameter for trainable in task.trainables for name, parameter in trainable.tensors().items()}
    ids = {id(parameter) for parameter in trained.values()}
    yield "unet", numbers_of(task.unet) - sum(p.numel() for p in task.unet.parameters() if id(p) in ids)
    absent = [
        *(["text_encoder_1", "text_encoder_2"] if cache.text else []),
        *([] if encodes_images(models, cache, are_masked=are_masked) else ["vae"]),
    ]
    for part in models.checkpoint.parts:
        if part != "unet" and part not in absent:
            own = sum(parameter.numel() for name, parameter in trained.items() if name.startswith(f"{part}."))
            yield part, sum(tensor.numel() for tensor in models.stored(part).values()) - own


def encodes_images(models: SdxlModels, cache: CacheOptions, *, are_masked: bool) -> bool:
    """Whether steps need the VAE: for pictures without cached latents, and for what inpainting models see under drawn masks.

    Args: are_masked: all pictures have masks of their own, so that what is seen is cached too.
    """
    return not cache.latents or (models.checkpoint.unet.is_inpainting and not are_masked)


def dtype_of(part: str, models: SdxlModels) -> torch.dtype:
    """The dtype of a part's frozen weights; a part that is trained has one dtype for all of them."""
    precision = models.precision
    return precision.trained if part in models.trained else precision.vae if part == "vae" else precision.compute


def _text_channels(models: SdxlModels) -> int:
    stored = {number: models.stored(f"text_encoder_{number}") for number in (1, 2)}
    configs = [text_encoder_config(tensors, number) for number, tensors in stored.items() if tensors]
    return sum(config["hidden_size"] * config["num_hidden_layers"] for config in configs)


# ------------------------------------------------------------------------------------------------------------- in words


def format_steps(plan: Plan, datasets: Sequence[Dataset]) -> list[str]:
    """The arithmetic from pictures to steps."""
    order = plan.order
    shown = sum(dataset.num_samples for dataset in datasets)
    share = f"({order.processes} processes x {order.per_process} accumulated)"
    return [
        f"{len(samples_of(datasets))} pictures, {shown} with repeats, in {len(order.groups)} buckets",
        f"{order.batches_per_epoch} batches / {share} = {order.steps_per_epoch} steps an epoch; "
        f"{plan.total_steps} steps in all, {plan.num_epochs} epochs",
    ]


def format_groups(groups: Sequence[ParamGroup]) -> list[str]:
    """A table of what is trained at which learning rate."""
    width = max(len("trained"), *(len(group.name) for group in groups))
    lines = [f"{'trained'.ljust(width)}  tensors        numbers  learning rate"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group.parameters.values())
        until = "" if group.last_step is None else f" until step {group.last_step}"
        lines.append(f"{group.name.ljust(width)}  {len(group.parameters):7d}  {count:13,}  {group.lr:g}{until}")
    return lines


def format_saves(saver: Saver, plan: Plan) -> list[str]:
    """How often a whole run saves, and under which names; what lies on the disk at once."""
    names, space = saver.planned(plan.total_steps, plan.order.steps_per_epoch), saver.space(plan.total_steps)
    shown = names if len(names) <= _SHOWN else [*names[: _SHOWN - 2], "…", *names[-2:]]
    states = f" and {space.states} states of about {format_bytes(space.state_bytes)}" if space.states else ""
    return [
        f"saves: {len(names)} of {format_bytes(space.model_bytes)}: {', '.join(shown)}",
        f"on the disk at once: at most {space.models} saves{states}, {format_bytes(space.needed)}",
    ]


def format_memory(found: Estimate) -> str:
    """The terms of the estimate that aren't 0."""
    words = {
        "frozen": "frozen weights", "trained": "trained weights", "gradients": "gradients", "optimizer": "optimizer",
        "average": "moving average", "activations": "activations",
    }  # fmt: skip
    terms = [f"{words[name]} {format_bytes(size)}" for name, size in found._asdict().items() if size]
    return f"memory: about {format_bytes(found.total)} on the device: {', '.join(terms)}"
