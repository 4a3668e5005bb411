"""StepPlan: the optimizer steps of a run, and the buckets of its images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from library.data.batch_sampler import BatchSampler
from library.data.loader import group_samples
from library.data.samples import Sample
from library.data.scan import Dataset
from library.errors import Mistake, OptionError
from library.param_group import ParamGroup
from library.size import Size
from library.training.options.run import RunOptions


class StepPlan(NamedTuple):
    """The order of batches, and how many steps and epochs there are."""

    order: BatchSampler
    total_steps: int
    num_epochs: int


class Bucket(NamedTuple):
    """Images that share batches.

    Attributes:
        size: the size of the images in pixels.
        num_images: image files.
        num_samples: images of an epoch, repeats included.
        batch_size: the most images of a batch.
        are_masked: all images have masks.
    """

    size: Size
    num_images: int
    num_samples: int
    batch_size: int
    are_masked: bool = False

    @property
    def largest(self) -> int:
        """Images of its largest batch."""
        return min(self.num_samples, self.batch_size)


def plan_steps(
    options: RunOptions, datasets: Sequence[Dataset], *, world_size: int, seed: int
) -> StepPlan:
    """Return the steps of a run on these datasets.

    Args:
        options: the run's length, and its gradient accumulation.
        datasets: the datasets.
        world_size: the number of processes.
        seed: seed of the order of batches.
    """
    groups = group_samples(datasets, training_samples(datasets))
    order = BatchSampler(groups, seed, world_size, options.gradient_accumulation_steps)
    total = options.max_train_steps
    if options.max_train_epochs:
        total = options.max_train_epochs * order.steps_per_epoch
    return StepPlan(order, total, math.ceil(total / order.steps_per_epoch))


def training_samples(datasets: Sequence[Dataset]) -> list[Sample]:
    """Return the samples that are trained on."""
    return [sample for dataset in datasets for sample in dataset.samples]


def all_samples(datasets: Sequence[Dataset]) -> list[Sample]:
    """Return the samples that are trained on, and those that are held out for validation."""
    return [sample for dataset in datasets for sample in (*dataset.samples, *dataset.validation)]


def buckets_of(order: BatchSampler, datasets: Sequence[Dataset]) -> list[Bucket]:
    """Return the buckets of all datasets. Buckets of one size in two datasets share no batch, so both are returned."""
    samples = training_samples(datasets)
    buckets = []
    for indices, batch_size in order.groups:
        members = [samples[i] for i in indices]
        are_masked = all(sample.has_mask for sample in members)
        bucket_size = members[0].fit.bucket
        buckets.append(
            Bucket(bucket_size, len(set(indices)), len(indices), batch_size, are_masked=are_masked)
        )
    return buckets


def largest_of(buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket of the batch with the most pixels."""
    return max(buckets, key=lambda bucket: bucket.size.area * bucket.largest)


def check_trains_to_the_end(groups: Sequence[ParamGroup], total_steps: int) -> None:
    """Raise OptionError if everything that is trained stops before the run ends."""
    last_steps = [total_steps if group.last_step is None else group.last_step for group in groups]
    last = max(last_steps, default=total_steps)
    if last >= total_steps:
        return
    names = []
    if any(group.is_of_text_encoders for group in groups):
        names.append("stop_text_encoder_training")
    if any(group.component == "token" for group in groups):
        names.append("ti_stop_ratio")
    flags = " and ".join(f"--{name}" for name in names)
    raise OptionError(
        Mistake(
            f"{flags}: nothing is left to train after step {last} of {total_steps}; leave it out, or train something else too",
            tuple(names),
        )
    )


def format_steps(plan: StepPlan, datasets: Sequence[Dataset]) -> list[str]:
    """Return two lines that derive the number of steps from the number of images."""
    order = plan.order
    num_samples = sum(dataset.num_samples for dataset in datasets)
    per_step = f"({order.world_size} processes x {order.accumulation_steps} accumulated)"
    return [
        f"{len(training_samples(datasets))} images, {num_samples} with repeats, in {len(order.groups)} buckets",
        f"{order.batches_per_epoch} batches / {per_step} = {order.steps_per_epoch} steps an epoch; "
        f"{plan.total_steps} steps in all, {plan.num_epochs} epochs",
    ]


def format_buckets(buckets: Sequence[Bucket], *, most: int) -> list[str]:
    """Return a table of the buckets, those with the most images first.

    Args:
        buckets: the buckets.
        most: the most rows.
    """
    shown = sorted(buckets, key=lambda bucket: -bucket.num_samples)[:most]
    lines = [f"{'bucket':>9}    images  with repeats  batches  of at most"]
    for size, num_images, num_samples, batch_size, _ in shown:
        num_batches = math.ceil(num_samples / batch_size)
        lines.append(
            f"{size!s:>9}  {num_images:8,}  {num_samples:12,}  {num_batches:7,}  {batch_size:10,}"
        )
    if len(buckets) > len(shown):
        lines.append(f"and {len(buckets) - len(shown)} more")
    return lines
