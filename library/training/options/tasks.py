"""Options of each training script, and their contradictions with others. Torch-free."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.data.options import CacheOptions
from library.errors import Mistake
from library.models.unet_config import NUM_LR_BLOCKS
from library.options import OptionGroup, Options, option
from library.training.options.compatibility import check_trained_shards
from library.training.options.distributed import ShardingOptions
from library.training.options.memory import MemoryOptions
from library.training.options.objective import LossOptions
from library.training.options.optimizer import EmaOptions, OptimizerOptions, UpdateOptions
from library.training.options.output import is_plain_name
from library.training.options.run import RunOptions
from networks.options import NetworkOptions, check_weights


@dataclass(frozen=True)
class FineTuneOptions(OptionGroup):
    """Fine-tuning."""

    train_text_encoder: bool = option(
        False, "train both text encoders too; excludes --cache_text_encoder_outputs"
    )
    learning_rate_te1: float | None = option(
        None, "learning rate of text encoder 1; unset: --learning_rate; 0: frozen", at_least=0
    )
    learning_rate_te2: float | None = option(
        None, "learning rate of text encoder 2; unset: --learning_rate; 0: frozen", at_least=0
    )
    block_lr: str | None = option(
        None, "learning rates of the U-Net's 23 blocks, separated by commas; 0: frozen"
    )
    diffusers_xformers: bool = option(
        False, "", no_effect="attention is PyTorch's, in the U-Net and in the VAE"
    )
    save_model_as: str | None = option(
        None,
        "format of saved models; unset: diffusers_safetensors if the base model is a Diffusers "
        "folder, else safetensors",
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        affects_result=False,
    )
    use_safetensors: bool = option(
        False, "", no_effect="models are saved as safetensors anyway, unless ckpt is asked for"
    )

    @property
    def text_encoder_lrs(self) -> tuple[float | None, float | None]:
        """The learning rate of each text encoder; None: the base learning rate."""
        return self.learning_rate_te1, self.learning_rate_te2

    @cached_property
    def block_lrs(self) -> tuple[float, ...] | None:
        """The learning rate of each of the U-Net's blocks; None: the base learning rate."""
        if self.block_lr is None:
            return None
        return tuple(float(text) for text in self.block_lr.split(","))

    def kind(self, *, is_folder: bool) -> str:
        """Return the format of saved models.

        Args:
            is_folder: whether the base model is a Diffusers folder.
        """
        default = "diffusers_safetensors" if is_folder else "safetensors"
        return self.save_model_as or default

    def mistakes(self) -> Iterable[Mistake]:
        if self.block_lr is not None:
            try:
                rates = self.block_lrs or ()
            except ValueError:
                rates = ()
            if len(rates) != NUM_LR_BLOCKS or not all(0 <= rate < math.inf for rate in rates):
                yield Mistake(
                    f"--block_lr: expected {NUM_LR_BLOCKS} numbers of at least 0, separated by "
                    f"commas, got {self.block_lr!r}",
                    ("block_lr",),
                )
        if not self.train_text_encoder and any(rate is not None for rate in self.text_encoder_lrs):
            yield Mistake(
                "--learning_rate_te1 and --learning_rate_te2 need --train_text_encoder",
                ("train_text_encoder",),
            )


@dataclass(frozen=True)
class EmbeddingOptions(OptionGroup):
    """Textual Inversion."""

    token_string: str | None = option(None, "placeholder token; captions contain it")
    init_word: str | None = option(
        None,
        "words whose embeddings initialize the vectors, in turn; unset: the mean of all embeddings",
    )
    num_vectors_per_token: int = option(1, "number of vectors of the placeholder token", at_least=1)
    weights: Path | None = option(None, "embedding file to continue from", private=True)
    use_object_template: bool = option(
        False,
        "use sentences about an object instead of all captions; wins over --use_style_template",
    )
    use_style_template: bool = option(False, "use sentences about a style instead of all captions")
    save_model_as: str = option(
        "pt",
        "format of the saved file; pt and ckpt have no metadata",
        choices=("ckpt", "pt", "safetensors"),
        affects_result=False,
    )

    def mistakes(self) -> Iterable[Mistake]:
        if not self.token_string or not self.token_string.strip():
            yield Mistake("--token_string is missing: the placeholder token", ("token_string",))
        elif len(self.token_string.split()) > 1:
            yield Mistake(
                f"--token_string {self.token_string!r}: expected one word without spaces",
                ("token_string",),
            )
        if self.weights is not None and not self.weights.is_file():
            yield Mistake(f"--weights {self.weights}: no such file", ("weights",))


