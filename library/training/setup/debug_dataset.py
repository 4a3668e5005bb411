"""--debug_dataset: what the model would see, printed and written as a page, without training."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from library.data.augment import Pixels, load_conditioning, load_pixels
from library.data.captions import process_caption
from library.data.samples import Sample
from library.data.scan import Dataset
from library.files import write_atomically
from library.images import ImageError, normalized
from library.models.options import ModelOptions
from library.models.tokenizer import Tokenizer, load_tokenizers
from library.rng import python_rng
from library.training.options.run import RunOptions
from library.training.setup.dataset_page import Shown, Table, dataset_page
from library.training.setup.inputs import RunInputs
from library.training.setup.step_plan import plan_steps, training_samples

IMAGES_ON_PAGE = 300
RANDOM_CAPTIONS = 3  # shown of a caption that differs from step to step


def show_dataset(
    inputs: RunInputs, model: ModelOptions, run: RunOptions, page_file: Path, *, augments: bool
) -> None:
    """Print tables and captions, and write them with thumbnails to a page.

    Args:
        inputs: the datasets, and the model whose tokenizer is used.
        model: the options of the model.
        run: the options of the run's length and seed.
        page_file: where the page is written.
        augments: images are augmented, because latents aren't cached.
    """
    folder = inputs.checkpoint.path if inputs.checkpoint.is_folder else None
    tokenizer, _ = load_tokenizers(model.tokenizer_cache_dir, folder)
    tables = [*map(_bucket_table, inputs.datasets), _steps_table(inputs.datasets, run)]
    for table in tables:
        print(table.as_text(), end="\n\n")
    limit, seed, all_shown = model.num_tokens, run.seed or 0, []
    for i, sample in enumerate(training_samples(inputs.datasets)):
        shown = _show(
            sample, tokenizer, limit, seed, augments=augments, with_pixels=i < IMAGES_ON_PAGE
        )
        all_shown.append(shown)
        print(_format_line(shown))
    summary = _summary(all_shown)
    print(summary)
    if len(all_shown) > IMAGES_ON_PAGE:
        summary += f" The first {IMAGES_ON_PAGE} of {len(all_shown)} images."
    page_file.parent.mkdir(parents=True, exist_ok=True)
    title = f"{page_file.stem}: what the model will see"
    page = dataset_page(title, tables, all_shown[:IMAGES_ON_PAGE], summary)
    write_atomically(page_file, lambda file: file.write(page.encode("utf-8", "replace")))
    print(f"page with thumbnails: {page_file}")


def _bucket_table(dataset: Dataset) -> Table:
    """Return a table of the buckets: their images, how much these are scaled, and how much of them is cropped away."""
    by_bucket: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in dataset.samples:
        by_bucket[sample.fit.bucket].append(sample)
    rows = []
    for bucket, samples in sorted(by_bucket.items()):
        num_samples = sum(sample.repeats for sample in samples)
        scale = sum(sample.fit.resized.width / sample.size.width for sample in samples) / len(
            samples
        )
        lost = sum(map(_lost, samples)) / len(samples)
        num_batches = math.ceil(num_samples / dataset.config.batch_size)
        size = f"{bucket[0]}x{bucket[1]}"
        rows.append(
            (
                size,
                str(len(samples)),
                str(num_samples),
                str(num_batches),
                f"{scale:.2f}",
                f"{lost:.1%}",
            )
        )
    columns = ("bucket", "images", "with repeats", "batches", "mean scale", "mean crop loss")
    plan = dataset.config
    title = f"Dataset at {plan.buckets.resolution}, batches of {plan.batch_size}"
    if dataset.validation:
        title += f"; {len(dataset.validation)} images held out"
    return Table(title, columns, rows)


def _lost(sample: Sample) -> float:
    return 1 - sample.fit.bucket.area / sample.fit.resized.area


def _steps_table(datasets: Sequence[Dataset], run: RunOptions) -> Table:
    """Return a table that derives the number of steps from images and repeats."""
    samples = training_samples(datasets)
    order, total_steps, num_epochs = plan_steps(run, datasets, world_size=1, seed=0)
    subsets = {id(sample.subset): sample.subset for sample in samples}
    rows = []
    for subset in subsets.values():
        repeats = [sample.repeats for sample in samples if sample.subset is subset]
        kind = "regularization" if subset.is_reg else "training"
        total = sum(repeats)
        rows.append(
            (str(subset.source), kind, str(len(repeats)), f"{total / len(repeats):g}", str(total))
        )
    title = (
        f"{order.batches_per_epoch} batches / {run.gradient_accumulation_steps} accumulated = {order.steps_per_epoch} steps "
        f"an epoch on one process; {total_steps} steps in all, {num_epochs} epochs"
    )
    return Table(title, ("images from", "kind", "images", "x repeats", "= an epoch"), rows)


def _show(
    sample: Sample,
    tokenizer: Tokenizer,
    limit: int,
    seed: int,
    *,
    augments: bool,
    with_pixels: bool,
) -> Shown:
    """Return an image as the model will see it. Reads the image file only if pixels are wanted."""
    captions = _captions(sample, seed)
    ids = max((tokenizer.ids(caption) for caption in captions), key=len)
    pixels, mask, condition, note = None, None, None, ""
    if with_pixels:
        try:
            loaded = load_pixels(
                sample, python_rng(seed, "debug", sample.file) if augments else None
            )
            pixels, mask = loaded.rgb, _mask(sample, loaded)
            if sample.conditioning is not None and not sample.subset.conditioning_is_mask:
                condition = load_conditioning(sample, flipped=False)
        except (OSError, ImageError) as error:
            note = f"can't be read: {error}"
    return Shown(
        file=sample.file,
        size=sample.size,
        bucket=sample.fit.bucket,
        lost=_lost(sample),
        repeats=sample.repeats,
        captions=captions,
        tokens=len(ids),
        limit=limit,
        cut=tokenizer.text(ids[limit:]) if len(ids) > limit else "",
        pixels=pixels,
        mask=mask,
        condition=condition,
        note=note,
    )


def _captions(sample: Sample, seed: int) -> list[str]:
    """Return the processed caption; a few different ones where it is random."""
    settings = sample.subset.captions
    captions: dict[str, None] = {}
    for i in range(RANDOM_CAPTIONS if settings.random_settings() else 1):
        rng = python_rng(seed, "debug", sample.file, i)
        captions[
            process_caption(sample.caption, settings, rng, epoch=1, step=0, max_train_steps=1)
        ] = None
    return list(captions)


def _mask(sample: Sample, loaded: Pixels) -> np.ndarray | None:
    if sample.conditioning is not None and sample.subset.conditioning_is_mask:
        return normalized(load_conditioning(sample, flipped=False))[0] / 2 + 0.5
    return loaded.alpha


def _format_line(shown: Shown) -> str:
    captions = " | ".join(repr(caption) for caption in shown.captions)
    mask = "" if shown.mask is None else f", mask {shown.mask.mean():.0%}"
    line = f"{shown.file}: {shown.size} -> {shown.bucket}, {shown.tokens} tokens{mask}: {captions}"
    if shown.cut:
        line += f"; LEFT OUT: {shown.cut!r}"
    if shown.note:
        line += f"; {shown.note}"
    return line


def _summary(all_shown: Sequence[Shown]) -> str:
    """Return counts of captions that are empty or too long, and of masks."""
    num_empty, num_cut, masks = 0, 0, []
    for shown in all_shown:
        if not any(shown.captions):
            num_empty += 1
        if shown.cut:
            num_cut += 1
        if shown.mask is not None:
            masks.append(float(shown.mask.mean()))
    text = f"{len(all_shown)} images; {num_empty} without a caption; {num_cut} with a caption that is cut off"
    if masks:
        text += f"; {len(masks)} masks, covering {np.mean(masks):.0%} on average"
    return f"{text}."
