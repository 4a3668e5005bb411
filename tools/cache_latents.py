"""Encode the images of a dataset and keep their latents on disk, for training runs that use them.

accelerate launch tools/cache_latents.py --config_file run.toml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import run
from library.log import start_logging
from library.training.setup.cache_tool import fill, read_tool_options


def main(argv: list[str] | None = None) -> None:
    options, definition = read_tool_options(
        __doc__,
        argv,
        cache_latents=True,
        cache_latents_to_disk=True,
        cache_text_encoder_outputs=False,
        cache_text_encoder_outputs_to_disk=False,
    )
    start_logging(options)
    fill(options, definition)


if __name__ == "__main__":
    run(main)
