"""Options of the networks room: --network_…, and the arguments in --network_args. No torch here."""

import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import Mistake, RunError
from library.models.checkpoint.reader import identify
from library.option_types import did_you_mean
from library.options import OptionGroup, option
from library.safetensors_io import read_header

NUM_BLOCKS = 23  # blocks of the U-Net, in the numbering of library/models/unet.py: block_of
_SIDE_BLOCKS, _MIDDLE_BLOCKS = 9, 3


@dataclass(frozen=True)
class NetworkOptions(OptionGroup):
    """Network"""

    network_module: str | None = option(
        None, "the kind of network: networks.lora, or another package's module with create_network: lycoris.kohya"
    )
    network_dim: int | None = option(None, "rank; 4 when unset", at_least=1)
    network_alpha: float = option(
        1.0, "the network's effect is scaled by alpha / rank; 0 means alpha = rank", at_least=0
    )
    network_dropout: float | None = option(
        None, "probability of leaving out each value between the down and the up projection", at_least=0, at_most=0.99
    )
    network_args: tuple[str, ...] | None = option(
        None, "further arguments of the network: conv_dim=4 conv_alpha=1 …", metavar="KEY=VALUE"
    )
    network_weights: Path | None = option(None, "network file to go on from", affects_result=False, private=True)
    dim_from_weights: bool = option(
        False, "take modules, ranks and alphas from --network_weights", affects_result=False
    )
    allow_partial: bool = option(
        False, "take --network_weights though some of its modules don't fit or some are missing", affects_result=False
    )
    base_weights: tuple[Path, ...] | None = option(
        None,
        "LoRA files that are merged into the base model first; what is trained and saved is the difference to that",
        private=True,
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, "how strongly each of --base_weights is merged; 1 where one is missing"
    )
    network_train_unet_only: bool = option(False, "leave the text encoders alone")
    network_train_text_encoder_only: bool = option(False, "leave the U-Net alone")
    unet_lr: float | None = option(
        None, "learning rate of the U-Net's modules; unset: --learning_rate; 0: they aren't trained", at_least=0
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "learning rate of the text encoders' modules, one number or one for each encoder; unset: --learning_rate; 0: not trained",
        at_least=0,
    )
    scale_weight_norms: float | None = option(
        None,
        "scale each module down, after every step, to a change of at most this norm (1 is usual)",
        above=0,
        unset=(0,),
    )
    save_model_as: str = option(
        "safetensors", "format of the saved file", choices=("safetensors", "ckpt", "pt"), affects_result=False
    )
    no_metadata: bool = option(
        False, "write only the metadata that other programs need to load the file", affects_result=False
    )
    training_comment: str | None = option(None, "written to the metadata", affects_result=False)

    def mistakes(self) -> Iterable[Mistake]:
        if self.network_module is None:
            yield Mistake("--network_module is missing: networks.lora trains a LoRA", ("network_module",))
        elif not self.is_own:
            yield from _check_module(self.network_module)
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            yield Mistake(
                "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train",
                ("network_train_unet_only",),
            )
        if self.dim_from_weights and self.network_weights is None:
            yield Mistake(
                "--dim_from_weights needs --network_weights, the file to take ranks from", ("network_weights",)
            )
        if self.network_weights is not None and not self.network_weights.is_file():
            found = "is a folder; a file is needed" if self.network_weights.is_dir() else "no such file"
            yield Mistake(f"--network_weights {self.network_weights}: {found}", ("network_weights",))
        if len(self.text_encoder_lr or ()) > 2:
            yield Mistake(
                f"--text_encoder_lr: SDXL has two text encoders, got {len(self.text_encoder_lr or ())} numbers",
                ("text_encoder_lr",),
            )
        for path in self.base_weights or ():
            if not path.is_file():
                yield Mistake(f"--base_weights {path}: no such file", ("base_weights",))
        if len(self.base_weights_multiplier or ()) > len(self.base_weights or ()):
            yield Mistake(
                "--base_weights_multiplier: more numbers than --base_weights has files", ("base_weights_multiplier",)
            )
        if self.is_own:
            yield from read_network_args(self)[1]
        else:
            bad = [pair for pair in self.network_args or () if "=" not in pair]
            if bad:
                yield Mistake(f"--network_args {bad[0]!r}: expected key=value", ("network_args",))

    @property
    def is_own(self) -> bool:
        """Whether the network is one of this suite's."""
        return self.network_module in (None, "networks.lora")

    @property
    def text_encoder_lrs(self) -> tuple[float | None, float | None]:
        """The learning rate of each text encoder; None: the base learning rate."""
        given = self.text_encoder_lr or (None,)
        return given[0], given[-1]


