"""Preflight: everything about a run that can be known before torch is imported. Wrong files are told in half a second."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.dataset_config import ConditioningKind, check_masks_are_used, read_datasets
from library.data.file_index import FileIndex
from library.data.options import CacheOptions, DatasetOptions
from library.data.scan import Dataset, scan
from library.errors import Mistake, OptionError, RunError
from library.log import log
from library.models.checkpoint.key_maps import PARTS
from library.models.checkpoint.reader import Checkpoint, check_vae, open_checkpoint
from library.models.checkpoint.reference_shapes import stand_in
from library.models.options import ModelOptions
from library.options import Options
from library.safetensors_io import data_hash, read_header
from library.training.options.distributed import ShardingOptions, sharding_notices
from library.training.options.objective import LossOptions
from library.training.options.optimizer import OptimizerOptions
from library.training.options.output import SavingOptions
from library.training.options.run import RunOptions


@dataclass(frozen=True)
class RunInputs:
    """What was found: the base model, opened; what it predicts and with which schedule; the pictures.

    Attributes:
        no_model: why there is no base model; SDXL base's sizes stand in for it (--dry_run).
    """

    checkpoint: Checkpoint
    v_prediction: bool
    zero_terminal_snr: bool
    datasets: Sequence[Dataset]
    known: FileIndex
    no_model: tuple[Mistake, ...] = ()


def inspect_inputs(options: Options, conditioning: ConditioningKind = "masks") -> RunInputs:
    """Open the model and scan the datasets. Raises OptionError with what can't be used.

    With --dry_run a model that can't be opened is only remembered, so that all else is looked at too.
    """
    no_model: tuple[Mistake, ...] = ()
    run, max_grad_norm = options[RunOptions], options[OptimizerOptions].max_grad_norm
    for notice in sharding_notices(
        options[ShardingOptions],
        zero_stage_source=options.where("zero_stage") if options.given("zero_stage") else None,
        accumulation=run.gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
    ):
        log.warning(notice)
    try:
        checkpoint = open_model(options[ModelOptions], prefer_fp16=options[RunOptions].mixed_precision == "fp16")
        log.info(checkpoint.describe())
    except OptionError as error:
        if not options[RunOptions].dry_run:
            raise
        no_model = tuple(error.mistakes)
        checkpoint = stand_in(Path(str(options[ModelOptions].pretrained_model_name_or_path)))
    _refuse_to_overwrite(checkpoint.path, options[SavingOptions])
    v_prediction = _settled(options, "v_parameterization", checkpoint.v_prediction, checkpoint)
    zero_terminal_snr = _settled(options, "zero_terminal_snr", checkpoint.zero_terminal_snr, checkpoint)
    if mistakes := list(
        _against_the_model(
            options[LossOptions], checkpoint, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr
        )
    ):
        raise OptionError(*no_model, *mistakes)
    try:
        sees_masks = options[LossOptions].masked_loss or checkpoint.unet.is_inpainting or bool(no_model)
        datasets, known = inspect_datasets(options, options[RunOptions].seed, conditioning, uses_masks=sees_masks)
    except OptionError as error:
        raise OptionError(*no_model, *error.mistakes) from None
    return RunInputs(checkpoint, v_prediction, zero_terminal_snr, datasets, known, no_model)


def inspect_datasets(
    options: Options, seed: int | None, conditioning: ConditioningKind = "masks", *, uses_masks: bool = True
) -> tuple[list[Dataset], FileIndex]:
    """Scan the datasets. Raises OptionError with what can't be used.

    Args:
        seed: --seed.
        uses_masks: the run has a use for masks in conditioning_data_dir: in its loss, or because the model is to paint there.
    """
    data, cache_dir = options[DatasetOptions], options[CacheOptions].cache_dir
    configs, notices = read_datasets(options, conditioning)
    if not uses_masks:
        check_masks_are_used(configs)
    for notice in notices:
        log.warning(notice)
    known = FileIndex(None if cache_dir is None else cache_dir / "index")
    datasets = scan(
        configs,
        known,
        skip_bad_images=data.skip_bad_images,
        allow_missing_captions=data.allow_missing_captions,
        cache_dir=cache_dir,
        seed=(seed if data.validation_seed is None else data.validation_seed) or 0,
    )
    return datasets, known


def open_model(model: ModelOptions, *, prefer_fp16: bool) -> Checkpoint:
    """The opened checkpoint. Nothing runs yet, so a damaged file is told as a mistake in the options."""
    assert model.pretrained_model_name_or_path is not None
    try:
        if model.vae is not None:
            check_vae(model.vae)
        checkpoint = open_checkpoint(
            model.pretrained_model_name_or_path, mapped=not model.disable_mmap_load_safetensors, prefer_fp16=prefer_fp16
        )
        if model.verify_model:
            _verify(checkpoint.path)
    except RunError as error:
        raise OptionError(str(error)) from None
    return checkpoint


def _verify(path: Path) -> None:
    """Compare a file's numbers with what its metadata say of them. Raises RunError if they differ, or say nothing."""
    said = read_header(path).metadata if path.suffix == ".safetensors" else {}
    stored = said.get("modelspec.hash_sha256") or said.get("sshs_model_hash")
    if stored is None:
        raise RunError(f"--verify_model: {path} has no sha256 in its metadata to compare with; leave the option out")
    found = data_hash(path)
    if found != stored.lower().removeprefix("0x"):
        raise RunError(
            f"--verify_model: {path}: damaged: the sha256 of its numbers is {found}, its metadata say {stored}; copy or download it again"
        )
    log.info("%s: its numbers are those that its metadata's sha256 was taken of", path.name)


