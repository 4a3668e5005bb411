"""The report page NAME-report.html: a run's step log as charts, its sample images and its options.

It is one HTML file that loads nothing, so it works offline. uPlot draws the charts.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from library.files import write_atomically
from library.training.monitoring.step_log import StepLog, read_step_log

POINTS = 1500  # of a line, at most; a screen has no more columns
_COLORS = 8  # --c0 to --c7 in report.css
_LOG_FROM = 100  # an axis is logarithmic if the highest line is this factor above the lowest
_ASSETS = Path(__file__).parent / "report_assets"


def write_report_page(
    log_file: Path,
    page: Path,
    *,
    title: str,
    options: Mapping[str, object],
    facts: Sequence[tuple[str, str]],
    samples: Sequence[tuple[str, str, bytes]],
) -> None:
    """Write the page of the run that has this step log.

    Args:
        log_file: JSON lines. If it does not exist, the page says that no step is complete.
        options: those to be shown; the caller leaves out secrets.
        samples: (label such as 000100 or e000001, prompt, a small PNG or JPEG), in order of time.

    Raises:
        RunError: The page cannot be written; see write_atomically.
    """
    log = read_step_log(log_file)
    charts = _charts(log)
    body = [f"<h1>{html.escape(title)}</h1>", _headline(log)]
    if facts:
        body.append(_table("facts", facts))
    if charts:
        body.append(f'<div class="charts">{"".join(map(_figure, charts))}</div>')
        body.append("<noscript>Charts need JavaScript; see NAME-log.jsonl.</noscript>")
    body.append(_samples(samples))
    if options:
        body += [
            "<h2>Options</h2>",
            _table("options", [(name, _as_text(value)) for name, value in options.items()]),
        ]
    scripts = []
    if charts:
        body.append(f'<script type="application/json" id="chart-data">{_json(charts)}</script>')
        license_text = _asset("uplot/LICENSE")
        scripts = [
            f"/*! uPlot\n{license_text}*/\n{_asset('uplot/uPlot.iife.min.js')}",
            _asset("report.js"),
        ]
        body += [f"<script>{script}</script>" for script in scripts]
    text = "\n".join([_head(title, scripts), *body, "</body></html>\n"])
    write_atomically(page, lambda file: file.write(text.encode(errors="replace")))


# The charts


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    It has a value for each step of the chart; those that are not finite are left out.

    Attributes:
        look: faint, smooth (a mean of another line), dots, dashed, or empty for a plain line.
        shown: the share of the values, without the most distant ones, that must be visible before
            zooming.
    """

    name: str
    values: np.ndarray
    color: int = 0
    look: str = ""
    shown: float = 1.0

    @property
    def known(self) -> np.ndarray:
        """The indices of the finite values."""
        return np.flatnonzero(np.isfinite(self.values))

    def extent(self) -> tuple[float, float]:
        """Return the lowest and the highest value that must be visible."""
        values = self.values[self.known]
        beyond = (1 - self.shown) / 2
        low = np.quantile(values, beyond, method="lower")
        high = np.quantile(values, 1 - beyond, method="higher")
        return float(low), float(high)


@dataclass(frozen=True)
class Chart:
    """The data of a chart, as report.js reads them.

    All lines share the steps, so that the cursor reads them at once.

    Attributes:
        range: of the vertical axis before zooming.
        lines: name, color, look and values (None where the line has none) of each line.
        note: the text below the chart.
    """

    title: str
    unit: str
    steps: list[int]
    range: tuple[float, float]
    is_log: bool
    lines: list[dict[str, object]]
    note: str


