"""Compatibility: which option groups and which features go together. Torch-free.

Every pair of features that isn't INCOMPATIBLE works, and has a test (tests/test_compatibility.py);
docs/memory.md shows the table.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.errors import Mistake
from library.log import LogOptions
from library.models.options import ModelOptions
from library.options import Options
from library.training.options.distributed import (
    ShardingOptions,
    check_sharding,
    is_sharded,
    offloads_optimizer,
    sharding_flag,
)
from library.training.options.memory import CompileOptions, MemoryOptions
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import (
    EmaOptions,
    OptimizerOptions,
    ScheduleOptions,
    UpdateOptions,
    check_update,
)
from library.training.options.output import (
    MetadataOptions,
    PreviewOptions,
    ResumeOptions,
    SavingOptions,
    TrackerOptions,
    UploadOptions,
)
from library.training.options.run import RunOptions, ValidationOptions

COMMON_TRAINING = (
    ModelOptions,
    DatasetOptions,
    CaptionOptions,
    CacheOptions,
    RunOptions,
    ShardingOptions,
    MemoryOptions,
    CompileOptions,
    OptimizerOptions,
    UpdateOptions,
    ScheduleOptions,
    NoiseOptions,
    LossOptions,
    ValidationOptions,
    PreviewOptions,
    EmaOptions,
    SavingOptions,
    ResumeOptions,
    UploadOptions,
    TrackerOptions,
    MetadataOptions,
    LogOptions,
)
"""The groups of every training script."""

# ---------------------------------------------------------------------- options of sd-scripts

UNSUPPORTED = {
    "fp16_master_weights_and_gradients": "trained weights that are sharded are float32, and so "
    "are their gradients; leave it out",
    "dataset_class": "a class of sd-scripts can't be loaded here; describe the images by "
    "--dataset_config",
}
"""Options that end the run before it starts, with the reason."""

NO_EFFECT = {
    "offload_optimizer_nvme_path": "nothing is moved to NVMe drives here",
    "offload_param_nvme_path": "nothing is moved to NVMe drives here",
}
"""Options that only mean something together with unsupported ones, with what a notice says."""

# ---------------------------------------------------------------------- contradictions of groups


def check_training(options: Options) -> Iterable[Mistake]:
    """Yield contradictions between the groups that every training script has."""
    run, optimizer = options[RunOptions], options[OptimizerOptions]
    yield from _check_loss(options[ModelOptions], options[LossOptions])
    yield from check_update(options[UpdateOptions], optimizer, run.mixed_precision)
    yield from _check_schedule(optimizer, options[ScheduleOptions])
    if optimizer.spec.is_schedule_free:
        yield from check_ema(optimizer.name, options[EmaOptions])
    yield from _check_upload(options[UploadOptions], options[ResumeOptions])
    memory = options[MemoryOptions]
    is_selective = memory.gradient_checkpointing and memory.checkpoint_policy == "selective"
    if options[CompileOptions].torch_compile and is_selective:
        yield Mistake(
            "--checkpoint_policy selective can't go with --torch_compile, which decides itself "
            "what it recomputes; leave one out",
            ("checkpoint_policy", "torch_compile"),
        )
    if run.ddp_static_graph and run.gradient_accumulation_steps > 1:
        yield Mistake(
            "--ddp_static_graph can't go with --gradient_accumulation_steps, where not every "
            "batch exchanges gradients",
            ("ddp_static_graph", "gradient_accumulation_steps"),
        )


def _check_loss(model: ModelOptions, loss: LossOptions) -> Iterable[Mistake]:
    if loss.scale_v_pred_loss_like_noise_pred and loss.v_pred_like_loss:
        yield Mistake(
            "--scale_v_pred_loss_like_noise_pred is for velocity models, --v_pred_like_loss for "
            "noise models; leave one out",
            ("v_pred_like_loss",),
        )
    if model.v_parameterization and loss.v_pred_like_loss:
        yield Mistake(
            "--v_pred_like_loss is for models that predict noise; it can't go with "
            "--v_parameterization",
            ("v_pred_like_loss", "v_parameterization"),
        )


def _check_schedule(optimizer: OptimizerOptions, schedule: ScheduleOptions) -> Iterable[Mistake]:
    finds_relative_step = optimizer.spec.finds_relative_step(optimizer.arguments)
    if schedule.lr_scheduler == "adafactor" and not finds_relative_step:
        yield Mistake(
            "--lr_scheduler adafactor goes only with --optimizer_type Adafactor that finds its "
            "own rate (relative_step)",
            ("lr_scheduler", "optimizer_type"),
        )


def _check_upload(upload: UploadOptions, states: ResumeOptions) -> Iterable[Mistake]:
    if upload.save_state_to_huggingface and not (
        upload.huggingface_repo_id and states.saves_states
    ):
        yield Mistake(
            "--save_state_to_huggingface needs --huggingface_repo_id, and --save_state or "
            "--save_state_on_train_end",
            ("save_state_to_huggingface",),
        )
    resume = states.resume or ""
    if upload.resume_from_huggingface and resume.count("/") < 2:
        yield Mistake(
            f"--resume_from_huggingface: --resume {resume} must be OWNER/REPOSITORY/FOLDER",
            ("resume",),
        )


# ---------------------------------------------------------------------- pairs of features


@dataclass(frozen=True)
class Feature:
    """Something that a run may use.

    Attributes:
        flag: how the user asks for it; where there are several ways, the one that was used.
        is_on: whether the options ask for it.
    """

    flag: Callable[[Options], str]
    is_on: Callable[[Options], bool]


def _feature(flag: str, is_on: Callable[[Options], bool]) -> Feature:
    return Feature(lambda options: flag, is_on)


FEATURES: dict[str, Feature] = {
    "optimizer in backward": _feature("--fused_backward_pass", lambda o: o[UpdateOptions].is_fused),
    "gradient accumulation": _feature(
        "--gradient_accumulation_steps", lambda o: o[RunOptions].gradient_accumulation_steps > 1
    ),
    "block swap": _feature("--blocks_to_swap", lambda o: bool(o[MemoryOptions].blocks_to_swap)),
    "optimizer offload": Feature(
        lambda o: offload_flag(o[MemoryOptions]),
        lambda o: offloads_optimizer(o[MemoryOptions], o[ShardingOptions]),
    ),
    "activation offload": _feature(
        "--cpu_offload_checkpointing", lambda o: o[MemoryOptions].cpu_offload_checkpointing
    ),
    "quantized base": _feature(
        "--fp8_base or --base_quant", lambda o: bool(o[MemoryOptions].quantized)
    ),
    "DDP": _feature(
        "several processes", lambda o: _world_size() > 1 and not is_sharded(o[ShardingOptions])
    ),
    "FSDP2": Feature(
        lambda o: sharding_flag(o[ShardingOptions]), lambda o: is_sharded(o[ShardingOptions])
    ),
    "EMA": _feature("--ema_decay", lambda o: o[EmaOptions].ema_decay is not None),
    "torch.compile": _feature("--torch_compile", lambda o: o[CompileOptions].torch_compile),
}

INCOMPATIBLE: dict[tuple[str, str], str] = {
    ("optimizer in backward", "DDP"): "each process would step by its own gradients, before they "
                                      "are averaged; train in one process or with FSDP2, or leave "
                                      "it out",
    ("block swap", "DDP"): "each process would keep its own blocks in RAM and wait for the same bus",
    ("block swap", "FSDP2"): "FSDP gathers and frees the weights of a block itself",
    ("activation offload", "FSDP2"): "the pair is untested",
    ("quantized base", "FSDP2"): "packed weights can't be sharded",
    ("FSDP2", "torch.compile"): "the pair is untested",
    ("block swap", "torch.compile"): "a compiled block keeps the addresses of its weights, which "
                                     "change",
    ("activation offload", "torch.compile"): "what a compiled block saves for backward can't be "
                                             "moved",
    ("quantized base", "torch.compile"): "a compiled block can't unpack its weights",
}  # fmt: skip


def check_pairs(options: Options) -> Iterable[Mistake]:
    """Yield the features that the options ask for and that can't go together."""
    optimizer, memory, sharding = (
        options[OptimizerOptions],
        options[MemoryOptions],
        options[ShardingOptions],
    )
    yield from check_sharding(sharding)
    for (first, second), reason in INCOMPATIBLE.items():
        if FEATURES[first].is_on(options) and FEATURES[second].is_on(options):
            flag, other_flag = FEATURES[first].flag(options), FEATURES[second].flag(options)
            yield Mistake(f"{flag} can't go with {other_flag}: {reason}")
    if optimizer.spec.is_schedule_free:
        yield from check_schedule_free(optimizer.name, memory, sharding)
    if offloads_optimizer(memory, sharding) and optimizer.spec.is_paged:
        yield Mistake(
            f"{offload_flag(memory)}: the state of --optimizer_type {optimizer.name} is paged by "
            "the GPU already; leave it out",
            ("optimizer_offload", "optimizer_type"),
        )
    if is_sharded(sharding):
        yield from _check_sharded(options[RunOptions], memory, sharding)


