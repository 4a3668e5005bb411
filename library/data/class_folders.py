"""Datasets without a file: --train_data_dir and --reg_data_dir with their N_class folders, or --in_json, as its tables."""

import os
import re
from pathlib import Path
from typing import Any

from library.data.options import DatasetOptions
from library.errors import Mistake, OptionError


def implied_tables(options: DatasetOptions) -> tuple[dict[str, Any], list[str]]:
    """The dataset file that the command line stands for, and what the user should know of it."""
    if options.in_json is not None:
        subset: dict[str, Any] = {"metadata_file": str(options.in_json)}
        if options.train_data_dir is not None:
            subset["image_dir"] = str(options.train_data_dir)
        notices = [] if options.reg_data_dir is None else ["--reg_data_dir is not used with --in_json"]
        return {"datasets": [{"subsets": [_marked(subset, options)]}]}, notices
    if options.train_data_dir is None:
        raise OptionError(
            Mistake(
                "no dataset: give --dataset_config, or --train_data_dir with its N_class folders, or --in_json",
                ("train_data_dir", "dataset_config", "in_json"),
            )
        )
    subsets, notices = [], []
    for name, parent in (("train_data_dir", options.train_data_dir), ("reg_data_dir", options.reg_data_dir)):
        if parent is None:
            continue
        found, told = class_folders(parent, f"--{name}")
        notices += told
        for folder, repeats, tokens in found:
            own: dict[str, Any] = {"image_dir": str(folder), "num_repeats": repeats, "is_reg": name == "reg_data_dir"}
            if tokens is not None:
                own["class_tokens"] = tokens
            subsets.append(_marked(own, options))
    return {"datasets": [{"subsets": subsets}]}, notices


def _marked(subset: dict[str, Any], options: DatasetOptions) -> dict[str, Any]:
    """The mask settings that the file knows for subsets alone."""
    if options.alpha_mask:
        subset["alpha_mask"] = True
    if options.conditioning_data_dir is not None and not subset.get("is_reg"):
        subset["conditioning_data_dir"] = str(options.conditioning_data_dir)
    return subset


def class_folders(parent: Path, option: str) -> tuple[list[tuple[Path, int, str | None]], list[str]]:
    """The N_class folders of `parent`: (folder, repeats, class), and what the user should know of the others.

    A parent without any, but with pictures of its own, is taken itself, with repeats 1 and no class.
    """
    if not parent.is_dir():
        raise OptionError(
            Mistake(
                f"{option} {parent}: {'is a file; a folder is needed' if parent.exists() else 'no such folder'}",
                (option.removeprefix("--"),),
            )
        )
    found: list[tuple[Path, int, str | None]] = []
    other = []
    with os.scandir(parent) as entries:  # there may be a million of them
        folders, files = [], False
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            else:
                files = True
    for name in sorted(folders):
        match = re.fullmatch(r"(-?\d+)(?:_(.*))?", name)
        if match:
            found.append((parent / name, int(match[1]), match[2] or ""))
        else:
            other.append(name)
    if other and found:
        return found, [f"{option} {parent}: not named N_class, so not used: {', '.join(other)}"]
    if not found and files:
        return [(parent, 1, None)], [
            f"{option} {parent}: has no N_class folders; its own pictures are used, once each an epoch"
        ]
    if not found:
        there = ", ".join(other) or "nothing"
        raise OptionError(
            f"{option} {parent}: expected folders named N_class (say 10_cat: shown ten times an epoch) with pictures; found {there}"
        )
    return found, []
