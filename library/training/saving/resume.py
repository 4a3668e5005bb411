"""Resume: which state a run is resumed from, and what must be the same in both. Torch-free.

Options declared with affects_result=False may change; of paths, the file name or the data is compared instead.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from library.data.scan import Dataset
from library.errors import OptionError, RunError
from library.hub import download_folder
from library.log import log
from library.training.options.output import ResumeOptions, SavingOptions, UploadOptions
from library.training.saving.state_folder import DAMAGE, find_state, newest_state, read_state_metadata


class ResumePoint(NamedTuple):
    """A state that a run is resumed from.

    Attributes:
        folder: the state's folder.
        metadata: the contents of its state.json.
        is_same: no option that affects the result, and no image, differs from those of the state.
        is_finished: nothing is left to do. With other options (--resume_anyway) there may be.
    """

    folder: Path
    metadata: dict[str, Any]
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
    """Return the state that --resume or --auto_resume means, if any.

    Args:
        options: which state, and whether it may be another run's.
        saving: the output folder and name.
        uploads: whether the state is on the Hugging Face hub.
        signature: what must be the same as in the state, the seed excepted.
        seed: --seed; None: the state's.
        patience: --early_stop_patience.

    Raises:
        OptionError: there is no such state, or it is of another run.
        RunError: the state is damaged.
    """
    assert saving.output_dir is not None
    names = [saving.output_name] if saving.output_name else ["last", "at", "epoch"]
    folder: Path | None = None
    if options.resume:
        resume = options.resume
        if uploads.resume_from_huggingface:
            resume = str(download_folder(resume, uploads.huggingface_token))
        folder = find_state(resume, saving.output_dir, names)
    elif options.auto_resume:
        folder = newest_state(saving.output_dir, names)
    if folder is None:
        return None
    metadata = read_state_metadata(folder)
    with damage_as_run_error(folder):
        _check_metadata(metadata)
        is_over = _is_over(metadata, patience)
    saved = metadata["run"]
    now = {**signature, "seed": saved["seed"] if seed is None else str(seed)}
    is_same = check_same(saved, now, anyway=options.resume_anyway)
    return ResumePoint(folder, metadata, is_same, is_finished=is_over and is_same)


def _is_over(metadata: Mapping[str, Any], patience: int | None) -> bool:
    """Return whether the final save was the last one.

    A run that validation ended is continued if there is more patience now.
    """
    is_early_stop = patience is not None and metadata["best"]["waited"] >= patience
    return metadata["finished"] and (metadata["step"] >= metadata["total_steps"] or is_early_stop)


@contextmanager
def damage_as_run_error(folder: Path) -> Iterator[None]:
    """Context manager: turn Python's errors for a damaged state into a RunError."""
    try:
        yield
    except OptionError:
        raise
    except DAMAGE as error:
        raise RunError(f"{folder}: damaged state: {type(error).__name__}: {error}") from None


_LEAST = {"step": 0, "epoch": 0, "samples": 0, "splits": 1, "total_steps": 1}
_TYPES = {"finished": bool, "session_id": str, "run": dict, "report": dict, "best": dict, "saved": dict}


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if an entry is missing or of another type."""
    for name, least in _LEAST.items():
        if type(metadata.get(name)) is not int or metadata[name] < least:
            raise ValueError(f"{name} is {str(metadata.get(name))[:50]}")
    for name, kind in _TYPES.items():
        if type(metadata.get(name)) is not kind:
            raise ValueError(f"{name} is {str(metadata.get(name))[:50]}")
    run = metadata["run"]
    if not all(isinstance(value, str) for value in run.values()) or not run.get("seed", "").isdigit():
        raise ValueError("run holds no text, or no seed")


def run_signature(
    options: Mapping[str, str],
    datasets: Sequence[Dataset],
    *,
    base_model: str,
    latents_are_cached: bool,
    text_is_cached: bool,
) -> dict[str, str]:
    """Return what must be the same when the run is resumed, the seed excepted, as text by name.

    Args:
        options: the options that affect the result.
        datasets: the run's datasets.
        base_model: --pretrained_model_name_or_path.
        latents_are_cached: cached latents have one sample of the VAE's noise; where caches are stored has no effect.
        text_is_cached: captions are encoded before training.
    """
    return {
        **options,
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "latents are cached": str(latents_are_cached),
        "captions are cached": str(text_is_cached),
        "base model": base_model.replace("\\", "/").rpartition("/")[2],
        **_dataset_signature(datasets),
    }


def _dataset_signature(datasets: Sequence[Dataset]) -> dict[str, str]:
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(repr((dataset.plan.batch_size, dataset.plan.buckets)).encode())
        for sample in (*dataset.samples, *dataset.validation):
            name = sample.file.replace("\\", "/").rpartition("/")[2]
            values = (name, sample.size, sample.fit, sample.repeats, sample.caption, sample.subset.captions)
            digest.update(repr((*values, "masked") if sample.has_mask else values).encode())
    num_images = sum(len(dataset.samples) for dataset in datasets)
    num_samples = sum(dataset.num_samples for dataset in datasets)
    return {
        "pictures": f"{num_images}, {num_samples} with repeats",
        "batch sizes": ", ".join(str(dataset.plan.batch_size) for dataset in datasets),
        "files, sizes and captions": digest.hexdigest()[:16],
    }


def check_same(saved: Mapping[str, str], now: Mapping[str, str], *, anyway: bool) -> bool:
    """Whether nothing differs. Raises OptionError with every difference, unless the run is to be resumed anyway."""
    different = [name for name in (*saved, *sorted(set(now) - set(saved))) if saved.get(name) != now.get(name)]
    if not different:
        return True
    told = "\n".join(f"  {name}: {saved.get(name, 'not there')} -> {now.get(name, 'not there')}" for name in different)
    if not anyway:
        raise OptionError(
            f"--resume: this isn't the run that the state is of; it would go on otherwise than it began:\n{told}\n"
            "Give the options that it had, or --resume_anyway"
        )
    log.warning("resumed though these differ from the state (--resume_anyway):\n%s", told)
    return False


def initial_step(options: ResumeOptions, *, steps_per_epoch: int, total_steps: int) -> int:
    """The steps that a run without a state takes as done. Raises OptionError if none are left."""
    epoch = options.initial_epoch
    step = (epoch - 1) * steps_per_epoch if epoch is not None else options.initial_step or 0
    if step >= total_steps:
        given = f"--initial_step {step}" if epoch is None else f"--initial_epoch {epoch} begins at step {step}"
        raise OptionError(f"{given}: the run has {total_steps} steps, so nothing would be left to do")
    return step
