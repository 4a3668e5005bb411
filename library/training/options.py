"""Options of the training room, and the contradictions between its groups and others. No torch here."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.errors import Mistake
from library.log import LogOptions
from library.models.options import ModelOptions
from library.options import OptionGroup, Options, option
from library.training.compile_options import CompileOptions
from library.training.memory_options import MemoryOptions
from library.training.output_options import (
    MetadataOptions,
    PreviewOptions,
    ResumeOptions,
    SavingOptions,
    TrackerOptions,
    UploadOptions,
)
from library.training.sharding_options import ShardingOptions
from library.training.update_options import UpdateOptions, check_update

SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay",
)  # fmt: skip


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Run"""

    max_train_steps: int = option(1600, "optimizer steps in all", at_least=1)
    max_train_epochs: int | None = option(None, "epochs in all; wins over --max_train_steps", at_least=0)
    gradient_accumulation_steps: int = option(1, "batches per optimizer step and process", at_least=1)
    seed: int | None = option(
        None, "seed of everything random; one is drawn and told when unset", at_least=0, at_most=2**63 - 1
    )
    mixed_precision: str = option(
        "no",
        "dtype of frozen weights and of arithmetic; what is trained stays float32, unless --full_bf16 or --full_fp16 is given",
        choices=("no", "fp16", "bf16"),
    )
    stop_text_encoder_training: int | None = option(
        None, "text encoders are trained for the first N optimizer steps only", unset=(0,)
    )
    ddp_timeout: int | None = option(None, "minutes after which a process that waits for another gives up", at_least=0)
    ddp_gradient_as_bucket_view: bool = option(
        False, "several processes: gradients are views of the buckets that are exchanged, which saves memory"
    )
    ddp_static_graph: bool = option(False, "several processes: promise that every step uses the same parameters")
    dry_run: bool = option(False, "check everything, print what the run would do on one page, and write nothing")

    def mistakes(self) -> Iterable[Mistake]:
        if (self.stop_text_encoder_training or 0) < 0:
            yield Mistake(
                f"--stop_text_encoder_training {self.stop_text_encoder_training}: expected a number of steps; "
                "--network_train_unet_only leaves the text encoders alone",
                ("stop_text_encoder_training",),
            )


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
class NoiseOptions(OptionGroup):
    """Noise"""

    noise_offset: float | None = option(
        None, "strength of a noise that shifts whole channels, for very dark and very bright pictures", at_least=0
    )
    noise_offset_random_strength: bool = option(False, "draw each sample's strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(
        None, "added to --noise_offset times each latent channel's absolute mean", unset=(0, 0.0)
    )
    multires_noise_iterations: int | None = option(None, "levels of coarser noise laid over the noise", at_least=0)
    multires_noise_discount: float = option(
        0.3, "strength of each level of --multires_noise_iterations against the one before", at_least=0
    )
    ip_noise_gamma: float | None = option(None, "strength of noise that the U-Net sees but needn't predict", at_least=0)
    ip_noise_gamma_random_strength: bool = option(False, "draw each sample's strength between 0 and --ip_noise_gamma")
    min_timestep: int | None = option(None, "lowest timestep drawn; 0 when unset", at_least=0, at_most=999)
    max_timestep: int | None = option(
        None, "timesteps below this one are drawn; 1000 when unset", at_least=1, at_most=1000
    )
    timestep_sampling: str = option(
        "uniform",
        "how timesteps are distributed over that range: evenly, around the middle (logit_normal, cosmap), or by mode",
        choices=("uniform", "logit_normal", "mode", "cosmap"),
        unset=("sigma",),
    )
    logit_mean: float = option(0.0, "of logit_normal: above 0 for more noise, below for less")
    logit_std: float = option(1.0, "width of logit_normal", above=0)
    mode_scale: float = option(1.29, "of mode: above 0 for the middle, below for both ends", at_least=-1, at_most=1.75)

    def mistakes(self) -> Iterable[Mistake]:
        if self.adaptive_noise_scale is not None and not self.noise_offset:
            yield Mistake("--adaptive_noise_scale needs --noise_offset, which it is added to", ("noise_offset",))
        low, high = self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
        if low > high or low == 1000:
            yield Mistake(
                f"--min_timestep {low} is above --max_timestep {high}: no timestep lies between them",
                ("min_timestep", "max_timestep"),
            )


