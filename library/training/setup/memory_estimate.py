"""The memory that a training step takes on the device, estimated from counts before anything is loaded.

The memory of activations is (elements kept) x (bytes of the compute dtype). The elements that a forward pass of the U-Net
keeps for backward were counted on the meta device, at 1024x1024 and 77 tokens, in millions per image:

                    all kept   --gradient_checkpointing: selective    full
    SDXL base         3,024                                2,002       287
    SSD-1B            1,807                                1,140       232
    Segmind Vega      1,109                                  644       203
    the tiny SDXL       119                                   70        21

The factors below fit these within 10 %. Not counted are CUDA's context (about 0.5 GB), the allocator's rounding, and the
work space of convolutions.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from library.data.options import CacheOptions
from library.files import format_bytes
from library.models.memory.block_swap import largest_blocks
from library.models.memory.quantization import BYTES_OF, count_parameters, large_linears
from library.models.sdxl import SdxlModels
from library.models.text_encoders import text_encoder_config
from library.models.unet import UNet
from library.models.unet_config import UNetConfig
from library.models.vae import PIXELS_PER_LATENT
from library.param_group import ParamGroup, split_groups
from library.training.optim.master_weights import FP32_BUCKET_NUMEL
from library.training.options.memory import MemoryOptions
from library.training.options.optimizer import EmaOptions, OptimizerOptions, UpdateOptions
from library.training.options.optimizer_table import optimizer_spec
from library.training.setup.open_caches import encodes_images
from library.training.setup.step_plan import Bucket, largest_of
from library.training.tasks.base import Task

# Elements kept for backward, per channel and position of a block's output.
_RESIDUAL, _TRANSFORMER = 10.1, 24.17
_RESIDUAL_SELECTED, _TRANSFORMER_SELECTED = 4.13, 17.18
_SKIPS = 0.5  # of the blocks' outputs, kept because later blocks see them too
_RESIDUAL_INPUTS, _TRANSFORMER_INPUTS = 3.77, 0.99  # where blocks are recomputed
_TEXT_LAYER = 16.0  # q, k, v, attention, two norms, and the four times wider feed-forward before and after its activation
_VAE = 3.0  # a residual block's input, hidden state and output, at the images' full size

_FLOAT32 = 4
# Bytes for each parameter that is stepped within backward, measured with Adafactor: its gradient and three temporaries; of
# 16-bit parameters also the float32 copies of the parameter and of its gradient.
_FUSED, _FUSED_16 = 16, 20


class MemoryEstimate(NamedTuple):
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
    """Frozen weights of one component on the device: the parameters, and the bytes of each."""

    component: str
    numel: int
    bytes_each: float


class Work(NamedTuple):
    """What the largest forward pass computes.

    Attributes:
        unet: the U-Net's sizes.
        pixels: width times height of an image.
        batch_size: images of the batch.
        bytes_each: bytes of the compute dtype.
        policy: which activations are recomputed: None, "selective" or "full" (models/memory/activation_checkpointing.py).
        offloads_activations: kept activations are in RAM until backward.
        text_channels: the width of all layers of the text encoders together, if gradients pass through them; else 0.
        text_tokens: tokens of a caption, with the start and end tokens.
        vae_channels: the VAE's width at full size, if images are encoded in every step; else 0.
        vae_batch: images that the VAE encodes at a time.
    """

    unet: UNetConfig
    pixels: int
    batch_size: int
    bytes_each: int
    policy: str | None = None
    offloads_activations: bool = False
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
    has_compensation: bool = False,
    fused: int = 0,
    swapped: int = 0,
) -> MemoryEstimate:
    """Return the peak of a training step. The moving average is float32, whatever the weights are.

    Args:
        frozen: the frozen weights on the device.
        work: what the largest forward pass computes.
        trained: parameters that are trained.
        optimizer: bytes of its state on the device.
        average_on_device: the moving average (--ema_decay) is on the device.
        bytes_each: bytes of a trained weight, and of its gradient.
        has_compensation: --rounding kahan.
        fused: the most parameters that are stepped together within backward, when no gradient is kept; 0: all are
            stepped after it.
        swapped: trained parameters whose weights are in RAM (--blocks_to_swap).
    """
    weights = (trained - swapped) * bytes_each
    if has_compensation:
        weights += trained * bytes_each
    gradients = trained * bytes_each
    if fused:
        gradients = fused * (_FUSED if bytes_each == _FLOAT32 else _FUSED_16)
    return MemoryEstimate(
        frozen=round(sum(component.numel * component.bytes_each for component in frozen)),
        trained=weights,
        gradients=gradients,
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
    """Return the most that activations take: those of encoding the images, or of the forward pass after it."""
    positions = work.pixels // PIXELS_PER_LATENT**2
    kept = unet_activations(work.unet, positions, work.policy, offloads=work.offloads_activations)
    per_text_layer = _TEXT_LAYER if work.policy is None else 1
    kept += work.text_channels * work.text_tokens * per_text_layer
    forward = work.batch_size * kept
    encoding = min(work.batch_size, work.vae_batch) * work.vae_channels * work.pixels * _VAE
    return int(max(forward, encoding) * work.bytes_each)


def unet_activations(
    unet: UNetConfig, positions: int, policy: str | None, *, offloads: bool = False
) -> float:
    """Return the elements that the U-Net keeps on the device for backward, per image.

    Args:
        unet: the U-Net's sizes.
        positions: width times height of the latents.
        policy: which activations are recomputed.
        offloads: kept activations are in RAM.
    """
    blocks = list(_blocks(unet, positions))
    if policy is None:
        return sum(size * (_RESIDUAL + depth * _TRANSFORMER) for size, depth in blocks)
    if policy == "selective" and not offloads:
        return sum(
            size * (_RESIDUAL_SELECTED + depth * _TRANSFORMER_SELECTED) for size, depth in blocks
        )
    recomputed = max(size * (_TRANSFORMER if depth else _RESIDUAL) for size, depth in blocks)
    if offloads:
        return recomputed + sum(size for size, _ in blocks) * _SKIPS
    return recomputed + sum(
        size * (_RESIDUAL_INPUTS + depth * _TRANSFORMER_INPUTS) for size, depth in blocks
    )


def _blocks(unet: UNetConfig, positions: int) -> Iterator[tuple[int, int]]:
    """Yield (channels x positions, transformer blocks) of each residual block."""
    for block in unet.input_blocks:
        if block.resample:
            positions //= 4
        else:
            yield block.channels_out * positions, block.depth
    middle = unet.input_blocks[-1].channels_out * positions
    yield middle, unet.middle_depth or 0
    if unet.middle_depth is not None:
        yield middle, 0
    for block in unet.output_blocks:
        yield block.channels_out * positions, block.depth
        if block.resample:
            positions *= 4


# ------------------------------------------------------------------------------------------------------- of a run's plan


def estimate_memory(
    task: Task[Any],
    models: SdxlModels,
    buckets: Sequence[Bucket],
    *,
    cache: CacheOptions,
    memory: MemoryOptions,
    optimizing: OptimizerOptions,
    update: UpdateOptions,
    ema: EmaOptions,
    num_tokens: int,
    accumulation: int,
    offloads_state: bool,
) -> MemoryEstimate:
    """Return the peak of a step on the largest batch.

    Only the model's headers are read, so the task may be on the meta device.

    Args:
        task: what is trained.
        models: the base model.
        buckets: the buckets of all images.
        cache: which encoders' outputs are cached.
        memory: the memory options.
        optimizing: the optimizer.
        update: how weights are stepped.
        ema: the moving average.
        num_tokens: tokens of a caption, without the start and end tokens.
        accumulation: micro-batches of an optimizer step.
        offloads_state: the optimizer's state is in RAM.
    """
    groups = task.param_groups()
    largest = largest_of(buckets)
    are_masked = all(bucket.are_masked for bucket in buckets)
    shapes = [parameter.shape for group in groups for parameter in group.parameters.values()]
    swapped = _swapped_numel(task.unet, memory.blocks_to_swap or 0)
    trains_unet = "unet" in models.trained
    frozen: list[Frozen] = []
    for component, numel in frozen_components(task, models, cache, are_masked=are_masked):
        if component == "unet" and not trains_unet:
            numel -= swapped
        frozen += _frozen(component, numel, task.unet, models)
    vae_channels = 0
    if encodes_images(models, cache, are_masked=are_masked):
        vae_channels = models.stored("vae")["encoder.conv_in.weight"].shape[0]
    work = Work(
        models.checkpoint.unet,
        largest.size.area,
        largest.largest,
        models.precision.compute.itemsize,
        policy=memory.checkpoint_policy if memory.gradient_checkpointing else None,
        offloads_activations=memory.cpu_offload_checkpointing,
        text_channels=_text_channels(models) if task.trains_text else 0,
        text_tokens=num_tokens + 2,
        vae_channels=vae_channels,
        vae_batch=cache.vae_batch_size,
    )
    return estimate(
        frozen,
        work,
        trained=sum(map(math.prod, shapes)),
        optimizer=_state_on_device(optimizing.name, shapes, is_offloaded=offloads_state),
        average_on_device=ema.ema_decay is not None and ema.ema_device != "cpu",
        bytes_each=models.precision.trained.itemsize,
        has_compensation=update.rounding == "kahan",
        fused=_numel_stepped_together(groups, update) if accumulation == 1 else 0,
        swapped=swapped if trains_unet else 0,
    )


def optimizer_bytes_in_state(
    groups: Sequence[ParamGroup], optimizing: OptimizerOptions, update: UpdateOptions
) -> int:
    """Return the approximate bytes of the optimizer in a saved state, the compensation of Kahan's rounding included."""
    parameters = [parameter for group in groups for parameter in group.parameters.values()]
    size = state_bytes(optimizing.name, [parameter.shape for parameter in parameters])
    if update.rounding == "kahan":
        size += sum(parameter.nbytes for parameter in parameters)
    return size


