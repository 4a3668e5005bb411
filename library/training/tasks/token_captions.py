"""Captions of a run that trains a new token: templates, and what is told where the token is missing. No torch here."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.errors import OptionError
from library.log import log

if TYPE_CHECKING:
    from library.data.scan import Dataset  # which imports numpy: --help needs none

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
    """The datasets with the templates of the options in place of their captions, or with their own, looked through.

    Raises OptionError if no caption has the word.
    """
    if word is None:
        return list(datasets)
    templates = OBJECTS if objects else STYLES if styles else ()
    if templates:
        return [
            _with_templates(dataset, tuple(template.format(word) for template in templates)) for dataset in datasets
        ]
    samples = [
        sample for dataset in datasets for sample in (*dataset.samples, *dataset.validation) if not sample.subset.is_reg
    ]
    without = [sample for sample in samples if word not in _whole(sample.caption, sample.subset.captions)]
    if without and len(without) == len(samples):
        raise OptionError(
            f"no caption holds {word!r}, so nothing would be learnt: write it into the captions, give --class_tokens in the dataset file, "
            "or take --use_object_template"
        )
    if without:
        shown = ", ".join(sample.file for sample in without[:_SHOWN])
        log.warning("%d of %d captions don't hold %r: %s%s", len(without), len(samples), word, shown, ", …" if len(without) > _SHOWN else "")  # fmt: skip
    return list(datasets)


def _whole(caption: str, settings: object) -> str:
    prefix, suffix = (getattr(settings, name) or "" for name in ("caption_prefix", "caption_suffix"))
    return f"{prefix} {caption} {suffix}"


def _with_templates(dataset: "Dataset", templates: tuple[str, ...]) -> "Dataset":
    changed = {}
    for sample in (*dataset.samples, *dataset.validation):
        if id(sample.subset) not in changed and not sample.subset.is_reg:
            captions = dataclasses.replace(sample.subset.captions, templates=templates)
            changed[id(sample.subset)] = dataclasses.replace(sample.subset, captions=captions)
    samples, validation = (
        tuple(dataclasses.replace(sample, subset=changed.get(id(sample.subset), sample.subset)) for sample in part)
        for part in (dataset.samples, dataset.validation)
    )
    return dataclasses.replace(dataset, samples=samples, validation=validation)
