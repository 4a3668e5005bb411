"""The settings of networks.lora: how --network_dim, --network_alpha, --network_dropout and --network_args define it.

Imports no torch, so that mistakes are reported before it is imported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.models.unet_config import NUM_LR_BLOCKS
from library.option_types import did_you_mean

_SIDE_BLOCKS = 9
_MIDDLE_BLOCKS = 3


@dataclass(frozen=True)
class LoraSettings:
    """Everything that defines a LoRA's modules, dropouts and learning rate factors.

    Attributes:
        dim: rank of linear layers and 1x1 convolutions.
        alpha: alpha of linear layers and 1x1 convolutions.
        dropout: probability of dropping each value between the projections.
        rank_dropout: probability of dropping each rank of a sample.
        module_dropout: probability of leaving a module out for a batch.
        conv_dim: rank of 3x3 convolutions; None: they, and the other layers of residual blocks, have no modules.
        conv_alpha: alpha of 3x3 convolutions.
        block_dims: ranks by U-Net block, instead of `dim`; 0: no modules in that block.
        block_alphas: alphas by U-Net block, instead of `alpha`.
        conv_block_dims: the same for 3x3 convolutions.
        conv_block_alphas: the same for 3x3 convolutions.
        block_lr_weights: factor of the U-Net's learning rate by block; 0: no modules in that block.
        loraplus_unet_lr_ratio: factor of the learning rate of the U-Net's up projections (LoRA+, Hayou et al. 2024,
            arXiv:2402.12354).
        loraplus_text_encoder_lr_ratio: the same for the text encoders.
    """

    dim: int = 4
    alpha: float = 1.0
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    conv_dim: int | None = None
    conv_alpha: float = 1.0
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_lr_weights: tuple[float, ...] | None = None
    loraplus_unet_lr_ratio: float = 1.0
    loraplus_text_encoder_lr_ratio: float = 1.0

    @property
    def has_convolutions(self) -> bool:
        """Whether residual blocks get modules."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    def rank_in_block(self, block: int, *, is_conv3x3: bool) -> tuple[int, float]:
        """Return (rank, alpha) of a layer of the U-Net; rank 0 means no module."""
        if self.block_lr_weights is not None and self.block_lr_weights[block] == 0:
            return 0, 0.0
        if is_conv3x3:
            dims, dim = self.conv_block_dims, self.conv_dim or 0
            alphas, alpha = self.conv_block_alphas, self.conv_alpha
        else:
            dims, dim = self.block_dims, self.dim
            alphas, alpha = self.block_alphas, self.alpha
        if dims:
            dim = dims[block]
        if alphas:
            alpha = alphas[block]
        return dim, alpha


@dataclass(frozen=True)
class NetworkArgument:
    """One key of --network_args.

    Attributes:
        read: text -> value; raises ValueError.
        expected: what a message says about valid values.
    """

    read: Callable[[str], Any]
    expected: str


def _block_values(convert: Callable[[str], Any]) -> Callable[[str], tuple]:
    def read(text: str) -> tuple:
        values = tuple(convert(item) for item in text.split(","))
        if len(values) != NUM_LR_BLOCKS or min(values) < 0:
            raise ValueError
        return values

    return read


def _bounded(
    convert: Callable[[str], Any], low: float, below: float = math.inf
) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = convert(text)
        if not low <= value < below:
            raise ValueError
        return value

    return read


_PRESETS = {
    "sine": lambda i: math.sin(math.pi / 2 * i / 8),
    "cosine": lambda i: math.sin(math.pi / 2 * (8 - i) / 8),
    "linear": lambda i: i / 8,
    "reverse_linear": lambda i: (8 - i) / 8,
    "zeros": lambda i: 0.0,
}


def _side_weights(text: str) -> tuple[float, ...]:
    """Read nine learning rate factors: values, or the name of a preset and what is added to it."""
    name, _, base = text.partition("+")
    if name in _PRESETS:
        preset, added = _PRESETS[name], float(base or 0)
        return tuple(preset(i) + added for i in range(_SIDE_BLOCKS))
    return _weights(text, _SIDE_BLOCKS)


def _weights(text: str, count: int) -> tuple[float, ...]:
    """Read `count` factors separated by commas. An empty one is 0, missing ones are 1."""
    if "," not in text:
        raise ValueError
    values = [float(item) if item.strip() else 0.0 for item in text.split(",")]
    values += [1.0] * (count - len(values))
    return tuple(values[:count])


