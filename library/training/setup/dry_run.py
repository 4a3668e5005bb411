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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from library.data.batch import Batch
from library.data.batch_sampler import BatchPosition
from library.data.cache.fill import audit
from library.data.cache.latents import LATENT_CHANNELS, CaptionVariants
from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.data.samples import Sample
from library.data.scan import Dataset
from library.device import Precision
from library.errors import Mistake, OptionError, RunError, first_line
from library.files import free_space
from library.log import is_main_process, silence_logging
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText
from library.models.vae import PIXELS_PER_LATENT
from library.options import Options
from library.rng import SampleRng
from library.training.distributed.launch import start_processes
from library.training.monitoring.trackers import read_tracker_config
from library.training.optim.build import build_optimizer_step
from library.training.options.memory import MemoryOptions
from library.training.options.optimizer import EmaOptions, OptimizerOptions, ScheduleOptions
from library.training.options.output import ResumeOptions, SavingOptions, TrackerOptions, UploadOptions
from library.training.options.run import RunOptions, ValidationOptions
from library.training.progress import Progress
from library.training.saving.resume import find_resume_point, initial_step
from library.training.saving.saver import Saver, format_bytes
from library.training.setup.build import (
    build_ema,
    build_loss_module,
    build_on_meta,
    build_task,
    fit_memory,
    open_models,
)
from library.training.setup.build_run import sample_prompts
from library.training.setup.caches import all_samples, latent_cache, text_cache, token_width, without_bad
from library.training.setup.inputs import RunInputs
from library.training.setup.memory_estimate import in_words
from library.training.setup.plan import (
    Bucket,
    Plan,
    buckets_of,
    check_lasting,
    dtype_of,
    encodes_images,
    estimate_memory,
    format_groups,
    format_memory,
    format_saves,
    format_steps,
    frozen_parts,
    largest_of,
    make_plan,
    optimizer_in_state,
    samples_of,
)
from library.training.tasks.base import Task

_WIDTH, _LABEL = 100, 16
_MOST_BUCKETS = 40
_STEPS = 3  # measured, behind one that isn't: it makes the optimizer's state

Rows = list[tuple[str, str]]
"""(label, text); without a label, a line of a table"""

Problem = Callable[[Sample], str | None]
"""Why a cache holds nothing valid for a sample; None if it does"""


def dry_run(kind: type[Task], options: Options, found: RunInputs) -> None:
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
        steps = make_plan(options[RunOptions], found.datasets, processes=accelerator.num_processes, seed=0).total_steps
        task = build_on_meta(kind, models, options, found, steps)
    looked = _look_at_images(page, options, found, models)
    plan = make_plan(
        options[RunOptions], looked.datasets, processes=accelerator.num_processes, seed=options[RunOptions].seed or 0
    )
    buckets = buckets_of(plan, looked.datasets)
    groups = [] if task is None else task.param_groups()
    with page.checked():
        check_lasting(groups, plan.total_steps)
    if options[MemoryOptions].memory_plan is not None:
        with page.checked():
            options = fit_memory(task, models, options, looked.datasets, accelerator.num_processes)
            models = open_models(kind, options, found, accelerator.device)

    page.section("Model", _model(options, found, models, task))
    trained = format_groups(groups) if groups else ["can't be told before the weights are loaded"]
    page.section("Trained", [*(("", line) for line in trained), *_optimizer(options)])
    page.section("Pictures", looked.images)
    page.section("Caches", looked.caches or [("", "none: pictures and captions are encoded in every step")])
    page.section("Steps", [*_steps(looked.datasets, plan, buckets), *_beginning(page, options, found, plan)])
    if task is not None:
        page.section("Output", _output(page, options, found, task, plan))
        memory = format_memory(estimate_memory(task, models, groups, buckets, options))
        planned = [("plan", in_words(options[MemoryOptions]))] if options[MemoryOptions].memory_plan else []
        page.section("Memory", [*planned, ("estimated", memory.partition(": ")[2])])
    samples = samples_of(looked.datasets)
    page.section("Time", _time(page, plan, buckets, models.device, lambda: measure(kind, options, found, models, buckets, samples)))  # fmt: skip
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

    def section(self, title: str, rows: Rows) -> None:
        """A heading and its rows, broken where they are too long."""
        self.lines += ["", title] if self.lines else [title]
        for label, text in rows:
            width = _WIDTH - 2 - (_LABEL if label else 0)
            lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) if label else [text]
            for number, line in enumerate(lines):
                shown = f"{'' if number else label:{_LABEL}}" if label else ""
                self.lines.append(f"  {shown}{line}")

    def print(self) -> None:
        count = len(self.problems)
        end = f"Errors that keep the run from starting: {count}" if count else "Nothing keeps the run from starting."
        coding = sys.stdout.encoding or "utf-8"
        print("\n".join([*self.lines, "", end]).encode(coding, "replace").decode(coding), flush=True)


