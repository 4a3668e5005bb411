"""Options of the optimizer, its schedule, EMA, and 16-bit weights. Torch-free."""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from library.errors import Mistake
from library.options import OptionGroup, option
from library.training.options.optimizer_table import OptimizerSpec, optimizer_spec

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
)


@dataclass(frozen=True)
class OptimizerOptions(OptionGroup):
    """Optimizer."""

    optimizer_type: str = option(
        "",
        "AdamW when unset; AdamW8bit, Lion, Adafactor, Prodigy …, a class of torch.optim, or "
        "package.module.Class",
    )
    optimizer_args: tuple[str, ...] | None = option(
        None, "arguments of the optimizer, as key=value with Python literals", metavar="KEY=VALUE"
    )
    use_8bit_adam: bool = option(False, "old name of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "old name of --optimizer_type Lion")
    learning_rate: float = option(
        2e-6, "learning rate of all parameters without one of their own", at_least=0
    )
    max_grad_norm: float = option(
        1.0, "clip the global gradient norm to this value; 0 disables clipping", at_least=0
    )

    @property
    def name(self) -> str:
        """The optimizer asked for, with old names resolved."""
        if self.use_8bit_adam:
            return "AdamW8bit"
        if self.use_lion_optimizer:
            return "Lion"
        return self.optimizer_type or "AdamW"

    @property
    def spec(self) -> OptimizerSpec:
        """What is known about the optimizer."""
        return optimizer_spec(self.name)

    @property
    def arguments(self) -> dict[str, object]:
        """--optimizer_args, read."""
        return read_arguments("--optimizer_args", self.optimizer_args)[0]

    def mistakes(self) -> Iterable[Mistake]:
        if (self.use_8bit_adam or self.use_lion_optimizer) and self.optimizer_type:
            yield Mistake(
                "--use_8bit_adam and --use_lion_optimizer are old ways to say --optimizer_type; "
                "give one of them",
                ("optimizer_type",),
            )
        if self.use_8bit_adam and self.use_lion_optimizer:
            yield Mistake(
                "--use_8bit_adam and --use_lion_optimizer exclude each other", ("use_8bit_adam",)
            )
        arguments, mistakes = read_arguments("--optimizer_args", self.optimizer_args)
        yield from mistakes
        if "lr" in arguments:
            yield Mistake(
                f"--optimizer_args lr={arguments['lr']}: give --learning_rate", ("optimizer_args",)
            )


@dataclass(frozen=True)
class ScheduleOptions(OptionGroup):
    """Learning-rate schedule (counted in optimizer steps)."""

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
        0, "steps over which the learning rate rises from 0, or their fraction of all steps"
    )
    lr_decay_steps: int | float = option(
        0, "steps over which warmup_stable_decay falls, or their fraction of all steps"
    )
    lr_scheduler_num_cycles: int = option(
        1,
        "restarts of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay",
        at_least=1,
    )
    lr_scheduler_power: float = option(1, "exponent of polynomial", at_least=0)
    lr_scheduler_timescale: int | None = option(
        None, "time scale of inverse_sqrt in steps; unset: the length of the warm-up", at_least=0
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "lowest learning rate of cosine_with_min_lr and warmup_stable_decay, as a fraction of the "
        "learning rate",
        at_least=0,
    )

    def mistakes(self) -> Iterable[Mistake]:
        flag = f"--lr_scheduler {self.lr_scheduler}"
        if self.lr_scheduler_type:
            flag = f"--lr_scheduler_type {self.lr_scheduler_type}"
        has_warmup = not self.lr_scheduler_type and self.lr_scheduler not in (
            "constant",
            "piecewise_constant",
        )
        if self.lr_warmup_steps and not has_warmup:
            yield Mistake(
                f"--lr_warmup_steps {self.lr_warmup_steps}: {flag} has no warm-up; take "
                "--lr_scheduler "
                "constant_with_warmup, or leave it out",
                ("lr_warmup_steps", "lr_scheduler"),
            )
        if self.lr_scheduler == "cosine_with_min_lr" and self.lr_scheduler_min_lr_ratio is None:
            yield Mistake(
                "--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, say 0.1",
                ("lr_scheduler_min_lr_ratio",),
            )
        arguments, mistakes = read_arguments("--lr_scheduler_args", self.lr_scheduler_args)
        yield from mistakes
        if (
            self.lr_scheduler == "piecewise_constant"
            and "step_rules" not in arguments
            and not mistakes
        ):
            yield Mistake(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args "
                "\"step_rules='1:10,0.1:20,0.01'\"",
                ("lr_scheduler_args",),
            )
        if arguments and not self.lr_scheduler_type and self.lr_scheduler != "piecewise_constant":
            yield Mistake(
                f"--lr_scheduler_args: --lr_scheduler {self.lr_scheduler} takes none; it has "
                "options of its own",
                ("lr_scheduler_args",),
            )


