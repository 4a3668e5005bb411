"""Optimizer."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import Mistake
from library.options import OptionGroup, option

SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay",
)  # fmt: skip


@dataclass(frozen=True)
class OptimizerOptions(OptionGroup):
    """Optimizer"""

    optimizer_type: str = option(
        "", "AdamW when unset; AdamW8bit, Lion, Adafactor, Prodigy …, a class of torch.optim, or package.module.Class"
    )
    optimizer_args: tuple[str, ...] | None = option(
        None, "arguments of the optimizer, as key=value with Python literals", metavar="KEY=VALUE"
    )
    use_8bit_adam: bool = option(False, "old name of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "old name of --optimizer_type Lion")
    learning_rate: float = option(2e-6, "learning rate of what has none of its own", at_least=0)
    max_grad_norm: float = option(
        1.0, "gradients are scaled down to this norm over all parameters; 0: never", at_least=0
    )

    @property
    def name(self) -> str:
        """The optimizer asked for, old names resolved."""
        return (
            "AdamW8bit" if self.use_8bit_adam else "Lion" if self.use_lion_optimizer else self.optimizer_type or "AdamW"
        )

    def mistakes(self) -> Iterable[Mistake]:
        if (self.use_8bit_adam or self.use_lion_optimizer) and self.optimizer_type:
            yield Mistake(
                "--use_8bit_adam and --use_lion_optimizer are old ways to say --optimizer_type; give one of them",
                ("optimizer_type",),
            )
        if self.use_8bit_adam and self.use_lion_optimizer:
            yield Mistake("--use_8bit_adam and --use_lion_optimizer can't both be meant", ("use_8bit_adam",))
        arguments, mistakes = read_arguments("--optimizer_args", self.optimizer_args)
        yield from mistakes
        if "lr" in arguments:
            yield Mistake(f"--optimizer_args lr={arguments['lr']}: give --learning_rate", ("optimizer_args",))


@dataclass(frozen=True)
class ScheduleOptions(OptionGroup):
    """Learning-rate schedule (counted in optimizer steps)"""

    lr_scheduler: str = option(
        "constant",
        "how the learning rate changes over the run",
        choices=(*SCHEDULERS, "piecewise_constant", "adafactor"),
    )
    lr_scheduler_type: str = option(
        "", "a class of torch.optim.lr_scheduler, or package.module.Class; wins over --lr_scheduler"
    )
    lr_scheduler_args: tuple[str, ...] | None = option(
        None, "arguments of the schedule, as key=value with Python literals", metavar="KEY=VALUE"
    )
    lr_warmup_steps: int | float = option(
        0, "steps over which the learning rate rises from 0, or their share of all steps"
    )
    lr_decay_steps: int | float = option(0, "steps over which warmup_stable_decay falls, or their share of all steps")
    lr_scheduler_num_cycles: int = option(
        1, "restarts of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay", at_least=1
    )
    lr_scheduler_power: float = option(1, "exponent of polynomial", at_least=0)
    lr_scheduler_timescale: int | None = option(
        None, "time scale of inverse_sqrt in steps; unset: the warm-up's length", at_least=0
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "share of the learning rate below which cosine_with_min_lr and warmup_stable_decay don't fall", at_least=0
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.lr_warmup_steps and (self.lr_scheduler in ("constant", "piecewise_constant") or self.lr_scheduler_type):
            which = (
                f"--lr_scheduler_type {self.lr_scheduler_type}"
                if self.lr_scheduler_type
                else f"--lr_scheduler {self.lr_scheduler}"
            )
            yield Mistake(
                f"--lr_warmup_steps {self.lr_warmup_steps}: {which} has no warm-up; take --lr_scheduler constant_with_warmup or leave it out",
                ("lr_warmup_steps", "lr_scheduler"),
            )
        if self.lr_scheduler == "cosine_with_min_lr" and self.lr_scheduler_min_lr_ratio is None:
            yield Mistake(
                "--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, say 0.1",
                ("lr_scheduler_min_lr_ratio",),
            )
        arguments, mistakes = read_arguments("--lr_scheduler_args", self.lr_scheduler_args)
        yield from mistakes
        if self.lr_scheduler == "piecewise_constant" and "step_rules" not in arguments and not mistakes:
            yield Mistake(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\"",
                ("lr_scheduler_args",),
            )
        if arguments and not self.lr_scheduler_type and self.lr_scheduler != "piecewise_constant":
            yield Mistake(
                f"--lr_scheduler_args: --lr_scheduler {self.lr_scheduler} takes none; it has options of its own",
                ("lr_scheduler_args",),
            )


def read_arguments(flag: str, pairs: Sequence[str] | None) -> tuple[dict[str, object], list[Mistake]]:
    """The key=value pairs of `flag` with their values read as Python literals, and what is wrong with them."""
    values: dict[str, object] = {}
    mistakes = []
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        try:
            if not equals or "=" in text:
                raise ValueError
            values[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            hint = " (text needs quotes)" if equals else ""
            mistakes.append(
                Mistake(
                    f"{flag} {pair!r}: expected key=value with a number, True, False, None, quoted text or a list{hint}",
                    (flag[2:],),
                )
            )
    return values, mistakes


@dataclass(frozen=True)
class EmaOptions(OptionGroup):
    """Moving average of what is trained (EMA)"""

    ema_decay: float | None = option(
        None, "keep a moving average of the weights with this decay (0.999 is usual), saved beside as NAME-ema", above=0, at_most=0.999999, unset=(0,)
    )  # fmt: skip
    ema_device: str = option(
        "accelerator", "where the average lies; cpu takes no memory of the card and some time", choices=("accelerator", "cpu")
    )  # fmt: skip


def is_adafactor_with_relative_step(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether Adafactor finds its own learning rate, which then isn't given to it."""
    return name.lower() == "adafactor" and bool(arguments.get("relative_step", True) or arguments.get("warmup_init"))