# ------------------------------------------------------------------------------------------------------------ sections


def _model(options: Options, found: RunInputs, models: SdxlModels, task: Task | None) -> Rows:
    checkpoint = found.checkpoint
    if found.no_model:
        told = "; ".join(mistake.text for mistake in found.no_model)
        rows = [("model", f"NOT THERE: {told}"), ("", "What follows is computed for SDXL base.")]
    else:
        kind = "Diffusers folder" if checkpoint.is_folder else "single file"
        rows = [("model", f"{checkpoint.path.name}: {checkpoint.unet.family}, {kind}")]
    zero = ", on a schedule with zero terminal SNR" if found.zero_terminal_snr else ""
    rows.append(("predicts", f"{'velocity' if found.v_prediction else 'noise'}{zero}"))
    if task is None:
        return rows
    are_masked = all(sample.has_mask for sample in all_samples(found.datasets))
    in_steps = {part for part, _ in frozen_parts(task, models, options[CacheOptions], are_masked=are_masked)}
    for part, numbers in frozen_parts(task, models, CacheOptions(), are_masked=False):
        dtype = dtype_of(part, models)
        when = "in every step" if part in in_steps else "for the caches alone"
        rows.append((part, f"{numbers:13,} frozen numbers, {str(dtype).removeprefix('torch.')}, {when}"))
    return rows


def _optimizer(options: Options) -> Rows:
    optimizing, schedule = options[OptimizerOptions], options[ScheduleOptions]
    warmup = f", warm-up {schedule.lr_warmup_steps:g}" if schedule.lr_warmup_steps else ""
    return [
        ("optimizer", " ".join([optimizing.name, *(optimizing.optimizer_args or ())])),
        ("schedule", f"{schedule.lr_scheduler_type or schedule.lr_scheduler}{warmup}"),
    ]


class _Looked(NamedTuple):
    """What was seen of pictures and caches: the datasets without what would be left out, and what to tell."""

    datasets: list[Dataset]
    images: Rows
    caches: Rows


def _look_at_images(page: _Page, options: Options, found: RunInputs, models: SdxlModels) -> _Looked:
    """Decode the pictures that no valid cache stands for, and look at every cache file; nothing is made."""
    cache, samples = options[CacheOptions], all_samples(found.datasets)
    datasets, caches, to_decode = list(found.datasets), Rows(), samples
    if cache.latents:
        with page.checked():
            size = _latent_bytes(for_inpainting=models.checkpoint.unet.is_inpainting)
            to_decode = _cached(caches, "latents", samples, _latent_problem(options, found, models), size)
    bad = audit(to_decode, found.known)
    with page.checked():
        datasets = without_bad(datasets, bad, skip=options[DatasetOptions].skip_bad_images)
    if cache.text:
        with page.checked():
            problem, size = _text_problem(options, found, models), _text_bytes(options, models)
            _cached(caches, "text", all_samples(datasets), problem, size)
    empty = sum(not sample.caption for sample in samples)
    sources = dict.fromkeys(str(subset.source) for dataset in found.datasets for subset in dataset.plan.subsets)
    held_out = sum(len(dataset.validation) for dataset in found.datasets)
    rows = [
        ("from", ", ".join(sources)),
        ("pictures", f"{len(samples)}, {held_out} of them held out for validation"),
        ("captions", f"{len(samples) - empty}; {empty} are missing or empty"),
        ("decoded", f"{len({sample.file for sample in to_decode})}; {len(bad)} can't be used"),
    ]
    return _Looked(datasets, rows, caches)