def _state_on_device(optimizer: str, shapes: Sequence[Sequence[int]], *, is_offloaded: bool) -> int:
    """Return the bytes of an optimizer's state on the device; of an offloaded one, what is copied there for a step."""
    if not is_offloaded:
        return state_bytes(optimizer, shapes)
    return max(
        FP32_BUCKET_NUMEL * optimizer_bytes(optimizer),
        *(state_bytes(optimizer, [shape]) for shape in shapes),
    )


def _swapped_numel(unet: UNet, count: int) -> int:
    """Return the parameters of the swapped blocks, without the two that are on the device at a time."""
    sizes = [count_parameters(block) for block in largest_blocks(unet.blocks, count)]
    return max(0, sum(sizes) - 2 * max(sizes, default=0))


def _frozen(component: str, numel: int, unet: UNet, models: SdxlModels) -> Iterator[Frozen]:
    """Yield a component's frozen parameters: those of quantized layers, and the others."""
    kind = models.quantized.get(component)
    if kind is not None:
        quantized = round(numel * _quantized_share(component, unet, models))
        yield Frozen(component, quantized, BYTES_OF[kind])
        numel -= quantized
    yield Frozen(component, numel, dtype_of(component, models).itemsize)


def _quantized_share(component: str, unet: UNet, models: SdxlModels) -> float:
    """Return the share of a component's parameters that belong to layers which are quantized."""
    if component == "unet":
        quantized = sum(layer.in_features * layer.out_features for _, layer in large_linears(unet))
        return quantized / count_parameters(unet)
    stored = models.stored(component)
    total, quantized = 0, 0
    for name, tensor in stored.items():
        total += tensor.numel()
        if ".layers." in name and tensor.ndim == 2:
            quantized += tensor.numel()
    return quantized / total


