"""Memory plan: the way to fit a run into the card's memory that costs the least time (--memory_plan).

It chooses among what changes no result: what activations are computed again, and what lies in RAM. Fewer bits for a frozen
base, 16-bit weights, steps within backward and smaller batches change what is learnt; they are named where nothing else helps.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from library.errors import Mistake, OptionError
from library.log import log
from library.options import Options
from library.training.memory import Estimate
from library.training.memory_options import MemoryOptions
from library.training.saving import size_in_words
from library.training.update_options import UpdateOptions

GIB = 1 << 30
_RESERVE = 0.8 * GIB  # CUDA's context, the allocator's rounding, the work space of convolutions


def fit(
    options: Options, device: torch.device, estimate: Callable[[Options], Estimate], blocks: int, *, trains_base: bool
) -> Options:
    """The options with the fastest memory options that fit, told in a line. What the user gave stays.

    Args:
        estimate: the peak of a step with options.
        blocks: the U-Net's, which can be swapped.
        trains_base: the U-Net itself is trained.

    Raises OptionError if nothing fits.
    """
    chosen = options[MemoryOptions]
    budget = _budget(str(chosen.memory_plan), device)
    can_swap = not trains_base or options[UpdateOptions].fused_backward_pass
    tried: list[tuple[MemoryOptions, Estimate]] = []
    for candidate in _candidates(chosen, blocks if can_swap else 0):
        if all(getattr(candidate, name) == getattr(chosen, name) for name in _CHOSEN if options.given(name)):
            tried.append((candidate, estimate(options.replaced(candidate))))
            if tried[-1][1].total <= budget:
                break
    found, needed = (
        min(tried, key=lambda one: one[1].total > budget and one[1].total) if tried else (chosen, estimate(options))
    )
    if needed.total > budget:
        raise OptionError(
            Mistake(
                f"--memory_plan {chosen.memory_plan}: a step takes at least {size_in_words(needed.total)}, with {in_words(found)}; "
                f"there are {size_in_words(round(budget))}. What would help: {_what_would_help(options, trains_base=trains_base)}",
                ("memory_plan",),
            )
        )
    log.info("memory plan: %s, for about %s", in_words(found), size_in_words(needed.total))
    return options.replaced(found)


_CHOSEN = (
    "gradient_checkpointing",
    "checkpoint_policy",
    "cpu_offload_checkpointing",
    "optimizer_offload",
    "blocks_to_swap",
)


def in_words(options: MemoryOptions) -> str:
    """The options that the plan chooses, as they would be given."""
    words = []
    for name in _CHOSEN:
        value = getattr(options, name)
        if value and value != "full":
            words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words) or "everything kept on the card"


def _candidates(given: MemoryOptions, blocks: int) -> Iterator[MemoryOptions]:
    """From the fastest to the leanest. Args: blocks: how many may be swapped."""
    plain = dataclasses.replace(
        given, gradient_checkpointing=False, checkpoint_policy="full", cpu_offload_checkpointing=False, optimizer_offload=False, blocks_to_swap=None
    )  # fmt: skip
    yield plain
    yield dataclasses.replace(plain, gradient_checkpointing=True, checkpoint_policy="selective")
    full = dataclasses.replace(plain, gradient_checkpointing=True)
    yield full
    yield dataclasses.replace(full, cpu_offload_checkpointing=True)
    yield dataclasses.replace(full, optimizer_offload=True)
    leanest = dataclasses.replace(full, cpu_offload_checkpointing=True, optimizer_offload=True)
    yield leanest
    for count in range(1, blocks + 1):
        yield dataclasses.replace(full, blocks_to_swap=count)
    for count in range(1, blocks + 1):
        yield dataclasses.replace(leanest, blocks_to_swap=count)


def _budget(plan: str, device: torch.device) -> float:
    """Bytes for tensors."""
    if plan == "fast":
        return float("inf")
    if plan != "auto":
        return float(plan) * GIB - _RESERVE
    if device.type != "cuda":
        log.warning("--memory_plan auto: there is no card to look at; everything is kept")
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free - _RESERVE


def _what_would_help(options: Options, *, trains_base: bool) -> str:
    update, memory = options[UpdateOptions], options[MemoryOptions]
    words = []
    if trains_base:
        words += [] if update.full_bf16 else ["--full_bf16"]
        words += [] if update.is_fused else ["--fused_backward_pass"]
        words.append("--optimizer_type Adafactor")
    elif not memory.quantized:
        words.append("--fp8_base or --base_quant nf4")
    return ", ".join([*words, "a smaller --train_batch_size or --resolution"])
