"""The page NAME-report.html: what a run's step log tells, drawn. One HTML file without a script or anything outside it."""

import base64
import html
import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from library.files import write_atomically

_POINTS = 1500  # of a line; a screen has no more columns
_WIDTH, _HEIGHT = 1000, 300  # of a drawing, in its own units; the page stretches it
_WIDE = 100  # times between the highest and the lowest line, from which on an axis is logarithmic
_COLOURS = 8
_MOST = 1 << 62  # beyond, a number in a log is none


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


# The log

_VALIDATIONS = [("step", "loss/validation/step_average"), ("epoch", "loss/validation/epoch_average")]


@dataclass
class StepLog:
    """What a step log says, in columns as long as `steps`; NaN where a line doesn't tell.

    Attributes:
        columns: by the log's names.
        pace: seconds that each step took.
        validations: (steps, losses) by kind: step or epoch.
    """

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    columns: "dict[str, array[float]]" = field(default_factory=dict)
    pace: "array[float]" = field(default_factory=lambda: array("d"))
    validations: "dict[str, tuple[array[int], array[float]]]" = field(default_factory=dict)
    epoch: int = 0
    _keys: Set[str] = frozenset()  # all that lines have had

    def column(self, name: str) -> np.ndarray:
        values = np.array(self.columns.get(name, array("d")))
        return np.where(np.abs(values) < _MOST, values, np.nan)

    def add_step(self, step: int, pace: float, line: Mapping[str, object]) -> None:
        """A step that was done before is a resumed run's, which does over what came after it, too."""
        if self.steps and step <= self.steps[-1]:
            self._forget(step)
        if line.keys() != self._keys:
            self._take_in(line)
        self.steps.append(step)
        self.pace.append(pace)
        for name, column in self.columns.items():
            value = line.get(name)
            column.append(value if type(value) is float else _number(value))

    def add_validation(self, kind: str, step: int, loss: float) -> None:
        steps, losses = self.validations.setdefault(kind, (array("q"), array("d")))
        kept = bisect_left(steps, step)
        del steps[kept:], losses[kept:]
        steps.append(step)
        losses.append(loss)

    def _forget(self, step: int) -> None:
        kept = bisect_left(self.steps, step)
        del self.steps[kept:], self.pace[kept:]
        for column in self.columns.values():
            del column[kept:]
        for steps, losses in self.validations.values():
            kept = bisect_left(steps, step)
            del steps[kept:], losses[kept:]
        self.validations = {kind: seen for kind, seen in self.validations.items() if seen[0]}

    def _take_in(self, line: Mapping[str, object]) -> None:
        for name in line:
            is_drawn = name in ("loss/current", "grad_norm", "memory_gib") or name.startswith(("lr/", "d*lr/"))
            if is_drawn and name not in self._keys:
                self.columns[name] = array("d", [math.nan]) * len(self.steps)
        self._keys |= line.keys()


def read_step_log(path: Path) -> StepLog:
    """The log, line by line; lines that were torn, and what is unknown in the others, are left out."""
    told = StepLog()
    last_step, last_seconds = 0, math.nan
    for line in _lines(path):
        step = line.get("step")
        if type(step) is not int or not 0 <= step < _MOST:
            continue
        if "loss/current" in line:
            pace, seconds = math.nan, _number(line.get("seconds"))
            if step > last_step and seconds > last_seconds:  # else another process has gone on, with a clock of its own
                pace = (seconds - last_seconds) / (step - last_step)
            last_step, last_seconds = step, seconds
            told.add_step(step, pace, line)
            epoch = line.get("epoch")
            told.epoch = epoch if type(epoch) is int else told.epoch
        for kind, name in _VALIDATIONS:
            if name in line and math.isfinite(loss := _number(line[name])):
                told.add_validation(kind, step, loss)
    return told


