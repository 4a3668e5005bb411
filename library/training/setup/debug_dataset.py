"""--debug_dataset: what the model would see, printed and written as a page, without training."""

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
DRAWN_CAPTIONS = 3  # shown of a caption that is drawn anew for every sample


def show_dataset(inputs: RunInputs, model: ModelOptions, run: RunOptions, page_file: Path, *, augments: bool) -> None:
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
    samples = training_samples(inputs.datasets)
    shown = []
    for i, sample in enumerate(samples):
        with_pixels = i < IMAGES_ON_PAGE
        shown.append(
            _shown(sample, tokenizer, model.num_tokens, run.seed or 0, augments=augments, with_pixels=with_pixels)
        )
    for one in shown:
        print(_in_a_line(one))
    print(_summary(shown))
    page_file.parent.mkdir(parents=True, exist_ok=True)
    note = f"The first {IMAGES_ON_PAGE} of {len(shown)} pictures." if len(shown) > IMAGES_ON_PAGE else ""
    page = dataset_page(
        f"{page_file.stem}: what the model will see", tables, shown[:IMAGES_ON_PAGE], f"{_summary(shown)} {note}"
    )
    write_atomically(page_file, lambda file: file.write(page.encode("utf-8", "replace")))
    print(f"page with thumbnails: {page_file}")


def _bucket_table(dataset: Dataset) -> Table:
    """Each bucket: its pictures, how much they are scaled, how much of them is cropped away."""
    by_bucket: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in dataset.samples:
        by_bucket[sample.fit.bucket].append(sample)
    rows = []
    for bucket, samples in sorted(by_bucket.items()):
        repeated = sum(sample.repeats for sample in samples)
        scale = sum(sample.fit.resized.width / sample.size.width for sample in samples) / len(samples)
        lost = sum(map(_lost, samples)) / len(samples)
        batches = -(-repeated // dataset.plan.batch_size)
        rows.append(
            (f"{bucket[0]}x{bucket[1]}", str(len(samples)), str(repeated), str(batches), f"{scale:.2f}", f"{lost:.1%}")
        )
    columns = ("bucket", "pictures", "with repeats", "batches", "mean scale", "mean crop loss")
    plan = dataset.plan
    title = f"Dataset at {plan.buckets.resolution}, batches of {plan.batch_size}"
    held_out = f"; {len(dataset.validation)} pictures held out" if dataset.validation else ""
    return Table(title + held_out, columns, rows)


def _lost(sample: Sample) -> float:
    return 1 - sample.fit.bucket.area / sample.fit.resized.area


def _steps_table(datasets: Sequence[Dataset], run: RunOptions) -> Table:
    """From pictures and repeats to steps."""
    samples = training_samples(datasets)
    order, total_steps, num_epochs = plan_steps(run, datasets, world_size=1, seed=0)
    subsets = {id(sample.subset): sample.subset for sample in samples}
    rows = []
    for subset in subsets.values():
        own = [sample for sample in samples if sample.subset is subset]
        shown = sum(sample.repeats for sample in own)
        kind = "regularisation" if subset.is_reg else "training"
        rows.append((str(subset.source), kind, str(len(own)), f"{shown / len(own):g}", str(shown)))
    title = (
        f"{order.batches_per_epoch} batches / {run.gradient_accumulation_steps} accumulated = {order.steps_per_epoch} steps "
        f"an epoch on one process; {total_steps} steps in all, {num_epochs} epochs"
    )
    return Table(title, ("pictures from", "kind", "pictures", "x repeats", "= an epoch"), rows)


def _shown(sample: Sample, tokenizer: Tokenizer, limit: int, seed: int, *, augments: bool, with_pixels: bool) -> Shown:
    captions = _captions(sample, seed)
    ids = max((tokenizer.ids(caption) for caption in captions), key=len)
    pixels, mask, condition, note = None, None, None, ""
    if with_pixels:
        try:
            loaded = load_pixels(sample, python_rng(seed, "debug", sample.file) if augments else None)
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
    """The processed caption; a few different ones where it is drawn."""
    settings = sample.subset.captions
    drawn = [
        process_caption(sample.caption, settings, python_rng(seed, "debug", sample.file, i), epoch=1, step=0, max_train_steps=1)
        for i in range(DRAWN_CAPTIONS if settings.random_parts() else 1)
    ]  # fmt: skip
    return list(dict.fromkeys(drawn))


def _mask(sample: Sample, loaded: Pixels) -> np.ndarray | None:
    if sample.conditioning is not None and sample.subset.conditioning_is_mask:
        return normalized(load_conditioning(sample, flipped=False))[0] / 2 + 0.5
    return loaded.alpha


def _in_a_line(one: Shown) -> str:
    captions = " | ".join(repr(caption) for caption in one.captions)
    cut = f"; LEFT OUT: {one.cut!r}" if one.cut else ""
    mask = "" if one.mask is None else f", mask {one.mask.mean():.0%}"
    note = f"; {one.note}" if one.note else ""
    return f"{one.file}: {one.size} -> {one.bucket}, {one.tokens} tokens{mask}: {captions}{cut}{note}"


def _summary(shown: Sequence[Shown]) -> str:
    """Counts of what users look for: captions that are empty or too long, masks."""
    empty = sum(not any(one.captions) for one in shown)
    cut = sum(bool(one.cut) for one in shown)
    masks = [float(one.mask.mean()) for one in shown if one.mask is not None]
    told = f"{len(shown)} pictures; {empty} without a caption; {cut} with a caption that is cut off"
    return f"{told}; {len(masks)} masks, covering {np.mean(masks):.0%} on average." if masks else f"{told}."
