"""Specs of options: their types, values read from text or TOML, and similar names."""

import dataclasses
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TYPO_EDITS = 2  # an unknown key this close to an option is taken for a misspelling


_SAME = object()


@dataclass(frozen=True)
class DatasetKey:
    """How an option is a key of the dataset file.

    Attributes:
        tables: the levels of the tables in which the key may be given: "general", "dataset",
            "subset".
        name: the key, where it isn't the option's name.
        type: the annotation, where the file's type isn't the option's.
        default: the default, where it isn't the option's.
        rules: bounds of option(), where they differ from the option's.
        folders_only: whether only subsets whose captions are files next to the images have the key.
    """

    tables: tuple[str, ...]
    name: str | None = None
    type: Any = _SAME
    default: Any = _SAME
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folders_only: bool = False


@dataclass(frozen=True)
class Spec:
    """What is known about one option.

    Attributes:
        name: without dashes.
        default: its value when nothing sets it.
        kinds: the types that a single value may have, without None.
        is_list: whether it takes several values.
        rules: the arguments of option().
        affects_result: whether a resumed run must use the same value.
        stored_in_image: whether generated images store it.
    """

    name: str
    default: Any
    kinds: tuple[type, ...]
    is_list: bool
    rules: Mapping[str, Any]
    affects_result: bool = True
    stored_in_image: bool = True

    @property
    def is_private(self) -> bool:
        """Whether trackers never get the value."""
        return self.rules["private"] or self.rules["secret"]

    @property
    def dataset_key(self) -> DatasetKey | None:
        return self.rules["dataset_key"]

    def as_dataset_key(self) -> "Spec":
        """Return the spec of the dataset file's key that this option also is."""
        key = self.dataset_key
        assert key is not None
        kinds, is_list, default = self.kinds, self.is_list, self.default
        if key.type is not _SAME:
            kinds, is_list = _kinds(key.type)
        if key.default is not _SAME:
            default = key.default
        return Spec(key.name or self.name, default, kinds, is_list, {**self.rules, **key.rules})

    @property
    def unset_values(self) -> list[Any]:
        return [*self.rules["unset"], *map(str, self.rules["unset"])]

    @property
    def is_switch(self) -> bool:
        return self.kinds == (bool,)


def specs_of(group: type) -> list[Spec]:
    """Return the options that a group declares, in order."""
    hints = typing.get_type_hints(group)
    specs = []
    for field in dataclasses.fields(group):
        kinds, is_list = _kinds(hints[field.name])
        flags = {}
        for name in ("affects_result", "stored_in_image"):
            declared = field.metadata[name]
            flags[name] = getattr(group, name) if declared is None else declared
        specs.append(Spec(field.name, field.default, kinds, is_list, field.metadata, **flags))
    return specs


def _kinds(hint: Any) -> tuple[tuple[type, ...], bool]:
    """Return the types that a single value of an annotation may have, and whether it is a list."""
    if isinstance(hint, types.UnionType):
        all_kinds: list[type] = []
        any_list = False
        for member in typing.get_args(hint):
            if member is not type(None):
                kinds, is_list = _kinds(member)
                all_kinds += kinds
                any_list = any_list or is_list
        return tuple(all_kinds), any_list
    if typing.get_origin(hint) in (tuple, list):
        return (typing.get_args(hint)[0],), True
    return (hint,), False


UNSET = object()
_EXPECTED = {
    (bool,): "true or false",
    (int,): "a whole number",
    (float,): "a number",
    (str,): "text",
    (Path,): "a path",
    (int, float): "a whole number of steps, or a share (0.1 or 10%; all: 100%)",
    (dict,): "a table",
}


def read_value(value: Any, spec: Spec) -> Any:
    """Return the value as the option's type, or UNSET.

    Accepts what real config files contain: whole numbers for floats, 0 and 1 for switches, quoted
    numbers, one value for a list of one. `[]`, "" and, except for switches, false say "not set".

    Raises:
        ValueError: says what is expected.
    """
    if value in ("", []) or value in spec.unset_values or (value is False and not spec.is_switch):
        return UNSET
    if not spec.is_list:
        return _read_single(value, spec)
    items = value if isinstance(value, list) else [value]
    return tuple(_read_single(item, spec) for item in items)


def _read_single(value: Any, spec: Spec) -> Any:
    result = _READERS[spec.kinds](value)
    if result is None:
        raise ValueError(f"expected {_EXPECTED[spec.kinds]}")
    if spec.rules["choices"] is not None and result not in spec.rules["choices"]:
        choices = [str(choice) for choice in spec.rules["choices"]]
        near = nearest(str(result), choices)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"expected one of {', '.join(choices)}{hint}")
    if isinstance(result, float) and not math.isfinite(result):
        raise ValueError("expected a finite number")
    for rule, holds, words in _BOUNDS:
        limit = spec.rules[rule]
        if limit is not None and not holds(result, limit):
            raise ValueError(f"must be {words} {limit:g}")
    return result


_BOUNDS = (
    ("at_least", operator.ge, "at least"),
    ("above", operator.gt, "above"),
    ("at_most", operator.le, "at most"),
)


def _read_bool(value: Any) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def _read_int(value: Any) -> int | None:
    number = _read_float(value)
    if number is None or not math.isfinite(number) or number != int(number):
        return None
    return int(number)


def _read_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _read_text(value: Any) -> str | None:
    return None if isinstance(value, bool | list | dict) else str(value)


def _read_path(value: Any) -> Path | None:
    return Path(value).expanduser() if isinstance(value, str | Path) else None


def _read_table(value: Any) -> dict | None:
    return value if isinstance(value, dict) else None


def _read_steps_or_fraction(value: Any) -> int | float | None:
    """Read 30 as steps, 0.1 and "10%" as a tenth of all; 1.5 is neither, 1.0 could be either."""
    if isinstance(value, str) and value.endswith("%"):
        percent = _read_float(value[:-1])
        if percent is None or not 0 <= percent <= 100:
            return None
        return percent / 100
    number = _read_float(value)
    if number is None or not math.isfinite(number) or number < 0:
        return None
    if number == 1 and (isinstance(value, float) or "." in str(value)):
        return None
    if number == int(number):
        return int(number)
    return number if number < 1 else None


_READERS: dict[tuple[type, ...], Callable[[Any], Any]] = {
    (bool,): _read_bool,
    (int,): _read_int,
    (float,): _read_float,
    (str,): _read_text,
    (Path,): _read_path,
    (int, float): _read_steps_or_fraction,
    (dict,): _read_table,
}


# ----------------------------------------------------------------------------------- similar names


def edits(a: str, b: str) -> int:
    """Return the Levenshtein distance: the single-letter changes between two names."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b, 1):
            replaced = above[j - 1] if x == y else above[j - 1] + 1
            row.append(min(above[j] + 1, row[j - 1] + 1, replaced))
    return row[-1]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name within two edits of `name`, if there is one."""
    similar = [other for other in known if abs(len(other) - len(name)) <= MAX_TYPO_EDITS]
    distances = [(edits(name, other), other) for other in similar]
    distance, other = min(distances, default=(MAX_TYPO_EDITS + 1, ""))
    return other if distance <= MAX_TYPO_EDITS else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that names the nearest known name; empty if there is none."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def as_toml(value: Any) -> str:
    """Return a value as TOML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = [f"{as_toml(key)} = {as_toml(item)}" for key, item in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
