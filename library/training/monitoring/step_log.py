"""The step log of a run, NAME-log.jsonl, read into columns. This file does not import torch."""

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_MOST = 1 << 62  # a larger number in a log is an error
_VALIDATIONS = [
    ("step", "loss/validation/step_average"),
    ("epoch", "loss/validation/epoch_average"),
]


@dataclass
class StepLog:
    """The values of a step log, in columns as long as `steps`; NaN where a line has no value.

    Attributes:
        columns: by the names in the log.
        pace: the seconds that each step took.
        validations: (steps, losses) by kind: step or epoch.
    """

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    columns: "dict[str, array[float]]" = field(default_factory=dict)
    pace: "array[float]" = field(default_factory=lambda: array("d"))
    validations: "dict[str, tuple[array[int], array[float]]]" = field(default_factory=dict)
    epoch: int = 0
    _keys: Set[str] = frozenset()  # of all lines so far

    def column(self, name: str) -> np.ndarray:
        """Return the values at all steps; all NaN if the log never has this name."""
        if name not in self.columns:
            return np.full(len(self.steps), np.nan)
        values = np.array(self.columns[name])
        return np.where(np.abs(values) < _MOST, values, np.nan)

    def add_step(self, step: int, pace: float, line: Mapping[str, object]) -> None:
        """Append a step.

        A resumed run repeats steps: a step replaces an earlier one and all that came after it.
        """
        if self.steps and step <= self.steps[-1]:
            self._forget(step)
        if line.keys() != self._keys:
            self._add_columns(line)
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

    def _add_columns(self, line: Mapping[str, object]) -> None:
        for name in line:
            is_shown = name in ("loss/current", "grad_norm", "memory_gib") or name.startswith(
                ("lr/", "d*lr/")
            )
            if is_shown and name not in self._keys:
                self.columns[name] = array("d", [math.nan]) * len(self.steps)
        self._keys |= line.keys()


def read_step_log(path: Path) -> StepLog:
    """Read a log. Lines that were cut off and keys that are not known are left out."""
    log = StepLog()
    last_step, last_seconds = 0, math.nan
    for line in _lines(path):
        step = line.get("step")
        if type(step) is not int or not 0 <= step < _MOST:
            continue
        if "loss/current" in line:
            pace, seconds = math.nan, _number(line.get("seconds"))
            # Otherwise a resumed run started its clock again.
            if step > last_step and seconds > last_seconds:
                pace = (seconds - last_seconds) / (step - last_step)
            last_step, last_seconds = step, seconds
            log.add_step(step, pace, line)
            epoch = line.get("epoch")
            log.epoch = epoch if type(epoch) is int else log.epoch
        for kind, name in _VALIDATIONS:
            if name in line and math.isfinite(loss := _number(line[name])):
                log.add_validation(kind, step, loss)
    return log


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a step log as they are.

    Lines that were cut off, as those of a killed run, are left out.
    """
    return [line for line in _lines(path) if type(line.get("step")) is int]


def saved_files(path: Path, session_id: str) -> set[Path]:
    """Return the files that this run was the last to save, according to a step log."""
    sessions: dict[str, object] = {}
    for line in read_log(path):
        names = line.get("saved")
        if isinstance(names, list):
            for name in names:
                sessions[str(name)] = line.get("session")
    return {path.parent / name for name, session in sessions.items() if session == session_id}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
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
    """Return the value, or NaN if it is not a number or not a sensible one."""
    if isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST:
        return float(value)
    return math.nan
