"""Options of sharding: ZeRO stages by --deepspeed or accelerate's configuration. Torch-free."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from library.errors import Mistake
from library.options import OptionGroup, option
from library.training.options.memory import MemoryOptions

_FSDP = "ACCELERATE_USE_FSDP"
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
ACCELERATE_VARS = (_FSDP, _DEEPSPEED)
"""Variables by which accelerate would shard the model itself."""


@dataclass(frozen=True)
class ShardingOptions(OptionGroup, affects_result=False):
    """Sharding over several GPUs."""

    deepspeed: bool = option(
        False,
        "shard the U-Net over all processes by --zero_stage; PyTorch does it, DeepSpeed is not "
        "needed",
    )
    zero_stage: int = option(
        2,
        "with --deepspeed: 0: no sharding; 1: shard the optimizer state and the weights, which "
        "are gathered from a "
        "block's forward to its backward; 2: shard the gradients too; 3: gather weights only "
        "while their block computes",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer_device: str | None = option(
        None,
        "with --deepspeed: cpu: keep the shards of the optimizer state in RAM, as with "
        "--optimizer_offload",
        choices=("cpu", "nvme"),
    )
    offload_param_device: str | None = option(
        None,
        "with --deepspeed: cpu: keep the shards of weights and gradients in RAM, on the GPU only "
        "while they are stepped",
        choices=("cpu", "nvme"),
    )
    zero3_init_flag: bool = option(
        False, "", no_effect="every process reads the complete model and shards it at once"
    )
    zero3_save_16bit_model: bool = option(
        False, "", no_effect="saved files are always complete, and --save_precision is their dtype"
    )

    def mistakes(self) -> Iterable[Mistake]:
        devices = {
            "offload_optimizer_device": (self.offload_optimizer_device, "--optimizer_offload"),
            "offload_param_device": (self.offload_param_device, "--blocks_to_swap"),
        }
        for name, (device, without_shards) in devices.items():
            if device is None:
                continue
            if not self.deepspeed:
                yield Mistake(
                    f"--{name} {device} needs --deepspeed; in one process use --optimizer_offload "
                    "or --blocks_to_swap",
                    (name, "deepspeed"),
                )
                continue
            if device == "nvme":
                yield Mistake(
                    f"--{name} nvme: nothing is moved to NVMe drives here; take cpu", (name,)
                )
            if not self.zero_stage:
                yield Mistake(
                    f"--{name} needs --zero_stage 1 or more; with 0 use {without_shards}",
                    (name, "zero_stage"),
                )


class ShardingConfig(NamedTuple):
    """A ZeRO stage, and which shards are offloaded to RAM.

    Attributes:
        stage: 0: nothing is sharded. 1 and 2: weights are gathered from their block's forward to
            its backward. 3: they are gathered for each. With 1, gradients are complete until the
            last micro-batch of a step; with 2 and 3 they are sharded after each micro-batch.
        weights_in_ram: shards of weights and gradients are offloaded.
        state_in_ram: shards of the optimizer state are offloaded.
    """

    stage: int
    weights_in_ram: bool = False
    state_in_ram: bool = False


def sharding_config(options: ShardingOptions) -> ShardingConfig:
    """Return what the options and accelerate's configuration ask for together."""
    configs = _requested(options).values()
    return ShardingConfig(
        stage=max((config.stage for config in configs), default=0),
        weights_in_ram=any(config.weights_in_ram for config in configs),
        state_in_ram=any(config.state_in_ram for config in configs),
    )


def is_sharded(options: ShardingOptions) -> bool:
    """Return whether the U-Net is sharded."""
    return sharding_config(options).stage > 0


def sharding_flag(options: ShardingOptions) -> str:
    """Return what asks for sharding, as the user knows it."""
    return " and ".join(source for source, config in _requested(options).items() if config.stage)


def offloads_optimizer(memory: MemoryOptions, sharding: ShardingOptions) -> bool:
    """Return whether the optimizer state is offloaded to RAM."""
    return memory.optimizer_offload or sharding_config(sharding).state_in_ram


