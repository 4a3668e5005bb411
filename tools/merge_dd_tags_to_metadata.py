"""Merge the tags beside pictures (as a tagger writes them) into a metadata file, as the `tags` of each picture's entry.

python tools/merge_dd_tags_to_metadata.py pictures metadata.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.metadata_merge import merge_parser, merge_texts, start_tool_logging
from library.errors import run


def main(argv: list[str] | None = None) -> None:
    given = merge_parser(__doc__, extension=".txt").parse_args(argv)
    start_tool_logging(debug=given.debug)
    merge_texts(
        given.train_data_dir,
        given.out_json,
        field="tags",
        extension=given.caption_extension,
        in_json=given.in_json,
        full_path=given.full_path,
        recursive=given.recursive,
    )


if __name__ == "__main__":
    run(main)
