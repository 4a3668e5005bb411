"""--dry_run: one page about what a run would do. Everything is checked, nothing is written, and no weight is loaded.

On a CUDA device, if the model is there, a few steps on the largest batch are measured too.
"""

import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from library.data.options import CacheOptions
from library.errors import Mistake, MistakeCollector, OptionError, first_line
from library.files import format_bytes, free_space
from library.training.monitoring.preview import read_prompts
from library.training.monitoring.trackers import read_tracker_config
from library.training.options.optimizer import OptimizerOptions, ScheduleOptions
from library.training.options.output import (
    PreviewOptions,
    ResumeOptions,
    TrackerOptions,
    UploadOptions,
)
from library.training.progress import Progress
from library.training.setup.cache_report import Rows, report_images
from library.training.setup.measure import Measurement, measure
from library.training.setup.memory_estimate import dtype_of, frozen_components
from library.training.setup.plan import RunPlan
from library.training.setup.step_plan import Bucket, all_samples, format_buckets, largest_of

_WIDTH, _LABEL = 100, 16
_MOST_BUCKETS = 40


def dry_run(plan: RunPlan, accelerator: Accelerator) -> None:
    """Print the page. Of several processes the first one does.

    Args:
        plan: the plan of the run.
        accelerator: this process.

    Raises:
        OptionError: something keeps the run from starting; raised after the page, with everything that does.
    """
    if not accelerator.is_main_process:
        return
    inputs, collector = plan.inputs, MistakeCollector(raises=False)
    collector.mistakes += [*inputs.model_mistakes, *plan.mistakes]
    images = report_images(plan, collector)
    plan = plan.for_datasets(images.datasets)
    collector.mistakes += inputs.resume_mistakes
    page = Page()
    page.add("Model", _model_rows(plan))
    page.add("Images", images.images)
    page.add(
        "Caches", images.caches or [("", "none: images and captions are encoded in every step")]
    )
    page.add("Buckets", [("", line) for line in format_buckets(plan.buckets, most=_MOST_BUCKETS)])
    page.add("Plan", [("", line) for line in plan.describe()])
    page.add("Run", _run_rows(plan, collector))
    if plan.task is not None:
        page.add("Output", _output_rows(plan, collector))
    page.add("Time", time_rows(plan, collector, lambda: measure(plan, accelerator)))
    page.print(collector.mistakes)
    if collector.mistakes:
        raise OptionError(*collector.mistakes)


