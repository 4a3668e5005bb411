"""Captions of a run that trains a placeholder token: templates, or a check that captions have it. Torch-free."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.errors import OptionError
from library.log import log

if TYPE_CHECKING:
    from library.data.samples import (  # imported for types only: --help needs no numpy
        Sample,
        Subset,
    )
    from library.data.scan import Dataset

OBJECTS = tuple(
    f"{kind} {article}{{}}"
    for kind in ("a photo of", "a picture of", "a close view of", "a bright photo of", "a dim photo of", "a cropped photo of", "a drawing of")
    for article in ("a ", "the ", "one ")
)  # fmt: skip
OBJECTS += ("{} on a table", "{} in a room", "{} seen from above", "{} seen from the side", "a nice {}", "a small {}")  # fmt: skip
STYLES = tuple(
    f"{kind} in the style of {{}}"
    for kind in (
        "a painting", "a drawing", "a picture", "a sketch", "a portrait", "a landscape", "a still life", "a cropped painting", "a bright painting",
        "a dark painting", "a detailed picture", "a simple picture", "a small painting", "a large painting", "the painting", "the drawing",
        "an illustration", "a print", "a mural",
    )
)  # fmt: skip
_SHOWN = 5


def with_token(
    datasets: "Sequence[Dataset]", word: str | None, *, objects: bool = False, styles: bool = False
) -> "list[Dataset]":
    """Return the datasets with templates in place of their captions, or check that their captions have the token.

    Args:
        datasets: the scanned datasets.
        word: the token's text; None: no token is trained.
        objects: take sentences about an object; wins over styles.
        styles: take sentences about a style.

    Raises:
        OptionError: no caption has the token.
    """
    if word is not None and (objects or styles):
        templates = tuple(template.format(word) for template in (OBJECTS if objects else STYLES))
        return [_with_templates(dataset, templates) for dataset in datasets]
    if word is not None:
        _check_captions(datasets, word)
    return list(datasets)


def _check_captions(datasets: "Sequence[Dataset]", word: str) -> None:
    """Warn of captions without the token. Raises OptionError if none has it."""
    num_captions, without = 0, []
    for dataset in datasets:
        for sample in (*dataset.samples, *dataset.validation):
            if sample.subset.is_reg:
                continue
            num_captions += 1
            settings = sample.subset.captions
            prefix, suffix = settings.caption_prefix or "", settings.caption_suffix or ""
            if word not in f"{prefix} {sample.caption} {suffix}":
                without.append(sample.file)
    if without and len(without) == num_captions:
        raise OptionError(
            f"no caption has the token {word!r}, so nothing would be learned: write it into the captions, give --class_tokens in "
            "the dataset file, or take --use_object_template"
        )
    if without:
        shown = ", ".join(without[:_SHOWN])
        if len(without) > _SHOWN:
            shown += ", …"
        log.warning(
            "%d of %d captions don't have the token %r: %s", len(without), num_captions, word, shown
        )


def _with_templates(dataset: "Dataset", templates: tuple[str, ...]) -> "Dataset":
    """Return the dataset with templates as the captions of all subsets but those of regularization images."""
    subsets: dict[int, Subset] = {}

    def replaced(samples: "Sequence[Sample]") -> "tuple[Sample, ...]":
        result = []
        for sample in samples:
            subset = sample.subset
            if not subset.is_reg and id(subset) not in subsets:
                captions = dataclasses.replace(subset.captions, templates=templates)
                subsets[id(subset)] = dataclasses.replace(subset, captions=captions)
            result.append(dataclasses.replace(sample, subset=subsets.get(id(subset), subset)))
        return tuple(result)

    return dataclasses.replace(
        dataset, samples=replaced(dataset.samples), validation=replaced(dataset.validation)
    )
