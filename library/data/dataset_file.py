"""The dataset file of --dataset_config: its keys, and the values of its tables. Torch-free.

Source: contract, dataset_config.md section 1.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from library.data.options import DATA_OPTIONS
from library.errors import Mistake, OptionError
from library.option_types import UNSET, DatasetKey, Spec, did_you_mean, read_value, specs_of
from library.options import OptionGroup, option

_ANY_TABLE = DatasetKey(("general", "dataset", "subset"))
_DATASET = DatasetKey(("general", "dataset"))
_SUBSET = DatasetKey(("subset",))


@dataclass(frozen=True)
class _FileKeys(OptionGroup):
    """Keys that have no command-line option."""

    network_multiplier: float = option(1.0, "", dataset_key=_DATASET)
    num_repeats: int = option(1, "", dataset_key=_ANY_TABLE)
    recursive: bool = option(False, "", dataset_key=_ANY_TABLE)
    custom_attributes: dict | None = option(None, "", dataset_key=_ANY_TABLE)
    class_tokens: str | None = option(
        None, "", dataset_key=DatasetKey(_ANY_TABLE.tables, folders_only=True)
    )
    image_dir: Path | None = option(None, "", dataset_key=_SUBSET)
    is_reg: bool = option(False, "", dataset_key=_SUBSET)
    metadata_file: Path | None = option(None, "", dataset_key=_SUBSET)


class FileKey(NamedTuple):
    """A key of the dataset file.

    Attributes:
        spec: type, bounds and default.
        option: the command-line option that gives the default; of the same name if there is none.
        tables: the levels of the tables in which the key may be given.
        folders_only: the key is for captions that are files next to the images.
    """

    spec: Spec
    option: str
    tables: tuple[str, ...]
    folders_only: bool


def _declared_keys() -> dict[str, FileKey]:
    """Return the keys by name, from the declarations of the options."""
    keys = {}
    for group in (*DATA_OPTIONS, _FileKeys):
        for spec in specs_of(group):
            declared = spec.dataset_key
            if declared is not None:
                key = spec.as_dataset_key()
                keys[key.name] = FileKey(key, spec.name, declared.tables, declared.folders_only)
    return keys


KEYS = _declared_keys()
_FOLDER_KEYS = [name for name, key in KEYS.items() if key.folders_only]
_TABLES = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
# Keys for which empty text is a value: class_tokens = "" says that images have no caption.
_MAY_BE_EMPTY = (
    "class_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "caption_prefix",
    "caption_suffix",
)


class SubsetTable(NamedTuple):
    """The values that are given for one subset, and the name of the subset in messages."""

    where: str
    values: Mapping[str, Any]


class DatasetTable(NamedTuple):
    """The values that are given for one dataset, its name in messages, and its subsets."""

    where: str
    values: Mapping[str, Any]
    subsets: Sequence[SubsetTable]


@dataclass
class Problems:
    """What is wrong in a dataset definition, and what the user should know about it.

    Attributes:
        source: the file or option that defines the datasets.
    """

    source: str
    mistakes: list[Mistake] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def mistake(self, where: str, text: str, about: tuple[str, ...] = ()) -> None:
        self.mistakes.append(Mistake(f"{self._prefix(where)}: {text}", about))

    def notice(self, where: str, text: str) -> None:
        self.notices.append(f"{self._prefix(where)}: {text}")

    def _prefix(self, where: str) -> str:
        return f"{self.source}, {where}" if where else self.source


class DatasetFile(NamedTuple):
    """The values in a dataset file, checked one by one."""

    general: Mapping[str, Any]
    datasets: Sequence[DatasetTable]


def read_dataset_file(path: Path, problems: Problems) -> DatasetFile:
    """Return the values in a dataset file. Mistakes in its tables are added to `problems`.

    Raises:
        OptionError: the file can't be read.
    """
    content = _load(path)
    for key in content.keys() - {"general", "datasets"}:
        problems.mistake(
            "top level", f"{key!r} is unknown{did_you_mean(key, ('general', 'datasets'))}"
        )
    general = _read_table("general", "[general]", content.get("general", {}), problems)
    tables = _list_of_tables(content.get("datasets", []), "datasets", problems)
    if not tables:
        problems.mistake("top level", "it defines no [[datasets]]")
    datasets = []
    for i, table in enumerate(tables, 1):
        datasets.append(_read_dataset(f"[[datasets]] {i}", table, problems))
    return DatasetFile(general, datasets)


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".toml":
                return tomllib.loads(text)
            case ".json":
                content = json.loads(text)
                return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        raise OptionError(f"--dataset_config {path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"--dataset_config {path}: can't be read: {error}") from None
    raise OptionError(f"--dataset_config {path}: expected a .toml or .json file")


def _read_dataset(where: str, table: Mapping[str, Any], problems: Problems) -> DatasetTable:
    subset_tables = _list_of_tables(table.get("subsets", []), f"{where}: subsets", problems)
    values = {key: value for key, value in table.items() if key != "subsets"}
    values = _read_table("dataset", where, values, problems)
    if not subset_tables:
        problems.mistake(where, "it has no [[datasets.subsets]]")
    with_metadata = [subset for subset in subset_tables if "metadata_file" in subset]
    if with_metadata and len(with_metadata) < len(subset_tables):
        problems.mistake(
            where,
            "only some subsets have metadata_file; put the others into [[datasets]] of their own",
        )
    if with_metadata:
        _refuse_folder_keys(where, values, problems)
    subsets = []
    for i, subset_table in enumerate(subset_tables, 1):
        subset_where = f"{where}, subset {i}"
        subset_values = _read_table("subset", subset_where, subset_table, problems)
        if with_metadata:
            _refuse_folder_keys(subset_where, subset_values, problems)
        subsets.append(SubsetTable(subset_where, subset_values))
    return DatasetTable(where, values, subsets)


def _read_table(level: str, where: str, table: Any, problems: Problems) -> dict[str, Any]:
    """Return the values of a table that are right."""
    if not isinstance(table, dict):
        problems.mistake(where, f"expected a table, got {table!r}")
        return {}
    values = {}
    for name, raw in table.items():
        if name not in KEYS:
            problems.mistake(where, f"{name!r} is unknown{did_you_mean(name, KEYS)}")
        elif level not in KEYS[name].tables:
            allowed = " or ".join(_TABLES[allowing] for allowing in KEYS[name].tables)
            problems.mistake(where, f"{name!r} belongs in {allowed}")
        elif raw == "" and name in _MAY_BE_EMPTY:
            values[name] = raw
        else:
            try:
                value = read_value(raw, KEYS[name].spec)
            except ValueError as error:
                problems.mistake(where, f"{name}: {error}, got {raw!r}")
                continue
            if value is not UNSET:
                values[name] = value
    return values


def _refuse_folder_keys(where: str, values: Mapping[str, Any], problems: Problems) -> None:
    for name in _FOLDER_KEYS:
        if name in values:
            problems.mistake(
                where, f"{name!r} is for folders of images and can't be used with metadata_file"
            )


def _list_of_tables(value: Any, where: str, problems: Problems) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    problems.mistake(
        where,
        "expected a list of tables: write [[datasets]] and [[datasets.subsets]] with double "
        "brackets",
    )
    return []
