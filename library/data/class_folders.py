"""Datasets without a dataset file: --train_data_dir, --reg_data_dir and --in_json. Torch-free."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from library.data.dataset_file import DatasetTable, SubsetTable
from library.data.options import DatasetOptions
from library.errors import Mistake, OptionError


def command_line_dataset(
    options: DatasetOptions, *, alpha_mask: bool
) -> tuple[DatasetTable, list[str]]:
    """Return the dataset that the command line describes, and what the user should know about it.

    Args:
        options: the folders or the metadata file.
        alpha_mask: --alpha_mask.

    Raises:
        OptionError: no dataset is given, or a folder can't be used.
    """
    if options.in_json is not None:
        metadata = _subset_values(options, alpha_mask=alpha_mask, is_reg=False)
        metadata["metadata_file"] = options.in_json
        if options.train_data_dir is not None:
            metadata["image_dir"] = options.train_data_dir
        notices = []
        if options.reg_data_dir is not None:
            notices.append("--reg_data_dir is not used with --in_json")
        return DatasetTable("", {}, [SubsetTable("", metadata)]), notices
    if options.train_data_dir is None:
        raise OptionError(
            Mistake(
                "no dataset: give --dataset_config, or --train_data_dir with its N_class folders, "
                "or --in_json",
                ("train_data_dir", "dataset_config", "in_json"),
            )
        )
    subsets, notices = [], []
    folders = {"train_data_dir": options.train_data_dir, "reg_data_dir": options.reg_data_dir}
    for option, parent in folders.items():
        if parent is None:
            continue
        found, more_notices = class_folders(parent, f"--{option}")
        notices += more_notices
        for folder in found:
            values = _subset_values(options, alpha_mask=alpha_mask, is_reg=option == "reg_data_dir")
            values |= {"image_dir": folder.path, "num_repeats": folder.repeats}
            if folder.class_tokens is not None:
                values["class_tokens"] = folder.class_tokens
            subsets.append(SubsetTable(folder.path.name, values))
    return DatasetTable("", {}, subsets), notices


def _subset_values(options: DatasetOptions, *, alpha_mask: bool, is_reg: bool) -> dict[str, Any]:
    """Return the settings that a subset of a dataset file doesn't take from the command line."""
    values: dict[str, Any] = {"is_reg": is_reg}
    if alpha_mask:
        values["alpha_mask"] = True
    if options.conditioning_data_dir is not None and not is_reg:
        values["conditioning_data_dir"] = options.conditioning_data_dir
    return values


class ClassFolder(NamedTuple):
    """A folder of images, with what its name N_class says.

    Attributes:
        class_tokens: the caption of images without a caption file. None if there is no class.
    """

    path: Path
    repeats: int
    class_tokens: str | None


def class_folders(parent: Path, option: str) -> tuple[list[ClassFolder], list[str]]:
    """Return the N_class folders of `parent`, and what the user should know about the others.

    A parent that has none, but contains files, is returned itself, with 1 repeat and no class.

    Args:
        parent: the folder that the option names.
        option: the option, for messages.

    Raises:
        OptionError: there are neither such folders nor files.
    """
    if not parent.is_dir():
        reason = "is a file; a folder is needed" if parent.exists() else "no such folder"
        raise OptionError(Mistake(f"{option} {parent}: {reason}", (option.removeprefix("--"),)))
    names, has_files = _list(parent)
    folders, others = [], []
    for name in names:
        match = re.fullmatch(r"(-?\d+)(?:_(.*))?", name)
        if match:
            folders.append(ClassFolder(parent / name, int(match[1]), match[2] or ""))
        else:
            others.append(name)
    if folders and others:
        unused = ", ".join(others)
        return folders, [f"{option} {parent}: not named N_class, so not used: {unused}"]
    if folders:
        return folders, []
    if has_files:
        notice = (
            f"{option} {parent}: has no N_class folders; the images in it are used, with 1 repeat"
        )
        return [ClassFolder(parent, 1, None)], [notice]
    raise OptionError(
        f"{option} {parent}: expected folders of images named N_class (10_cat: repeated ten times "
        f"per epoch); found {', '.join(others) or 'nothing'}"
    )


def _list(parent: Path) -> tuple[list[str], bool]:
    """Return the names of the folders in `parent`, sorted, and whether it contains files."""
    folders, has_files = [], False
    with os.scandir(parent) as entries:  # there may be a million of them
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            else:
                has_files = True
    return sorted(folders), has_files
