"""Resuming: which state a run is resumed from, and what must be the same in both. Torch-free.

Options declared with affects_result=False may change. Paths may change too: the name of the base
model and the content of the datasets are compared instead.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.samples import DatasetConfig
from library.data.scan import Dataset
from library.errors import OptionError
from library.hub import download_folder
from library.log import log
from library.training.options.output import ResumeOptions, SavingOptions, UploadOptions
from library.training.saving.state_folder import (
    StateMetadata,
    damaged_state_errors,
    find_state,
    newest_state,
    read_metadata,
)

# Keys of the signature. They are stored in state.json, and keep their names.
_PROCESSES = "processes"
_LATENTS_CACHED = "latents are cached"
_TEXT_CACHED = "captions are cached"
_BASE_MODEL = "base model"
_IMAGES = "pictures"
_BATCH_SIZES = "batch sizes"
_SAMPLES = "files, sizes and captions"
_SHOWN_NAMES = {_IMAGES: "images"}


@dataclass(frozen=True)
class ResumePoint:
    """A state that a run is resumed from.

    Attributes:
        folder: the state's folder.
        metadata: what its state.json says of the run.
        is_same: every setting that affects the result, and every image, is the same as in the
            state.
        is_finished: no step is left. With other settings (--resume_anyway) this is always False.
    """

    folder: Path
    metadata: StateMetadata
    is_same: bool
    is_finished: bool


def find_resume_point(
    options: ResumeOptions,
    saving: SavingOptions,
    uploads: UploadOptions,
    signature: Mapping[str, str],
    *,
    seed: int | None,
    patience: int | None,
) -> ResumePoint | None:
    """Return the state that --resume or --auto_resume asks for, or None without one.

    Args:
        options: which state, and whether its settings may differ.
        saving: the output folder and name.
        uploads: whether the state is on the Hugging Face hub.
        signature: what must be the same as in the state, without the seed (run_signature).
        seed: --seed; None: the seed of the state.
        patience: --early_stop_patience.

    Raises:
        OptionError: there is no such state, or it belongs to a run with other settings.
        RunError: the state is damaged.
    """
    folder = _find_folder(options, saving, uploads)
    if folder is None:
        return None
    metadata = read_metadata(folder)
    with damaged_state_errors(folder):
        is_over = _is_over(metadata, patience)
    if seed is None:
        seed = metadata.seed
    current = {**signature, "seed": str(seed)}
    is_same = check_signature(metadata.signature, current, resume_anyway=options.resume_anyway)
    return ResumePoint(folder, metadata, is_same, is_finished=is_over and is_same)


def _find_folder(
    options: ResumeOptions, saving: SavingOptions, uploads: UploadOptions
) -> Path | None:
    assert saving.output_dir is not None
    names = [saving.output_name] if saving.output_name else ["last", "at", "epoch"]
    if options.resume:
        resume = options.resume
        if uploads.resume_from_huggingface:
            resume = str(download_folder(resume, uploads.huggingface_token))
        return find_state(resume, saving.output_dir, names)
    if options.auto_resume:
        return newest_state(saving.output_dir, names)
    return None


def _is_over(metadata: StateMetadata, patience: int | None) -> bool:
    """Return whether the run has nothing left to do.

    A run that --early_stop_patience ended continues if the patience is larger now.
    """
    has_all_steps = metadata.step >= metadata.total_steps
    is_stopped_early: bool = patience is not None and metadata.best["waited"] >= patience
    return metadata.finished and (has_all_steps or is_stopped_early)


def run_signature(
    options: Mapping[str, str],
    datasets: Sequence[Dataset],
    *,
    base_model: str,
    latents_are_cached: bool,
    text_is_cached: bool,
) -> dict[str, str]:
    """Return what must be the same when the run is resumed, without the seed, as text by name.

    Args:
        options: the options that affect the result.
        datasets: the run's datasets.
        base_model: --pretrained_model_name_or_path.
        latents_are_cached: cached latents are other samples of the VAE; where the caches are stored
            has no effect.
        text_is_cached: captions are encoded before training.
    """
    return {
        **options,
        _PROCESSES: os.environ.get("WORLD_SIZE", "1"),
        _LATENTS_CACHED: str(latents_are_cached),
        _TEXT_CACHED: str(text_is_cached),
        _BASE_MODEL: _file_name(base_model),
        **_dataset_signature(datasets),
    }


def _dataset_signature(datasets: Sequence[Dataset]) -> dict[str, str]:
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(_bucket_text(dataset.config).encode())
        for sample in [*dataset.samples, *dataset.validation]:
            name = _file_name(sample.file)
            values = [
                name,
                sample.size,
                sample.fit,
                sample.repeats,
                sample.caption,
                sample.subset.captions,
            ]
            if sample.has_mask:
                values.append("masked")
            digest.update(repr(tuple(values)).encode())
    num_images = sum(len(dataset.samples) for dataset in datasets)
    num_samples = sum(dataset.num_samples for dataset in datasets)
    return {
        _IMAGES: f"{num_images}, {num_samples} with repeats",
        _BATCH_SIZES: ", ".join(str(dataset.config.batch_size) for dataset in datasets),
        _SAMPLES: digest.hexdigest()[:16],
    }


def _bucket_text(config: DatasetConfig) -> str:
    """Return batch size and bucket settings as text.

    It is part of the signature in saved states, so its names are those of earlier versions.
    """
    buckets = config.buckets
    return (
        f"({config.batch_size!r}, BucketPlan(resolution={buckets.resolution!r}, enabled={buckets.enable_bucket!r}, "
        f"min_side={buckets.min_bucket_reso!r}, max_side={buckets.max_bucket_reso!r}, step={buckets.bucket_reso_steps!r}, "
        f"no_upscale={buckets.bucket_no_upscale!r}))"
    )


def _file_name(path: str) -> str:
    """Return what follows the last slash or backslash, as a state may come from another system."""
    return path.replace("\\", "/").rpartition("/")[2]


def check_signature(
    saved: Mapping[str, str], current: Mapping[str, str], *, resume_anyway: bool
) -> bool:
    """Return whether the signature of a state is that of the run.

    Raises OptionError that lists every difference, unless `resume_anyway`.
    """
    names = [*saved, *sorted(current.keys() - saved.keys())]
    different = [name for name in names if saved.get(name) != current.get(name)]
    if not different:
        return True
    lines = []
    for name in different:
        before, now = saved.get(name, "not set"), current.get(name, "not set")
        lines.append(f"  {_SHOWN_NAMES.get(name, name)}: {before} -> {now}")
    differences = "\n".join(lines)
    if not resume_anyway:
        raise OptionError(
            f"--resume: this state belongs to a run with different settings:\n{differences}\n"
            "Use the settings of the state, or add --resume_anyway"
        )
    log.warning(
        "--resume_anyway: resumed although these settings differ from the state:\n%s", differences
    )
    return False


def initial_step(options: ResumeOptions, *, steps_per_epoch: int, total_steps: int) -> int:
    """Return the step at which a run without a state starts.

    Raises OptionError if no step would be left.
    """
    if options.initial_epoch is None:
        step = options.initial_step or 0
        given = f"--initial_step {step}"
    else:
        step = (options.initial_epoch - 1) * steps_per_epoch
        given = f"--initial_epoch {options.initial_epoch} begins at step {step}"
    if step >= total_steps:
        raise OptionError(f"{given}: the run has {total_steps} steps, so no step would be left")
    return step
