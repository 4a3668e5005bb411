"""The page of --debug_dataset: one self-contained HTML file of tables and thumbnails."""

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
    """One image as the model will see it.

    Attributes:
        file: the image file.
        size: its size in pixels.
        bucket: the size of its bucket.
        lost: the share of the image that is cropped away.
        repeats: times per epoch.
        captions: processed captions; several where they are random.
        tokens: tokens of the longest caption.
        limit: tokens that are used.
        cut: the text that is truncated.
        pixels: the image in its bucket, [H, W, 3], uint8; None if it can't be read.
        mask: of the loss, or of what an inpainting model paints, [H, W], 0..1.
        condition: the conditioning image in the same bucket, [H, W, 3], uint8.
        note: why the image can't be read.
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
        """Return the table for a terminal, with aligned columns."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.title]
        for row in (self.columns, *self.rows):
            lines.append(
                "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            )
        return "\n".join(lines)


def dataset_page(title: str, tables: Iterable[Table], shown: Iterable[Shown], note: str) -> str:
    """Return the complete page as HTML.

    Args:
        title: its heading.
        tables: tables above the images.
        shown: the images.
        note: a line above the images.
    """
    lines = [
        f"<h1>{html.escape(title)}</h1>",
        *map(_table, tables),
        f"<p>{html.escape(note)}</p>",
        "<div class=grid>",
    ]
    lines += map(_card, shown)
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", "\n".join(lines) + "</div>")


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
    rows = [_row(table.columns, "th")]
    rows += [_row(row, "td") for row in table.rows]
    return f"<h2>{html.escape(table.title)}</h2><table>{''.join(rows)}</table>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _card(shown: Shown) -> str:
    lines = []
    if shown.pixels is not None:
        lines.append(f'<img src="{_thumbnail(shown.pixels, shown.mask)}" alt="">')
    if shown.condition is not None:
        lines.append(f'<img src="{_thumbnail(shown.condition, None)}" alt="its condition">')
    lines.append(f"<p class=file>{html.escape(shown.file)}</p>")
    if shown.note:
        lines.append(f'<p class="caption cut">{html.escape(shown.note)}</p>')
    for caption in shown.captions:
        lines.append(f"<p class=caption>{html.escape(caption) or '<i>no caption</i>'}</p>")
    if shown.cut:
        lines.append(f'<p class="caption cut">left out: {html.escape(shown.cut)}</p>')
    facts = (
        f"{shown.size} → {shown.bucket}, {shown.lost:.1%} cropped, {shown.repeats} × an epoch, "
        f"{shown.tokens} of {shown.limit} tokens"
    )
    if shown.mask is not None:
        facts += f", mask covers {shown.mask.mean():.0%}"
    lines.append(f"<p class=numbers>{facts}</p>")
    return f"<div class=card>{''.join(lines)}</div>"


def _thumbnail(pixels: np.ndarray, mask: np.ndarray | None) -> str:
    """Return a small JPEG as a data: URL. What a mask leaves out is red."""
    if mask is not None:
        red = np.array([200, 0, 0], dtype=np.float32)
        weight = (1 - mask)[..., None] * 0.7
        pixels = (pixels * (1 - weight) + red * weight).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
