"""Samples that can't be used: finding images that can't be decoded, before training starts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from library import images
from library.data.cache.background import map_ahead
from library.data.cache.disk import SourceStamp, source_stamp
from library.data.file_index import FileIndex, file_stamp
from library.data.samples import Sample
from library.errors import RunError
from library.images import ImageError
from library.log import log, progress_bar
from library.size import Size


class RejectedSample(NamedTuple):
    """A sample that can't be used for training, and why."""

    sample: Sample
    reason: str


def audit(
    samples: Sequence[Sample], file_index: FileIndex, *, rank: int = 0, world_size: int = 1
) -> list[RejectedSample]:
    """Decode every image once, and return the samples that can't be used.

    Files that were decoded before and haven't changed since are skipped.
    """
    sizes: dict[str, Size | None] = {}  # None for conditioning images, whose size isn't known
    for sample in samples[rank::world_size]:
        sizes[sample.file] = sample.size
        if sample.conditioning is not None:
            sizes.setdefault(sample.conditioning, None)
    undecoded = [item for item in sizes.items() if not _was_decoded(item[0], file_index)]
    reasons: dict[str, str] = {}
    with progress_bar("checking images", len(undecoded), unit="images") as bar:
        for (file, _), result in map_ahead(_decode_once, undecoded):
            if isinstance(result, SourceStamp):
                folder, name = os.path.split(file)
                file_index.record(folder, name, result.stamp, decoded=True, content=result.content)
            else:
                reasons[file] = result
            bar.update()
    rejected = []
    for sample in samples:
        if sample.file in reasons:
            rejected.append(RejectedSample(sample, reasons[sample.file]))
        if sample.conditioning in reasons:
            reason = f"its conditioning image {sample.conditioning}: {reasons[sample.conditioning]}"
            rejected.append(RejectedSample(sample, reason))
    return rejected


def _was_decoded(file: str, file_index: FileIndex) -> bool:
    folder, name = os.path.split(file)
    try:
        return "decoded" in file_index.get(folder, name, file_stamp(file))
    except OSError:
        return False


def _decode_once(file_and_size: tuple[str, Size | None]) -> SourceStamp | str:
    """Return the stamp of an image file, or why it can't be used."""
    file, expected = file_and_size
    try:
        content, source = source_stamp(Path(file))
        pixels = images.decode(content, file)
    except (OSError, ImageError) as error:
        return read_error(error)
    size = Size(pixels.shape[1], pixels.shape[0])
    if expected not in (None, size):
        return f"it was {expected} when the dataset was read, and is {size} now"
    return source


def refuse_or_skip(rejected: Sequence[RejectedSample], *, skip: bool) -> None:
    """Report all samples that can't be used.

    Args:
        rejected: the samples.
        skip: only log a warning.

    Raises:
        RunError: there are such samples, and they may not be skipped.
    """
    if not rejected:
        return
    listed = "\n  ".join(f"{sample.path}: {reason}" for sample, reason in rejected)
    if not skip:
        raise RunError(
            f"{len(rejected)} images can't be used. Fix or remove them, or skip them with "
            f"--skip_bad_images:\n  {listed}"
        )
    log.warning(
        "%d images can't be used and are skipped (--skip_bad_images):\n  %s", len(rejected), listed
    )


def read_error(error: OSError | ImageError) -> str:
    """Return why a file can't be used."""
    return str(error) if isinstance(error, ImageError) else f"can't be read: {error.strerror}"