_LOOK_AT_ALL = ("prodigy", "dadapt")  # optimizers that find their rate from all gradients together


@dataclass(frozen=True)
class UpdateOptions(OptionGroup):
    """Weights of 16 bits, and steps within backward"""

    full_bf16: bool = option(
        False, "what is trained, and its gradients, are bfloat16: half the memory; needs --mixed_precision bf16"
    )
    full_fp16: bool = option(False, "what is trained, and its gradients, are float16; needs --mixed_precision fp16")
    rounding: str | None = option(
        None,
        "how 16-bit weights are rounded when they are stepped: up or down by chance, so that small steps count on average; with what is "
        "left over kept in 2 more bytes a number; or to nearest, which loses small steps. Unset: stochastic with --full_bf16, nearest with "
        "--full_fp16",
        choices=("stochastic", "kahan", "nearest"),
    )
    fused_backward_pass: bool = option(
        False, "step each tensor as soon as its gradient is there, and free that: gradients take no memory"
    )
    fused_optimizer_groups: int | None = option(
        None, "the same by N groups of tensors, each stepped when its last gradient is there", at_least=1, unset=(0,)
    )
    fused_clip: str = option(
        "tensor",
        "what --max_grad_norm bounds in fused steps: each tensor's gradient alone, or the norm over all, taken from the step before",
        choices=("tensor", "previous_norm"),
    )

    @property
    def is_fused(self) -> bool:
        return self.fused_backward_pass or self.fused_optimizer_groups is not None

    @property
    def rounding_used(self) -> str:
        """The rounding of 16-bit weights; "nearest" also where there are none."""
        return self.rounding or ("stochastic" if self.full_bf16 else "nearest")

    def mistakes(self) -> Iterable[Mistake]:
        if self.full_bf16 and self.full_fp16:
            yield Mistake("--full_bf16 and --full_fp16: give one of them", ("full_bf16", "full_fp16"))
        if self.rounding and not (self.full_bf16 or self.full_fp16):
            yield Mistake(
                f"--rounding {self.rounding}: trained weights are float32, so nothing is rounded; it goes with --full_bf16 or --full_fp16",
                ("rounding",),
            )
        if self.full_fp16 and self.rounding == "stochastic":
            yield Mistake(
                "--rounding stochastic is for --full_bf16; with --full_fp16 take kahan or nearest",
                ("rounding", "full_fp16"),
            )
        if self.fused_backward_pass and self.fused_optimizer_groups:
            yield Mistake(
                "--fused_backward_pass and --fused_optimizer_groups: give one of them",
                ("fused_backward_pass", "fused_optimizer_groups"),
            )
        if self.fused_clip != "tensor" and not self.is_fused:
            yield Mistake("--fused_clip goes with --fused_backward_pass or --fused_optimizer_groups", ("fused_clip",))


def check_update(chosen: UpdateOptions, *, mixed_precision: str, optimizer: str) -> Iterable[Mistake]:
    """Contradictions between the update's options and others. Args: optimizer: its name."""
    for name, wanted in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if getattr(chosen, name) and mixed_precision != wanted:
            yield Mistake(
                f"--{name} needs --mixed_precision {wanted}, got {mixed_precision}", (name, "mixed_precision")
            )
    fused = "fused_backward_pass" if chosen.fused_backward_pass else "fused_optimizer_groups"
    if chosen.is_fused and mixed_precision == "fp16":
        yield Mistake(
            f"--{fused}: float16 gradients may overflow, and a step that was taken in part can't be left out; take --mixed_precision bf16, "
            "or no",
            (fused, "mixed_precision"),
        )
    if chosen.fused_backward_pass and optimizer.lower().startswith(_LOOK_AT_ALL):
        yield Mistake(
            f"--fused_backward_pass: --optimizer_type {optimizer} finds its rate from all gradients together; leave it out, or take "
            "--fused_optimizer_groups, in which each group finds its own",
            ("fused_backward_pass", "optimizer_type"),
        )
