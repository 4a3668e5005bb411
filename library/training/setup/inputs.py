"""RunInputs: everything about a run that can be known before torch is imported.

A wrong model file, dataset or state is reported in half a second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.data.dataset_config import DatasetDefinition, check_masks_are_used
from library.data.file_index import FileIndex
from library.data.options import CacheOptions, DatasetOptions
from library.data.scan import Dataset, scan
from library.errors import Mistake, MistakeCollector, OptionError, RunError
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
from library.training.options.output import ResumeOptions, SavingOptions, UploadOptions
from library.training.options.run import RunOptions, ValidationOptions
from library.training.saving.resume import ResumePoint, find_resume_point, run_signature

_CHECKPOINT_FLAGS = {"v_parameterization": "v_prediction", "zero_terminal_snr": "zero_terminal_snr"}

ChangeDatasets = Callable[[Sequence[Dataset]], Sequence[Dataset]]


@dataclass(frozen=True)
class RunInputs:
    """The base model, the datasets, and the state that the run is resumed from.

    Attributes:
        checkpoint: the base model, opened; no weight is read.
        v_prediction: the model predicts velocity, not noise.
        zero_terminal_snr: the model is trained on a schedule with zero terminal SNR.
        datasets: the datasets with the sizes, captions and buckets of all images.
        file_index: what is known of files from earlier runs.
        signature: what must be the same when the run is resumed; empty if it saves no states.
        resume: the state that the run is resumed from.
        model_mistakes: why there is no base model; SDXL base's shapes take its place (--dry_run).
        resume_mistakes: why the state can't be resumed from (--dry_run).
    """

    checkpoint: Checkpoint
    v_prediction: bool
    zero_terminal_snr: bool
    datasets: Sequence[Dataset]
    file_index: FileIndex
    signature: Mapping[str, str] = field(default_factory=dict)
    resume: ResumePoint | None = None
    model_mistakes: tuple[Mistake, ...] = ()
    resume_mistakes: tuple[Mistake, ...] = ()


def inspect_inputs(
    options: Options,
    definition: DatasetDefinition,
    change_datasets: ChangeDatasets = lambda datasets: datasets,
) -> RunInputs:
    """Open the base model, scan the datasets, and find the state to resume from.

    With --dry_run, a model that can't be opened or a state that can't be resumed is only noted, so that everything else
    is checked too.

    Args:
        options: the options of the run.
        definition: the dataset definition, parsed.
        change_datasets: what the script does to the scanned datasets, such as putting a token into captions.

    Raises:
        OptionError: something can't be used.
        RunError: the state is damaged.
    """
    run, loss, cache = options[RunOptions], options[LossOptions], options[CacheOptions]
    zero_stage_source = options.where("zero_stage") if options.given("zero_stage") else None
    _warn_about_sharding(
        options[ShardingOptions], run, options[OptimizerOptions], zero_stage_source
    )
    checkpoint, model_mistakes = _open_model(options[ModelOptions], run)
    _refuse_to_overwrite(checkpoint.path, options[SavingOptions])
    flags = {}
    for name in ("v_parameterization", "zero_terminal_snr"):
        denied = options.where(name) if options.given(name) else None
        flags[name] = _settle_flag(getattr(options[ModelOptions], name), denied, name, checkpoint)
    v_prediction, zero_terminal_snr = flags["v_parameterization"], flags["zero_terminal_snr"]
    mistakes = _check_against_model(
        loss, checkpoint, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr
    )
    if mistakes:
        raise OptionError(*model_mistakes, *mistakes)
    try:
        if not (loss.masked_loss or checkpoint.unet.is_inpainting or model_mistakes):
            check_masks_are_used(definition.configs)
        scanned, file_index = scan_datasets(
            definition, options[DatasetOptions], cache.cache_dir, seed=run.seed
        )
        datasets = change_datasets(scanned)
    except OptionError as error:
        raise OptionError(*model_mistakes, *error.mistakes) from None
    states, uploads = options[ResumeOptions], options[UploadOptions]
    values = {spec.name: str(value) for spec, value in options.specs() if spec.affects_result}
    signature = _signature(values, datasets, options[ModelOptions], cache, states)
    resume, collector = None, MistakeCollector(raises=not run.dry_run)
    if not (
        run.dry_run and states.resume and uploads.resume_from_huggingface
    ):  # a page downloads no state
        with collector.collected():
            patience = options[ValidationOptions].early_stop_patience
            resume = find_resume_point(
                states, options[SavingOptions], uploads, signature, seed=run.seed, patience=patience
            )
    return RunInputs(
        checkpoint,
        v_prediction,
        zero_terminal_snr,
        datasets,
        file_index,
        signature,
        resume,
        model_mistakes,
        tuple(collector.mistakes),
    )


def _signature(
    values: Mapping[str, str],
    datasets: Sequence[Dataset],
    model: ModelOptions,
    cache: CacheOptions,
    states: ResumeOptions,
) -> Mapping[str, str]:
    """Return the signature of the run for states; {} if none is read or written."""
    if not (states.resume or states.auto_resume or states.saves_states):
        return {}
    return run_signature(
        values,
        datasets,
        base_model=str(model.pretrained_model_name_or_path),
        latents_are_cached=cache.latents,
        text_is_cached=cache.text,
    )


def _warn_about_sharding(
    sharding: ShardingOptions,
    run: RunOptions,
    optimizing: OptimizerOptions,
    zero_stage_source: str | None,
) -> None:
    """Log what the sharding of the launch means for the run's options."""
    notices = sharding_notices(
        sharding,
        zero_stage_source=zero_stage_source,
        accumulation=run.gradient_accumulation_steps,
        max_grad_norm=optimizing.max_grad_norm,
    )
    for notice in notices:
        log.warning(notice)