@dataclass(frozen=True)
class PivotalOptions(OptionGroup):
    """A placeholder token trained with the network (pivotal tuning)."""

    train_token: str | None = option(
        None,
        "placeholder token trained together with the network (pivotal tuning), saved in a file of "
        "its own",
    )
    token_init_word: str | None = option(
        None,
        "words whose embeddings initialize its vectors, in turn; unset: the mean of all embeddings",
    )
    token_vectors: int = option(1, "number of vectors of the placeholder token", at_least=1)
    token_lr: float | None = option(
        None, "learning rate of the placeholder token; unset: --learning_rate", above=0
    )
    ti_stop_ratio: float | None = option(
        None,
        "fraction of the steps after which the placeholder token is frozen",
        above=0,
        at_most=1,
    )
    bundle_token: bool = option(
        False,
        "store the placeholder token in the network's file too (bundle_emb keys, which Diffusers "
        "refuses)",
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.train_token is not None and len(self.train_token.split()) != 1:
            yield Mistake(
                f"--train_token {self.train_token!r}: expected one word without spaces",
                ("train_token",),
            )
        elif self.train_token is not None and not is_plain_name(self.train_token):
            yield Mistake(
                f"--train_token {self.train_token!r}: it becomes part of a file's name, and can't "
                "be",
                ("train_token",),
            )
        given = [
            name
            for name in ("token_init_word", "token_lr", "ti_stop_ratio")
            if getattr(self, name) is not None
        ]
        given += ["bundle_token"] if self.bundle_token else []
        if given and self.train_token is None:
            yield Mistake(
                f"--{given[0]} needs --train_token, the placeholder token",
                ("train_token", given[0]),
            )


DEFAULT_EMBEDDING, DEFAULT_DIM = 32, 64
_BLOCK = re.compile(r"(input_blocks|output_blocks)(\.\d)?|middle_block")


@dataclass(frozen=True)
class LLLiteOptions(OptionGroup):
    """ControlNet-LLLite."""

    cond_emb_dim: int | None = option(
        None,
        "channels of each module's embedding of the condition; unset: those of --network_weights, "
        f"or {DEFAULT_EMBEDDING}",
        at_least=2,
    )
    network_dim: int | None = option(
        None,
        "channels of each module's small network; unset: those of --network_weights, or "
        f"{DEFAULT_DIM}",
        at_least=1,
    )
    network_dropout: float | None = option(
        None, "probability of dropping each value before the last layer", at_least=0, at_most=0.99
    )
    network_weights: Path | None = option(
        None, "ControlNet-LLLite file to continue from", affects_result=False, private=True
    )
    allow_partial: bool = option(
        False,
        "accept --network_weights although some of its modules don't fit or some are missing",
        affects_result=False,
    )
    lllite_blocks: tuple[str, ...] | None = option(
        None,
        "blocks that get modules: input_blocks.4, middle_block, output_blocks.3 …, or "
        "input_blocks for all of them; unset: those of --network_weights, or input_blocks "
        "middle_block",
    )
    save_model_as: str = option(
        "safetensors",
        "format of the saved file",
        choices=("ckpt", "pt", "safetensors"),
        affects_result=False,
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.cond_emb_dim is not None and self.cond_emb_dim % 2:
            yield Mistake(
                f"--cond_emb_dim {self.cond_emb_dim}: its first layer has half as many; give an "
                "even number",
                ("cond_emb_dim",),
            )
        for name in self.lllite_blocks or ():
            if not _BLOCK.fullmatch(name):
                yield Mistake(
                    f"--lllite_blocks {name}: expected input_blocks.4, middle_block or the like",
                    ("lllite_blocks",),
                )
        if self.network_weights is not None and not self.network_weights.is_file():
            problem = "no such file"
            if self.network_weights.is_dir():
                problem = "is a folder; a file is needed"
            yield Mistake(
                f"--network_weights {self.network_weights}: {problem}", ("network_weights",)
            )


def check_network(options: Options) -> Iterable[Mistake]:
    """Yield contradictions between the network's options and others."""
    network, pivotal = options[NetworkOptions], options[PivotalOptions]
    lr = options[OptimizerOptions].learning_rate
    lrs: list[float | None] = []
    if pivotal.train_token:
        lrs.append(pivotal.token_lr)
    if not network.network_train_text_encoder_only:
        lrs.append(network.unet_lr)
    if not network.network_train_unet_only:
        lrs += network.text_encoder_lrs
    if not any(_or_default(lrs, lr)):
        yield Mistake(
            "nothing is trained: every learning rate is 0",
            ("learning_rate", "unet_lr", "text_encoder_lr"),
        )
    if options[CacheOptions].text and not network.network_train_unet_only:
        yield Mistake(
            "--cache_text_encoder_outputs: captions are encoded before training, so the text "
            "encoders can't be trained; give --network_train_unet_only too",
            ("cache_text_encoder_outputs", "network_train_unet_only"),
        )
    if options[RunOptions].stop_text_encoder_training and network.network_train_text_encoder_only:
        yield Mistake(
            "--stop_text_encoder_training with --network_train_text_encoder_only leaves nothing "
            "to train after that",
            ("stop_text_encoder_training", "network_train_text_encoder_only"),
        )
    yield from check_weights(network)
    if options[MemoryOptions].quantized and not network.kind.supports_quantized_base:
        yield Mistake(
            f"--network_module {network.network_module} reads the base model's weights itself, and "
            "can't go with --fp8_base or --base_quant",
            ("network_module", "fp8_base", "base_quant"),
        )
    if pivotal.train_token is not None and options[CacheOptions].text:
        yield Mistake(
            "--train_token: captions with a placeholder token can't be encoded before training; "
            "leave out "
            "--cache_text_encoder_outputs",
            ("train_token", "cache_text_encoder_outputs"),
        )


def _or_default(lrs: Iterable[float | None], default: float) -> list[float]:
    """Return learning rates with the default in place of None."""
    return [default if lr is None else lr for lr in lrs]


def check_embedding(options: Options) -> Iterable[Mistake]:
    """Yield contradictions between the options of Textual Inversion and others."""
    if options[CacheOptions].text:
        yield Mistake(
            "--cache_text_encoder_outputs: Textual Inversion changes the text encoders' outputs, "
            "so "
            "captions can't be encoded before training",
            ("cache_text_encoder_outputs",),
        )
    if options[RunOptions].stop_text_encoder_training:
        yield Mistake(
            "--stop_text_encoder_training: only embeddings are trained; take fewer "
            "--max_train_steps",
            ("stop_text_encoder_training",),
        )
    if options[OptimizerOptions].learning_rate == 0:
        yield Mistake("nothing is trained: --learning_rate is 0", ("learning_rate",))


def check_lllite(options: Options) -> Iterable[Mistake]:
    """Yield contradictions between the options of ControlNet-LLLite and others."""
    if options[LossOptions].masked_loss:
        yield Mistake(
            "--masked_loss: the images of conditioning_data_dir are conditions here, not masks; "
            "--alpha_mask weights the loss by alpha channels",
            ("masked_loss",),
        )
    if options[RunOptions].stop_text_encoder_training:
        yield Mistake(
            "--stop_text_encoder_training: the text encoders aren't trained; leave it out",
            ("stop_text_encoder_training",),
        )
    if options[OptimizerOptions].learning_rate == 0:
        yield Mistake("nothing is trained: --learning_rate is 0", ("learning_rate",))


def check_fine_tune(options: Options) -> Iterable[Mistake]:
    """Yield contradictions between the options of fine-tuning and others."""
    fine_tune, lr = options[FineTuneOptions], options[OptimizerOptions].learning_rate
    if options[MemoryOptions].blocks_to_swap and not options[UpdateOptions].fused_backward_pass:
        yield Mistake(
            "--blocks_to_swap in full fine-tuning needs --fused_backward_pass: a block's weights "
            "are stepped while they are on the GPU",
            ("blocks_to_swap", "fused_backward_pass"),
        )
    if options[MemoryOptions].quantized:
        yield Mistake(
            "--fp8_base, --fp8_base_unet and --base_quant are for networks on a frozen model; "
            "here the model itself is trained",
            ("fp8_base", "fp8_base_unet", "base_quant"),
        )
    if fine_tune.train_text_encoder and options[CacheOptions].text:
        yield Mistake(
            "--train_text_encoder: captions that are encoded before training can't go with it; "
            "leave out --cache_text_encoder_outputs",
            ("train_text_encoder", "cache_text_encoder_outputs"),
        )
    is_unreadable = bool(list(fine_tune.mistakes()))  # --block_lr, which is then not looked at
    trains_unet = is_unreadable or any(fine_tune.block_lrs or (lr,))
    trains_text = fine_tune.train_text_encoder and any(_or_default(fine_tune.text_encoder_lrs, lr))
    if trains_unet:
        yield from check_trained_shards(
            options[OptimizerOptions],
            options[UpdateOptions],
            options[EmaOptions],
            options[ShardingOptions],
        )
    elif not trains_text:
        yield Mistake("nothing is trained: every learning rate is 0", ("learning_rate", "block_lr"))
