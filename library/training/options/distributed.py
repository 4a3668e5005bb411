"""Options of sharding: by --deepspeed's ZeRO stages, or by accelerate's configuration, in which FSDP2 is a stage too. No torch here."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from library.errors import Mistake
from library.options import OptionGroup, Options, option
from library.training.options.memory import MemoryOptions

ACCELERATE_VARS = _FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
"""Variables by which accelerate would cut the model itself."""


@dataclass(frozen=True)
class ShardingOptions(OptionGroup):
    """Weights in parts on several cards"""

    deepspeed: bool = option(
        False,
        "cut the U-Net into parts, one for each process, by --zero_stage; PyTorch does it, DeepSpeed isn't needed",
        affects_result=False,
    )
    zero_stage: int = option(
        2,
        "with --deepspeed: 0: every process has the whole model; 1: its part of the weights and of the optimizer's state, blocks are whole from "
        "forward to backward; 2: of gradients too, which 1 adds up whole; 3: blocks are whole only while they compute",
        choices=(0, 1, 2, 3),
        affects_result=False,
    )
    offload_optimizer_device: str | None = option(
        None,
        "with --deepspeed: cpu: the parts of the optimizer's state lie in RAM, as with --optimizer_offload",
        choices=("cpu", "nvme"),
        affects_result=False,
    )
    offload_param_device: str | None = option(
        None,
        "with --deepspeed: cpu: the parts of the weights and of gradients lie in RAM, and visit the card for their step",
        choices=("cpu", "nvme"),
        affects_result=False,
    )
    zero3_init_flag: bool = option(
        False, "", no_effect="every process reads the whole model, and cuts it at once", affects_result=False
    )
    zero3_save_16bit_model: bool = option(
        False, "", no_effect="saved files are whole anyway, and --save_precision is their dtype", affects_result=False
    )

    def mistakes(self) -> Iterable[Mistake]:
        for name in ("offload_optimizer_device", "offload_param_device"):
            device = getattr(self, name)
            if device is not None and not self.deepspeed:
                yield Mistake(
                    f"--{name} {device} needs --deepspeed; in one process it is --optimizer_offload or --blocks_to_swap",
                    (name, "deepspeed"),
                )
            elif device == "nvme":
                yield Mistake(f"--{name} nvme: nothing is moved to NVMe drives here; take cpu", (name,))
        for name, other in (
            ("offload_optimizer_device", "--optimizer_offload"),
            ("offload_param_device", "--blocks_to_swap"),
        ):
            if self.deepspeed and getattr(self, name) and not self.zero_stage:
                yield Mistake(f"--{name} needs --zero_stage 1 or more; with 0 it is {other}", (name, "zero_stage"))


class ShardingConfig(NamedTuple):
    """A ZeRO stage, and which of the parts lie in RAM.

    Attributes:
        stage: 0: nothing is in parts. 1 and 2: blocks stay whole from their forward to their backward; 3: they are gathered for each.
            With 1 gradients are whole until a window closes; with 2 and 3 they are cut with each micro-batch.
    """

    stage: int
    weights_in_ram: bool = False
    state_in_ram: bool = False


def sharding_config(chosen: ShardingOptions) -> ShardingConfig:
    """What the options and accelerate's configuration ask for together."""
    asked = _asked(chosen).values()
    return ShardingConfig(
        max((zero.stage for zero in asked), default=0),
        any(zero.weights_in_ram for zero in asked),
        any(zero.state_in_ram for zero in asked),
    )


def is_sharded(options: Options) -> bool:
    """Whether the U-Net lies in parts."""
    return sharding_config(options[ShardingOptions]).stage > 0


def sharding_asked_by(options: Options) -> str:
    """What asks for the U-Net to lie in parts, in the user's words."""
    return " and ".join(by for by, zero in _asked(options[ShardingOptions]).items() if zero.stage)


def keeps_state_in_ram(options: Options) -> bool:
    """Whether the optimizer's state lies in RAM."""
    return options[MemoryOptions].optimizer_offload or sharding_config(options[ShardingOptions]).state_in_ram


def _asked(chosen: ShardingOptions) -> dict[str, ShardingConfig]:
    """What is asked for, by who asks. The variables are those that `accelerate launch` sets (accelerate/utils/launch.py)."""
    asked = {}
    if chosen.deepspeed:
        asked[f"--deepspeed --zero_stage {chosen.zero_stage}"] = ShardingConfig(
            chosen.zero_stage, chosen.offload_param_device == "cpu", chosen.offload_optimizer_device == "cpu"
        )
    if _is_set(_DEEPSPEED):
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        in_ram = [stage > 0 and _deepspeed_device(name) == "cpu" for name in ("param", "optimizer")]
        asked["DeepSpeed in accelerate's configuration"] = ShardingConfig(stage, *in_ram)
    if _is_set(_FSDP):
        stage = 2 if _reshards() == "false" else 3
        asked["FSDP in accelerate's configuration"] = ShardingConfig(stage, _is_set("FSDP_OFFLOAD_PARAMS"))
    return asked


def check_sharding(chosen: ShardingOptions) -> Iterable[Mistake]:
    """What can't be done of what accelerate's configuration asks for, and where it contradicts the options."""
    asked = _asked(chosen)
    if len({zero.stage for zero in asked.values()}) > 1:
        told = " and ".join(f"{by} (ZeRO-{zero.stage})" for by, zero in asked.items())
        yield Mistake(f"{told} ask for different things; leave one of them out", ("deepspeed", "zero_stage"))
    said = "accelerate's configuration: "
    if _is_set(_FSDP):
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            yield Mistake(f"{said}fsdp_version is {version}; take 2 (configs/accelerate/fsdp2.yaml)")
        elif _reshards() not in ("true", "false"):
            yield Mistake(f"{said}fsdp_reshard_after_forward is {_reshards()}; take true (ZeRO-3) or false (ZeRO-2)")
    if _is_set(_DEEPSPEED):
        if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            yield Mistake(f"{said}deepspeed_config_file {file} isn't read here; give zero_stage instead")
        for name in ("param", "optimizer"):
            if (device := _deepspeed_device(name)) not in ("none", "cpu"):
                yield Mistake(f"{said}offload_{name}_device is {device}; here it can be none or cpu")


def _reshards() -> str:
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()


def _deepspeed_device(name: str) -> str:
    return os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", "none").lower()


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def sharding_notices(options: Options, *, accumulation: int, max_grad_norm: float) -> Iterator[str]:
    """What changes nothing, or means something else here, of --deepspeed and of accelerate's configuration of DeepSpeed."""
    chosen = options[ShardingOptions]
    if options.given("zero_stage") and not chosen.deepspeed:
        yield f"{options.where('zero_stage')} changes nothing without --deepspeed"
    if chosen.deepspeed and chosen.zero_stage == 0:
        yield "--zero_stage 0: every process has the whole model, as without --deepspeed"
    for variable, flag, value in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "--gradient_accumulation_steps", accumulation),
        ("ACCELERATE_GRADIENT_CLIPPING", "--max_grad_norm", max_grad_norm),
    ):
        if _is_set(_DEEPSPEED) and _is_other(said := os.environ.get(variable, ""), value):
            yield f"accelerate's configuration says {said} where {flag} decides, which is {value:g}"


def _is_other(said: str, value: float) -> bool:
    """Whether a configuration's text is another number; "auto" and "none" are none."""
    try:
        return float(said) != value
    except ValueError:
        return False