def _open_model(model: ModelOptions, run: RunOptions) -> tuple[Checkpoint, tuple[Mistake, ...]]:
    """Open the base model. With --dry_run, SDXL base's shapes take its place if it can't be opened.

    Returns:
        The model, and why it can't be opened.
    """
    try:
        checkpoint = open_model(model, prefer_fp16=run.mixed_precision == "fp16")
    except OptionError as error:
        if not run.dry_run:
            raise
        return stand_in(Path(str(model.pretrained_model_name_or_path))), tuple(error.mistakes)
    log.info(checkpoint.describe())
    return checkpoint, ()


def scan_datasets(
    definition: DatasetDefinition,
    options: DatasetOptions,
    cache_dir: Path | None,
    *,
    seed: int | None,
) -> tuple[list[Dataset], FileIndex]:
    """Scan the datasets.

    Args:
        definition: the dataset definition, parsed.
        options: what is done with images that can't be used.
        cache_dir: the folder of cache files; None: next to the images.
        seed: --seed, which chooses the images that are held out for validation unless --validation_seed does.

    Returns:
        The datasets, and the index of facts about files, which the scan used and added to.

    Raises:
        OptionError: images or captions can't be used.
    """
    for notice in definition.notices:
        log.warning(notice)
    validation_seed = seed if options.validation_seed is None else options.validation_seed
    file_index = FileIndex(None if cache_dir is None else cache_dir / "index")
    datasets = scan(
        definition.configs,
        file_index,
        skip_bad_images=options.skip_bad_images,
        allow_missing_captions=options.allow_missing_captions,
        cache_dir=cache_dir,
        seed=validation_seed or 0,
    )
    return datasets, file_index


def open_model(model: ModelOptions, *, prefer_fp16: bool) -> Checkpoint:
    """Open the base model. Nothing runs yet, so a damaged file is reported as a mistake in the options.

    Args:
        model: the options of the model.
        prefer_fp16: take the fp16 variant of a Diffusers folder, where there is one.

    Raises:
        OptionError: the model or the VAE can't be opened.
    """
    assert model.pretrained_model_name_or_path is not None
    try:
        if model.vae is not None:
            check_vae(model.vae)
        checkpoint = open_checkpoint(
            model.pretrained_model_name_or_path,
            mapped=not model.disable_mmap_load_safetensors,
            prefer_fp16=prefer_fp16,
        )
        if model.verify_model:
            _verify(checkpoint.path)
    except RunError as error:
        raise OptionError(str(error)) from None
    return checkpoint