def _steps(datasets: Sequence[Dataset], plan: Plan, buckets: Sequence[Bucket]) -> Rows:
    shown = sorted(buckets, key=lambda bucket: -bucket.shown)[:_MOST_BUCKETS]
    lines = [*format_steps(plan, datasets), f"{'bucket':>9}  pictures  with repeats  batches  of at most"]
    for size, images, repeated, batch_size, _ in shown:
        lines.append(f"{size!s:>9}  {images:8,}  {repeated:12,}  {-(-repeated // batch_size):7,}  {batch_size:10,}")
    lines += [f"and {len(buckets) - len(shown)} more"] if len(buckets) > len(shown) else []
    return [("", line) for line in lines]


def _beginning(page: _Page, options: Options, found: RunInputs, plan: Plan) -> Rows:
    """Where the run begins: at its start, or at a state's step. And what it draws and sends."""
    chosen, upload, trackers = options[ResumeOptions], options[UploadOptions], options[TrackerOptions]
    rows: Rows = []
    with page.checked():
        rows.append(("begins", _first_step(options, found, plan)))
    with page.checked():
        if prompts := sample_prompts(options, found):
            rows.append(("samples", f"{len(prompts)} prompts"))
    with page.checked():
        if trackers.log_tracker_config is not None:
            read_tracker_config(trackers.log_tracker_config)
        for name in trackers.names:
            if importlib.util.find_spec(name) is None:
                raise OptionError(f"--log_with: {name} isn't installed; pip install {name}")
    if trackers.names:
        rows.append(("logs", ", ".join(trackers.names)))
    if upload.huggingface_repo_id:
        rows.append(("uploads", f"to {upload.huggingface_repo_id}{', states too' if chosen.saves_states and upload.save_state_to_huggingface else ''}"))  # fmt: skip
    return rows


def _first_step(options: Options, found: RunInputs, plan: Plan) -> str:
    chosen = options[ResumeOptions]
    if chosen.resume and options[UploadOptions].resume_from_huggingface:
        return f"at the state {chosen.resume} on the hub, which isn't downloaded for this page"
    resumed = find_resume_point(options, found.datasets)
    if resumed is None:
        first = initial_step(chosen, steps_per_epoch=plan.order.steps_per_epoch, total_steps=plan.total_steps)
        return f"at step {first}"
    if resumed.is_finished:
        return f"not at all: {resumed.folder} is the state of a finished run"
    step = resumed.facts["step"]
    return f"at step {step}, from {resumed.folder}; {plan.total_steps - step} steps are left"


def _done(options: Options, found: RunInputs) -> Progress:
    """How far the state is that the run goes on from. What is wrong with it is told where the run begins."""
    if not (options[ResumeOptions].resume and options[UploadOptions].resume_from_huggingface):
        with silence_logging(), suppress(OptionError, RunError):
            if (resumed := find_resume_point(options, found.datasets)) is not None:
                return Progress(resumed.facts["epoch"], resumed.facts["step"])
    return Progress()


