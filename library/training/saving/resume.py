"""Resuming: which state a run continues from, and what must be the same in both.

Options declared with affects_result=False may change. Paths may change too: the name of the base model and the content
of the datasets are compared instead.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.options import CacheOptions
from library.data.scan import Dataset
from library.errors import OptionError
from library.hub import download_folder
from library.log import log
from library.models.options import ModelOptions
from library.options import Options
from library.training.monitoring.validation import Best
from library.training.options.output import ResumeOptions, SavingOptions, UploadOptions
from library.training.options.run import RunOptions, ValidationOptions
from library.training.saving.state import (
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
    """The state that a run continues from.

    Attributes:
        is_same: every setting that affects the result, and every image, is the same as in the state.
        is_finished: no step is left. With other settings (--resume_anyway) this is always False.
    """

    folder: Path
    metadata: StateMetadata
    is_same: bool
    is_finished: bool


def find_resume_point(options: Options, datasets: Sequence[Dataset]) -> ResumePoint | None:
    """Return the state that --resume or --auto_resume asks for, or None without one.

    Raises OptionError if the state belongs to a run with other settings.
    """
    resuming = options[ResumeOptions]
    folder = _find_folder(resuming, options[SavingOptions], options[UploadOptions])
    if folder is None:
        return None
    metadata = read_metadata(folder)
    with damaged_state_errors(folder):
        is_over = _is_over(metadata, options[ValidationOptions].early_stop_patience)
    seed = options[RunOptions].seed
    if seed is None:
        seed = metadata.seed
    signature = run_signature(options, datasets, seed=seed)
    is_same = check_signature(metadata.signature, signature, resume_anyway=resuming.resume_anyway)
    return ResumePoint(folder, metadata, is_same, is_finished=is_over and is_same)


def _find_folder(resuming: ResumeOptions, saving: SavingOptions, uploads: UploadOptions) -> Path | None:
    assert saving.output_dir is not None
    names = [saving.output_name] if saving.output_name else ["last", "at", "epoch"]
    if not resuming.resume:
        return newest_state(saving.output_dir, names) if resuming.auto_resume else None
    if uploads.resume_from_huggingface:
        downloaded = download_folder(resuming.resume, uploads.huggingface_token)
        return find_state(str(downloaded), saving.output_dir, names)
    return find_state(resuming.resume, saving.output_dir, names)


def _is_over(metadata: StateMetadata, patience: int | None) -> bool:
    """Return whether the run has nothing left to do.

    A run that --early_stop_patience ended continues if the patience is larger now.
    """
    best = Best(patience)
    best.restore(metadata.best)
    has_all_steps = metadata.step >= metadata.total_steps
    return metadata.finished and (has_all_steps or best.is_lost)


def run_signature(options: Options, datasets: Sequence[Dataset], *, seed: int) -> dict[str, str]:
    """Return everything that must not change when a run is resumed, as text by name."""
    signature = {spec.name: str(value) for spec, value in options.specs() if spec.affects_result}
    caching, base_model = options[CacheOptions], options[ModelOptions].pretrained_model_name_or_path
    signature["seed"] = str(seed)
    signature[_PROCESSES] = os.environ.get("WORLD_SIZE", "1")
    # Cached latents are other samples of the VAE than uncached ones. Where the caches are stored makes no difference.
    signature[_LATENTS_CACHED] = str(caching.latents)
    signature[_TEXT_CACHED] = str(caching.text)
    signature[_BASE_MODEL] = _file_name(str(base_model))
    return signature | _dataset_signature(datasets)


def _dataset_signature(datasets: Sequence[Dataset]) -> dict[str, str]:
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(repr((dataset.plan.batch_size, dataset.plan.buckets)).encode())
        for sample in [*dataset.samples, *dataset.validation]:
            values = [
                _file_name(sample.file),
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
        _BATCH_SIZES: ", ".join(str(dataset.plan.batch_size) for dataset in datasets),
        _SAMPLES: digest.hexdigest()[:16],
    }


def _file_name(path: str) -> str:
    """Return what follows the last slash or backslash: a state may have been written on another system."""
    return path.replace("\\", "/").rpartition("/")[2]


def check_signature(saved: Mapping[str, str], current: Mapping[str, str], *, resume_anyway: bool) -> bool:
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
    log.warning("--resume_anyway: resumed although these settings differ from the state:\n%s", differences)
    return False


def initial_step(options: ResumeOptions, *, steps_per_epoch: int, total_steps: int) -> int:
    """Return the step at which a run without a state starts. Raises OptionError if no step would be left."""
    if options.initial_epoch is None:
        step = options.initial_step or 0
        given = f"--initial_step {step}"
    else:
        step = (options.initial_epoch - 1) * steps_per_epoch
        given = f"--initial_epoch {options.initial_epoch} begins at step {step}"
    if step >= total_steps:
        raise OptionError(f"{given}: the run has {total_steps} steps, so no step would be left")
    return step
