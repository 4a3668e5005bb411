"""Train a network (LoRA) on SDXL: a small file that other programs load with the model.

accelerate launch sdxl_train_network.py --config_file run.toml
"""

from functools import partial

from library.data.dataset_config import DatasetDefinition
from library.errors import run
from library.log import start_logging
from library.options import read_options
from library.training.options.compatibility import (
    COMMON_TRAINING,
    NO_EFFECT,
    UNSUPPORTED,
    check_pairs,
    check_training,
)
from library.training.options.tasks import PivotalOptions, check_network
from library.training.tasks.token_captions import with_token
from networks.options import NetworkOptions

OPTIONS = [NetworkOptions, PivotalOptions, *COMMON_TRAINING]


def main(argv: list[str] | None = None) -> None:
    datasets = DatasetDefinition()
    options = read_options(
        __doc__,
        OPTIONS,
        argv,
        checks=[check_training, check_pairs, datasets.check, check_network],
        refused=UNSUPPORTED,
        unused=NO_EFFECT,
    )
    start_logging(options)

    from library.training.setup.inputs import inspect_inputs

    token = options[PivotalOptions].train_token
    inputs = inspect_inputs(options, datasets, partial(with_token, word=token))
    from library.training.main import run_training
    from library.training.tasks.network import NetworkTask

    run_training(NetworkTask, options, inputs)


if __name__ == "__main__":
    run(main)