def _output(page: _Page, options: Options, found: RunInputs, task: Task, plan: Plan) -> Rows:
    saving = options[SavingOptions]
    assert saving.output_dir is not None
    ema = build_ema(task, dataclasses.replace(options[EmaOptions], ema_device="accelerator"))  # the meta device here
    dtype = Precision.decide("no", saving.save_precision, no_half_vae=True).save
    saver = Saver(
        saving, options[ResumeOptions], task.trainables, lambda steps, epoch: {}, dtype, plan.num_epochs, session_id="", is_main=True, ema=ema,
        keeps_best=options[ValidationOptions].keeps_best, optimizer_bytes=optimizer_in_state(task, options),
    )  # fmt: skip
    with page.checked():
        _see_writable(saving.output_dir)
        saver.check_space(plan.total_steps, _done(options, found))
    made = "" if saving.output_dir.is_dir() else ", which will be made"
    saves, disk = (line.partition(": ")[2] for line in format_saves(saver, plan))
    free = format_bytes(free_space(saving.output_dir))
    return [("folder", f"{saving.output_dir}{made}"), ("saves", saves), ("at once", f"{disk}; {free} are free")]


def _see_writable(folder: Path) -> None:
    """Raises OptionError if the folder, or the nearest one above that exists, can't be written in."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OptionError(f"--output_dir {folder}: {nearest} can't be written in")


# -------------------------------------------------------------------------------------------------------------- caches


def _cached(
    rows: Rows, what: str, samples: Sequence[Sample], problem: Problem, size: Callable[[Sample], int]
) -> list[Sample]:
    """Add what is to be told of a cache; returns the samples that it lacks. Args: size: bytes of a sample's entry."""
    found = [(sample, reason) for sample in samples if (reason := problem(sample)) is not None]
    missing = [sample for sample, _ in found]
    told = f"{len(samples) - len(missing)} of {len(samples)} are there and valid"
    if missing:
        reasons = Counter(reason for _, reason in found).most_common()
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
        told += f"; to encode: {counts}; {format_bytes(sum(map(size, missing)))}"
    rows.append((what, told))
    return missing


def _latent_problem(options: Options, found: RunInputs, models: SdxlModels) -> Problem:
    cache = _looked_at(options, found)
    # Without files there is nothing to compare with the model, whose hash takes its time.
    files = (file for s in all_samples(found.datasets) for file in (s.latents_file, s.old_latents_file))
    if cache.cache_latents_to_disk and not any(file.exists() for file in files):
        return lambda sample: "not there"
    return latent_cache(models, cache, found.known).problem


def _text_problem(options: Options, found: RunInputs, models: SdxlModels) -> Problem:
    cache = _looked_at(options, found)
    if cache.cache_text_encoder_outputs_to_disk and not any(s.text_file.exists() for s in all_samples(found.datasets)):
        return lambda sample: "not there"
    weighted, num_tokens = options[CaptionOptions].weighted_captions, options[ModelOptions].num_tokens
    return text_cache(models, cache, found.known, num_tokens=num_tokens, weighted=weighted).problem


def _looked_at(options: Options, found: RunInputs) -> CacheOptions:
    """Without a model, files that are there can't be compared with it."""
    cache = options[CacheOptions]
    return dataclasses.replace(cache, skip_cache_check=cache.skip_cache_check or bool(found.no_model))


def _latent_bytes(*, for_inpainting: bool) -> Callable[[Sample], int]:
    def of(sample: Sample) -> int:
        pixels, area = sample.subset.pixels, sample.fit.bucket.area
        channels = LATENT_CHANNELS + (1 + LATENT_CHANNELS if for_inpainting and sample.has_mask else 0)
        latents = channels * area // PIXELS_PER_LATENT**2
        return 4 * (latents * (2 if pixels.flip_aug else 1) + (area if pixels.alpha_mask else 0))

    return of


def _text_bytes(options: Options, models: SdxlModels) -> Callable[[Sample], int]:
    texts, tokens = CaptionVariants(options[CacheOptions].text_cache_variants), options[ModelOptions].num_tokens + 2
    one, two = (token_width(models, f"text_encoder_{number}") for number in (1, 2))
    return lambda sample: 4 * len(texts.of(sample)) * (tokens * (one + two) + two)


# --------------------------------------------------------------------------------------------------------- measurement


class Measured(NamedTuple):
    """A step on the largest batch: the most bytes on the device, and seconds."""

    peak: int
    seconds: float