def check_schedule_free(
    optimizer: str, memory: MemoryOptions, sharding: ShardingOptions
) -> Iterable[Mistake]:
    """Yield what can't go with a schedule-free optimizer, which needs weights and state together.

    Args:
        optimizer: its name.
        memory: the memory options.
        sharding: the sharding options.
    """
    flag = None
    if offloads_optimizer(memory, sharding):
        flag = offload_flag(memory)
    elif memory.blocks_to_swap:
        flag = "--blocks_to_swap"
    if flag is not None:
        yield Mistake(
            f"{flag}: --optimizer_type {optimizer} takes weights and state together whenever it "
            "saves; leave one out",
            ("optimizer_offload", "blocks_to_swap", "optimizer_type"),
        )


def check_ema(optimizer: str, ema: EmaOptions) -> Iterable[Mistake]:
    """Yield the EMA of a schedule-free optimizer, which averages the weights itself."""
    if ema.ema_decay:
        yield Mistake(
            f"--ema_decay: --optimizer_type {optimizer} averages the weights itself; leave it out",
            ("ema_decay", "optimizer_type"),
        )


def offload_flag(memory: MemoryOptions) -> str:
    """Return which flag asks for the optimizer offload, where one does."""
    return "--optimizer_offload" if memory.optimizer_offload else "--offload_optimizer_device cpu"