def _charts(log: StepLog) -> list[Chart]:
    if not log.steps:
        return []
    done = np.array(log.steps)
    steps = done
    for seen, _ in log.validations.values():
        steps = np.union1d(steps, seen)

    def spread(at: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return a value for each of the steps, from values at some of them."""
        column = np.full(len(steps), np.nan)
        column[np.searchsorted(steps, at)] = values
        return column

    def smoothed(values: np.ndarray, color: int) -> list[Line]:
        window = smoothing_window(len(done))
        # Thinning keeps the extremes, which would fill any height.
        shown = 0.99 if len(done) <= POINTS else 0.95
        mean = spread(done, trailing_mean(values, window))
        return [
            Line("each step", spread(done, values), color, "faint", shown),
            Line(f"mean of the last {window:,}", mean, color, "smooth", shown),
        ]

    loss = smoothed(log.column("loss/current"), 0)
    for color, (kind, (seen, losses)) in enumerate(log.validations.items(), start=1):
        name = "validation" if kind == "step" else "validation after epochs"
        loss.append(Line(name, spread(seen, losses), color, "dots"))

    rates = _rates({name: spread(done, log.column(name)) for name in log.columns if "lr/" in name})

    norm = log.column("grad_norm")
    without = int((~np.isfinite(norm)).sum())
    note = f"no norm at {without:,} of {len(done):,} steps" if without else ""

    pace = np.array(log.pace)
    known = np.isfinite(pace)
    at, medians, size = medians_of_runs(done[known], pace[known])
    speed = [Line("each step", spread(done, pace), 3)]
    if len(medians) > 2:
        speed = [
            Line("each step", spread(done, pace), 3, "faint", shown=0.8),
            Line(f"median of {size:,} steps", spread(at, medians), 3),
        ]

    memory = [Line("in use", spread(done, log.column("memory_gib")), 4)]
    charts = [
        _chart("Loss", steps, loss, from_zero=False),
        _chart("Learning rate", steps, rates),
        _chart("Gradient norm", steps, smoothed(norm, 2), note=note),
        _chart("Speed", steps, speed, "s/step"),
        _chart("Memory", steps, memory, "GiB"),
    ]
    return [chart for chart in charts if chart is not None]


def _rates(columns: Mapping[str, np.ndarray]) -> list[Line]:
    """Return a line for each learning rate that differs; groups with the same rate share a line."""
    names: dict[bytes, list[str]] = {}
    for column, values in columns.items():
        group = column.removeprefix("lr/").replace("lr/", "lr ", 1)
        names.setdefault(values.tobytes(), []).append(group)
    lines = []
    for i, (data, groups) in enumerate(names.items()):
        name = ", ".join(groups)
        if len(groups) > 4:
            name = f"{', '.join(groups[:3])} and {len(groups) - 3} more"
        look = "dashed" if i // _COLORS % 2 else ""
        lines.append(Line(name, np.frombuffer(data), i % _COLORS, look))
    return lines


def _chart(
    title: str,
    steps: np.ndarray,
    lines: Sequence[Line],
    unit: str = "",
    *,
    from_zero: bool = True,
    note: str = "",
) -> Chart | None:
    """Return the chart, or None if no line has a value."""
    lines = [line for line in lines if len(line.known)]
    if not lines:
        return None
    low, high, is_log = _value_range(lines, from_zero)
    notes = [note] if note else []
    for line in lines:
        values = line.values[line.known]
        outside = int(((values < low) | (values > high)).sum())
        if outside and line.look == "faint":
            notes.append(f"outside: {outside:,} of {len(values):,} steps")
    if is_log:
        notes.append("logarithmic")
    kept = _steps_to_keep(lines)
    data: list[dict[str, object]] = [
        {
            "name": line.name,
            "color": line.color,
            "look": line.look,
            "values": _numbers(line.values[kept]),
        }
        for line in lines
    ]
    return Chart(title, unit, steps[kept].tolist(), (low, high), is_log, data, "; ".join(notes))


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _value_range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float, bool]:
    """Return the ends of the vertical axis, and whether it is logarithmic."""
    extents = [line.extent() for line in lines]
    peaks = [high for _, high in extents]
    low, high = min(low for low, _ in extents), max(peaks)
    if from_zero and min(peaks) > 0 and high > _LOG_FROM * min(peaks):
        # Rates far apart. A single rate that comes from zero or goes there is easier to read on a
        # linear axis.
        return max(low, min(peaks) / 100) / 1.5, high * 1.5, True
    if from_zero and low >= 0:
        return 0.0, high * 1.06 or 1.0, False
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom = low - margin
    if low >= 0:
        bottom = max(0.0, bottom)
    return bottom, high + margin, False


def _steps_to_keep(lines: Sequence[Line]) -> np.ndarray:
    """Return the indices of both ends and of the steps that show the shape of the lines."""
    most = POINTS
    while True:
        kept = np.unique([0, len(lines[0].values) - 1])
        for line in lines:
            if line.look != "smooth":
                kept = np.union1d(kept, line.known[thinned(line.values[line.known], most)])
        if len(kept) * len(lines) <= 6 * POINTS or most < 32:
            return kept
        most //= 2


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Return the indices of at most `most` values that look like all of them.

    These are both ends, and the lowest and highest value of each section, so that no spike is lost.
    """
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        section = values[start:end]
        kept |= {start + int(section.argmin()), start + int(section.argmax())}
    return np.array(sorted(kept))


def round_up(value: float) -> float:
    """Return the next number that is 1, 2 or 5 times a power of 10."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(times * power for times in (1, 2, 5, 10) if value <= times * power * (1 + 1e-9))


def smoothing_window(steps: int) -> int:
    """Return how many steps to take the mean of: about a 25th of them, rounded, and at least 10."""
    return max(10, round(round_up(steps / 25)))


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` finite values at each index; NaN if there are none."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    count = counts[end] - counts[start]
    return np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)


def medians_of_runs(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (last step, median) of each run of equally many values, and how many these are.

    Unlike a mean, a median does not show the pauses to save.
    """
    size = max(5, round(round_up(max(1, len(values)) / 100)))
    over = len(values) % size
    return (
        steps[over:].reshape(-1, size)[:, -1],
        np.median(values[over:].reshape(-1, size), axis=1),
        size,
    )


# The HTML


def _head(title: str, scripts: Sequence[str]) -> str:
    """Return the page up to its body.

    Its policy lets a browser run these scripts only, and load nothing.
    """
    allowed = " ".join(_digest(script) for script in scripts) or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    style = _asset("report.css")
    if scripts:
        style = _asset("uplot/uPlot.min.css") + style
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title>
<style>{style}</style></head><body>"""


def _digest(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _figure(chart: Chart) -> str:
    kind = ' class="tall"' if chart.title == "Loss" else ""
    unit = f" <small>{chart.unit}</small>" if chart.unit else ""
    note = f'<p class="note">{chart.note}</p>' if chart.note else ""
    return f'<figure{kind}><h2>{chart.title}{unit}</h2><div class="plot"></div>{note}</figure>\n'


def _json(charts: Sequence[Chart]) -> str:
    """Return JSON for a script element: no text in it can end the element."""
    text = json.dumps([asdict(chart) for chart in charts], allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _headline(log: StepLog) -> str:
    if not log.steps:
        return "<p>No step is complete yet.</p>"
    window = smoothing_window(len(log.steps))
    parts = [("step", f"{log.steps[-1]:,}", "")]
    if log.epoch:
        parts.append(("epoch", f"{log.epoch:,}", ""))
    mean = trailing_mean(log.column("loss/current"), window)[-1]
    if math.isfinite(mean):
        parts.append(("loss", f"{mean:.4f}", f"mean of the last {window:,}"))
    for _, losses in list(log.validations.values())[:1]:
        parts.append(("validation loss", f"{losses[-1]:.4f}", f"lowest {min(losses):.4f}"))
    pace = np.array(log.pace)
    pace = pace[np.isfinite(pace)]
    if len(pace):
        parts.append(("median", f"{float(np.median(pace)):.4g} s", "a step"))
    spans = "".join(f"<span>{name} <b>{value}</b> {more}</span>" for name, value, more in parts)
    return f'<p class="headline">{spans}</p>'


def _samples(samples: Sequence[tuple[str, str, bytes]]) -> str:
    """Return a table of the samples: a row per step, a column per prompt."""
    rows: dict[str, dict[tuple[str, int], bytes]] = {}
    columns: dict[tuple[str, int], None] = {}
    for label, prompt, image in samples:
        row = rows.setdefault(label, {})
        earlier = sum(seen == prompt for seen, _ in row)
        row[prompt, earlier] = image
        columns[prompt, earlier] = None
    if not rows:
        return ""
    head = "".join(f"<th><div>{html.escape(prompt)}</div></th>" for prompt, _ in columns)
    body = []
    for label, row in rows.items():
        images = [_image(row[column], label) if column in row else "" for column in columns]
        cells = "".join(f"<td>{image}</td>" for image in images)
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
    cells = [
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows
    ]
    return f'<table class="{name}">{"".join(cells)}</table>'


def _as_text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
