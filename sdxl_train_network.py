"""Train a network (LoRA) on SDXL: a small file beside the model that other programs load with it.

accelerate launch sdxl_train_network.py --config_file run.toml
"""

from library.data.dataset_config import check_datasets
from library.data.options import DatasetOptions
from library.errors import run
from library.log import start_logging
from library.options import read_options
from library.training.not_yet import REFUSED, UNUSED
from library.training.options import COMMON_TRAINING, PivotalOptions, RunOptions, check_network, check_training
from library.training.token_captions import with_token
from networks.options import NetworkOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(
        __doc__,
        [NetworkOptions, PivotalOptions, *COMMON_TRAINING],
        argv,
        checks=[check_training, check_datasets, check_network],
        refused=REFUSED,
        unused=UNUSED,
    )
    start_logging(options)
    from library.training.preflight import look_before

    found = look_before(options)
    if (word := options[PivotalOptions].train_token) is not None:
        with_token(found.datasets, word)
    if options[DatasetOptions].debug_dataset:
        from library.training.debug_dataset import show_dataset

        show_dataset(options, found)
        return
    from library.training.tasks.network import NetworkTask

    if options[RunOptions].dry_run:
        from library.training.dry_run import dry_run

        dry_run(NetworkTask, options, found)
        return
    from library.training.loop import train

    train(NetworkTask, options, found)


if __name__ == "__main__":
    run(main)
