"""StepLog: a run's step log, NAME-log.jsonl, in columns. No torch here."""

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_MOST = 1 << 62  # beyond, a number in a log is none
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