def _check_sharded(
    run: RunOptions, memory: MemoryOptions, sharding: ShardingOptions
) -> Iterable[Mistake]:
    """Yield what can't go with a sharded U-Net."""
    if _world_size() == 1 and not run.dry_run:
        yield Mistake(
            "FSDP and --deepspeed are for several processes; launch with --num_processes N, or "
            "leave them out: in one process "
            "--optimizer_offload and --blocks_to_swap move to RAM what doesn't fit",
            ("deepspeed",),
        )
    if memory.memory_plan is not None:
        yield Mistake(
            "--memory_plan counts a complete model on one GPU; it can't go with "
            f"{sharding_flag(sharding)}: leave one of them out",
            ("memory_plan",),
        )


def check_trained_shards(
    optimizer: OptimizerOptions, update: UpdateOptions, ema: EmaOptions, sharding: ShardingOptions
) -> Iterable[Mistake]:
    """Yield what can't go with a sharded U-Net that is trained itself."""
    if not is_sharded(sharding):
        return
    refused = []
    if update.is_16_bit:
        refused.append("--full_bf16, --full_fp16")
    if ema.ema_decay is not None:
        refused.append("--ema_decay")
    if not optimizer.spec.is_elementwise:
        name = optimizer.name
        refused.append(f"--optimizer_type {name}, which may not step each element by itself,")
    for flag in refused:
        yield Mistake(f"{flag} can't go with {sharding_flag(sharding)}; leave one of them out")


def _world_size() -> int:
    """The number of processes, as launchers set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
