"""What the command lines of the metadata tools share."""

import argparse
from pathlib import Path
from typing import NoReturn

from library.errors import OptionError
from library.log import LogOptions, start_logging
from library.options import Options


class ToolParser(argparse.ArgumentParser):
    """A parser for positional arguments, which read_options doesn't have. It raises OptionError."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see --help")


def merge_parser(description: str, *, extension: str) -> ToolParser:
    """Return a parser with the arguments of both merge tools.

    Args:
        description: the tool's docstring.
        extension: the default of --caption_extension.
    """
    parser = ToolParser(description)
    parser.add_argument(
        "train_data_dir", type=Path, help="folder of the images, with the text files next to them"
    )
    parser.add_argument("out_json", type=Path, help="metadata file to write")
    parser.add_argument(
        "--in_json", type=Path, help="metadata file to extend; unset: out_json, if it exists"
    )
    parser.add_argument(
        "--full_path", action="store_true", help="keys are the images' paths, not their names"
    )
    parser.add_argument(
        "--recursive", action="store_true", help="search subfolders too; needs --full_path"
    )
    parser.add_argument(
        "--caption_extension",
        default=extension,
        help="extension of the text files (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="log each entry")
    return parser


def start_tool_logging(*, debug: bool) -> None:
    """Log to stderr. With `debug`, each entry is logged too."""
    options = LogOptions(console_log_level="DEBUG" if debug else None)
    start_logging(Options([options], sources={}, notices=()))