_ELSEWHERE = {
    "networks.lora_fa": "take networks.lora with loraplus_lr_ratio, which also lets the up projections learn more",
    "networks.dylora": "take --network_module lycoris.kohya --network_args algo=dylora",
    "networks.oft": "take --network_module lycoris.kohya --network_args algo=diag-oft",
}
_PIP_NAMES = {"lycoris": "lycoris-lora"}


def _check_module(name: str) -> Iterable[Mistake]:
    """Whether a module from elsewhere is there, without importing it."""
    package = name.partition(".")[0]
    if name in _ELSEWHERE:
        yield Mistake(f"--network_module {name}: it isn't part of this suite; {_ELSEWHERE[name]}", ("network_module",))
    elif package == "networks" or not re.fullmatch(r"\w+(\.\w+)*", name):
        yield Mistake(
            f"--network_module {name}: no such module; networks.lora trains a LoRA{did_you_mean(name, ['networks.lora', 'lycoris.kohya'])}",
            ("network_module",),
        )
    elif importlib.util.find_spec(package) is None:
        yield Mistake(
            f"--network_module {name}: {package} isn't installed; pip install {_PIP_NAMES.get(package, package)}",
            ("network_module",),
        )


@dataclass(frozen=True)
class LoraSettings:
    """All numbers that define a LoRA's modules, dropouts and learning-rate factors.

    Attributes:
        dim, alpha: of linear layers and 1x1 convolutions. Without U-Net block lists, everywhere.
        conv_dim: of 3x3 convolutions; None: those, and the other layers of residual blocks, have no modules.
        block_dims, block_alphas, conv_block_dims, conv_block_alphas: one number per U-Net block; dim 0: no modules there.
        block_lr_weights: factor of the U-Net's learning rate per block; 0: no modules there.
        loraplus_*: factor of the learning rate of up projections (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
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
        return self.conv_dim is not None or self.conv_block_dims is not None

    def rank_in_block(self, block: int, *, is_conv3x3: bool) -> tuple[int, float]:
        """(rank, alpha) of a layer of the U-Net; rank 0: it gets no module."""
        if self.block_lr_weights is not None and self.block_lr_weights[block] == 0:
            return 0, 0.0
        if is_conv3x3:
            dim = self.conv_block_dims[block] if self.conv_block_dims else self.conv_dim or 0
            return dim, self.conv_block_alphas[block] if self.conv_block_alphas else self.conv_alpha
        dim = self.block_dims[block] if self.block_dims else self.dim
        return dim, self.block_alphas[block] if self.block_alphas else self.alpha


@dataclass(frozen=True)
class _Argument:
    read: Callable[[str], Any]
    wanted: str


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    def read(text: str) -> tuple:
        values = tuple(kind(item) for item in text.split(","))
        if len(values) != NUM_BLOCKS or min(values) < 0:
            raise ValueError
        return values

    return read


def _at_least(low: float, kind: Callable[[str], Any], below: float = math.inf) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
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
    """Nine learning-rate factors: numbers (empty: 0; missing ones: 1), or a preset's name and what is added to it."""
    name, _, base = text.partition("+")
    if name in _PRESETS:
        return tuple(_PRESETS[name](i) + float(base or 0) for i in range(_SIDE_BLOCKS))
    return _weights(text, _SIDE_BLOCKS)


def _weights(text: str, count: int) -> tuple[float, ...]:
    if "," not in text:
        raise ValueError
    values = tuple(float(item) if item.strip() else 0.0 for item in text.split(","))
    return (*values[:count], *[1.0] * (count - len(values)))


