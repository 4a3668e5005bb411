"""--memory_plan: the fastest memory options with which a training step fits the device."""

import dataclasses
from collections.abc import Callable, Collection, Iterator

import torch

from library.errors import Mistake, OptionError
from library.files import format_bytes
from library.log import log
from library.training.options.memory import MemoryOptions
from library.training.options.optimizer import UpdateOptions
from library.training.setup.memory_estimate import MemoryEstimate

GIB = 1 << 30
_RESERVE = 0.8 * GIB  # CUDA's context, the allocator's rounding, the work space of convolutions
_CHOSEN = (
    "gradient_checkpointing",
    "checkpoint_policy",
    "cpu_offload_checkpointing",
    "optimizer_offload",
    "blocks_to_swap",
)


def choose_memory_options(
    options: MemoryOptions,
    update: UpdateOptions,
    device: torch.device,
    estimate: Callable[[MemoryOptions], MemoryEstimate],
    num_blocks: int,
    *,
    given: Collection[str],
    trains_base: bool,
) -> MemoryOptions:
    """Return the fastest memory options that fit.

    Args:
        options: the options as they were given.
        update: how weights are stepped.
        device: the device that trains.
        estimate: gives the peak of a step with other memory options.
        num_blocks: the U-Net's blocks, which can be swapped.
        given: names of options that the user gave, which stay.
        trains_base: the U-Net itself is trained.

    Raises:
        OptionError: nothing fits.
    """
    budget = _budget(str(options.memory_plan), device)
    can_swap = not trains_base or update.fused_backward_pass
    best, needed = options, None
    for candidate in _candidates(options, num_blocks if can_swap else 0):
        if _changes_given(candidate, options, given):
            continue
        total = estimate(candidate).total
        if needed is None or total < needed:
            best, needed = candidate, total
        if total <= budget:
            best, needed = candidate, total
            break
    if needed is None:
        needed = estimate(options).total
    if needed > budget:
        raise OptionError(
            Mistake(
                f"--memory_plan {options.memory_plan}: a step takes at least {format_bytes(needed)}, with "
                f"{format_memory_options(best)}; there are {format_bytes(round(budget))}. What would help: "
                f"{_what_would_help(options, update, trains_base=trains_base)}",
                ("memory_plan",),
            )
        )
    return best


def format_memory_options(options: MemoryOptions) -> str:
    """Return the options that the plan chooses as they would be given on the command line."""
    words = []
    for name in _CHOSEN:
        value = getattr(options, name)
        if value is True:
            words.append(f"--{name}")
        elif value and value != "full":
            words.append(f"--{name} {value}")
    return " ".join(words) or "nothing offloaded or recomputed"


def _changes_given(
    candidate: MemoryOptions, options: MemoryOptions, given: Collection[str]
) -> bool:
    return any(
        getattr(candidate, name) != getattr(options, name) for name in _CHOSEN if name in given
    )


def _candidates(options: MemoryOptions, num_blocks: int) -> Iterator[MemoryOptions]:
    """Yield memory options from the fastest to those that need the least memory.

    Args:
        options: the options as they were given.
        num_blocks: how many blocks may be swapped.
    """
    plain = dataclasses.replace(
        options,
        gradient_checkpointing=False,
        checkpoint_policy="full",
        cpu_offload_checkpointing=False,
        optimizer_offload=False,
        blocks_to_swap=None,
    )
    yield plain
    yield dataclasses.replace(plain, gradient_checkpointing=True, checkpoint_policy="selective")
    full = dataclasses.replace(plain, gradient_checkpointing=True)
    yield full
    yield dataclasses.replace(full, cpu_offload_checkpointing=True)
    yield dataclasses.replace(full, optimizer_offload=True)
    leanest = dataclasses.replace(full, cpu_offload_checkpointing=True, optimizer_offload=True)
    yield leanest
    for base in (full, leanest):
        for count in range(1, num_blocks + 1):
            yield dataclasses.replace(base, blocks_to_swap=count)


def _budget(plan: str, device: torch.device) -> float:
    """Return the bytes that tensors may take."""
    if plan == "fast":
        return float("inf")
    if plan != "auto":
        return float(plan) * GIB - _RESERVE
    if device.type != "cuda":
        log.warning("--memory_plan auto: no GPU found; nothing is offloaded")
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free - _RESERVE


def _what_would_help(options: MemoryOptions, update: UpdateOptions, *, trains_base: bool) -> str:
    words = []
    if trains_base:
        if not update.full_bf16:
            words.append("--full_bf16")
        if not update.is_fused:
            words.append("--fused_backward_pass")
        words.append("--optimizer_type Adafactor")
    elif not options.quantized:
        words.append("--fp8_base or --base_quant nf4")
    return ", ".join([*words, "a smaller --train_batch_size or --resolution"])