def _refuse_to_overwrite(model: Path, saving: SavingOptions) -> None:
    """The final file must not be the base model's."""
    assert saving.output_dir is not None
    final = saving.output_dir / (saving.output_name or "last")
    for ending in ("safetensors", "ckpt", "pt"):
        if final.with_name(f"{final.name}.{ending}").is_dir():
            raise OptionError(
                f"{final}.{ending} is a folder, where the model is to be saved; give another --output_name"
            )
    if model.is_file() and model.with_suffix("").resolve() == final.resolve():
        raise OptionError(
            f"--output_name {final.name} in --output_dir {saving.output_dir} would overwrite the base model {model}; give another name"
        )


def _settled(options: Options, name: str, said: bool | None, checkpoint: Checkpoint) -> bool:
    """What the option and the checkpoint say together; refused where they contradict each other."""
    wanted = dict(options.items())[name]
    if said and options.given(name) and not wanted:
        raise OptionError(
            f"{options.where(name)} = false, but {checkpoint.path.name} is such a model (by {checkpoint.said_by}); leave the option out"
        )
    if said and not wanted:
        log.info("--%s is set by the checkpoint itself (%s)", name, checkpoint.said_by)
    return bool(wanted or said)


def _against_the_model(
    loss: LossOptions, checkpoint: Checkpoint, *, v_prediction: bool, zero_terminal_snr: bool
) -> list[Mistake]:
    """Options that don't fit what the model predicts, and models that can't be trained."""
    found = []
    if loss.scale_v_pred_loss_like_noise_pred and not v_prediction:
        found.append(
            "--scale_v_pred_loss_like_noise_pred is for velocity models; give --v_parameterization if this is one"
        )
    if loss.v_pred_like_loss and v_prediction:
        found.append(f"--v_pred_like_loss is for models that predict noise; {checkpoint.path.name} predicts velocity")
    if (
        zero_terminal_snr
        and not v_prediction
        and (loss.min_snr_gamma or loss.debiased_estimation_loss or loss.v_pred_like_loss)
    ):
        found.append(
            "--zero_terminal_snr with a model that predicts noise makes the weights of --min_snr_gamma, --debiased_estimation_loss and "
            "--v_pred_like_loss infinite at the last timestep; leave them out, or train velocity with --v_parameterization"
        )
    unet = checkpoint.unet
    if unet.in_channels != 4 and not unet.is_inpainting:
        found.append(f"{checkpoint.path}: a U-Net with {unet.in_channels} input channels is none that is known here")
    absent = {"text_encoder_1"} if unet.takes_score else set()
    if missing := [part for part in PARTS if part not in checkpoint.parts and part not in absent]:
        told = ", ".join(part.replace("_", " ") for part in missing)
        found.append(f"{checkpoint.path}: {unet.family}: the file is incomplete, it lacks {told}")
    return [Mistake(text) for text in found]