_DIM = _Argument(_at_least(0, int), "a whole number")
_NUMBER = _Argument(_at_least(0, float), "a number of at least 0")
_SHARE = _Argument(_at_least(0, float, below=1), "a number in 0..1")
_SIDE = _Argument(
    _side_weights, f"{_SIDE_BLOCKS} numbers separated by commas, or one of {', '.join(_PRESETS)} with +number"
)
_BLOCK_DIMS = _Argument(_numbers(int), f"{NUM_BLOCKS} whole numbers separated by commas")
_BLOCK_NUMBERS = _Argument(_numbers(float), f"{NUM_BLOCKS} numbers separated by commas")

_ARGUMENTS = {
    "conv_dim": _DIM, "conv_alpha": _NUMBER, "dropout": _SHARE, "rank_dropout": _SHARE, "module_dropout": _SHARE,
    "block_dims": _BLOCK_DIMS, "block_alphas": _BLOCK_NUMBERS, "conv_block_dims": _BLOCK_DIMS, "conv_block_alphas": _BLOCK_NUMBERS,
    "down_lr_weight": _SIDE, "up_lr_weight": _SIDE,
    "mid_lr_weight": _Argument(lambda text: _weights(text, _MIDDLE_BLOCKS), f"{_MIDDLE_BLOCKS} numbers separated by commas"),
    "block_lr_zero_threshold": _NUMBER,
    "loraplus_lr_ratio": _NUMBER, "loraplus_unet_lr_ratio": _NUMBER, "loraplus_text_encoder_lr_ratio": _NUMBER,
}  # fmt: skip


def read_network_args(options: NetworkOptions) -> tuple[LoraSettings, list[Mistake]]:
    """The settings that --network_dim, --network_alpha, --network_dropout and --network_args define, and what is wrong with them.

    Source: contract, training_math.md section 7; golden 07_lora_fullsize.
    """
    values: dict[str, Any] = {}
    mistakes = []
    for pair in options.network_args or ():
        key, _, text = pair.partition("=")
        if key not in _ARGUMENTS:
            mistakes.append(
                f"{key!r} is no argument of networks.lora{did_you_mean(key, _ARGUMENTS)}; it takes {', '.join(_ARGUMENTS)}"
            )
            continue
        try:
            values[key] = _ARGUMENTS[key].read(text.strip())
        except ValueError:
            mistakes.append(f"{key}: expected {_ARGUMENTS[key].wanted}, got {text!r}")
    if "conv_alpha" in values and "conv_dim" not in values and "conv_block_dims" not in values:
        mistakes.append("conv_alpha needs conv_dim or conv_block_dims")
    return _settings(options, values), [Mistake(f"--network_args: {text}", ("network_args",)) for text in mistakes]


def _settings(options: NetworkOptions, values: dict[str, Any]) -> LoraSettings:
    dim = options.network_dim or 4
    ratio = values.get("loraplus_lr_ratio", 1.0)
    return LoraSettings(
        dim=dim,
        alpha=options.network_alpha or dim,
        dropout=values.get("dropout", options.network_dropout or 0.0),
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


def _block_lr_weights(values: dict[str, Any]) -> tuple[float, ...] | None:
    sides: Sequence[tuple[str, int]] = (
        ("down_lr_weight", _SIDE_BLOCKS),
        ("mid_lr_weight", _MIDDLE_BLOCKS),
        ("up_lr_weight", _SIDE_BLOCKS),
    )
    if not any(key in values for key, _ in sides):
        return None
    threshold = values.get("block_lr_zero_threshold", 0.0)
    weights = [1.0, *(weight for key, count in sides for weight in values.get(key, (1.0,) * count)), 1.0]
    return tuple(0.0 if weight <= threshold else weight for weight in weights)


def check_weights(options: NetworkOptions) -> Iterable[Mistake]:
    """What is wrong with the network files that are read, by their headers alone."""
    given = [("--base_weights", path) for path in options.base_weights or ()]
    if options.network_weights is not None and options.is_own:
        given.append(("--network_weights", options.network_weights))
    for flag, path in given:
        if path.suffix != ".safetensors" or not path.is_file():
            continue
        try:
            names = read_header(path).tensors
        except RunError as error:
            yield Mistake(f"{flag} {error}", (flag[2:],))
            continue
        if not any(name.endswith(".lora_down.weight") for name in names):
            yield Mistake(
                f"{flag} {path}: this is {identify(names)}; a LoRA with .lora_down.weight keys is needed", (flag[2:],)
            )
