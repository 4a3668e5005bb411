"""Options of networks: --network_… and the arguments in --network_args. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import Mistake, RunError
from library.models.checkpoint.reader import identify
from library.options import OptionGroup, option
from library.safetensors_io import read_header
from networks.kinds import KINDS, NetworkKind, kind_of


@dataclass(frozen=True)
class NetworkOptions(OptionGroup):
    """Network."""

    network_module: str | None = option(
        None,
        "kind of network: networks.lora, or a module of another package with create_network: lycoris.kohya",
    )
    network_dim: int | None = option(None, "rank; 4 if unset", at_least=1)
    network_alpha: float = option(
        1.0,
        "alpha: the network's output is scaled by alpha / rank; 0 means alpha = rank",
        at_least=0,
    )
    network_dropout: float | None = option(
        None,
        "probability of dropping each value between the down and the up projection",
        at_least=0,
        at_most=0.99,
    )
    network_args: tuple[str, ...] | None = option(
        None, "further arguments of the network: conv_dim=4 conv_alpha=1 …", metavar="KEY=VALUE"
    )
    network_weights: Path | None = option(
        None,
        "network file to continue from, with a new optimizer and schedule",
        affects_result=False,
        private=True,
    )
    dim_from_weights: bool = option(
        False, "use the modules, ranks and alphas of --network_weights", affects_result=False
    )
    allow_partial: bool = option(
        False,
        "load --network_weights even if some modules don't fit or are missing",
        affects_result=False,
    )
    base_weights: tuple[Path, ...] | None = option(
        None,
        "LoRA files that are merged into the base model first; the trained network is the difference from the merged model",
        private=True,
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, "multiplier of each file of --base_weights; 1 where one is missing"
    )
    network_train_unet_only: bool = option(False, "train the U-Net only")
    network_train_text_encoder_only: bool = option(False, "train the text encoders only")
    unet_lr: float | None = option(
        None, "learning rate of the U-Net's modules; unset: --learning_rate; 0: frozen", at_least=0
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "learning rate of the text encoders' modules, one value or one per encoder; unset: --learning_rate; 0: frozen",
        at_least=0,
    )
    scale_weight_norms: float | None = option(
        None,
        "after every step, scale each module down so that the norm of its weight change is at most this (usually 1)",
        above=0,
        unset=(0,),
    )
    save_model_as: str = option(
        "safetensors",
        "format of the saved file",
        choices=("safetensors", "ckpt", "pt"),
        affects_result=False,
    )
    no_metadata: bool = option(
        False,
        "write only the metadata that other programs need to load the file",
        affects_result=False,
    )
    training_comment: str | None = option(None, "written to the metadata", affects_result=False)

    def mistakes(self) -> Iterable[Mistake]:
        if self.network_module is None:
            yield Mistake(
                "--network_module is required: networks.lora trains a LoRA", ("network_module",)
            )
        else:
            yield from self.kind.check_module(self.network_module)
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            yield Mistake(
                "--network_train_unet_only and --network_train_text_encoder_only exclude each other",
                ("network_train_unet_only",),
            )
        if self.dim_from_weights and self.network_weights is None:
            yield Mistake(
                "--dim_from_weights requires --network_weights, the file with the ranks",
                ("network_weights",),
            )
        if self.network_weights is not None and not self.network_weights.is_file():
            found = (
                "is a folder; a file is required"
                if self.network_weights.is_dir()
                else "no such file"
            )
            yield Mistake(
                f"--network_weights {self.network_weights}: {found}", ("network_weights",)
            )
        if len(self.text_encoder_lr or ()) > 2:
            yield Mistake(
                f"--text_encoder_lr: SDXL has two text encoders, got {len(self.text_encoder_lr or ())} values",
                ("text_encoder_lr",),
            )
        for path in self.base_weights or ():
            if not path.is_file():
                yield Mistake(f"--base_weights {path}: no such file", ("base_weights",))
        if len(self.base_weights_multiplier or ()) > len(self.base_weights or ()):
            yield Mistake(
                "--base_weights_multiplier has more values than --base_weights has files",
                ("base_weights_multiplier",),
            )
        for text in self.read_settings()[1]:
            yield Mistake(f"--network_args: {text}", ("network_args",))

    @property
    def kind(self) -> NetworkKind:
        """The kind of network that --network_module names."""
        return kind_of(self.network_module)

    def read_settings(self) -> tuple[Any, list[str]]:
        """Return the settings of the kind of network, and a sentence for each mistake in --network_args."""
        return self.kind.read_settings(
            self.network_dim, self.network_alpha, self.network_dropout, self.network_args or ()
        )

    @property
    def text_encoder_lrs(self) -> tuple[float | None, float | None]:
        """The learning rate of each text encoder; None means --learning_rate."""
        given = self.text_encoder_lr or (None,)
        return given[0], given[-1]


def check_weights(options: NetworkOptions) -> Iterable[Mistake]:
    """Yield what is wrong with the network files that will be read, by their headers."""
    files = [
        ("--base_weights", path, KINDS["networks.lora"]) for path in options.base_weights or ()
    ]
    if options.network_weights is not None:
        files.append(("--network_weights", options.network_weights, options.kind))
    for flag, path, kind in files:
        if kind.weights_key is None or path.suffix != ".safetensors" or not path.is_file():
            continue
        try:
            names = read_header(path).tensors
        except RunError as error:
            yield Mistake(f"{flag} {error}", (flag[2:],))
            continue
        if not any(name.endswith(kind.weights_key) for name in names):
            yield Mistake(
                f"{flag} {path}: this is {identify(names)}; a {kind.title} with {kind.weights_key} "
                "keys is required",
                (flag[2:],),
            )