def _lines(path: Path) -> Iterator[dict[str, object]]:
    if not path.exists():
        return
    read = json.JSONDecoder().raw_decode  # json.loads takes twice as long
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line, _ = read(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _number(value: object) -> float:
    """NaN for what is no number, or no sensible one."""
    if isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST:
        return float(value)
    return math.nan


# What is drawn


@dataclass(frozen=True)
class _Line:
    """A line of a chart; values that aren't finite are left out.

    Attributes:
        shown: the share of the values, without the farthest ones, that the chart's height must hold.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: int = 0
    look: str = ""  # faint, dots or dashed
    shown: float = 1.0

    def finite(self) -> tuple[np.ndarray, np.ndarray]:
        known = np.isfinite(self.values)
        return self.steps[known], self.values[known]

    def extent(self) -> tuple[float, float]:
        """Lowest and highest value to be seen."""
        values, beyond = self.finite()[1], (1 - self.shown) / 2
        low, high = np.quantile(values, beyond, method="lower"), np.quantile(values, 1 - beyond, method="higher")
        return float(low), float(high)


def _charts(told: StepLog) -> Iterator[str]:
    if not told.steps:
        return
    steps = np.array(told.steps)
    ends = [told.steps[0], told.steps[-1]]
    ends += [end for seen, _ in told.validations.values() for end in (seen[0], seen[-1])]
    across = (min(ends), max(ends))

    window = smoothing_window(len(steps))
    smoothed = f"mean of the last {window:,}"
    shown = 0.99 if len(steps) <= _POINTS else 0.95  # what is thinned keeps its extremes, and would fill any height
    loss = told.column("loss/current")
    lines = [
        _Line("each step", steps, loss, look="faint", shown=shown),
        _Line(smoothed, steps, trailing_mean(loss, window), shown=shown),
    ]
    for colour, (kind, (seen, losses)) in enumerate(told.validations.items(), start=1):
        name = "validation" if kind == "step" else "validation after epochs"
        lines.append(_Line(name, np.array(seen), np.array(losses), colour, look="dots"))
    yield _chart("Loss", "", lines, across, tall=True)

    yield _chart("Learning rate", "", _rates(told, steps), across, from_zero=True)

    norm = told.column("grad_norm")
    lines = [
        _Line("each step", steps, norm, 2, look="faint", shown=shown),
        _Line(smoothed, steps, trailing_mean(norm, window), 2, shown=shown),
    ]
    without = int((~np.isfinite(norm)).sum())
    note = f"no norm at {without:,} of {len(steps):,} steps" if without else ""
    yield _chart("Gradient norm", "", lines, across, from_zero=True, note=note)

    pace = np.array(told.pace)
    known = np.isfinite(pace)
    at, medians, size = medians_of_runs(steps[known], pace[known])
    lines = [_Line("each step", steps, pace, 3)]
    if len(medians) > 2:
        lines = [
            _Line("each step", steps, pace, 3, look="faint", shown=0.8),
            _Line(f"median of {size:,} steps", at, medians, 3),
        ]
    yield _chart("Speed", "s/step", lines, across, from_zero=True)

    lines = [_Line("in use", steps, told.column("memory_gib"), 4)]
    yield _chart("Memory", "GiB", lines, across, from_zero=True)


def _rates(told: StepLog, steps: np.ndarray) -> list[_Line]:
    """A line for each learning rate that differs; groups that share one share a line."""
    names: dict[bytes, list[str]] = {}
    for column in told.columns:
        if column.startswith(("lr/", "d*lr/")):
            group = column.removeprefix("lr/").replace("lr/", "lr ", 1)
            names.setdefault(told.column(column).tobytes(), []).append(group)
    lines = []
    for number, (values, groups) in enumerate(names.items()):
        name = ", ".join(groups) if len(groups) <= 4 else f"{', '.join(groups[:3])} and {len(groups) - 3} more"
        look = "dashed" if number // _COLOURS % 2 else ""
        lines.append(_Line(name, steps, np.frombuffer(values), number % _COLOURS, look))
    return lines


def smoothing_window(steps: int) -> int:
    """Steps to take the mean of: about a 25th of them, as a round number, and never less than 10."""
    return max(10, round(_round_up(steps / 25)))


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
    size = max(5, round(_round_up(max(1, len(values)) / 100)))
    over = len(values) % size
    return steps[over:].reshape(-1, size)[:, -1], np.median(values[over:].reshape(-1, size), axis=1), size


def _round_up(value: float) -> float:
    """The next number that is 1, 2 or 5 times a power of 10."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(times * power for times in (1, 2, 5, 10) if value <= times * power * (1 + 1e-9))


# How it is drawn


@dataclass(frozen=True)
class _Axis:
    """From values to shares of the axis' length, 0..1, and the values to be written beside it."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if self.log:
            low, high = math.log10(low), math.log10(high)
            values = np.log10(np.maximum(values, self.low / 1e6))
        return (values - low) / (high - low)


def _chart(
    title: str,
    unit: str,
    lines: Sequence[_Line],
    across: tuple[int, int],
    *,
    from_zero: bool = False,
    tall: bool = False,
    note: str = "",
) -> str:
    """A figure: heading, legend, drawing. Nothing if no line has a value. Text is HTML, so a narrow page doesn't shrink it."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return ""
    x, y = _step_axis(*across), _value_axis(lines, from_zero)
    most = _POINTS if len(lines) <= 6 else 6 * _POINTS // len(lines)

    marks, notes = [], [note] if note else []
    drawing, legend = [], []
    for value, text in y.ticks:
        share = 1 - float(y.place(np.array(value)))
        drawing.append(f'<path class="rule" d="M0 {share * _HEIGHT:.1f}H{_WIDTH}"/>')
        marks.append(f'<span class="y" style="top:{share:.2%}">{text}</span>')
    for number, (value, text) in enumerate(x.ticks):
        rank = " second" if number % 2 else ""
        marks.append(f'<span class="x{rank}" style="left:{float(x.place(np.array(value))):.2%}">{text}</span>')
    for line in lines:
        steps, values = line.finite()
        kept = thinned(values, most)
        points = np.stack((x.place(steps[kept]) * _WIDTH, (1 - y.place(values[kept])) * _HEIGHT), axis=1)
        drawing.append(_drawn(line, np.clip(points, -_WIDTH, 2 * _WIDTH)))
        legend.append(
            f'<span><i class="c{line.colour} {line.look}"></i>{html.escape(line.name)} <b>{_told(values[-1])}</b></span>'
        )
        outside = int(((values < y.low) | (values > y.high)).sum())
        if outside and line.look == "faint":
            notes.append(f"outside: {outside:,} of {len(values):,} steps")
    if y.log:
        notes.append("logarithmic")
    unit = f" <small>{unit}</small>" if unit else ""
    small = f'<p class="note">{"; ".join(notes)}</p>' if notes else ""
    spoken = html.escape(f"{title}, steps {across[0]} to {across[1]}")
    return (
        f'<figure class="{"tall" if tall else ""}"><h2>{title}{unit}</h2><p class="legend">{"".join(legend)}</p>'
        f'<div class="plot"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{spoken}">'
        f'{"".join(drawing)}</svg>{"".join(marks)}<span class="axis">step</span></div>{small}</figure>\n'
    )


def _drawn(line: _Line, points: np.ndarray) -> str:
    """The line in the drawing's units; points [N, 2]."""
    places = [f"{x:.1f},{y:.1f}" for x, y in points.tolist()]
    name = f"<title>{html.escape(line.name)}</title>"
    look = f"{line.look} dense" if len(points) > 600 else line.look
    drawn = f'<polyline class="c{line.colour} {look}" points="{" ".join(places)}">{name}</polyline>'
    if len(points) == 1 or (line.look == "dots" and len(points) <= 200):
        dots = "".join(f"M{place}h0" for place in places)  # of no length, but with round ends
        drawn += f'<path class="c{line.colour} dot" d="{dots}"/>'
    return drawn


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """The places of at most `most` values that look like all of them: the ends, and the lowest and highest of each part."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return np.array(sorted(kept))


def _step_axis(first: int, last: int) -> _Axis:
    if first == last:
        return _Axis(first - 1, last + 1, [(first, _count(first))])
    apart = max(1, _round_up((last - first) / 8))
    values = [number * apart for number in range(math.ceil(first / apart), math.floor(last / apart) + 1)]
    return _Axis(first, last, [(value, _count(value)) for value in values])


def _value_axis(lines: Sequence[_Line], from_zero: bool) -> _Axis:
    extents = [line.extent() for line in lines]
    low, high = min(low for low, _ in extents), max(high for _, high in extents)
    peaks = [high for _, high in extents]
    if from_zero and min(peaks) > 0 and max(peaks) > _WIDE * min(peaks):
        # rates far apart; a single one that comes from zero or goes there is easier to read on a linear axis
        return _log_axis(max(low, min(peaks) / 100), high)
    if from_zero and low >= 0:
        low, high = 0.0, high * 1.06 or 1.0
    else:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    apart = _round_up((high - low) / 6)
    numbers = range(math.ceil(low / apart), math.floor(high / apart) + 1)
    return _Axis(low, high, [(number * apart, _on_axis(number * apart, apart)) for number in numbers])


def _log_axis(low: float, high: float) -> _Axis:
    low, high = low / 1.5, high * 1.5
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    powers = range(first, last + 1, max(1, math.ceil((last - first) / 6)))
    return _Axis(low, high, [(10.0**power, _told(10.0**power)) for power in powers], log=True)


def _on_axis(value: float, apart: float) -> str:
    """A value of an axis, with the decimals that tell it from the next."""
    if value == 0:
        return "0"
    if 1e-3 <= apart < 1e4:
        return f"{value:,.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}"
    return _told(value)


def _told(value: float) -> str:
    """At most four digits: 0.1234, 2e-5."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{float(f'{value:.4g}'):,.10g}"
    number, _, power = f"{value:.3e}".partition("e")
    return f"{number.rstrip('0').rstrip('.')}e{int(power)}"


def _count(value: float) -> str:
    """A number of steps, short: 500, 2.5k, 1M."""
    for size, letter in ((1_000_000, "M"), (10_000, "k")):
        if value >= size:
            return f"{value / (1000 if letter == 'k' else size):.10g}{letter}"
    return f"{value:,.0f}"


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
        parts.append(("median", f"{_told(float(np.median(pace)))} s", "a step"))
    spans = "".join(f"<span>{name} <b>{value}</b> {more}</span>" for name, value, more in parts)
    return f'<p class="headline">{spans}</p>'


def _samples(samples: Sequence[tuple[str, str, bytes]]) -> str:
    """A row for each time, a column for each prompt; a prompt that is given twice has two."""
    rows: dict[str, dict[tuple[str, int], bytes]] = {}
    columns: dict[tuple[str, int], None] = {}
    for label, prompt, picture in samples:
        row = rows.setdefault(label, {})
        place = (prompt, sum(seen == prompt for seen, _ in row))
        row[place] = picture
        columns[place] = None
    if not rows:
        return ""
    head = "".join(f"<th><div>{html.escape(prompt)}</div></th>" for prompt, _ in columns)
    body = []
    for label, row in rows.items():
        cells = "".join(f"<td>{_picture(row[place], label) if place in row else ''}</td>" for place in columns)
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


def _picture(picture: bytes, label: str) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(picture).decode()
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
