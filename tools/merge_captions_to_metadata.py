"""Merge the caption files next to images into a metadata file, as the `caption` of each image's entry.

python tools/merge_captions_to_metadata.py images metadata.json --caption_extension .txt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.metadata_file import merge_texts
from library.errors import run
from tools.metadata_tool import merge_parser, start_tool_logging


def main(argv: list[str] | None = None) -> None:
    parser = merge_parser(__doc__, extension=".caption")
    parser.add_argument(
        "--caption_extention", help=argparse.SUPPRESS
    )  # an old misspelling, which wins
    given = parser.parse_args(argv)
    start_tool_logging(debug=given.debug)
    merge_texts(
        given.train_data_dir,
        given.out_json,
        field="caption",
        extension=given.caption_extention or given.caption_extension,
        in_json=given.in_json,
        full_path=given.full_path,
        recursive=given.recursive,
    )


if __name__ == "__main__":
    run(main)