def read_arguments(
    flag: str, pairs: Sequence[str] | None
) -> tuple[dict[str, object], list[Mistake]]:
    """Return the key=value pairs of `flag`, read as Python literals, and their mistakes."""
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
                    f"{flag} {pair!r}: expected key=value with a number, True, False, None, quoted "
                    f"text or a list{hint}",
                    (flag[2:],),
                )
            )
    return values, mistakes


@dataclass(frozen=True)
class EmaOptions(OptionGroup):
    """Exponential moving average of the weights (EMA)."""

    ema_decay: float | None = option(
        None,
        "keep an exponential moving average of the trained weights with this decay (0.999 is "
        "usual), and save it as NAME-ema too",
        above=0,
        at_most=0.999999,
        unset=(0,),
    )
    ema_device: str = option(
        "accelerator",
        "device of the EMA weights; cpu saves VRAM and is slower",
        choices=("accelerator", "cpu"),
    )


@dataclass(frozen=True)
class UpdateOptions(OptionGroup):
    """16-bit trained weights, and the optimizer in backward."""

    full_bf16: bool = option(
        False,
        "keep trained weights and gradients in bfloat16: half the memory; needs --mixed_precision "
        "bf16",
    )
    full_fp16: bool = option(
        False,
        "keep trained weights and gradients in float16: half the memory; needs --mixed_precision "
        "fp16",
    )
    rounding: str | None = option(
        None,
        "how a step rounds 16-bit weights: stochastic: up or down at random, so that small steps "
        "count on average; kahan: keeps the "
        "rounding error in 2 more bytes per parameter; nearest: loses small steps; unset: "
        "stochastic with --full_bf16, nearest with "
        "--full_fp16",
        choices=("stochastic", "kahan", "nearest"),
    )
    fused_backward_pass: bool = option(
        False,
        "step each tensor in backward as soon as its gradient is ready, then free the gradient: "
        "gradients take no memory",
    )
    fused_optimizer_groups: int | None = option(
        None,
        "like --fused_backward_pass with N groups of tensors, each stepped when its last gradient "
        "is ready",
        at_least=1,
        unset=(0,),
    )
    fused_clip: str = option(
        "tensor",
        "what --max_grad_norm clips with --fused_backward_pass or --fused_optimizer_groups: each "
        "tensor's gradient by its own norm, or "
        "all gradients by the global norm of the step before",
        choices=("tensor", "previous_norm"),
    )

    @property
    def is_fused(self) -> bool:
        return self.fused_backward_pass or self.fused_optimizer_groups is not None

    @property
    def is_16_bit(self) -> bool:
        """Whether trained weights have 16 bits."""
        return self.full_bf16 or self.full_fp16

    @property
    def rounding_used(self) -> str:
        """The rounding of 16-bit weights; "nearest" also where there are none."""
        return self.rounding or ("stochastic" if self.full_bf16 else "nearest")

    def mistakes(self) -> Iterable[Mistake]:
        if self.full_bf16 and self.full_fp16:
            yield Mistake(
                "--full_bf16 and --full_fp16: give one of them", ("full_bf16", "full_fp16")
            )
        if self.rounding and not self.is_16_bit:
            yield Mistake(
                f"--rounding {self.rounding}: trained weights are float32, so nothing is rounded; "
                "it needs --full_bf16 or --full_fp16",
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
            yield Mistake(
                "--fused_clip goes with --fused_backward_pass or --fused_optimizer_groups",
                ("fused_clip",),
            )


def check_update(
    options: UpdateOptions, optimizer: OptimizerOptions, mixed_precision: str
) -> Iterable[Mistake]:
    """Yield contradictions between UpdateOptions and other options."""
    for name, needed in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if getattr(options, name) and mixed_precision != needed:
            yield Mistake(
                f"--{name} needs --mixed_precision {needed}, got {mixed_precision}",
                (name, "mixed_precision"),
            )
    flag = "fused_backward_pass" if options.fused_backward_pass else "fused_optimizer_groups"
    if options.is_fused and mixed_precision == "fp16":
        yield Mistake(
            f"--{flag}: float16 gradients may overflow, and a step that was taken in part can't be "
            "undone; take --mixed_precision bf16, or no",
            (flag, "mixed_precision"),
        )
    if options.fused_backward_pass and optimizer.spec.finds_lr:
        yield Mistake(
            f"--fused_backward_pass: --optimizer_type {optimizer.name} finds its rate from all "
            "gradients together; leave it out, or take "
            "--fused_optimizer_groups, where each group finds its own",
            ("fused_backward_pass", "optimizer_type"),
        )
