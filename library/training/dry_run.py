"""--dry_run: one page that tells what a run would do. Everything is looked at, nothing is written, no weight is loaded.

On a CUDA device, where the model is there, a few real steps on the largest batch are measured too.
"""

import dataclasses
import importlib.util
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from library.data.batch import Batch
from library.data.cache import LATENT_CHANNELS, TextPlan
from library.data.fill_cache import audit
from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.data.order import Place
from library.data.sample import Sample
from library.data.subsets import Dataset
from library.draws import Draws
from library.errors import Mistake, OptionError, RunError, first_line
from library.files import free_space
from library.log import is_main_process
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText
from library.models.vae import PIXELS_PER_LATENT
from library.options import Options
from library.precision import Precision
from library.training.options import (
    EmaOptions,
    OptimizerOptions,
    ResumeOptions,
    RunOptions,
    SavingOptions,
    ScheduleOptions,
    TrackerOptions,
    UploadOptions,
)
from library.training.plan import (
    Bucket,
    Plan,
    buckets_of,
    estimate_memory,
    frozen_parts,
    groups_in_words,
    make_plan,
    memory_in_words,
    samples_of,
    saves_in_words,
    steps_in_words,
    trained_groups,
)
from library.training.preflight import Preflight
from library.training.prepare import all_samples, latent_cache, text_cache, token_width, without_bad
from library.training.processes import start_processes
from library.training.resume import initial_step, look_for_state
from library.training.saving import Saver, size_in_words
from library.training.start import make_ema, make_step, make_update, open_models, rehearse, sample_prompts
from library.training.task import Task
from library.training.trackers import read_tracker_config

_WIDTH, _LABEL = 100, 16
_MOST_BUCKETS = 40
_STEPS = 3  # measured, behind one that isn't: it makes the optimizer's state


def dry_run(kind: type[Task], options: Options, found: Preflight) -> None:
    """Print the page. Of several processes the first one does.

    Raises OptionError, behind the page, with everything that keeps the run from starting.
    """
    accelerator = start_processes(timeout=options[RunOptions].ddp_timeout)
    if not is_main_process():
        return
    page = _Page()
    page.problems += found.no_model
    models = open_models(kind, options, found, accelerator.device)
    task: Task | None = None
    with page.checked():
        task = rehearse(kind, models, options)
    _model(page, options, found, models, task)
    datasets = _pictures(page, options, found, models)
    plan = make_plan(
        options[RunOptions], datasets, processes=accelerator.num_processes, seed=options[RunOptions].seed or 0
    )
    buckets = buckets_of(plan, datasets)
    _steps(page, options, datasets, plan, buckets)
    _beginning(page, options, found, plan)
    if task is None:
        page.section("Trained", [("", "can't be told before the weights are loaded")])
    else:
        groups = trained_groups(task, plan.total_steps)
        page.section("Trained", [("", line) for line in groups_in_words(groups)])
        page.rows(_optimizer(options))
        _output(page, options, task, plan)
        page.section(
            "Memory", [("estimated", memory_in_words(estimate_memory(task, models, groups, buckets, options)))]
        )
    _measurement(page, kind, options, found, models, plan, buckets, samples_of(datasets))
    page.print()
    if page.problems:
        raise OptionError(*page.problems)