@dataclass(frozen=True)
class LossOptions(OptionGroup):
    """Loss"""

    loss_type: str = option("l2", "loss of each element", choices=("l2", "l1", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "snr",
        "how the threshold of huber and smooth_l1 depends on the timestep",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "threshold between squared and absolute loss", above=0)
    huber_scale: float = option(1.0, "factor of the threshold; not used by the schedule snr", above=0)
    min_snr_gamma: float | None = option(
        None, "cap each timestep's weight at this signal-to-noise ratio (5 is usual)", at_least=0
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "weigh the loss of a velocity model as that of a noise model"
    )
    v_pred_like_loss: float | None = option(None, "add this much of the loss weighed as a velocity model's", at_least=0)
    masked_loss: bool = option(
        False, "weigh the loss by the images of conditioning_data_dir; --alpha_mask takes the pictures' alpha channels"
    )
    debiased_estimation_loss: bool = option(False, "weigh the loss by 1 / sqrt(SNR); for velocity by 1 / (SNR + 1)")


@dataclass(frozen=True)
class EmaOptions(OptionGroup):
    """Moving average of what is trained (EMA)"""

    ema_decay: float | None = option(
        None, "keep a moving average of the weights with this decay (0.999 is usual), saved beside as NAME-ema", above=0, at_most=0.999999, unset=(0,)
    )  # fmt: skip
    ema_device: str = option(
        "accelerator", "where the average lies; cpu takes no memory of the card and some time", choices=("accelerator", "cpu")
    )  # fmt: skip


@dataclass(frozen=True)
class ValidationOptions(OptionGroup):
    """Validation (of the pictures that --validation_split holds out)"""

    validate_every_n_steps: int | None = option(None, "validate after every N optimizer steps", at_least=1, unset=(0,))
    validate_every_n_epochs: int | None = option(
        None, "validate after every N epochs; unset: after every one", at_least=1, unset=(0,)
    )
    max_validation_steps: int | None = option(None, "at most so many batches", at_least=1, unset=(0,))
    save_best: bool = option(False, "save NAME-best whenever the validation loss is the lowest so far")
    early_stop_patience: int | None = option(
        None, "end the run when so many validations in a row brought no lower loss; saves NAME-best too", at_least=1, unset=(0,)
    )  # fmt: skip

    @property
    def keeps_best(self) -> bool:
        return self.save_best or self.early_stop_patience is not None


COMMON_TRAINING = (
    ModelOptions, DatasetOptions, CaptionOptions, CacheOptions, RunOptions, ShardingOptions, MemoryOptions, CompileOptions, OptimizerOptions, UpdateOptions, ScheduleOptions, NoiseOptions,
    LossOptions,
    ValidationOptions, PreviewOptions, EmaOptions, SavingOptions, ResumeOptions, UploadOptions, TrackerOptions, MetadataOptions, LogOptions,
)  # fmt: skip


def is_adafactor_with_relative_step(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether Adafactor finds its own learning rate, which then isn't given to it."""
    return name.lower() == "adafactor" and bool(arguments.get("relative_step", True) or arguments.get("warmup_init"))


def check_training(options: Options) -> Iterable[Mistake]:
    """Contradictions between the groups that every training script has."""
    model, loss, schedule, optimizer = (
        options[ModelOptions],
        options[LossOptions],
        options[ScheduleOptions],
        options[OptimizerOptions],
    )
    if loss.scale_v_pred_loss_like_noise_pred and loss.v_pred_like_loss:
        yield Mistake(
            "--scale_v_pred_loss_like_noise_pred is for velocity models, --v_pred_like_loss for noise models; leave one out",
            ("v_pred_like_loss",),
        )
    if model.v_parameterization and loss.v_pred_like_loss:
        yield Mistake(
            "--v_pred_like_loss is for models that predict noise; it can't go with --v_parameterization",
            ("v_pred_like_loss", "v_parameterization"),
        )
    yield from check_update(
        options[UpdateOptions], mixed_precision=options[RunOptions].mixed_precision, optimizer=optimizer.name
    )
    arguments, _ = read_arguments("--optimizer_args", optimizer.optimizer_args)
    if schedule.lr_scheduler == "adafactor" and not is_adafactor_with_relative_step(optimizer.name, arguments):
        yield Mistake(
            "--lr_scheduler adafactor goes with --optimizer_type Adafactor that finds its own rate (relative_step) only",
            ("lr_scheduler", "optimizer_type"),
        )
    if options[EmaOptions].ema_decay and optimizer.name.lower().endswith("schedulefree"):
        yield Mistake(
            f"--ema_decay: --optimizer_type {optimizer.name} averages the weights itself; leave it out",
            ("ema_decay", "optimizer_type"),
        )
    upload, states = options[UploadOptions], options[ResumeOptions]
    if upload.save_state_to_huggingface and not (upload.huggingface_repo_id and states.saves_states):
        yield Mistake(
            "--save_state_to_huggingface needs --huggingface_repo_id, and --save_state or --save_state_on_train_end",
            ("save_state_to_huggingface",),
        )
    if upload.resume_from_huggingface and (states.resume or "").count("/") < 2:
        yield Mistake(
            f"--resume_from_huggingface: --resume {states.resume or ''} must be OWNER/REPOSITORY/FOLDER", ("resume",)
        )
    memory = options[MemoryOptions]
    if (
        options[CompileOptions].torch_compile
        and memory.gradient_checkpointing
        and memory.checkpoint_policy == "selective"
    ):
        yield Mistake(
            "--checkpoint_policy selective can't go with --torch_compile, which decides itself what it computes again; leave one out",
            ("checkpoint_policy", "torch_compile"),
        )
    if options[RunOptions].ddp_static_graph and options[RunOptions].gradient_accumulation_steps > 1:
        yield Mistake(
            "--ddp_static_graph can't go with --gradient_accumulation_steps: its batches don't all exchange gradients",
            ("ddp_static_graph", "gradient_accumulation_steps"),
        )