def _requested(options: ShardingOptions) -> Mapping[str, ShardingConfig]:
    """Return what is asked for, by its source.

    The variables are those that `accelerate launch` sets (accelerate/utils/launch.py).
    """
    requested = {}
    if options.deepspeed:
        requested[f"--deepspeed --zero_stage {options.zero_stage}"] = ShardingConfig(
            options.zero_stage,
            weights_in_ram=options.offload_param_device == "cpu",
            state_in_ram=options.offload_optimizer_device == "cpu",
        )
    if _is_set(_DEEPSPEED):
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        requested["DeepSpeed in accelerate's configuration"] = ShardingConfig(
            stage,
            weights_in_ram=stage > 0 and _deepspeed_device("param") == "cpu",
            state_in_ram=stage > 0 and _deepspeed_device("optimizer") == "cpu",
        )
    if _is_set(_FSDP):
        stage = 2 if _reshards() == "false" else 3
        requested["FSDP in accelerate's configuration"] = ShardingConfig(
            stage, _is_set("FSDP_OFFLOAD_PARAMS")
        )
    return requested


def check_sharding(options: ShardingOptions) -> Iterable[Mistake]:
    """Yield what accelerate's configuration can't have, and where it contradicts the options."""
    requested = _requested(options)
    if len({config.stage for config in requested.values()}) > 1:
        sources = " and ".join(
            f"{source} (ZeRO-{config.stage})" for source, config in requested.items()
        )
        yield Mistake(
            f"{sources} ask for different things; leave one of them out",
            ("deepspeed", "zero_stage"),
        )
    prefix = "accelerate's configuration: "
    if _is_set(_FSDP):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            yield Mistake(
                f"{prefix}fsdp_version is {version}; take 2 (configs/accelerate/fsdp2.yaml)"
            )
        elif _reshards() not in ("true", "false"):
            yield Mistake(
                f"{prefix}fsdp_reshard_after_forward is {_reshards()}; take true (ZeRO-3) or false "
                "(ZeRO-2)"
            )
    if _is_set(_DEEPSPEED):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file:
            yield Mistake(
                f"{prefix}deepspeed_config_file {file} isn't read here; give zero_stage instead"
            )
        for name in ("param", "optimizer"):
            device = _deepspeed_device(name)
            if device not in ("none", "cpu"):
                yield Mistake(
                    f"{prefix}offload_{name}_device is {device}; here it can be none or cpu"
                )


def _reshards() -> str:
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()


def _deepspeed_device(name: str) -> str:
    return os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", "none").lower()


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def sharding_notices(
    options: ShardingOptions,
    *,
    zero_stage_source: str | None,
    accumulation: int,
    max_grad_norm: float,
) -> Iterator[str]:
    """Yield settings of DeepSpeed that have no effect, or another one here.

    Args:
        options: the options.
        zero_stage_source: where the user set zero_stage; None where it isn't set.
        accumulation: micro-batches per step and process.
        max_grad_norm: to which gradients are clipped.
    """
    if zero_stage_source is not None and not options.deepspeed:
        yield f"{zero_stage_source} has no effect without --deepspeed"
    if options.deepspeed and options.zero_stage == 0:
        yield "--zero_stage 0: every process holds the complete model, as without --deepspeed"
    if not _is_set(_DEEPSPEED):
        return
    for variable, flag, value in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "--gradient_accumulation_steps", accumulation),
        ("ACCELERATE_GRADIENT_CLIPPING", "--max_grad_norm", max_grad_norm),
    ):
        configured = os.environ.get(variable, "")
        if _is_other_number(configured, value):
            yield f"accelerate's configuration says {configured} where {flag} decides, which is {value:g}"


def _is_other_number(text: str, value: float) -> bool:
    """Return whether a configured text is another number; "auto" and "none" are not numbers."""
    try:
        return float(text) != value
    except ValueError:
        return False