class _Page:
    """Lines of text, and what keeps the run from starting."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.problems: list[Mistake] = []

    @contextmanager
    def checked(self) -> Iterator[None]:
        """A mistake that is found doesn't end the page."""
        try:
            yield
        except OptionError as error:
            self.problems += error.mistakes
        except RunError as error:
            self.problems.append(Mistake(str(error)))

    def section(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.lines += ["", title] if self.lines else [title]
        self.rows(rows)

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """Labelled lines, broken where they are too long; without a label, a line of a table."""
        for label, text in rows:
            if not label:
                self.lines.append(f"  {text}")
                continue
            lines = textwrap.wrap(text, _WIDTH - _LABEL - 2, break_long_words=False, break_on_hyphens=False)
            self.lines += [
                f"  {label if not number else '':{_LABEL}}{line}".rstrip() for number, line in enumerate(lines or [""])
            ]

    def print(self) -> None:
        count = len(self.problems)
        end = f"{count} errors keep the run from starting." if count else "Nothing keeps the run from starting."
        text = "\n".join([*self.lines, "", end])
        coding = sys.stdout.encoding or "utf-8"
        print(text.encode(coding, "replace").decode(coding), flush=True)


# ------------------------------------------------------------------------------------------------------------ sections


def _model(page: _Page, options: Options, found: Preflight, models: SdxlModels, task: Task | None) -> None:
    checkpoint = found.checkpoint
    kind = "Diffusers folder" if checkpoint.is_folder else "single file"
    rows = [("model", f"{checkpoint.path.name}: {checkpoint.unet.family}, {kind}")]
    if found.no_model:
        told = "; ".join(mistake.text for mistake in found.no_model)
        rows = [("model", f"NOT THERE: {told}"), ("", "What follows is computed for SDXL base.")]
    zero = ", on a schedule with zero terminal SNR" if found.zero_terminal_snr else ""
    rows.append(("predicts", f"{'velocity' if found.v_prediction else 'noise'}{zero}"))
    page.section("Model", rows)
    if task is None:
        return
    cache = options[CacheOptions]
    in_steps = {part for part, _ in frozen_parts(task, models, cache)}
    for part, numbers in frozen_parts(task, models, CacheOptions()):
        dtype = models.precision.vae if part == "vae" else models.precision.compute
        when = "in every step" if part in in_steps else "for the caches alone"
        page.rows([(part, f"{numbers:13,} frozen numbers, {str(dtype).removeprefix('torch.')}, {when}")])


def _optimizer(options: Options) -> list[tuple[str, str]]:
    optimizing, schedule = options[OptimizerOptions], options[ScheduleOptions]
    warmup = f", warm-up {schedule.lr_warmup_steps:g}" if schedule.lr_warmup_steps else ""
    return [
        ("optimizer", " ".join([optimizing.name, *(optimizing.optimizer_args or ())])),
        ("schedule", f"{schedule.lr_scheduler_type or schedule.lr_scheduler}{warmup}"),
    ]


def _pictures(page: _Page, options: Options, found: Preflight, models: SdxlModels) -> list[Dataset]:
    """Look at pictures and caches; returns the datasets without what would be left out."""
    cache, samples = options[CacheOptions], all_samples(found.datasets)
    to_decode, rows = samples, []
    with page.checked():
        if cache.latents:
            to_decode = _cached(page, rows, "latents", samples, _latent_problem(options, found, models), _latent_bytes)
        bad = audit(to_decode, found.known)
        decoded = f"{len({sample.file for sample in to_decode})} were decoded, {len(bad)} can't be used"
        held_out = sum(len(dataset.validation) for dataset in found.datasets)
        empty = sum(not sample.caption for sample in samples)
        page.section("Pictures", [
            ("from", ", ".join(dict.fromkeys(str(subset.source) for dataset in found.datasets for subset in dataset.plan.subsets))),
            ("pictures", f"{len(samples)}, of which {held_out} are held out for validation; {decoded}"),
            ("captions", f"{len(samples) - empty}; {empty} pictures have none"),
        ])  # fmt: skip
        kept = list(found.datasets)
        with page.checked():
            kept = without_bad(found.datasets, bad, skip=options[DatasetOptions].skip_bad_images)
        if cache.text:
            _cached(
                page,
                rows,
                "text",
                all_samples(kept),
                _text_problem(options, found, models),
                _text_bytes(options, models),
            )
        page.section("Caches", rows or [("", "none: pictures and captions are encoded in every step")])
        return kept
    return list(found.datasets)


def _steps(page: _Page, options: Options, datasets: Sequence[Dataset], plan: Plan, buckets: Sequence[Bucket]) -> None:
    page.section("Steps", [("", line) for line in steps_in_words(plan, datasets)])
    columns = f"{'bucket':>9}  pictures  with repeats  batches  of at most"
    shown = sorted(buckets, key=lambda bucket: -bucket.shown)[:_MOST_BUCKETS]
    lines = [
        f"{bucket.size!s:>9}  {bucket.pictures:8,}  {bucket.shown:12,}  {bucket.batches:7,}  {bucket.batch_size:10,}"
        for bucket in shown
    ]
    more = [f"and {len(buckets) - len(shown)} more"] if len(buckets) > len(shown) else []
    page.rows([("", line) for line in (columns, *lines, *more)])


def _beginning(page: _Page, options: Options, found: Preflight, plan: Plan) -> None:
    """Where the run begins: at its start, or at a state's step. And what it draws and sends."""
    chosen, upload = options[ResumeOptions], options[UploadOptions]
    told = "at step 0"
    with page.checked():
        if chosen.resume and upload.resume_from_huggingface:
            told = f"at the state {chosen.resume} on the hub, which isn't downloaded for this page"
        elif (resumed := look_for_state(options, found.datasets)) is not None:
            step = resumed.facts["step"]
            told = f"at step {step}, from {resumed.folder}"
            told += (
                ": the run is finished, nothing is left to do"
                if resumed.is_finished
                else f"; {plan.total_steps - step} steps are left"
            )
        elif step := initial_step(chosen, steps_per_epoch=plan.order.steps_per_epoch, total_steps=plan.total_steps):
            told = f"at step {step}"
    rows = [("begins", told)]
    with page.checked():
        if prompts := sample_prompts(options, found):
            rows.append(("samples", f"{len(prompts)} prompts"))
    trackers = options[TrackerOptions]
    with page.checked():
        if trackers.log_tracker_config is not None:
            read_tracker_config(trackers.log_tracker_config)
        missing = [name for name in trackers.names if importlib.util.find_spec(name) is None]
        if missing:
            raise OptionError(f"--log_with: {missing[0]} isn't installed; pip install {missing[0]}")
    if trackers.names:
        rows.append(("logs", ", ".join(trackers.names)))
    if upload.huggingface_repo_id:
        rows.append(("uploads", f"to {upload.huggingface_repo_id}"))
    page.rows(rows)


def _output(page: _Page, options: Options, task: Task, plan: Plan) -> None:
    saving = options[SavingOptions]
    assert saving.output_dir is not None
    ema = make_ema(task, dataclasses.replace(options[EmaOptions], ema_device="accelerator"))  # which is meta here
    dtype = Precision.decide("no", saving.save_precision, no_half_vae=True).save
    saver = Saver(
        saving, options[ResumeOptions], task.parts, lambda steps, epoch: {}, dtype, plan.num_epochs, session_id="", is_main=True, ema=ema
    )  # fmt: skip
    folder = str(saving.output_dir) if saving.output_dir.is_dir() else f"{saving.output_dir}, which will be made"
    rows = [("folder", folder), ("saves", saves_in_words(saver, plan))]
    rows.append(("free", size_in_words(free_space(saving.output_dir))))
    page.section("Output", rows)
    with page.checked():
        _see_writable(saving.output_dir, "--output_dir")
        saver.check_space(plan.total_steps)


# -------------------------------------------------------------------------------------------------------------- caches


def _cached(
    page: _Page,
    rows: list[tuple[str, str]],
    what: str,
    samples: Sequence[Sample],
    problem: Callable[[Sample], str | None],
    size: Callable[[Sample], int],
) -> list[Sample]:
    """Add what is told of a cache; returns the samples that it lacks. Args: size: bytes of a sample's entry."""
    found = [(sample, reason) for sample in samples if (reason := problem(sample)) is not None]
    missing = [sample for sample, _ in found]
    reasons = Counter(reason for _, reason in found)
    told = f"{len(samples) - len(missing)} of {len(samples)} are there and valid"
    if missing:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        told += f"; to encode: {counts}; {size_in_words(sum(map(size, missing)))}"
    rows.append((what, told))
    return missing


def _latent_problem(options: Options, found: Preflight, models: SdxlModels) -> Callable[[Sample], str | None]:
    cache = _looked_at(options, found)
    # Without files there is nothing to compare with the model, whose hash takes its time.
    any_file = any(s.latents_file.exists() or s.old_latents_file.exists() for s in all_samples(found.datasets))
    if cache.cache_latents_to_disk and not any_file:
        return lambda sample: "not there"
    return latent_cache(models, cache, found.known).problem


def _text_problem(options: Options, found: Preflight, models: SdxlModels) -> Callable[[Sample], str | None]:
    cache = _looked_at(options, found)
    if cache.cache_text_encoder_outputs_to_disk and not any(s.text_file.exists() for s in all_samples(found.datasets)):
        return lambda sample: "not there"
    return text_cache(
        models, cache, found.known,
        num_tokens=options[ModelOptions].num_tokens, weighted=options[CaptionOptions].weighted_captions,
    ).problem  # fmt: skip


def _looked_at(options: Options, found: Preflight) -> CacheOptions:
    """Without a model, files that are there can't be compared with it."""
    return dataclasses.replace(options[CacheOptions], skip_cache_check=options[CacheOptions].skip_cache_check or bool(found.no_model))  # fmt: skip


def _latent_bytes(sample: Sample) -> int:
    pixels, area = sample.subset.pixels, sample.fit.bucket.area
    latents = LATENT_CHANNELS * area // PIXELS_PER_LATENT**2
    return 4 * (latents * (2 if pixels.flip_aug else 1) + (area if pixels.alpha_mask else 0))


def _text_bytes(options: Options, models: SdxlModels) -> Callable[[Sample], int]:
    texts, tokens = TextPlan(options[CacheOptions].text_cache_variants), options[ModelOptions].num_tokens + 2
    one, two = (token_width(models, f"text_encoder_{number}") for number in (1, 2))
    return lambda sample: 4 * len(texts.of(sample)) * (tokens * (one + two) + two)


def _see_writable(folder: Path, flag: str) -> None:
    """Raises OptionError if the folder, or the nearest one above that exists, can't be written in."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OptionError(f"{flag} {folder}: {nearest} can't be written in")


# --------------------------------------------------------------------------------------------------------- measurement


class Measured(NamedTuple):
    """A step on the largest batch: the most bytes on the device, and seconds."""

    peak: int
    seconds: float


def _measurement(
    page: _Page,
    kind: type[Task],
    options: Options,
    found: Preflight,
    models: SdxlModels,
    plan: Plan,
    buckets: Sequence[Bucket],
    samples: Sequence[Sample],
) -> None:
    if models.device.type != "cuda":
        page.section("Time", [("", "not measured: there is no GPU here")])
        return
    if page.problems:
        page.section("Time", [("", "not measured: the run can't start")])
        return
    largest = max(buckets, key=lambda bucket: bucket.size.area * bucket.largest)
    try:
        measured = measure(kind, options, found, models, largest, samples)
    except torch.OutOfMemoryError as error:
        page.section("Time", [("", f"a batch of {largest.largest} doesn't fit the device: {first_line(error)}")])
        if largest.largest == 1:
            page.problems.append(Mistake(f"a single picture of {largest.size} doesn't fit the device's memory"))
        return
    each = measured.seconds / (largest.size.area * largest.largest)  # of a pixel
    epoch = each * sum(bucket.size.area * bucket.shown for bucket in buckets) / plan.order.processes
    whole = epoch * plan.total_steps / plan.order.steps_per_epoch
    page.section("Time", [
        ("measured", f"{_STEPS} steps on a batch of {largest.largest} at {largest.size}: {measured.seconds:.2f} s a step, {size_in_words(measured.peak)} at the peak"),
        ("expected", f"{_duration(whole)}, without caching, samples, validation and saving"),
    ])  # fmt: skip


def measure(
    kind: type[Task], options: Options, found: Preflight, models: SdxlModels, largest: Bucket, samples: Sequence[Sample]
) -> Measured:
    """Load the model and do some steps on made-up pictures of the largest batch; what is trained is thrown away."""
    device = models.device
    task = kind.from_options(models, options)
    groups = trained_groups(task, _STEPS + 1)
    step = make_step(task, models, options, found)
    update = make_update(step, groups, options, _STEPS + 1, processes=1)
    batch = _made_up(options, models, largest, [s for s in samples if s.fit.bucket == largest.size]).to(device)
    started = 0.0
    for number in range(_STEPS + 1):
        if number == 1:
            _wait(device)
            started = time.monotonic()
        losses = step(batch, Draws(0, 0, 0, len(batch), device))
        update.backward(losses, batch.place)
        update.step(number)
    _wait(device)
    seconds = (time.monotonic() - started) / _STEPS
    return Measured(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, seconds)


def _made_up(options: Options, models: SdxlModels, largest: Bucket, samples: Sequence[Sample]) -> Batch:
    """A batch like the run's largest, of random pictures. Args: samples: of the bucket; their captions are taken."""
    count, (width, height) = largest.largest, largest.size
    cache, tokens = options[CacheOptions], options[ModelOptions].num_tokens + 2
    captions = tuple(samples[i % len(samples)].caption for i in range(count))
    sizes = torch.tensor([(height, width)] * count)
    text = None
    if cache.text:
        one, two = (token_width(models, f"text_encoder_{number}") for number in (1, 2))
        text = EncodedText(torch.randn(count, tokens, one), torch.randn(count, tokens, two), torch.randn(count, two))
    latents = (count, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return Batch(
        place=Place(epoch=0, step=0, micro=0, first=0, window_samples=count, closes_window=True, is_idle=False),
        paths=tuple("made up" for _ in range(count)),
        captions=captions,
        images=None if cache.latents else torch.rand(count, 3, height, width) * 2 - 1,
        latents=torch.randn(latents) if cache.latents else None,
        text=text,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        weights=torch.ones(count),
        attributes=tuple({} for _ in range(count)),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )
