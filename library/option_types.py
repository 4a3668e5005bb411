"""Values of options: what each option takes, reading it from text or TOML, and near misses of names."""

import dataclasses
import json
import math
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
        tables: the levels of the tables in which the key may be given: "general", "dataset", "subset".
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
    if isinstance(hint, types.UnionType):
        parts = [_kinds(arg) for arg in typing.get_args(hint) if arg is not type(None)]
        return tuple(kind for kinds, _ in parts for kind in kinds), any(is_list for _, is_list in parts)
    if typing.get_origin(hint) in (tuple, list):
        return (typing.get_args(hint)[0],), True
    return (hint,), False


UNSET = object()
_WANTED = {
    (bool,): "true or false", (int,): "a whole number", (float,): "a number", (str,): "text", (Path,): "a path",
    (int, float): "a whole number of steps, or a share (0.1 or 10%; all: 100%)", (dict,): "a table",
}  # fmt: skip


def read_value(value: Any, spec: Spec) -> Any:
    """The value as the option's type, or UNSET. Raises ValueError with what was expected.

    Takes what real config files carry: whole numbers for floats, 0 and 1 for switches, quoted numbers, one value for a
    list of one; `[]`, "" and (for what is no switch) false say "not set".
    """
    if value in ("", []) or value in spec.unset_values or (value is False and not spec.is_switch):
        return UNSET
    if not spec.is_list:
        return _read_single(value, spec)
    items = value if isinstance(value, list) else [value]
    return tuple(_read_single(item, spec) for item in items)


def _read_single(value: Any, spec: Spec) -> Any:
    read = _READERS[spec.kinds](value)
    if read is None:
        raise ValueError(f"expected {_WANTED[spec.kinds]}")
    rules = spec.rules
    if rules["choices"] is not None and read not in rules["choices"]:
        near = nearest(str(read), [str(choice) for choice in rules["choices"]])
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"expected one of {', '.join(str(choice) for choice in rules['choices'])}{hint}")
    if isinstance(read, float) and not math.isfinite(read):
        raise ValueError("expected a finite number")
    for rule, holds, words in (
        ("at_least", lambda limit: read >= limit, "at least"),
        ("above", lambda limit: read > limit, "above"),
        ("at_most", lambda limit: read <= limit, "at most"),
    ):
        if rules[rule] is not None and not holds(rules[rule]):
            raise ValueError(f"must be {words} {rules[rule]:g}")
    return read


def _read_bool(value: Any) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def _read_int(value: Any) -> int | None:
    number = _read_float(value)
    return int(number) if number is not None and math.isfinite(number) and number == int(number) else None


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


def _read_steps_or_share(value: Any) -> int | float | None:
    """30 is 30 steps; 0.1 and "10%" are a tenth of all; 1.5 is neither, and 1.0 could be either."""
    if isinstance(value, str) and value.endswith("%"):
        share = _read_float(value[:-1])
        return None if share is None or not 0 <= share <= 100 else share / 100
    number = _read_float(value)
    if number is None or not math.isfinite(number) or number < 0:
        return None
    if number == 1 and (isinstance(value, float) or "." in str(value)):
        return None
    return int(number) if number == int(number) else number if number < 1 else None


_READERS: dict[tuple[type, ...], Callable[[Any], Any]] = {
    (bool,): _read_bool, (int,): _read_int, (float,): _read_float, (str,): _read_text, (Path,): _read_path,
    (int, float): _read_steps_or_share, (dict,): _read_table,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- names and nearness


def edits(a: str, b: str) -> int:
    """Levenshtein distance: the single-letter changes between two names."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name within two edits of `name`, if there is one."""
    close = [(edits(name, other), other) for other in known if abs(len(other) - len(name)) <= MAX_TYPO_EDITS]
    distance, other = min(close, default=(MAX_TYPO_EDITS + 1, ""))
    return other if distance <= MAX_TYPO_EDITS else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def as_toml(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{as_toml(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
