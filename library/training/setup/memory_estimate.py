"""Memory: the bytes that a training step takes on the device, estimated from counts before anything is loaded.

A number of activations is (numbers kept) x (bytes of the compute dtype). How many a forward of our U-Net leaves for backward
was counted on tensors without numbers, at 1024x1024 and 77 tokens, in millions a picture:

                    all kept   --gradient_checkpointing: selective    full
    SDXL base         3,024                                2,002       287
    SSD-1B            1,807                                1,140       232
    Segmind Vega      1,109                                  644       203
    the tiny SDXL       119                                   70        21

The factors below fit these within 10 %. What isn't counted: CUDA's own context (about 0.5 GB), the allocator's rounding, the
work space of convolutions.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from library.errors import Mistake, OptionError
from library.log import log
from library.models.unet_config import UNetConfig
from library.models.vae import PIXELS_PER_LATENT
from library.options import Options
from library.training.options.memory import MemoryOptions
from library.training.options.optimizer import UpdateOptions
from library.training.options.optimizer_table import optimizer_spec
from library.training.saving.saver import format_bytes

# Numbers kept for backward, per channel and position of a block's output.
_RESIDUAL, _TRANSFORMER = 10.1, 24.17
_RESIDUAL_SELECTED, _TRANSFORMER_SELECTED = 4.13, 17.18
_SKIPS = 0.5  # of the blocks' outputs: those that later blocks see too stay
_RESIDUAL_INPUTS, _TRANSFORMER_INPUTS = 3.77, 0.99  # where blocks are computed again
_TEXT_LAYER = (
    16.0  # q, k, v, attention, two norms, and a feed-forward four times as wide before and behind its function
)
_VAE = 3.0  # a residual block's input, inner and output, at the pictures' full size

_FLOAT32 = 4
# Bytes for each number that is stepped within backward, measured with Adafactor: its gradient and three temporaries; of 16 bits its float32
# copy and that of its gradient too.
_FUSED, _FUSED_16 = 16, 20


class Estimate(NamedTuple):
    """Bytes on the device at the peak of a training step, by what takes them."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


class Frozen(NamedTuple):
    """The frozen weights of one part that lie on the device: how many numbers, and the bytes of each."""

    part: str
    numbers: int
    bytes_each: float


class Work(NamedTuple):
    """What the largest forward computes.

    Attributes:
        pixels: of a picture, its width times its height.
        bytes_each: of the compute dtype.
        policy: what of the activations is computed again: None, "selective" or "full" (models/checkpointing.py).
        waits_at_home: what is kept of them lies in RAM until backward.
        text_channels: the width of every layer of the text encoders together, if gradients pass through them; else 0.
        text_tokens: of a caption, markers counted.
        vae_channels: the VAE's width at full size, if pictures are encoded in every step; else 0.
        vae_batch: pictures that the VAE encodes at once.
    """

    unet: UNetConfig
    pixels: int
    batch_size: int
    bytes_each: int
    policy: str | None = None
    waits_at_home: bool = False
    text_channels: int = 0
    text_tokens: int = 77
    vae_channels: int = 0
    vae_batch: int = 1


def estimate(
    frozen: Sequence[Frozen],
    work: Work,
    *,
    trained: int,
    optimizer: int,
    average_on_device: bool = False,
    bytes_each: int = _FLOAT32,
    has_rests: bool = False,
    fused: int = 0,
    away: int = 0,
) -> Estimate:
    """The peak of a training step. The average is float32, whatever the weights are.

    Args:
        trained: numbers that are trained.
        optimizer: bytes of its state on the device.
        average_on_device: --ema_decay with its average beside the weights.
        bytes_each: of a trained weight, and of its gradient.
        has_rests: --rounding kahan.
        fused: the most numbers that step together within backward, when no gradient is kept; 0: all step behind it.
        away: of the trained numbers, those whose weights lie in RAM (--blocks_to_swap).
    """
    return Estimate(
        frozen=round(sum(part.numbers * part.bytes_each for part in frozen)),
        trained=(trained - away) * bytes_each + (trained * bytes_each if has_rests else 0),
        gradients=fused * (_FUSED if bytes_each == _FLOAT32 else _FUSED_16) if fused else trained * bytes_each,
        optimizer=optimizer,
        average=trained * _FLOAT32 if average_on_device else 0,
        activations=activation_bytes(work),
    )


def optimizer_bytes(name: str) -> int:
    """Return the bytes of an optimizer's state for each parameter that it trains."""
    return optimizer_spec(name).bytes_per_param


def state_bytes(name: str, shapes: Iterable[Sequence[int]]) -> int:
    """Return the bytes of an optimizer's state for tensors of these shapes."""
    return optimizer_spec(name).state_bytes(shapes)


def activation_bytes(work: Work) -> int:
    """The most that activations take: of the pictures' encoding, or of the forward behind it."""
    cells = work.pixels // PIXELS_PER_LATENT**2
    kept = unet_numbers(work.unet, cells, work.policy, waits_at_home=work.waits_at_home)
    kept += work.text_channels * work.text_tokens * (1 if work.policy else _TEXT_LAYER)
    forward = work.batch_size * kept
    encoding = min(work.batch_size, work.vae_batch) * work.vae_channels * work.pixels * _VAE
    return int(max(forward, encoding) * work.bytes_each)


def unet_numbers(unet: UNetConfig, cells: int, policy: str | None, *, waits_at_home: bool = False) -> float:
    """Numbers that the U-Net keeps on the device of one picture for backward. Args: cells: width times height of its latents."""
    blocks = list(_blocks(unet, cells))
    if policy is None:
        return sum(size * (_RESIDUAL + depth * _TRANSFORMER) for size, depth in blocks)
    at_once = max(size * (_TRANSFORMER if depth else _RESIDUAL) for size, depth in blocks)
    if waits_at_home:
        return at_once + sum(size for size, _ in blocks) * _SKIPS
    if policy == "selective":
        return sum(size * (_RESIDUAL_SELECTED + depth * _TRANSFORMER_SELECTED) for size, depth in blocks)
    return at_once + sum(size * (_RESIDUAL_INPUTS + depth * _TRANSFORMER_INPUTS) for size, depth in blocks)


def _blocks(unet: UNetConfig, cells: int) -> Iterator[tuple[int, int]]:
    """(channels x positions, transformer blocks) of each residual block."""
    for plan in unet.input_blocks:
        if plan.resample:
            cells //= 4
        else:
            yield plan.channels_out * cells, plan.depth
    middle = unet.input_blocks[-1].channels_out * cells
    yield middle, unet.middle_depth or 0
    if unet.middle_depth is not None:
        yield middle, 0
    for plan in unet.output_blocks:
        yield plan.channels_out * cells, plan.depth
        if plan.resample:
            cells *= 4


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
                f"--memory_plan {chosen.memory_plan}: a step takes at least {format_bytes(needed.total)}, with {in_words(found)}; "
                f"there are {format_bytes(round(budget))}. What would help: {_what_would_help(options, trains_base=trains_base)}",
                ("memory_plan",),
            )
        )
    log.info("memory plan: %s, for about %s", in_words(found), format_bytes(needed.total))
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
