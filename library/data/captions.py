"""Captions: read from files, and processed for every sample.

Pure functions of text and a random number generator. Source: contract, dataset_config.md sections 3
and 4; golden 09.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from library.data.options import CaptionKeys
from library.files import read_small_file


@dataclass(frozen=True)
class CaptionSettings(CaptionKeys):
    """How the captions of one subset are processed.

    Attributes:
        templates: one of them, at random, replaces the caption.
    """

    templates: tuple[str, ...] = ()

    @property
    def drops_captions(self) -> bool:
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0

    @property
    def edits_tags(self) -> bool:
        return (
            self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0
        )

    def random_settings(self) -> list[str]:
        """Return the settings that make a caption vary, so that it can't be encoded in advance."""
        is_random = {
            "shuffle_caption": self.shuffle_caption,
            "caption_dropout_rate": self.caption_dropout_rate > 0,
            "caption_dropout_every_n_epochs": self.caption_dropout_every_n_epochs > 0,
            "caption_tag_dropout_rate": self.caption_tag_dropout_rate > 0,
            "token_warmup_step": self.token_warmup_step > 0,
            "enable_wildcard": self.enable_wildcard,
            "templates": bool(self.templates),
        }
        return [name for name, is_on in is_random.items() if is_on]


class CaptionError(ValueError):
    """A caption file that isn't UTF-8 text. The text gives the reason, without the path."""


def read_caption(path: str | Path, *, all_lines: bool) -> str:
    """Return the first non-blank line of a caption file, or with `all_lines` all of them.

    A byte order mark and any kind of line ending are removed.

    Raises:
        CaptionError: the file isn't UTF-8 text.
        OSError: the file can't be read.
    """
    raw = read_small_file(path)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CaptionError("it is UTF-16; save it as UTF-8")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CaptionError(f"it is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise CaptionError(
            "it contains NUL characters, so it is binary or UTF-16; save it as UTF-8"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines if all_lines else lines[:1])


def process_caption(
    caption: str,
    settings: CaptionSettings,
    rng: random.Random,
    *,
    epoch: int,
    step: int,
    max_train_steps: int,
    replacements: Mapping[str, str | Sequence[str]] | None = None,
) -> str:
    """Return the caption as the model gets it, processed in the contract's order.

    Args:
        caption: the caption as read from its file.
        settings: the settings of its subset.
        rng: the sample's random number generator.
        epoch: the epoch, counted from 1.
        step: the number of optimizer steps done.
        max_train_steps: the number of optimizer steps of the run.
        replacements: text -> text, or a choice of texts; the key "" replaces the complete caption.
    """
    if settings.templates:
        return rng.choice(settings.templates)
    if settings.caption_prefix:
        caption = f"{settings.caption_prefix} {caption}"
    if settings.caption_suffix:
        caption = f"{caption} {settings.caption_suffix}"
    if is_dropped(settings, rng, epoch=epoch):
        return ""
    lines = caption.split("\n")
    if settings.enable_wildcard:
        # Random numbers are used only for a choice: golden 09 depends on their order.
        line = rng.choice(lines) if len(lines) > 1 else caption
        caption = _expand_wildcards(line, rng)
    else:
        caption = lines[0]
    if settings.edits_tags:
        caption = _edit_tags(caption, settings, rng, step=step, max_train_steps=max_train_steps)
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.caption_separator)
    for old, new in (replacements or {}).items():
        replacement = new if isinstance(new, str) else rng.choice(new)
        caption = caption.replace(old, replacement) if old else replacement
    return caption


def is_dropped(settings: CaptionSettings, rng: random.Random, *, epoch: int) -> bool:
    """Return whether a sample gets the empty caption. Epochs are counted from 1."""
    if settings.caption_dropout_rate > 0 and rng.random() < settings.caption_dropout_rate:
        return True
    every = settings.caption_dropout_every_n_epochs
    return every > 0 and epoch % every == 0


def caption_variants(
    caption: str, settings: CaptionSettings, count: int, rngs: Iterable[random.Random]
) -> tuple[str, ...]:
    """Return random variants of a caption for caching, as process_caption makes them.

    Captions are not dropped. There is only one variant if nothing in the settings is random.

    Args:
        caption: the caption as read from its file.
        settings: the settings of its subset.
        count: the number of variants.
        rngs: the random number generator of each variant.
    """
    kept = replace(settings, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    if not kept.random_settings():
        count = 1
    variants = []
    for rng in islice(rngs, count):
        variant = process_caption(caption, kept, rng, epoch=1, step=0, max_train_steps=1)
        variants.append(variant)
    return tuple(variants)


# They replace {{ and }} while wildcards are expanded.
_LITERAL_OPEN, _LITERAL_CLOSE = "\x01", "\x02"


def _expand_wildcards(caption: str, rng: random.Random) -> str:
    """Replace each {a|b|c} by one of its alternatives; {{ and }} are braces."""
    protected = caption.replace("{{", _LITERAL_OPEN).replace("}}", _LITERAL_CLOSE)
    expanded = re.sub(r"\{([^}]*)\}", lambda match: rng.choice(match[1].split("|")), protected)
    return expanded.replace(_LITERAL_OPEN, "{").replace(_LITERAL_CLOSE, "}")


def _edit_tags(
    caption: str, settings: CaptionSettings, rng: random.Random, *, step: int, max_train_steps: int
) -> str:
    """Warm up, shuffle and drop the tags that aren't fixed."""
    first, flexible, last = _fixed_and_flexible(caption, settings)
    if settings.token_warmup_step:
        warmup = settings.token_warmup_step
        if warmup < 1:
            warmup = int(warmup * max_train_steps)
        if step < warmup:
            growth = int(step * (len(flexible) - settings.token_warmup_min) / warmup)
            flexible = flexible[: growth + settings.token_warmup_min]
    if settings.shuffle_caption:
        rng.shuffle(flexible)
    if settings.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= settings.caption_tag_dropout_rate]
    return ", ".join(first + flexible + last)


def _fixed_and_flexible(
    caption: str, settings: CaptionSettings
) -> tuple[list[str], list[str], list[str]]:
    """Return the tags that stay first, those that may be edited, and those that stay last."""
    separator, mark = settings.caption_separator, settings.keep_tokens_separator
    if not mark or mark not in caption:
        tags = [tag.strip() for tag in caption.split(separator)]
        return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []
    head, _, rest = caption.partition(mark)
    middle, _, tail = rest.partition(mark)
    first, flexible, last = (_nonempty_tags(text, separator) for text in (head, middle, tail))
    return first, flexible, last


def _nonempty_tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator) if tag.strip()]
