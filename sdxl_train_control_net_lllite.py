"""Train a ControlNet-LLLite for SDXL: a small file that makes images follow a condition, such as outlines or depth.

accelerate launch sdxl_train_control_net_lllite.py --config_file run.toml
"""

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
from library.training.options.tasks import LLLiteOptions, check_lllite

OPTIONS = [LLLiteOptions, *COMMON_TRAINING]


def main(argv: list[str] | None = None) -> None:
    datasets = DatasetDefinition("conditions")
    options = read_options(
        __doc__,
        OPTIONS,
        argv,
        checks=[check_training, check_pairs, datasets.check, check_lllite],
        refused=UNSUPPORTED,
        unused=NO_EFFECT,
    )
    start_logging(options)

    from library.training.setup.inputs import inspect_inputs

    inputs = inspect_inputs(options, datasets)
    from library.training.main import run_training
    from library.training.tasks.lllite import LLLiteTask

    run_training(LLLiteTask, options, inputs)


if __name__ == "__main__":
    run(main)