_DIM = NetworkArgument(_bounded(int, 0), "an integer of at least 0")
_VALUE = NetworkArgument(_bounded(float, 0), "a number of at least 0")
_PROBABILITY = NetworkArgument(_bounded(float, 0, below=1), "a probability from 0 to below 1")
_SIDE = NetworkArgument(
    _side_weights,
    f"{_SIDE_BLOCKS} numbers separated by commas, or one of {', '.join(_PRESETS)} with +number",
)
_MIDDLE = NetworkArgument(
    lambda text: _weights(text, _MIDDLE_BLOCKS), f"{_MIDDLE_BLOCKS} numbers separated by commas"
)
_BLOCK_DIMS = NetworkArgument(_block_values(int), f"{NUM_LR_BLOCKS} integers separated by commas")
_BLOCK_VALUES = NetworkArgument(
    _block_values(float), f"{NUM_LR_BLOCKS} numbers separated by commas"
)

LORA_ARGUMENTS: Mapping[str, NetworkArgument] = {
    "conv_dim": _DIM,
    "conv_alpha": _VALUE,
    "dropout": _PROBABILITY,
    "rank_dropout": _PROBABILITY,
    "module_dropout": _PROBABILITY,
    "block_dims": _BLOCK_DIMS,
    "block_alphas": _BLOCK_VALUES,
    "conv_block_dims": _BLOCK_DIMS,
    "conv_block_alphas": _BLOCK_VALUES,
    "down_lr_weight": _SIDE,
    "mid_lr_weight": _MIDDLE,
    "up_lr_weight": _SIDE,
    "block_lr_zero_threshold": _VALUE,
    "loraplus_lr_ratio": _VALUE,
    "loraplus_unet_lr_ratio": _VALUE,
    "loraplus_text_encoder_lr_ratio": _VALUE,
}
"""The keys of --network_args that networks.lora accepts."""


def read_arguments(
    pairs: Sequence[str], arguments: Mapping[str, NetworkArgument], module: str
) -> tuple[dict[str, Any], list[str]]:
    """Read --network_args by a table.

    Args:
        pairs: KEY=VALUE each.
        arguments: the keys that the network accepts.
        module: its name, for messages.

    Returns:
        The values by key, and a sentence for each mistake.
    """
    values: dict[str, Any] = {}
    mistakes = []
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in arguments:
            hint = did_you_mean(key, arguments)
            mistakes.append(
                f"{key!r} is not an argument of {module}{hint}; it accepts {', '.join(arguments)}"
            )
            continue
        try:
            values[key] = arguments[key].read(text.strip())
        except ValueError:
            mistakes.append(f"{key}: expected {arguments[key].expected}, got {text!r}")
    return values, mistakes


def read_lora_settings(
    dim: int | None, alpha: float, dropout: float | None, pairs: Sequence[str]
) -> tuple[LoraSettings, list[str]]:
    """Return the settings that the options define, and a sentence for each mistake in --network_args.

    Args:
        dim: --network_dim.
        alpha: --network_alpha; 0 means the rank.
        dropout: --network_dropout.
        pairs: --network_args.

    Source: contract, training_math.md section 7; golden 07_lora_fullsize.
    """
    values, mistakes = read_arguments(pairs, LORA_ARGUMENTS, "networks.lora")
    if "conv_alpha" in values and "conv_dim" not in values and "conv_block_dims" not in values:
        mistakes.append("conv_alpha needs conv_dim or conv_block_dims")
    rank = dim or 4
    ratio = values.get("loraplus_lr_ratio", 1.0)
    settings = LoraSettings(
        dim=rank,
        alpha=alpha or rank,
        dropout=values.get("dropout", dropout or 0.0),
        rank_dropout=values.get("rank_dropout", 0.0),
        module_dropout=values.get("module_dropout", 0.0),
        conv_dim=values.get("conv_dim"),
        conv_alpha=values.get("conv_alpha", 1.0),
        block_dims=values.get("block_dims"),
        block_alphas=values.get("block_alphas"),
        conv_block_dims=values.get("conv_block_dims"),
        conv_block_alphas=values.get("conv_block_alphas"),
        block_lr_weights=_block_lr_weights(values),
        loraplus_unet_lr_ratio=values.get("loraplus_unet_lr_ratio", ratio),
        loraplus_text_encoder_lr_ratio=values.get("loraplus_text_encoder_lr_ratio", ratio),
    )
    return settings, mistakes


def _block_lr_weights(values: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return 23 factors, where any of the three lists is given; those not above the threshold are 0."""
    counts = {
        "down_lr_weight": _SIDE_BLOCKS,
        "mid_lr_weight": _MIDDLE_BLOCKS,
        "up_lr_weight": _SIDE_BLOCKS,
    }
    if not any(key in values for key in counts):
        return None
    threshold = values.get("block_lr_zero_threshold", 0.0)
    weights = [1.0]
    for key, count in counts.items():
        weights += values.get(key, (1.0,) * count)
    weights.append(1.0)
    return tuple(0.0 if weight <= threshold else weight for weight in weights)
