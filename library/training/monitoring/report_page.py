"""The page NAME-report.html: what a run's step log tells, drawn. One HTML file without a script or anything outside it."""

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from library.files import write_atomically
from library.training.monitoring.chart import COLOURS, POINTS, Line, chart, few_digits, round_up
from library.training.monitoring.step_log import StepLog, read_step_log


def write_report_page(
    log_file: Path,
    page: Path,
    *,
    title: str,
    options: Mapping[str, object],
    facts: Sequence[tuple[str, str]],
    samples: Sequence[tuple[str, str, bytes]],
) -> None:
    """Write the page of the run whose log this is. Raises RunError, as write_atomically does.

    Args:
        log_file: JSON lines; without it the page says that no step is done.
        options: those to be shown; the caller leaves secrets out.
        samples: (label such as 000100 or e000001, prompt, a small PNG or JPEG), in order of time.
    """
    told = read_step_log(log_file)
    body = [f"<h1>{html.escape(title)}</h1>", _headline(told)]
    if facts:
        body.append(_table("facts", facts))
    body += [f'<div class="charts">{"".join(_charts(told))}</div>', _samples(samples)]
    if options:
        body += ["<h2>Options</h2>", _table("options", [(name, _as_text(value)) for name, value in options.items()])]
    head = [_HEAD, f"<title>{html.escape(title)}</title>", _STYLE, "</head><body>"]
    text = "\n".join([*head, *body, "</body></html>\n"])
    write_atomically(page, lambda file: file.write(text.encode(errors="replace")))


# What is drawn


def _charts(told: StepLog) -> Iterator[str]:
    if not told.steps:
        return
    steps = np.array(told.steps)
    ends = [told.steps[0], told.steps[-1]]
    ends += [end for seen, _ in told.validations.values() for end in (seen[0], seen[-1])]
    across = (min(ends), max(ends))

    window = smoothing_window(len(steps))
    smoothed = f"mean of the last {window:,}"
    shown = 0.99 if len(steps) <= POINTS else 0.95  # what is thinned keeps its extremes, and would fill any height
    loss = told.column("loss/current")
    lines = [
        Line("each step", steps, loss, look="faint", shown=shown),
        Line(smoothed, steps, trailing_mean(loss, window), shown=shown),
    ]
    for color, (kind, (seen, losses)) in enumerate(told.validations.items(), start=1):
        name = "validation" if kind == "step" else "validation after epochs"
        lines.append(Line(name, np.array(seen), np.array(losses), color, look="dots"))
    yield chart("Loss", "", lines, across, tall=True)

    yield chart("Learning rate", "", _rates(told, steps), across, from_zero=True)

    norm = told.column("grad_norm")
    lines = [
        Line("each step", steps, norm, 2, look="faint", shown=shown),
        Line(smoothed, steps, trailing_mean(norm, window), 2, shown=shown),
    ]
    without = int((~np.isfinite(norm)).sum())
    note = f"no norm at {without:,} of {len(steps):,} steps" if without else ""
    yield chart("Gradient norm", "", lines, across, from_zero=True, note=note)

    pace = np.array(told.pace)
    known = np.isfinite(pace)
    at, medians, size = medians_of_runs(steps[known], pace[known])
    lines = [Line("each step", steps, pace, 3)]
    if len(medians) > 2:
        lines = [
            Line("each step", steps, pace, 3, look="faint", shown=0.8),
            Line(f"median of {size:,} steps", at, medians, 3),
        ]
    yield chart("Speed", "s/step", lines, across, from_zero=True)

    lines = [Line("in use", steps, told.column("memory_gib"), 4)]
    yield chart("Memory", "GiB", lines, across, from_zero=True)


def _rates(told: StepLog, steps: np.ndarray) -> list[Line]:
    """A line for each learning rate that differs; groups that share one share a line."""
    names: dict[bytes, list[str]] = {}
    for column in told.columns:
        if column.startswith(("lr/", "d*lr/")):
            group = column.removeprefix("lr/").replace("lr/", "lr ", 1)
            names.setdefault(told.column(column).tobytes(), []).append(group)
    lines = []
    for number, (values, groups) in enumerate(names.items()):
        name = ", ".join(groups) if len(groups) <= 4 else f"{', '.join(groups[:3])} and {len(groups) - 3} more"
        look = "dashed" if number // COLOURS % 2 else ""
        lines.append(Line(name, steps, np.frombuffer(values), number % COLOURS, look))
    return lines


def smoothing_window(steps: int) -> int:
    """Steps to take the mean of: about a 25th of them, as a round number, and never less than 10."""
    return max(10, round(round_up(steps / 25)))


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """At each place the mean of the last `window` values up to it, of those that are finite; NaN if none is."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    count = counts[end] - counts[start]
    return np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)


def medians_of_runs(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(last step, median) of each run of equally many values, and how many those are: pauses to save don't show in it."""
    size = max(5, round(round_up(max(1, len(values)) / 100)))
    over = len(values) % size
    return steps[over:].reshape(-1, size)[:, -1], np.median(values[over:].reshape(-1, size), axis=1), size


# What is written


def _headline(told: StepLog) -> str:
    if not told.steps:
        return "<p>No step is done yet.</p>"
    window = smoothing_window(len(told.steps))
    parts = [("step", f"{told.steps[-1]:,}", "")]
    if told.epoch:
        parts.append(("epoch", f"{told.epoch:,}", ""))
    mean = trailing_mean(told.column("loss/current"), window)[-1]
    if math.isfinite(mean):
        parts.append(("loss", f"{mean:.4f}", f"mean of the last {window:,}"))
    for _, losses in list(told.validations.values())[:1]:
        parts.append(("validation loss", f"{losses[-1]:.4f}", f"lowest {min(losses):.4f}"))
    pace = np.array(told.pace)
    pace = pace[np.isfinite(pace)]
    if len(pace):
        parts.append(("median", f"{few_digits(float(np.median(pace)))} s", "a step"))
    spans = "".join(f"<span>{name} <b>{value}</b> {more}</span>" for name, value, more in parts)
    return f'<p class="headline">{spans}</p>'


