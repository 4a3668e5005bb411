"""Clean the tags and captions of a metadata file: drop ambiguous tags, and unify words.

python tools/clean_captions_and_tags.py metadata.json clean.json
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.metadata_file import Metadata, load_metadata, save_metadata
from library.errors import RunError, run
from library.log import log
from tools.metadata_tool import ToolParser, start_tool_logging

# Rules: contract, formats.md section 3; the tables are our own.
# Groups of tags of which several are ambiguous when there are several people. A complete tag must
# match.
_COLORS = "aqua|black|blonde|blue|brown|dark|green|grey|gray|light|orange|pink|platinum|purple|red|silver|white|yellow"
TAG_GROUPS = {
    "hair length": r"((very |absurdly )?(short|long)|medium|shoulder-length) hair|short hair with long locks",
    "hair cut": r"(bob|bowl|butch|buzz|crew|hime|pixie|wolf) cut|(short )?undercut|inverted bob|mullet",
    "eyes": r"((light|dark) )?[\w-]+ eyes",
    "sleeves": r"[\w-]+ sleeves",
    "hair style": r"((high|low|side|short|folded|front|single|french|crown|twin) )?(ponytail|braids?|twintails|drills?)"
    r"|(one|two) side up|half updo|((single|double|cone) )?(hair )?buns?|(drill|wavy|curly|straight|messy|spiked) hair",
    "hair color": rf"(({_COLORS}|multicolored|two-tone|gradient|streaked|rainbow)[ -]?)+ hair",
}

# They are applied in this order, repeatedly until nothing changes. None makes a caption longer.
_STYLE = r"(?:anime|cartoon|manga)(?:[ -]styled?)?"
CAPTION_REPLACEMENTS = (
    (r"\b(women|ladies|females|persons)\b", "girls"),
    (r"\b(woman|lady|female|person)\b", "girl"),
    (r"\bgirl (?:character|figure)(s?)\b", r"girl\1"),
    (r"\bgirl (girls?)\b", r"\1"),  # "a female person"
    (rf"\b(an? )?{_STYLE} (drawing|illustration|image|painting|picture|portrait|version) of ", ""),
    (rf"(,| in| from| of) (an? )?{_STYLE}(?=[,.]|$)", ""),
    (rf"\b(a)n? {_STYLE} (?=[aeiou])", r"\1n "),
    (rf"\b(a)n? {_STYLE} ", r"\1 "),
    (rf"\b{_STYLE}(, *| )", ""),
    (r"  +", " "),
)
MAX_PASSES = 100  # in case replacements go in circles
NUM_SHOWN = 5  # names of a long list that a warning shows


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("in_json", type=Path, help="metadata file to read")
    parser.add_argument("out_json", type=Path, help="metadata file to write")
    parser.add_argument("third", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="log each entry")
    given = parser.parse_intermixed_args(argv)
    start_tool_logging(debug=given.debug)
    in_json, out_json = given.in_json, given.out_json
    if given.third is not None:
        log.warning(
            "%s is ignored: of three files the second is read and the third written", in_json
        )
        in_json, out_json = out_json, given.third
    metadata = load_metadata(in_json)
    wrong = []
    for key, entry in metadata.items():
        for field in CLEANERS:
            if not isinstance(entry.get(field), str | None):
                wrong.append(f"{field} of {key!r}")
    if wrong:
        raise RunError(f"{in_json}: expected texts, found something else as {', '.join(wrong)}")
    for field, clean in CLEANERS.items():
        clean_field(metadata, field, clean)
    save_metadata(out_json, metadata)
    log.info("%s: %d entries cleaned", out_json, len(metadata))


def clean_field(metadata: Metadata, field: str, clean: Callable[[str], str]) -> None:
    """Clean one field of all entries, in place, and log which entries lack it."""
    missing = []
    for key, entry in metadata.items():
        if entry.get(field) is not None:
            before, entry[field] = entry[field], clean(entry[field])
            log.debug("%s: %s %r -> %r", key, field, before, entry[field])
        else:
            missing.append(key)
            log.debug("%s: no %s", key, field)
    if missing:
        num_more = len(missing) - NUM_SHOWN
        more = f" and {num_more} more (--debug names all)" if num_more > 0 else ""
        log.warning(
            "%d of %d entries have no %s: %s",
            len(missing),
            len(metadata),
            field,
            ", ".join(missing[:NUM_SHOWN]) + more,
        )


def clean_tags(tags: str) -> str:
    """Return the tags with spaces instead of underscores, without rating and ambiguous tags.

    A word that is the last one of another tag is dropped, as that tag is more specific.

    >>> clean_tags("1girl, long_hair, ^_^, hair, rating:safe, score_9")
    '1girl, long hair, ^_^'
    >>> clean_tags("2girls, blue_eyes, red_eyes, black_hair, long_hair")
    '2girls, black hair, long hair'
    """
    spaced = re.sub(r"(?<!\^)_|_(?!\^)", " ", tags)
    tidy = ", ".join(tag.strip() for tag in spaced.split(",") if tag.strip())
    kept = tidy.partition(", rating")[0].split(", ")
    if any("girls" in tag or "boys" in tag for tag in kept):
        kept = _without_ambiguous(kept)
    last_words = {tag.split()[-1] for tag in kept if " " in tag}
    return ", ".join(tag for tag in kept if tag not in last_words)


def _without_ambiguous(tags: Sequence[str]) -> list[str]:
    """Return the tags without the groups of which several tags occur."""
    kept = list(tags)
    for pattern in TAG_GROUPS.values():
        group = [tag for tag in tags if re.fullmatch(pattern, tag)]
        if len(group) > 1:
            kept = [tag for tag in kept if tag not in group]
    return kept


def clean_caption(
    caption: str, replacements: Sequence[tuple[str, str]] = CAPTION_REPLACEMENTS
) -> str:
    """Return the caption with "girl" for woman, lady, female and person, and without anime styles.

    >>> clean_caption("An anime style picture of a young lady, anime style")
    'a young girl'
    >>> clean_caption("a female anime character with two women")
    'a girl with two girls'
    """
    for _ in range(MAX_PASSES):
        before = caption
        for old, new in replacements:
            caption = re.sub(old, new, caption, flags=re.IGNORECASE)
        caption = caption.strip()
        if caption == before:
            break
    return caption


CLEANERS: dict[str, Callable[[str], str]] = {"tags": clean_tags, "caption": clean_caption}

if __name__ == "__main__":
    run(main)
