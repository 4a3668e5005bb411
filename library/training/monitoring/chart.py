"""Chart: lines over steps as an HTML figure with an SVG drawing. No script, no torch."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 1500  # of a line; a screen has no more columns
_WIDTH, _HEIGHT = 1000, 300  # of a drawing, in its own units; the page stretches it
_WIDE = 100  # times between the highest and the lowest line, from which on an axis is logarithmic
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """A line of a chart; values that aren't finite are left out.

    Attributes:
        shown: the share of the values, without the farthest ones, that the chart's height must hold.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    color: int = 0
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


def round_up(value: float) -> float:
    """The next number that is 1, 2 or 5 times a power of 10."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(times * power for times in (1, 2, 5, 10) if value <= times * power * (1 + 1e-9))


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


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
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
    most = POINTS if len(lines) <= 6 else 6 * POINTS // len(lines)

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
            f'<span><i class="c{line.color} {line.look}"></i>{html.escape(line.name)} <b>{few_digits(values[-1])}</b></span>'
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


def _drawn(line: Line, points: np.ndarray) -> str:
    """The line in the drawing's units; points [N, 2]."""
    places = [f"{x:.1f},{y:.1f}" for x, y in points.tolist()]
    name = f"<title>{html.escape(line.name)}</title>"
    look = f"{line.look} dense" if len(points) > 600 else line.look
    drawn = f'<polyline class="c{line.color} {look}" points="{" ".join(places)}">{name}</polyline>'
    if len(points) == 1 or (line.look == "dots" and len(points) <= 200):
        dots = "".join(f"M{place}h0" for place in places)  # of no length, but with round ends
        drawn += f'<path class="c{line.color} dot" d="{dots}"/>'
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
    apart = max(1, round_up((last - first) / 8))
    values = [number * apart for number in range(math.ceil(first / apart), math.floor(last / apart) + 1)]
    return _Axis(first, last, [(value, _count(value)) for value in values])


def _value_axis(lines: Sequence[Line], from_zero: bool) -> _Axis:
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
    apart = round_up((high - low) / 6)
    numbers = range(math.ceil(low / apart), math.floor(high / apart) + 1)
    return _Axis(low, high, [(number * apart, _on_axis(number * apart, apart)) for number in numbers])


def _log_axis(low: float, high: float) -> _Axis:
    low, high = low / 1.5, high * 1.5
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    powers = range(first, last + 1, max(1, math.ceil((last - first) / 6)))
    return _Axis(low, high, [(10.0**power, few_digits(10.0**power)) for power in powers], log=True)


def _on_axis(value: float, apart: float) -> str:
    """A value of an axis, with the decimals that tell it from the next."""
    if value == 0:
        return "0"
    if 1e-3 <= apart < 1e4:
        return f"{value:,.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}"
    return few_digits(value)


def few_digits(value: float) -> str:
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
