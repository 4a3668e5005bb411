"""Pairs: which techniques go together. This is the one table; docs/memory.md shows it. No torch here.

Every pair that isn't refused works, and has a test (tests/test_pairs.py).
"""

import os
from collections.abc import Callable, Iterable

from library.errors import Mistake
from library.options import Options
from library.training.compile_options import CompileOptions
from library.training.memory_options import MemoryOptions
from library.training.options import EmaOptions, OptimizerOptions, RunOptions
from library.training.update_options import UpdateOptions

# technique -> (how it is asked for, whether it is)
TECHNIQUES: dict[str, tuple[str, Callable[[Options], bool]]] = {
    "fused steps": ("--fused_backward_pass", lambda o: o[UpdateOptions].is_fused),
    "accumulation": ("--gradient_accumulation_steps", lambda o: o[RunOptions].gradient_accumulation_steps > 1),
    "swapped blocks": ("--blocks_to_swap", lambda o: bool(o[MemoryOptions].blocks_to_swap)),
    "state in RAM": ("--optimizer_offload", lambda o: o[MemoryOptions].optimizer_offload),
    "activations in RAM": ("--cpu_offload_checkpointing", lambda o: o[MemoryOptions].cpu_offload_checkpointing),
    "quantised base": ("--fp8_base or --base_quant", lambda o: bool(o[MemoryOptions].quantized)),
    "processes": ("several processes", lambda o: int(os.environ.get("WORLD_SIZE", "1")) > 1),
    "FSDP2": ("FSDP", lambda o: os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"),
    "average": ("--ema_decay", lambda o: o[EmaOptions].ema_decay is not None),
    "compiling": ("--torch_compile", lambda o: o[CompileOptions].torch_compile),
}

REFUSED: dict[tuple[str, str], str] = {
    (
        "fused steps",
        "processes",
    ): "it would step by the gradients of one process, before they are exchanged; train in one process, or leave it out",
    ("swapped blocks", "processes"): "each process would keep blocks of its own in RAM and wait for the same bus",
    ("fused steps", "FSDP2"): "gradients are exchanged behind the hooks that would step",
    ("swapped blocks", "FSDP2"): "FSDP gathers and frees the weights of a block itself",
    ("state in RAM", "FSDP2"): "each process keeps its part of the state already, beside its part of the weights",
    ("activations in RAM", "FSDP2"): "it isn't tried together",
    ("quantised base", "FSDP2"): "packed weights can't be cut into parts",
    ("FSDP2", "compiling"): "it isn't tried together",
    ("swapped blocks", "compiling"): "a compiled block holds on to the places of its weights, which move",
    ("activations in RAM", "compiling"): "what a compiled block keeps for backward isn't ours to move",
    ("quantised base", "compiling"): "a compiled block can't make its packed weights whole",
}


def check_pairs(options: Options) -> Iterable[Mistake]:
    """Techniques that were asked for together and can't be."""
    for (one, two), reason in REFUSED.items():
        (flag, is_asked), (other, is_asked_too) = TECHNIQUES[one], TECHNIQUES[two]
        if is_asked(options) and is_asked_too(options):
            names = tuple(
                flag.removeprefix("--") for flag in (flag, other) if flag.startswith("--") and " " not in flag
            )
            yield Mistake(f"{flag} can't go with {other}: {reason}", names)
    optimizer, memory = options[OptimizerOptions].name.lower(), options[MemoryOptions]
    moves = "optimizer_offload" if memory.optimizer_offload else "blocks_to_swap" if memory.blocks_to_swap else None
    if moves and optimizer.endswith("schedulefree"):
        yield Mistake(
            f"--{moves}: --optimizer_type {options[OptimizerOptions].name} takes weights and state together whenever it saves; leave one out",
            (moves, "optimizer_type"),
        )
    if memory.optimizer_offload and optimizer.startswith("paged"):
        yield Mistake(
            f"--optimizer_offload: --optimizer_type {options[OptimizerOptions].name} keeps its state where the card can page it already; leave it out",
            ("optimizer_offload", "optimizer_type"),
        )
