"""Memory: the bytes that a training step takes on the device, estimated from counts before anything is loaded.

A number of activations is (numbers kept) x (bytes of the compute dtype). How many are kept was counted by hooks on the meta
device, of our U-Net with a network beside every layer and attention that doesn't keep its matrix, at 1024x1024 and 77 tokens:

                    all kept   with --gradient_checkpointing   (millions of numbers a picture)
    SDXL base         3,414        281
    SSD-1B            1,971        226
    Segmind Vega      1,144        197
    the tiny SDXL       128         21

The factors below fit these within 3 %. What isn't counted: CUDA's own context (about 0.5 GB), the allocator's rounding, the
work space of convolutions.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from library.models.unet_config import UNetConfig
from library.models.vae import PIXELS_PER_LATENT

# Numbers kept for backward, per channel and position of a block's output.
_RESIDUAL, _TRANSFORMER = 9.0, 28.3
_RESIDUAL_INPUTS, _TRANSFORMER_INPUTS = 3.7, 0.95  # where blocks are computed again
_TEXT_LAYER = (
    16.0  # q, k, v, attention, two norms, and a feed-forward four times as wide before and behind its function
)
_VAE = 3.0  # a residual block's input, inner and output, at the pictures' full size

_FLOAT32 = 4
# Bytes for each number that is stepped within backward, measured with Adafactor: its gradient and three temporaries; of 16 bits its float32
# copy and that of its gradient too.
_FUSED, _FUSED_16 = 16, 20
# Bytes that an optimizer keeps for each number that it trains, by the lower-case names of --optimizer_type, counted after a
# step. Paged ones are counted too, though the driver may move them to the host.
_OPTIMIZER_BYTES = {
    "adamw": 8, "adam": 8, "radam": 8, "nadam": 8, "rmsprop": 4, "adagrad": 4, "sgd": 0,
    "adamw8bit": 2, "pagedadamw": 8, "pagedadamw8bit": 2, "pagedadamw32bit": 8,
    "lion": 4, "lion8bit": 1, "pagedlion8bit": 1, "sgdnesterov": 4, "sgdnesterov8bit": 1,
    "adafactor": 1,  # a row and a column for each matrix; the narrower the matrix, the more that is of it
    "prodigy": 16, "dadaptation": 12, "dadaptadampreprint": 12, "dadaptadam": 12, "dadaptadagrad": 12, "dadaptadan": 20,
    "dadaptadanip": 20, "dadaptlion": 8, "dadaptsgd": 12,
    "adamwschedulefree": 8, "radamschedulefree": 8, "sgdschedulefree": 4,
}  # fmt: skip


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
    bytes_each: int


class Work(NamedTuple):
    """What the largest forward computes.

    Attributes:
        pixels: of a picture, its width times its height.
        bytes_each: of the compute dtype.
        text_channels: the width of every layer of the text encoders together, if gradients pass through them; else 0.
        text_tokens: of a caption, markers counted.
        vae_channels: the VAE's width at full size, if pictures are encoded in every step; else 0.
        vae_batch: pictures that the VAE encodes at once.
    """

    unet: UNetConfig
    pixels: int
    batch_size: int
    bytes_each: int
    checkpointing: bool
    text_channels: int = 0
    text_tokens: int = 77
    vae_channels: int = 0
    vae_batch: int = 1


def estimate(
    frozen: Sequence[Frozen],
    work: Work,
    *,
    trained: int,
    optimizer: str,
    average_on_device: bool = False,
    bytes_each: int = _FLOAT32,
    has_rests: bool = False,
    fused: int = 0,
) -> Estimate:
    """The peak of a training step. The optimizer's state and the average are float32's, whatever the weights are.

    Args:
        trained: numbers that are trained.
        optimizer: --optimizer_type; one that isn't known is taken to keep as much as AdamW.
        average_on_device: --ema_decay with its average beside the weights.
        bytes_each: of a trained weight, and of its gradient.
        has_rests: --rounding kahan.
        fused: the most numbers that step together within backward, when no gradient is kept; 0: all step behind it.
    """
    return Estimate(
        frozen=sum(part.numbers * part.bytes_each for part in frozen),
        trained=trained * bytes_each * (2 if has_rests else 1),
        gradients=fused * (_FUSED if bytes_each == _FLOAT32 else _FUSED_16) if fused else trained * bytes_each,
        optimizer=trained * optimizer_bytes(optimizer),
        average=trained * _FLOAT32 if average_on_device else 0,
        activations=activation_bytes(work),
    )


def optimizer_bytes(name: str) -> int:
    """Bytes that an optimizer keeps for each number that it trains."""
    return _OPTIMIZER_BYTES.get(name.lower().rpartition(".")[2], _OPTIMIZER_BYTES["adamw"])


def activation_bytes(work: Work) -> int:
    """The most that activations take: of the pictures' encoding, or of the forward behind it."""
    kept = unet_numbers(work.unet, work.pixels // PIXELS_PER_LATENT**2, checkpointing=work.checkpointing)
    kept += work.text_channels * work.text_tokens * (1 if work.checkpointing else _TEXT_LAYER)
    forward = work.batch_size * kept
    encoding = min(work.batch_size, work.vae_batch) * work.vae_channels * work.pixels * _VAE
    return int(max(forward, encoding) * work.bytes_each)


def unet_numbers(unet: UNetConfig, cells: int, *, checkpointing: bool) -> float:
    """Numbers that the U-Net keeps of one picture for backward. Args: cells: width times height of its latents."""
    blocks = list(_blocks(unet, cells))
    if not checkpointing:
        return sum(size * (_RESIDUAL + depth * _TRANSFORMER) for size, depth in blocks)
    inputs = sum(size * (_RESIDUAL_INPUTS + depth * _TRANSFORMER_INPUTS) for size, depth in blocks)
    return inputs + max(size * (_TRANSFORMER if depth else _RESIDUAL) for size, depth in blocks)


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