def _time(page: _Page, plan: Plan, buckets: Sequence[Bucket], device: torch.device, measured: Callable[[], Measured]) -> Rows:  # fmt: skip
    if device.type != "cuda":
        return [("", "not measured: there is no GPU")]
    if page.problems:
        return [("", "not measured: the run can't start")]
    largest = largest_of(buckets)
    try:
        peak, seconds = measured()
    except torch.OutOfMemoryError as error:
        if largest.largest == 1:
            page.problems.append(Mistake(f"a single picture of {largest.size} doesn't fit the device's memory"))
        return [("", f"a batch of {largest.largest} at {largest.size} doesn't fit the device: {first_line(error)}")]
    of_pixel = seconds / (largest.size.area * largest.largest)
    epoch = of_pixel * sum(bucket.size.area * bucket.shown for bucket in buckets) / plan.order.processes
    whole = epoch * plan.total_steps / plan.order.steps_per_epoch
    batch = f"batches of {largest.largest} at {largest.size}"
    return [
        ("measured", f"{batch}: {seconds:.2f} s each, {format_bytes(peak)} at the peak"),
        ("expected", f"{_duration(whole)}, without caching, samples, validation and saving"),
    ]


def measure(
    kind: type[Task],
    options: Options,
    found: RunInputs,
    models: SdxlModels,
    buckets: Sequence[Bucket],
    samples: Sequence[Sample],
) -> Measured:
    """Load the model and do some steps on made-up pictures of the largest batch; what is trained is thrown away."""
    device, largest = models.device, largest_of(buckets)
    task = build_task(kind, models, options, found, _STEPS)
    update = build_optimizer_step(
        build_loss_module(task, models, options, found),
        task.param_groups(),
        options,
        _STEPS + 1,
        seed=0,
        processes=1,
    )
    own = [sample for sample in samples if sample.fit.bucket == largest.size]
    batch = made_up(options, models, largest, own).to(device)
    started = 0.0
    for number in range(_STEPS + 1):
        if number == 1:
            _wait(device)
            started = time.monotonic()
        update.backward(update.loss_module(batch, SampleRng(0, 0, 0, len(batch), device)), batch.place)
        update.step()
    _wait(device)
    seconds = (time.monotonic() - started) / _STEPS
    return Measured(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, seconds)


def made_up(options: Options, models: SdxlModels, largest: Bucket, samples: Sequence[Sample]) -> Batch:
    """A batch like the run's largest, of random pictures. Args: samples: of the bucket; their captions are taken; none: empty ones."""
    count, (width, height) = largest.largest, largest.size
    cache, tokens = options[CacheOptions], options[ModelOptions].num_tokens + 2
    sizes = torch.tensor([(height, width)] * count)
    text = None
    if cache.text:
        one, two = (token_width(models, f"text_encoder_{number}") for number in (1, 2))
        text = EncodedText(torch.randn(count, tokens, one), torch.randn(count, tokens, two), torch.randn(count, two))
    cells = (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    is_inpainting = models.checkpoint.unet.is_inpainting
    has_images = encodes_images(models, cache, are_masked=largest.are_masked)
    return Batch(
        place=BatchPosition(
            epoch=0,
            step=0,
            microbatch_index=0,
            first_sample_index=0,
            global_batch_size=count,
            is_last_microbatch=True,
            is_padding=False,
        ),
        paths=("made up",) * count,
        captions=tuple(samples[i % len(samples)].caption if samples else "" for i in range(count)),
        images=torch.rand(count, 3, height, width) * 2 - 1 if has_images else None,
        latents=torch.randn(count, LATENT_CHANNELS, *cells) if cache.latents else None,
        paint=torch.ones(count, height, width) if is_inpainting and has_images else None,
        raw_beside=torch.randn(count, 1 + LATENT_CHANNELS, *cells) if is_inpainting and not has_images else None,
        text=text,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        weights=torch.ones(count),
        aesthetic_scores=torch.full((count,), options[DatasetOptions].aesthetic_score),
        attributes=({},) * count,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