class Page:
    """Sections of lines."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, title: str, rows: Rows) -> None:
        """Add a section: a heading, and rows that are wrapped where they are too long.

        Args:
            title: the heading.
            rows: (label, text); a row without a label is a line.
        """
        if self._lines:
            self._lines.append("")
        self._lines.append(title)
        for label, text in rows:
            indent = _LABEL if label else 0
            lines = textwrap.wrap(
                text, _WIDTH - 2 - indent, break_long_words=False, break_on_hyphens=False
            )
            for i, line in enumerate(lines):
                prefix = label if i == 0 else ""
                self._lines.append(f"  {prefix:{indent}}{line}")

    def print(self, mistakes: list[Mistake]) -> None:
        """Print the page, and how many mistakes there are."""
        end = "Nothing keeps the run from starting."
        if mistakes:
            end = f"Errors that keep the run from starting: {len(mistakes)}"
        text = "\n".join([*self._lines, "", end])
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _model_rows(plan: RunPlan) -> Rows:
    inputs, models = plan.inputs, plan.models
    checkpoint = inputs.checkpoint
    if inputs.model_mistakes:
        reasons = "; ".join(mistake.text for mistake in inputs.model_mistakes)
        rows = [("model", f"NOT THERE: {reasons}"), ("", "What follows is computed for SDXL base.")]
    else:
        kind = "Diffusers folder" if checkpoint.is_folder else "single file"
        rows = [("model", f"{checkpoint.path.name}: {checkpoint.unet.family}, {kind}")]
    prediction = "velocity" if inputs.v_prediction else "noise"
    schedule = ", on a schedule with zero terminal SNR" if inputs.zero_terminal_snr else ""
    rows.append(("predicts", f"{prediction}{schedule}"))
    if plan.task is None:
        return rows
    are_masked = all(sample.has_mask for sample in all_samples(inputs.datasets))
    cache = plan.options[CacheOptions]
    in_steps = dict(frozen_components(plan.task, models, cache, are_masked=are_masked))
    for component, numel in frozen_components(plan.task, models, CacheOptions(), are_masked=False):
        dtype = str(dtype_of(component, models)).removeprefix("torch.")
        when = "in every step" if component in in_steps else "for the caches alone"
        rows.append((component, f"{numel:13,} frozen parameters, {dtype}, {when}"))
    return rows


def _run_rows(plan: RunPlan, collector: MistakeCollector) -> Rows:
    """Return how the run trains, where it begins, and what it generates and sends."""
    options = plan.options
    optimizing, schedule = options[OptimizerOptions], options[ScheduleOptions]
    upload, tracking, states = (
        options[UploadOptions],
        options[TrackerOptions],
        options[ResumeOptions],
    )
    warmup = f", warm-up {schedule.lr_warmup_steps:g}" if schedule.lr_warmup_steps else ""
    rows = [
        ("optimizer", " ".join([optimizing.name, *(optimizing.optimizer_args or ())])),
        ("schedule", f"{schedule.lr_scheduler_type or schedule.lr_scheduler}{warmup}"),
    ]
    begins = _first_step(plan)
    if begins is not None:
        rows.append(("begins", begins))
    with collector.collected():
        size = plan.datasets[0].config.buckets.resolution
        takes_conditions = plan.kind.conditioning_kind == "conditions"
        prompts = read_prompts(options[PreviewOptions], size, takes_conditions=takes_conditions)
        if prompts:
            rows.append(("samples", f"{len(prompts)} prompts"))
    with collector.collected():
        _check_trackers(tracking)
    if tracking.names:
        rows.append(("logs", ", ".join(tracking.names)))
    if upload.huggingface_repo_id:
        sends_states = states.saves_states and upload.save_state_to_huggingface
        rows.append(
            ("uploads", f"to {upload.huggingface_repo_id}{', states too' if sends_states else ''}")
        )
    return rows


def _check_trackers(options: TrackerOptions) -> None:
    """Raise OptionError if a tracker isn't installed or its configuration can't be read."""
    if options.log_tracker_config is not None:
        read_tracker_config(options.log_tracker_config)
    for name in options.names:
        if importlib.util.find_spec(name) is None:
            raise OptionError(f"--log_with: {name} isn't installed; pip install {name}")


def _first_step(plan: RunPlan) -> str | None:
    """Return where the run begins; None if a mistake keeps it from beginning."""
    states, resume = plan.options[ResumeOptions], plan.inputs.resume
    if plan.inputs.resume_mistakes:
        return None
    if states.resume and plan.options[UploadOptions].resume_from_huggingface:
        return f"at the state {states.resume} on the hub, which isn't downloaded for this page"
    if resume is not None and resume.is_finished:
        return f"not at all: {resume.folder} is the state of a finished run"
    if resume is not None:
        step = resume.metadata.step
        return (
            f"at step {step}, from {resume.folder}; {plan.steps.total_steps - step} steps are left"
        )
    with suppress(OptionError):  # which the plan has among its mistakes
        return f"at step {plan.first_step}"
    return None


def _output_rows(plan: RunPlan, collector: MistakeCollector) -> Rows:
    folder, resume, done = plan.saves.folder, plan.inputs.resume, Progress()
    if resume is not None:
        done = Progress(resume.metadata.epoch, resume.metadata.step)
    with collector.collected():
        _check_writable(folder)
        plan.saves.check_space(plan.steps.total_steps, done)
    made = "" if folder.is_dir() else ", which will be made"
    return [("folder", f"{folder}{made}"), ("free", format_bytes(free_space(folder)))]


def _check_writable(folder: Path) -> None:
    """Raise OptionError if the folder, or the nearest one above that exists, can't be written in."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OptionError(f"--output_dir {folder}: {nearest} can't be written in")


def time_rows(
    plan: RunPlan, collector: MistakeCollector, measured: Callable[[], Measurement]
) -> Rows:
    """Return the measured time and memory of a step, and the expected time of the run.

    Args:
        plan: the plan of the run.
        collector: what keeps the run from starting.
        measured: measures steps on the largest batch.
    """
    if plan.models.device.type != "cuda":
        return [("", "not measured: there is no GPU")]
    if collector.mistakes:
        return [("", "not measured: the run can't start")]
    largest = largest_of(plan.buckets)
    try:
        measurement = measured()
    except torch.OutOfMemoryError as error:
        if largest.largest == 1:
            collector.mistakes.append(
                Mistake(f"a single image of {largest.size} doesn't fit the GPU's memory")
            )
        return [
            (
                "",
                f"a batch of {largest.largest} at {largest.size} doesn't fit the GPU: {first_line(error)}",
            )
        ]
    batch = f"batches of {largest.largest} at {largest.size}"
    peak, seconds = format_bytes(measurement.peak), measurement.seconds
    order, total_steps = plan.steps.order, plan.steps.total_steps
    expected = expected_seconds(
        seconds, plan.buckets, order.world_size, total_steps / order.steps_per_epoch
    )
    return [
        ("measured", f"{batch}: {seconds:.2f} s each, {peak} at the peak"),
        (
            "expected",
            f"{format_duration(expected)}, without caching, samples, validation and saving",
        ),
    ]


def expected_seconds(
    seconds: float, buckets: list[Bucket], world_size: int, epochs: float
) -> float:
    """Return the expected time of a run, whose steps take time by their pixels.

    Args:
        seconds: the time of a step on the largest batch.
        buckets: the buckets of all images.
        world_size: the number of processes.
        epochs: epochs of the run.
    """
    largest = largest_of(buckets)
    pixels = sum(bucket.size.area * bucket.num_samples for bucket in buckets)
    return seconds * pixels / (largest.size.area * largest.largest) / world_size * epochs


def format_duration(seconds: float) -> str:
    """Return a duration for people: "2 h 5 min"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