def _numel_stepped_together(groups: Sequence[ParamGroup], update: UpdateOptions) -> int:
    """Return the most parameters that are stepped together within backward; 0 if all are stepped after it."""
    if not update.is_fused:
        return 0
    num_tensors = sum(len(group.parameters) for group in groups)
    buckets = split_groups(groups, update.fused_optimizer_groups or num_tensors)
    return max(
        sum(parameter.numel() for parameter in bucket.parameters.values()) for bucket in buckets
    )


def frozen_components(
    task: Task[Any], models: SdxlModels, cache: CacheOptions, *, are_masked: bool
) -> Iterator[tuple[str, int]]:
    """Yield (component, frozen parameters) of the components that are on the device during training.

    Args:
        task: what is trained.
        models: the base model.
        cache: which encoders' outputs are cached.
        are_masked: as for `encodes_images`.
    """
    trained = {name: p for trainable in task.trainables for name, p in trainable.tensors().items()}
    ids = {id(parameter) for parameter in trained.values()}
    yield (
        "unet",
        count_parameters(task.unet)
        - sum(p.numel() for p in task.unet.parameters() if id(p) in ids),
    )
    absent = set()
    if cache.text:
        absent |= {"text_encoder_1", "text_encoder_2"}
    if not encodes_images(models, cache, are_masked=are_masked):
        absent.add("vae")
    for component in models.checkpoint.parts:
        if component != "unet" and component not in absent:
            numel = sum(tensor.numel() for tensor in models.stored(component).values())
            yield (
                component,
                numel
                - sum(p.numel() for name, p in trained.items() if name.startswith(f"{component}.")),
            )


def dtype_of(component: str, models: SdxlModels) -> torch.dtype:
    """Return the dtype of a component's frozen weights; a trained component has one dtype for all of them."""
    precision = models.precision
    if component in models.trained:
        return precision.trained
    return precision.vae if component == "vae" else precision.compute


def _text_channels(models: SdxlModels) -> int:
    channels = 0
    for number in (1, 2):
        tensors = models.stored(f"text_encoder_{number}")
        if tensors:
            config = text_encoder_config(tensors, number)
            channels += config["hidden_size"] * config["num_hidden_layers"]
    return channels


def format_memory(estimate: MemoryEstimate) -> str:
    """Return the estimate in a line, with its terms that aren't 0."""
    names = {
        "frozen": "frozen weights",
        "trained": "trained weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "average": "moving average",
        "activations": "activations",
    }
    terms = [
        f"{names[name]} {format_bytes(size)}" for name, size in estimate._asdict().items() if size
    ]
    return f"memory: about {format_bytes(estimate.total)} on the device: {', '.join(terms)}"
