"""What a saved file says of the datasets it was trained on: the reference's keys, as text and JSON.

Source: contract, formats.md section 4.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from library.data.options import CaptionOptions, DatasetOptions, parse_range, parse_resolution
from library.data.sample import Sample, Subset
from library.data.subsets import Dataset
from library.options import Options


def dataset_metadata(
    options: Options, datasets: Sequence[Dataset], *, processes: int, per_process: int
) -> dict[str, Any]:
    """The keys that describe the data.

    Args:
        per_process: micro-batches of an optimizer step on each process.
    """
    data = options[DatasetOptions]
    values: dict[str, Any] = {
        "ss_num_train_images": sum(_count_shown(dataset.samples, is_reg=False) for dataset in datasets),
        "ss_num_reg_images": sum(_count_shown(dataset.samples, is_reg=True) for dataset in datasets),
        "ss_num_validation_images": sum(len(dataset.validation) for dataset in datasets),
        "ss_validation_split": data.validation_split,
        "ss_validation_seed": data.validation_seed,
        "ss_prior_loss_weight": data.prior_loss_weight,
        "ss_face_crop_aug_range": parse_range(data.face_crop_aug_range) if data.face_crop_aug_range else None,
        "ss_resize_interpolation": data.resize_interpolation,
    }
    described: dict[str, Any] = _datasets(datasets) if data.dataset_config else _folders(options, datasets[0])
    if not data.dataset_config:
        described["ss_total_batch_size"] = data.train_batch_size * processes * per_process
    return values | described


def _count_shown(samples: Sequence[Sample], *, is_reg: bool) -> int:
    return sum(sample.repeats for sample in samples if sample.subset.is_reg == is_reg)


def tag_frequency(subset: Subset, dataset: Dataset) -> dict[str, int]:
    """How many of the subset's captions hold each tag."""
    tags: Counter[str] = Counter()
    for sample in dataset.samples:
        if sample.subset is subset:
            tags.update(tag.strip().lower() for tag in sample.tags.split(",") if tag.strip())
    return dict(tags)


def _datasets(datasets: Sequence[Dataset]) -> dict[str, str]:
    frequencies: dict[str, Any] = {}
    folders: dict[str, Any] = {}
    described = []
    for dataset in datasets:
        plan = dataset.plan
        own_frequencies = {}
        for subset in plan.subsets:
            name = _free_name(subset.source.name, frequencies)
            frequencies[name] = own_frequencies[name] = tag_frequency(subset, dataset)
            if not subset.is_reg:
                folders[_free_name(subset.source.name, folders)] = _folder(subset, dataset)
        described.append({
            "is_dreambooth": not any(subset.metadata_file for subset in plan.subsets),
            "batch_size_per_device": plan.batch_size,
            "num_train_images": _count_shown(dataset.samples, is_reg=False),
            "num_reg_images": _count_shown(dataset.samples, is_reg=True),
            "resolution": list(plan.buckets.resolution),
            "enable_bucket": plan.buckets.enabled,
            "min_bucket_reso": plan.buckets.min_side,
            "max_bucket_reso": plan.buckets.max_side,
            "tag_frequency": own_frequencies,
            "bucket_info": bucket_info(dataset),
            "resize_interpolation": None,
            "subsets": [_subset(subset, dataset) for subset in plan.subsets],
        })  # fmt: skip
    return {
        "ss_datasets": json.dumps(described),
        "ss_tag_frequency": json.dumps(frequencies),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _subset(subset: Subset, dataset: Dataset) -> dict[str, Any]:
    captions, pixels = subset.captions, subset.pixels
    described: dict[str, Any] = {
        "img_count": _count(subset, dataset),
        "num_repeats": subset.num_repeats,
        "color_aug": pixels.color_aug,
        "flip_aug": pixels.flip_aug,
        "random_crop": pixels.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator or "",
        "secondary_separator": captions.secondary_separator,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix,
        "caption_suffix": captions.caption_suffix,
        "resize_interpolation": pixels.resize_interpolation,
    }
    if subset.image_dir is not None:
        described["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return described | {"metadata_file": subset.metadata_file.name}
    return described | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def _folder(subset: Subset, dataset: Dataset) -> dict[str, int]:
    return {"n_repeats": subset.num_repeats, "img_count": _count(subset, dataset)}


def _folders(options: Options, dataset: Dataset) -> dict[str, Any]:
    """The keys of a run without --dataset_config: one dataset, its numbers one by one."""
    data, captions = options[DatasetOptions], options[CaptionOptions]
    resolution = parse_resolution(data.resolution or "")
    subsets = dataset.plan.subsets
    return {
        "ss_batch_size_per_device": data.train_batch_size,
        "ss_resolution": tuple(resolution or dataset.plan.buckets.resolution),
        "ss_color_aug": data.color_aug,
        "ss_flip_aug": data.flip_aug,
        "ss_random_crop": data.random_crop,
        "ss_shuffle_caption": captions.shuffle_caption,
        "ss_enable_bucket": data.enable_bucket,
        "ss_bucket_no_upscale": data.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.plan.buckets.min_side,
        "ss_max_bucket_reso": dataset.plan.buckets.max_side,
        "ss_keep_tokens": captions.keep_tokens,
        "ss_dataset_dirs": json.dumps({s.source.name: _folder(s, dataset) for s in subsets if not s.is_reg}),
        "ss_reg_dataset_dirs": json.dumps({s.source.name: _folder(s, dataset) for s in subsets if s.is_reg}),
        "ss_tag_frequency": json.dumps({s.source.name: tag_frequency(s, dataset) for s in subsets}),
        "ss_bucket_info": json.dumps(bucket_info(dataset)),
    }


def bucket_info(dataset: Dataset) -> dict[str, Any] | None:
    """Pictures per bucket, repeats counted, and the mean aspect error of pictures; None where bucketing is off."""
    if not dataset.plan.buckets.enabled:
        return None
    counts: Counter = Counter()
    for sample in dataset.samples:
        counts[sample.fit.bucket] += sample.repeats
    errors = [abs(sample.fit.bucket.aspect - sample.size.aspect) for sample in dataset.samples]
    buckets = {i: {"resolution": list(bucket), "count": counts[bucket]} for i, bucket in enumerate(sorted(counts))}
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def _count(subset: Subset, dataset: Dataset) -> int:
    return sum(sample.subset is subset for sample in dataset.samples)


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free
