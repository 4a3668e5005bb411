"""Train a placeholder token for SDXL (Textual Inversion): a file of a few kilobytes that other programs load as an embedding.

accelerate launch sdxl_train_textual_inversion.py --config_file run.toml
"""

import dataclasses
from functools import partial

from library.data.dataset_config import DatasetDefinition
from library.errors import OptionError, run
from library.log import start_logging
from library.options import read_options
from library.training.options.compatibility import (
    COMMON_TRAINING,
    NO_EFFECT,
    UNSUPPORTED,
    check_pairs,
    check_training,
)
from library.training.options.output import SavingOptions, is_plain_name
from library.training.options.tasks import EmbeddingOptions, check_embedding
from library.training.tasks.token_captions import with_token

OPTIONS = [EmbeddingOptions, *COMMON_TRAINING]


def main(argv: list[str] | None = None) -> None:
    datasets = DatasetDefinition()
    options = read_options(
        __doc__,
        OPTIONS,
        argv,
        checks=[check_training, check_pairs, datasets.check, check_embedding],
        refused=UNSUPPORTED,
        unused=NO_EFFECT,
    )
    start_logging(options)
    chosen, saving = options[EmbeddingOptions], options[SavingOptions]
    word = str(chosen.token_string)
    if saving.output_name is None:
        if not is_plain_name(word):
            raise OptionError(f"--token_string {word} can't be a file's name; give --output_name")
        options = options.replaced(dataclasses.replace(saving, output_name=word))

    from library.training.setup.inputs import inspect_inputs

    templates = partial(
        with_token, word=word, objects=chosen.use_object_template, styles=chosen.use_style_template
    )
    inputs = inspect_inputs(options, datasets, templates)
    from library.training.main import run_training
    from library.training.tasks.embedding import EmbeddingTask

    run_training(EmbeddingTask, options, inputs)


if __name__ == "__main__":
    run(main)
