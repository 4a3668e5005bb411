"""Options of the training room, and the contradictions between its groups and others. No torch here."""

from collections.abc import Iterable

from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.errors import Mistake
from library.log import LogOptions
from library.models.options import ModelOptions
from library.options import Options
from library.training.options.distributed import ShardingOptions
from library.training.options.memory import CompileOptions, MemoryOptions
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import (
    EmaOptions,
    OptimizerOptions,
    ScheduleOptions,
    UpdateOptions,
    check_update,
    is_adafactor_with_relative_step,
    read_arguments,
)
from library.training.options.output import (
    MetadataOptions,
    PreviewOptions,
    ResumeOptions,
    SavingOptions,
    TrackerOptions,
    UploadOptions,
)
from library.training.options.run import RunOptions, ValidationOptions

COMMON_TRAINING = (
    ModelOptions, DatasetOptions, CaptionOptions, CacheOptions, RunOptions, ShardingOptions, MemoryOptions, CompileOptions, OptimizerOptions, UpdateOptions, ScheduleOptions, NoiseOptions,
    LossOptions,
    ValidationOptions, PreviewOptions, EmaOptions, SavingOptions, ResumeOptions, UploadOptions, TrackerOptions, MetadataOptions, LogOptions,
)  # fmt: skip


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