def _verify(path: Path) -> None:
    """Compare a file's weights with the hash in its metadata. Raises RunError if they differ, or there is none."""
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        metadata = read_header(path).metadata
    expected = metadata.get("modelspec.hash_sha256") or metadata.get("sshs_model_hash")
    if expected is None:
        raise RunError(
            f"--verify_model: {path} has no sha256 in its metadata to compare with; leave the option out"
        )
    actual = data_hash(path)
    if actual != expected.lower().removeprefix("0x"):
        raise RunError(
            f"--verify_model: {path}: damaged: the sha256 of its weights is {actual}, but its metadata has {expected}; "
            "copy or download it again"
        )
    log.info("%s: its weights have the sha256 in its metadata", path.name)


def _refuse_to_overwrite(model: Path, saving: SavingOptions) -> None:
    """Raise OptionError if the final file would overwrite the base model or a folder."""
    assert saving.output_dir is not None
    final = saving.output_dir / saving.name
    for ending in ("safetensors", "ckpt", "pt"):
        if final.with_name(f"{final.name}.{ending}").is_dir():
            raise OptionError(
                f"{final}.{ending} is a folder, where the model is to be saved; give another --output_name"
            )
    if model.is_file() and model.with_suffix("").resolve() == final.resolve():
        raise OptionError(
            f"--output_name {final.name} in --output_dir {saving.output_dir} would overwrite the base model {model}; "
            "give another name"
        )


def _settle_flag(wanted: bool, source: str | None, name: str, checkpoint: Checkpoint) -> bool:
    """Return whether the model is of a kind that its file or an option says.

    Args:
        wanted: the value of the option.
        source: where the option was given; None: it wasn't.
        name: the name of the option.
        checkpoint: the base model.

    Raises:
        OptionError: the option denies what the file says.
    """
    stored = getattr(checkpoint, _CHECKPOINT_FLAGS[name])
    if stored and source is not None and not wanted:
        raise OptionError(
            f"{source} = false, but {checkpoint.path.name} is such a model (by {checkpoint.said_by}); leave the option out"
        )
    if stored and not wanted:
        log.info("--%s is set by the checkpoint itself (%s)", name, checkpoint.said_by)
    return bool(wanted or stored)


def _check_against_model(
    loss: LossOptions, checkpoint: Checkpoint, *, v_prediction: bool, zero_terminal_snr: bool
) -> list[Mistake]:
    """Return the options that don't fit what the model predicts, and why the model can't be trained."""
    texts = []
    if loss.scale_v_pred_loss_like_noise_pred and not v_prediction:
        texts.append(
            "--scale_v_pred_loss_like_noise_pred is for velocity models; give --v_parameterization if this is one"
        )
    if loss.v_pred_like_loss and v_prediction:
        texts.append(
            f"--v_pred_like_loss is for models that predict noise; {checkpoint.path.name} predicts velocity"
        )
    weighs_by_snr = loss.min_snr_gamma or loss.debiased_estimation_loss or loss.v_pred_like_loss
    if zero_terminal_snr and not v_prediction and weighs_by_snr:
        texts.append(
            "--zero_terminal_snr with a model that predicts noise makes the weights of --min_snr_gamma, "
            "--debiased_estimation_loss and --v_pred_like_loss infinite at the last timestep; leave them out, or train "
            "velocity with --v_parameterization"
        )
    unet = checkpoint.unet
    if unet.in_channels != 4 and not unet.is_inpainting:
        texts.append(
            f"{checkpoint.path}: a U-Net with {unet.in_channels} input channels isn't known here"
        )
    optional = {"text_encoder_1"} if unet.takes_score else set()  # a refiner has one text encoder
    missing = [name for name in PARTS if name not in checkpoint.parts and name not in optional]
    if missing:
        names = ", ".join(name.replace("_", " ") for name in missing)
        texts.append(f"{checkpoint.path}: {unet.family}: the file is incomplete, it lacks {names}")
    return [Mistake(text) for text in texts]
