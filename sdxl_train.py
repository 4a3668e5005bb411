"""Fine-tune SDXL itself: the U-Net and, with --train_text_encoder, both text encoders. Saves a complete model.

accelerate launch sdxl_train.py --config_file run.toml
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
from library.training.options.tasks import FineTuneOptions, check_fine_tune

OPTIONS = [FineTuneOptions, *COMMON_TRAINING]


def main(argv: list[str] | None = None) -> None:
    datasets = DatasetDefinition()
    options = read_options(
        __doc__,
        OPTIONS,
        argv,
        checks=[check_training, check_pairs, datasets.check, check_fine_tune],
        refused=UNSUPPORTED,
        unused=NO_EFFECT,
    )
    start_logging(options)

    from library.training.setup.inputs import inspect_inputs

    inputs = inspect_inputs(options, datasets)
    from library.training.main import run_training
    from library.training.tasks.fine_tune import FineTune

    run_training(FineTune, options, inputs)


if __name__ == "__main__":
    run(main)
