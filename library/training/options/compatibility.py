"""Pairs: which techniques go together. This is the one table; docs/memory.md shows it. No torch here.

Every pair that isn't refused works, and has a test (tests/test_pairs.py).
"""

import os
from collections.abc import Callable, Iterable

from library.errors import Mistake
from library.options import Options
from library.training.options.distributed import (
    ShardingOptions,
    check_sharding,
    is_sharded,
    keeps_state_in_ram,
    sharding_asked_by,
)
from library.training.options.memory import CompileOptions, MemoryOptions
from library.training.options.optimizer import EmaOptions, OptimizerOptions, UpdateOptions
from library.training.options.run import RunOptions

# technique -> (how it is asked for, whether it is)
FEATURES: dict[str, tuple[str, Callable[[Options], bool]]] = {
    "fused steps": ("--fused_backward_pass", lambda o: o[UpdateOptions].is_fused),
    "accumulation": ("--gradient_accumulation_steps", lambda o: o[RunOptions].gradient_accumulation_steps > 1),
    "swapped blocks": ("--blocks_to_swap", lambda o: bool(o[MemoryOptions].blocks_to_swap)),
    "state in RAM": ("--optimizer_offload", keeps_state_in_ram),
    "activations in RAM": ("--cpu_offload_checkpointing", lambda o: o[MemoryOptions].cpu_offload_checkpointing),
    "quantised base": ("--fp8_base or --base_quant", lambda o: bool(o[MemoryOptions].quantized)),
    "processes": ("several processes", lambda o: _processes() > 1 and not is_sharded(o)),
    "FSDP2": ("FSDP", is_sharded),
    "average": ("--ema_decay", lambda o: o[EmaOptions].ema_decay is not None),
    "compiling": ("--torch_compile", lambda o: o[CompileOptions].torch_compile),
}

INCOMPATIBLE: dict[tuple[str, str], str] = {
    (
        "fused steps",
        "processes",
    ): "it would step by the gradients of one process, before they are exchanged; train in one process, or with FSDP2, or leave it out",
    ("swapped blocks", "processes"): "each process would keep blocks of its own in RAM and wait for the same bus",
    ("swapped blocks", "FSDP2"): "FSDP gathers and frees the weights of a block itself",
    ("activations in RAM", "FSDP2"): "it isn't tried together",
    ("quantised base", "FSDP2"): "packed weights can't be cut into parts",
    ("FSDP2", "compiling"): "it isn't tried together",
    ("swapped blocks", "compiling"): "a compiled block holds on to the places of its weights, which move",
    ("activations in RAM", "compiling"): "what a compiled block keeps for backward isn't ours to move",
    ("quantised base", "compiling"): "a compiled block can't make its packed weights whole",
}


# Optimizers that step each number by itself, so that a part of a tensor steps as it would in the whole.
_ELEMENTWISE = ("adam", "adamw", "sgd", "sgdnesterov", "lion", "nadam", "radam", "rmsprop")


def check_pairs(options: Options) -> Iterable[Mistake]:
    """Techniques that were asked for together and can't be."""
    yield from check_sharding(options[ShardingOptions])
    for (one, two), reason in INCOMPATIBLE.items():
        (flag, is_asked), (other, is_asked_too) = FEATURES[one], FEATURES[two]
        if is_asked(options) and is_asked_too(options):
            flag, other = _as_asked(one, flag, options), _as_asked(two, other, options)
            names = tuple(
                flag.removeprefix("--") for flag in (flag, other) if flag.startswith("--") and " " not in flag
            )
            yield Mistake(f"{flag} can't go with {other}: {reason}", names)
    optimizer, memory = options[OptimizerOptions].name.lower(), options[MemoryOptions]
    moves = (
        _state_flag(options) if keeps_state_in_ram(options) else "--blocks_to_swap" if memory.blocks_to_swap else None
    )
    if moves and optimizer.endswith("schedulefree"):
        yield Mistake(
            f"{moves}: --optimizer_type {options[OptimizerOptions].name} takes weights and state together whenever it saves; leave one out",
            (moves.removeprefix("--").removesuffix(" cpu"), "optimizer_type"),
        )
    if keeps_state_in_ram(options) and optimizer.startswith("paged"):
        yield Mistake(
            f"{_state_flag(options)}: --optimizer_type {options[OptimizerOptions].name} keeps its state where the card can page it already; leave it out",
            ("optimizer_offload", "optimizer_type"),
        )
    if is_sharded(options):
        yield from _beside_shards(options)


def _as_asked(technique: str, flag: str, options: Options) -> str:
    """How this run asks for it, where there are several ways."""
    if technique == "FSDP2":
        return sharding_asked_by(options)
    return _state_flag(options) if technique == "state in RAM" else flag


def _state_flag(options: Options) -> str:
    return "--optimizer_offload" if options[MemoryOptions].optimizer_offload else "--offload_optimizer_device cpu"


def _beside_shards(options: Options) -> Iterable[Mistake]:
    """What else can't go with a U-Net in parts."""
    if _processes() == 1 and not options[RunOptions].dry_run:
        yield Mistake(
            "FSDP and --deepspeed are for several processes; launch with --num_processes N, or leave them out: in one process "
            "--optimizer_offload and --blocks_to_swap move to RAM what doesn't fit",
            ("deepspeed",),
        )
    if options[MemoryOptions].memory_plan is not None:
        yield Mistake(
            f"--memory_plan counts a whole model on one card; it can't go with {sharding_asked_by(options)}: leave one of them out",
            ("memory_plan",),
        )


def check_trained_shards(options: Options) -> Iterable[Mistake]:
    """What can't go with a U-Net in parts that is trained itself."""
    update, name = options[UpdateOptions], options[OptimizerOptions].name
    wrong = {
        "--full_bf16, --full_fp16": update.full_bf16 or update.full_fp16,
        "--ema_decay": options[EmaOptions].ema_decay is not None,
        f"--optimizer_type {name}, which doesn't step each number by itself,": name.lower() not in _ELEMENTWISE,
    }
    for flag, is_on in wrong.items() if is_sharded(options) else ():
        if is_on:
            yield Mistake(f"{flag} can't go with {sharding_asked_by(options)}; leave one of them out")


def _processes() -> int:
    """Of the run, as launchers say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
