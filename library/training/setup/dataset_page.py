"""The page of --debug_dataset: one HTML file without anything outside it, of tables and thumbnails."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from library.size import Size

THUMBNAIL = 200  # pixels of the longer side


@dataclass(frozen=True)
class Shown:
    """One picture as the model will see it.

    Attributes:
        pixels: in its bucket, [H, W, 3], uint8; None for a picture that can't be read, which `note` tells.
        mask: of the loss, or of what an inpainting model paints, [H, W], 0..1.
        condition: the conditioning image in the same bucket, [H, W, 3], uint8.
        captions: as processed for some samples; more than one where they are drawn.
        tokens: of the longest caption; limit: how many are used; cut: the text that is left out.
        lost: share of the picture that is cropped away.
    """

    file: str
    size: Size
    bucket: Size
    lost: float
    repeats: int
    captions: Sequence[str]
    tokens: int
    limit: int
    cut: str
    pixels: np.ndarray | None
    mask: np.ndarray | None
    condition: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a heading; every cell is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        """For a terminal: columns aligned."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        told = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, *told])


def dataset_page(title: str, tables: Iterable[Table], shown: Iterable[Shown], note: str) -> str:
    """The whole page as HTML. Args: note: a line above the pictures."""
    parts = [f"<h1>{html.escape(title)}</h1>", *map(_table, tables), f"<p>{html.escape(note)}</p>", "<div class=grid>"]
    parts += [_card(one) for one in shown]
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", "\n".join(parts) + "</div>")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>TITLE</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); }
th { font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; margin-top: 1rem; align-items: start; }
.card { border: 1px solid color-mix(in srgb, currentColor 18%, transparent); border-radius: 8px; padding: .7rem; overflow-wrap: anywhere; }
.card img { display: block; max-width: 100%; border-radius: 4px; margin-bottom: .3rem; }
.file { font-size: .8rem; opacity: .75; margin: .4rem 0; } .caption { margin: .3rem 0; }
.cut { color: light-dark(#b00020, #ff8a8a); } .numbers { font-size: .8rem; opacity: .75; }
</style></head><body>
BODY
</body></html>
"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>"


def _card(one: Shown) -> str:
    image = "" if one.pixels is None else f'<img src="{_thumbnail(one.pixels, one.mask)}" alt="">'
    if one.condition is not None:
        image += f'<img src="{_thumbnail(one.condition, None)}" alt="its condition">'
    captions = "".join(
        f"<p class=caption>{html.escape(caption) or '<i>no caption</i>'}</p>" for caption in one.captions
    )
    cut = f'<p class="caption cut">left out: {html.escape(one.cut)}</p>' if one.cut else ""
    coverage = "" if one.mask is None else f", mask covers {one.mask.mean():.0%}"
    numbers = (
        f"{one.size} → {one.bucket}, {one.lost:.1%} cropped, {one.repeats} × an epoch, "
        f"{one.tokens} of {one.limit} tokens{coverage}"
    )
    note = f'<p class="caption cut">{html.escape(one.note)}</p>' if one.note else ""
    return f"<div class=card>{image}<p class=file>{html.escape(one.file)}</p>{note}{captions}{cut}<p class=numbers>{numbers}</p></div>"


def _thumbnail(pixels: np.ndarray, mask: np.ndarray | None) -> str:
    """A small JPEG as a data: URL. What a mask leaves out is shown in red."""
    if mask is not None:
        red = np.array([200, 0, 0], dtype=np.float32)
        share = (1 - mask)[..., None] * 0.7
        pixels = (pixels * (1 - share) + red * share).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
