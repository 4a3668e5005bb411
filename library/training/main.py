"""Begin: what every training script does once its options are read and its files are looked at. No torch until then."""

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from library.data.dataset_config import ConditioningKind
from library.data.options import DatasetOptions
from library.options import Options
from library.training.options.run import RunOptions

if TYPE_CHECKING:
    from library.data.scan import Dataset  # which imports numpy: --help needs none


def run_training(
    task: str,
    options: Options,
    with_datasets: "Callable[[Sequence[Dataset]], Sequence[Dataset]]" = lambda found: found,
    *,
    conditioning: ConditioningKind = "masks",
) -> None:
    """Look at the files, then show the data, tell what would happen, or train: what the options ask for.

    Args:
        task: module and class of the Task, imported when it is needed.
        with_datasets: what the script makes of the datasets that were found.
        conditioning: what the images of conditioning_data_dir are.

    Raises OptionError for what can't work.
    """
    import dataclasses

    from library.training.setup.inputs import inspect_inputs

    found = inspect_inputs(options, conditioning)
    found = dataclasses.replace(found, datasets=with_datasets(found.datasets))
    if options[DatasetOptions].debug_dataset:
        from library.training.setup.debug_dataset import show_dataset

        show_dataset(options, found)
        return
    module, _, name = task.rpartition(".")
    kind = getattr(importlib.import_module(f"library.training.tasks.{module}"), name)
    if options[RunOptions].dry_run:
        from library.training.setup.dry_run import dry_run

        dry_run(kind, options, found)
        return
    from library.training.loop import train

    train(kind, options, found)
