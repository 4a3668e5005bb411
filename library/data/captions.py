"""Captions: read from files, and processed anew for every sample. Pure text; randomness comes through `draw`.

Source: contract, dataset_config.md sections 3 and 4; golden 09.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from library.files import read_small_file


@dataclass(frozen=True)
class CaptionSettings:
    """How the captions of one subset are processed; names as in the dataset file."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    templates: tuple[str, ...] = ()  # one of them takes the caption's place

    @property
    def drops_captions(self) -> bool:
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0

    @property
    def edits_tags(self) -> bool:
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0

    def random_parts(self) -> list[str]:
        """The settings that make a caption differ from sample to sample, so that it can't be encoded once and for all."""
        rates = {
            "shuffle_caption": self.shuffle_caption,
            "caption_dropout_rate": self.caption_dropout_rate > 0,
            "caption_dropout_every_n_epochs": self.caption_dropout_every_n_epochs > 0,
            "caption_tag_dropout_rate": self.caption_tag_dropout_rate > 0,
            "token_warmup_step": self.token_warmup_step > 0,
            "enable_wildcard": self.enable_wildcard,
            "templates": bool(self.templates),
        }
        return [name for name, is_on in rates.items() if is_on]


class BadCaption(ValueError):
    """A caption file that is no UTF-8 text; the text says why, without the path."""


def read_caption(path: str | Path, *, all_lines: bool) -> str:
    """The caption in a file: its first line that isn't blank, or with `all_lines` all of those. Raises BadCaption.

    A byte order mark and any kind of line end are dropped.
    """
    raw = read_small_file(path)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadCaption("it is UTF-16; save it as UTF-8")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadCaption(f"it is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise BadCaption("it holds NUL characters, so it is no text (or UTF-16); save it as UTF-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines if all_lines else lines[:1])


def process_caption(
    caption: str,
    settings: CaptionSettings,
    draw: random.Random,
    *,
    epoch: int,
    step: int,
    max_train_steps: int,
    replacements: Mapping[str, str | Sequence[str]] | None = None,
) -> str:
    """The caption as the model gets it, in the contract's order of steps.

    Args:
        draw: the sample's own randomness.
        epoch: counted from 1.
        step: optimizer steps done.
        replacements: text -> text, or a choice of texts; the key "" stands for the whole caption.
    """
    if settings.templates:
        return draw.choice(settings.templates)
    if settings.caption_prefix:
        caption = f"{settings.caption_prefix} {caption}"
    if settings.caption_suffix:
        caption = f"{caption} {settings.caption_suffix}"
    if is_dropped(settings, draw, epoch=epoch):
        return ""
    if settings.enable_wildcard:
        lines = caption.split("\n")
        caption = _expand_wildcards(draw.choice(lines) if len(lines) > 1 else caption, draw)
    else:
        caption = caption.split("\n")[0]
    if settings.edits_tags:
        caption = _edit_tags(caption, settings, draw, step=step, max_train_steps=max_train_steps)
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.caption_separator)
    for old, new in (replacements or {}).items():
        chosen = new if isinstance(new, str) else draw.choice(new)
        caption = caption.replace(old, chosen) if old else chosen
    return caption


def is_dropped(settings: CaptionSettings, draw: random.Random, *, epoch: int) -> bool:
    """Whether a sample gets the empty caption; epochs count from 1."""
    if settings.caption_dropout_rate > 0 and draw.random() < settings.caption_dropout_rate:
        return True
    return settings.caption_dropout_every_n_epochs > 0 and epoch % settings.caption_dropout_every_n_epochs == 0


def caption_variants(
    caption: str, settings: CaptionSettings, count: int, rng: Iterable[random.Random]
) -> tuple[str, ...]:
    """So many captions as process_caption would draw them, apart from dropout, for caching: fewer where nothing is drawn.

    Args:
        draws: the randomness of each.
    """
    kept = replace(settings, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    is_random = bool(kept.random_parts())
    return tuple(
        process_caption(caption, kept, draw, epoch=1, step=0, max_train_steps=1)
        for draw in islice(rng, count if is_random else 1)
    )


_LITERAL_OPEN, _LITERAL_CLOSE = "\x01", "\x02"  # stand for {{ and }} while wildcards are expanded


def _expand_wildcards(caption: str, draw: random.Random) -> str:
    """Each {a|b|c} becomes one of its parts; {{ and }} are braces."""
    protected = caption.replace("{{", _LITERAL_OPEN).replace("}}", _LITERAL_CLOSE)
    expanded = re.sub(r"\{([^}]*)\}", lambda match: draw.choice(match[1].split("|")), protected)
    return expanded.replace(_LITERAL_OPEN, "{").replace(_LITERAL_CLOSE, "}")


def _edit_tags(caption: str, settings: CaptionSettings, draw: random.Random, *, step: int, max_train_steps: int) -> str:
    """Warm-up, shuffle and dropout of the tags that aren't kept fixed."""
    separator, keeper = settings.caption_separator, settings.keep_tokens_separator
    fixed: list[str] = []
    tail: list[str] = []
    if keeper and keeper in caption:
        head, _, rest = caption.partition(keeper)
        middle, _, end = rest.partition(keeper)
        fixed, flexible, tail = (_split_tags(text, separator, keep_empty=False) for text in (head, middle, end))
    else:
        flexible = _split_tags(caption, separator, keep_empty=True)
        fixed, flexible = flexible[: settings.keep_tokens], flexible[settings.keep_tokens :]
    warmup = settings.token_warmup_step
    if warmup:
        warmup = int(warmup * max_train_steps) if warmup < 1 else warmup
        if step < warmup:
            flexible = flexible[
                : int(step * (len(flexible) - settings.token_warmup_min) / warmup) + settings.token_warmup_min
            ]
    if settings.shuffle_caption:
        draw.shuffle(flexible)
    if settings.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if draw.random() >= settings.caption_tag_dropout_rate]
    return ", ".join(fixed + flexible + tail)


def _split_tags(text: str, separator: str, *, keep_empty: bool) -> list[str]:
    tags = [tag.strip() for tag in text.split(separator)]
    return tags if keep_empty else [tag for tag in tags if tag]
