"""Train a network (LoRA) on SDXL: a small file beside the model that other programs load with it.

accelerate launch sdxl_train_network.py --config_file run.toml
"""

from library.data.dataset_config import check_datasets
from library.errors import run
from library.log import start_logging
from library.options import read_options
from library.training.main import run_training
from library.training.options.common import COMMON_TRAINING, check_training
from library.training.options.compatibility import check_pairs
from library.training.options.tasks import PivotalOptions, check_network
from library.training.options.unsupported import NO_EFFECT, UNSUPPORTED
from library.training.tasks.token_captions import with_token
from networks.options import NetworkOptions

OPTIONS = [NetworkOptions, PivotalOptions, *COMMON_TRAINING]


def main(argv: list[str] | None = None) -> None:
    options = read_options(
        __doc__,
        OPTIONS,
        argv,
        checks=[check_training, check_pairs, check_datasets, check_network],
        refused=UNSUPPORTED,
        unused=NO_EFFECT,
    )
    start_logging(options)
    word = options[PivotalOptions].train_token
    run_training(
        "network.NetworkTask",
        options,
        lambda datasets: datasets if word is None else with_token(datasets, word),
    )


if __name__ == "__main__":
    run(main)