def _samples(samples: Sequence[tuple[str, str, bytes]]) -> str:
    """A row for each time, a column for each prompt; a prompt that is given twice has two."""
    rows: dict[str, dict[tuple[str, int], bytes]] = {}
    columns: dict[tuple[str, int], None] = {}
    for label, prompt, image in samples:
        row = rows.setdefault(label, {})
        place = (prompt, sum(seen == prompt for seen, _ in row))
        row[place] = image
        columns[place] = None
    if not rows:
        return ""
    head = "".join(f"<th><div>{html.escape(prompt)}</div></th>" for prompt, _ in columns)
    body = []
    for label, row in rows.items():
        cells = "".join(f"<td>{_image(row[place], label) if place in row else ''}</td>" for place in columns)
        body.append(f"<tr><th>{html.escape(_when(label))}</th>{cells}</tr>")
    return (
        '<h2>Samples</h2><div class="scroll" tabindex="0"><table class="samples">'
        f"<tr><th></th>{head}</tr>{''.join(body)}</table></div>"
    )


def _when(label: str) -> str:
    number = label.removeprefix("e")
    if not (number.isascii() and number.isdigit()):
        return label
    if not int(number):
        return "before"
    return f"{'epoch' if label.startswith('e') else 'step'} {int(number):,}"


def _image(image: bytes, label: str) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(image).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="sample, {html.escape(_when(label))}">'


def _table(name: str, rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows)
    return f'<table class="{name}">{cells}</table>'


def _as_text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">"""

_STYLE = """<style>
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #59636e; --rule: #e3e6ea;
  --c0: #2563c9; --c1: #c2570c; --c2: #1a7f4b; --c3: #7c3aed; --c4: #b3264a; --c5: #0e7490; --c6: #85591a; --c7: #59636e; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --text: #e6e9ed; --soft: #a3adb8; --rule: #30363d;
  --c0: #7ab0ff; --c1: #ffa657; --c2: #6fd08c; --c3: #c4a1ff; --c4: #ff8fa3; --c5: #5fd3e6; --c6: #dcb67a; --c7: #a9b3c0; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; background: var(--page);
  color: var(--text); font-variant-numeric: tabular-nums; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; } h2 small { font-weight: normal; color: var(--soft); }
.headline { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; color: var(--soft); margin: .5rem 0 1rem; }
.headline b { font-size: 1.25rem; color: var(--text); }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
.facts th, .options th { font-weight: normal; color: var(--soft); padding-right: 1.6rem; }
.options th { font-family: ui-monospace, monospace; font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 2rem; }
figure { margin: 0; min-width: 0; } .tall { grid-column: 1 / -1; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; margin: 0 0 .6rem; font-size: .85rem; color: var(--soft); }
.legend b { font-weight: 600; color: var(--text); }
.legend i { display: inline-block; width: 1.1rem; margin-right: .4rem; vertical-align: middle; border-top: 3px solid var(--ink); }
.legend .dashed { border-top-style: dashed; } .legend .faint { opacity: .4; }
.plot { position: relative; height: 13rem; margin: 0 1rem 2rem 3.6rem; font-size: .8rem; color: var(--soft); }
.tall .plot { height: 20rem; }
.plot span { position: absolute; white-space: nowrap; line-height: 1; }
.y { right: calc(100% + .5rem); transform: translateY(-50%); }
.x { top: calc(100% + .5rem); transform: translateX(-50%); }
.axis { top: calc(100% + .5rem); right: calc(100% + .5rem); font-style: italic; }
.note { margin: -.5rem 0 0 3.6rem; font-size: .8rem; color: var(--soft); }
svg { position: absolute; width: 100%; height: 100%; overflow: visible; clip-path: inset(-1px -6px); }
polyline, path { fill: none; stroke: var(--ink); stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.rule { stroke: var(--rule); stroke-width: 1; } .dot { stroke-width: 7; }
polyline.faint { stroke-width: 1; opacity: .6; } polyline.faint.dense { opacity: .35; } polyline.dashed { stroke-dasharray: 6 5; }
.c0 { --ink: var(--c0); } .c1 { --ink: var(--c1); } .c2 { --ink: var(--c2); } .c3 { --ink: var(--c3); }
.c4 { --ink: var(--c4); } .c5 { --ink: var(--c5); } .c6 { --ink: var(--c6); } .c7 { --ink: var(--c7); }
.scroll { overflow-x: auto; }
.samples th { font-weight: normal; font-size: .85rem; color: var(--soft); vertical-align: bottom; min-width: 4.5rem; }
.samples tr > th:first-child { position: sticky; left: 0; background: var(--page); vertical-align: middle; }
.samples th div { width: 12rem; max-height: 4.4em; overflow: auto; }
.samples td { padding: .3rem .5rem .3rem 0; } .samples th, .samples td { border: 0; } .samples img { display: block; width: 12rem; border-radius: 4px; }
@media (max-width: 36rem) { .second { display: none; } .samples img, .samples th div { width: 8rem; } .tall .plot { height: 15rem; }
  .options th, .options td { display: block; } .options th { border: 0; padding-bottom: 0; } }
</style>"""
