"""Resume: from a run to its state and back, and what must not differ between the two.

Options declared with affects_result=False may change; of paths, the file name or the data is compared instead.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from library.data.options import CacheOptions, DatasetOptions
from library.data.scan import Dataset
from library.errors import OptionError, RunError
from library.hub import download_folder
from library.log import log
from library.models.options import ModelOptions
from library.options import Options
from library.training.monitoring.validation import Best
from library.training.options.output import (
    ResumeOptions,
    SavingOptions,
    UploadOptions,
)
from library.training.options.run import RunOptions, ValidationOptions
from library.training.saving.state import DAMAGE, find_state, newest_state, read_facts


class ResumePoint(NamedTuple):
    """A state that the run goes on from: its folder, and what its state.json says.

    `is_same`: no option that decides what is learnt, and no picture, differs from those of the state.
    `is_finished`: nothing is left to do. With other options (--resume_anyway) there may be.
    """

    folder: Path
    facts: dict[str, Any]
    is_same: bool
    is_finished: bool


def find_resume_point(options: Options, datasets: Sequence[Dataset]) -> ResumePoint | None:
    """The state that --resume or --auto_resume means, if any. Raises OptionError if it isn't this run's."""
    chosen, saving = options[ResumeOptions], options[SavingOptions]
    assert saving.output_dir is not None
    names = [saving.output_name] if saving.output_name else ["last", "at", "epoch"]
    if chosen.resume:
        resume = chosen.resume
        if options[UploadOptions].resume_from_huggingface:
            resume = str(download_folder(resume, options[UploadOptions].huggingface_token))
        folder: Path | None = find_state(resume, saving.output_dir, names)
    else:
        folder = newest_state(saving.output_dir, names) if chosen.auto_resume else None
    if folder is None:
        return None
    facts = read_facts(folder)
    with _damage_told(folder):
        _check_facts(facts)
        is_over = _is_over(facts, options[ValidationOptions].early_stop_patience)
    seed = options[RunOptions].seed
    now = run_signature(options, datasets, seed=int(facts["run"]["seed"]) if seed is None else seed)
    is_same = check_same(facts["run"], now, anyway=chosen.resume_anyway)
    return ResumePoint(folder, facts, is_same, is_finished=is_over and is_same)


def _is_over(facts: Mapping[str, Any], patience: int | None) -> bool:
    """Whether its final save was its last one: a run that validation ended goes on if there is more patience now."""
    best = Best(patience)
    best.restore(facts["best"])
    return facts["finished"] and (facts["step"] >= facts["total_steps"] or best.is_lost)


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    """What Python says of a state that has been tampered with becomes a RunError."""
    try:
        yield
    except OptionError:
        raise
    except DAMAGE as error:
        raise RunError(f"{folder}: damaged state: {type(error).__name__}: {error}") from None


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raises ValueError if some are missing or of another kind."""
    for name, least in (("step", 0), ("epoch", 0), ("samples", 0), ("splits", 1), ("total_steps", 1)):
        if type(facts.get(name)) is not int or facts[name] < least:
            raise ValueError(f"{name} is {str(facts.get(name))[:50]}")
    for name, kind in (
        ("finished", bool),
        ("session_id", str),
        ("run", dict),
        ("report", dict),
        ("best", dict),
        ("saved", dict),
    ):
        if type(facts.get(name)) is not kind:
            raise ValueError(f"{name} is {str(facts.get(name))[:50]}")
    if not all(isinstance(value, str) for value in facts["run"].values()) or not facts["run"].get("seed", "").isdigit():
        raise ValueError("run holds no text, or no seed")


def run_signature(options: Options, datasets: Sequence[Dataset], *, seed: int) -> dict[str, str]:
    """What must be the same when the run is resumed, as text by name."""
    facts = {spec.name: str(value) for spec, value in options.specs() if spec.affects_result}
    facts |= {"seed": str(seed), "processes": os.environ.get("WORLD_SIZE", "1")}
    # Cached latents have noise of their own; where caches lie changes nothing.
    facts |= {
        "latents are cached": str(options[CacheOptions].latents),
        "captions are cached": str(options[CacheOptions].text),
    }
    facts["base model"] = str(options[ModelOptions].pretrained_model_name_or_path).replace("\\", "/").rpartition("/")[2]
    facts |= _dataset_facts(datasets, options[DatasetOptions])
    return facts


def _dataset_facts(datasets: Sequence[Dataset], options: DatasetOptions) -> dict[str, str]:
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(repr((dataset.plan.batch_size, dataset.plan.buckets)).encode())
        for samples in (dataset.samples, dataset.validation):
            for sample in samples:
                name = sample.file.replace("\\", "/").rpartition("/")[2]
                masked = ("masked",) if sample.has_mask else ()
                digest.update(
                    repr(
                        (name, sample.size, sample.fit, sample.repeats, sample.caption, sample.subset.captions, *masked)
                    ).encode()
                )
    shown = sum(dataset.num_samples for dataset in datasets)
    return {
        "pictures": f"{sum(len(dataset.samples) for dataset in datasets)}, {shown} with repeats",
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
