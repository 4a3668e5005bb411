"""Options: dataclass fields that are also command-line options, filled from command line > --config_file > default.

Each room declares its own groups beside the code they configure (its `options.py`). Nothing here imports torch, so a
mistake is told in a fraction of a second, and all mistakes of a run are told together.
"""

import argparse
import dataclasses
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from library.errors import Mistake, OptionError, RunError
from library.foreign_keys import foreign_key
from library.option_types import UNSET, DatasetKey, Spec, as_toml, did_you_mean, nearest, read_value, specs_of

# ------------------------------------------------------------------------------------------------ declaring options


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    unset: Sequence[Any] = (),
    metavar: str | None = None,
    no_effect: str | None = None,
    secret: bool = False,
    private: bool = False,
    affects_result: bool | None = None,
    stored_in_image: bool | None = None,
    dataset_key: DatasetKey | None = None,
) -> Any:
    """Declare a dataclass field that is also the command-line option `--<field name>` of the field's type.

    Args:
        default: the value where neither the command line nor the config file sets the option.
        help: one lower-case phrase: effect, unit, what it excludes. The help printer adds the default.
        choices: the accepted values. Like the bounds, they are checked for the command line and for TOML.
        at_least: the lower bound, inclusive.
        above: the lower bound, exclusive.
        at_most: the upper bound, inclusive.
        unset: values with which real config files say "not set".
        metavar: how --help names the value.
        no_effect: why the option has no effect here; logged in one line when the option is set.
        secret: the value is never logged, written or sent.
        private: the value says something about the user's machine, and is never sent to trackers.
        affects_result: False if a resumed run may use another value. None: as the group says.
        stored_in_image: False if generated images don't store the value. None: as the group says.
        dataset_key: where the option is also a key of the dataset file. None: nowhere.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "unset": tuple(unset),
        "metavar": metavar,
        "no_effect": no_effect,
        "secret": secret,
        "private": private,
        "affects_result": affects_result,
        "stored_in_image": stored_in_image,
        "dataset_key": dataset_key,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class OptionGroup:
    """Base of all option groups: an instance that breaks its own rules can't be made.

    Attributes:
        affects_result: whether options of this group affect what a run learns, unless they say otherwise.
        stored_in_image: whether generated images store options of this group, unless they say otherwise.
    """

    affects_result: ClassVar[bool] = True
    stored_in_image: ClassVar[bool] = True

    def __init_subclass__(
        cls, *, affects_result: bool | None = None, stored_in_image: bool | None = None, **keywords: Any
    ):
        super().__init_subclass__(**keywords)
        if affects_result is not None:
            cls.affects_result = affects_result
        if stored_in_image is not None:
            cls.stored_in_image = stored_in_image

    def mistakes(self) -> Iterable[Mistake]:
        """What is wrong between the options of this group; single values were checked already."""
        return ()

    def __post_init__(self) -> None:
        if found := list(self.mistakes()):
            raise OptionError(*found)


G = TypeVar("G", bound=OptionGroup)


# ------------------------------------------------------------------------------------------------------ the whole run


class Options:
    """The options of one run, by group: `options[LossOptions].min_snr_gamma`."""

    def __init__(self, groups: Iterable[OptionGroup], where: Mapping[str, str], notices: Sequence[str]):
        self._groups = {type(group): group for group in groups}
        self._where = dict(where)
        self.notices = list(notices)

    def __getitem__(self, group: type[G]) -> G:
        return typing.cast(G, self._groups[group])

    def __contains__(self, group: type[OptionGroup]) -> bool:
        return group in self._groups

    def given(self, name: str) -> bool:
        """Whether the user set this option, be it to its default."""
        return name in self._where

    def where(self, name: str) -> str:
        """How to point at this option in a message: `--name`, or the line of the config file that sets it."""
        return self._where.get(name, f"--{name}")

    def replaced(self, group: OptionGroup) -> "Options":
        """The same options with another instance of one group."""
        groups = {**self._groups, type(group): group}
        return Options(groups.values(), self._where, self.notices)

    def items(self) -> Iterator[tuple[str, Any]]:
        for group in self._groups.values():
            for field in dataclasses.fields(group):
                yield field.name, getattr(group, field.name)

    def specs(self) -> Iterator[tuple[Spec, Any]]:
        """Yield what is known about each option, and its value."""
        for group in self._groups.values():
            for spec in specs_of(type(group)):
                yield spec, getattr(group, spec.name)

    def changed(self, keep: Callable[[Spec], bool] = lambda spec: True) -> dict[str, Any]:
        """Return the options that differ from their defaults, without secrets, as values that TOML can hold.

        Args:
            keep: which options to return.
        """
        changed = {}
        for spec, value in self.specs():
            if value == spec.default or spec.rules["secret"] or not keep(spec):
                continue
            if isinstance(value, Path):
                value = str(value)
            changed[spec.name] = list(value) if spec.is_list else value
        return changed


Check = Callable[[Options], Iterable[Mistake]]


@dataclass(frozen=True)
class ConfigOptions(OptionGroup, affects_result=False, stored_in_image=False):
    """Configuration file"""

    config_file: Path | None = option(
        None, "TOML file with option values; the command line wins over it; .toml is added when missing", private=True
    )
    output_config: bool = option(False, "write the options that differ from their defaults to --config_file, and exit")
    strict_config: bool = option(
        False, "refuse every key of --config_file that this script doesn't know, instead of warning"
    )


def read_options(
    description: str,
    groups: Sequence[type[OptionGroup]],
    argv: Sequence[str] | None = None,
    *,
    checks: Sequence[Check] = (),
    refused: Mapping[str, str] | None = None,
    unused: Mapping[str, str] | None = None,
) -> Options:
    """Read the options of `groups` from `argv` over --config_file over defaults.

    Args:
        description: the script's docstring, the head of its --help.
        checks: functions that look for contradictions between groups.
        refused: options of the reference that can't be used, each with the reason and the alternative.
        unused: options of the reference that change nothing, each with the reason; said in one line when set.

    Raises OptionError with every mistake found. Exits 0 after --help and --output_config.
    """
    groups = [ConfigOptions, *groups]
    specs = {spec.name: spec for group in groups for spec in specs_of(group)}
    reader = _Reader(specs, refused or {}, unused or {})
    reader.read_command_line(_make_parser(description, groups, [*reader.refused, *reader.unused]), argv)
    config_file = reader.config_file()
    writing = reader.raw.get("output_config", (False, ""))[0]
    if config_file is not None and not writing:
        reader.read_toml(config_file)
    values = reader.values()

    made = [_unchecked(group, values) for group in groups]
    options = Options(made, {name: where for name, (_, where) in reader.raw.items()}, reader.notices)
    for group in made:
        reader.add(group.mistakes())
    for check in checks:
        reader.add(check(options))
    if reader.mistakes:
        raise OptionError(*reader.mistakes)
    if writing:
        write_config(config_file, options)
        raise SystemExit(0)
    return options


class _Reader:
    """Collects raw values, their places, and every mistake on the way."""

    def __init__(self, specs: Mapping[str, Spec], refused: Mapping[str, str], unused: Mapping[str, str]):
        self.specs = specs
        self.refused = refused
        self.unused = unused
        self.raw: dict[str, tuple[Any, str]] = {}  # option -> value as given, where it was given
        self.mistakes: list[Mistake] = []
        self.notices: list[str] = []
        self.broken: set[str] = set()  # options with a mistake of their own: what follows from them isn't told

    def add(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes += [m for m in mistakes if not self.broken.intersection(m.about)]

    def config_file(self) -> Path | None:
        value = self.raw.get("config_file", (None, ""))[0]
        return None if value is None else Path(value if value.endswith(".toml") else value + ".toml")

    def read_command_line(self, parser: "_Parser", argv: Sequence[str] | None) -> None:
        try:
            given, unknown = parser.parse_known_args(argv)
        except _CommandLineError as error:
            self.mistakes.append(Mistake(f"{error}; see --help"))
            return
        for name, value in vars(given).items():
            self.raw[name] = (value, f"--{name}")
        follows_unknown = False  # the words behind an unknown option are its values
        for word in unknown:
            if word.startswith("-"):
                name = word.lstrip("-").split("=")[0]
                kind = foreign_key(name)
                elsewhere = f"; it is {kind}" if kind else did_you_mean(name, self.specs)
                dashes = "" if word.startswith("--") else " (options start with two dashes)"
                self.mistakes.append(Mistake(f"{word.split('=')[0]} is no option of this script{elsewhere}{dashes}"))
                follows_unknown = True
            elif not follows_unknown:
                self.mistakes.append(Mistake(f"unexpected word {word!r} on the command line; see --help"))

    def read_toml(self, path: Path) -> None:
        """Raises OptionError if the file can't be read at all: what would follow from its absence isn't worth telling."""
        try:
            text = path.read_text(encoding="utf-8-sig")
            tables = tomllib.loads(text)
        except FileNotFoundError:
            raise OptionError(*self.mistakes, f"--config_file {path}: no such file") from None
        except UnicodeDecodeError:
            raise OptionError(*self.mistakes, f"--config_file {path}: it is not UTF-8; save it as UTF-8") from None
        except (OSError, tomllib.TOMLDecodeError) as error:
            hint = "; write Windows paths in 'single quotes', or with /" if "Unescaped" in str(error) else ""
            raise OptionError(*self.mistakes, f"--config_file {path}: can't be read as TOML: {error}{hint}") from None
        values: dict[str, Any] = {}
        for key, value in tables.items():  # section names only group keys for the reader
            values |= value if isinstance(value, dict) else {key: value}
        strict = bool(self.raw.get("strict_config", (False, ""))[0] or values.get("strict_config"))
        foreign = []
        for key, value in values.items():
            where = f"{path}, line {_line_of(text, key)}: {key}"
            if key in self.specs or key in self.refused or key in self.unused:
                self.raw.setdefault(key, (value, where))
            elif foreign_key(key) is None and nearest(key, self.specs):
                self.mistakes.append(Mistake(f"{where} is no option of this script{did_you_mean(key, self.specs)}"))
            elif strict:
                why = foreign_key(key) or "unknown"
                self.mistakes.append(
                    Mistake(f"{where} is no option of this script ({why}), and --strict_config is set")
                )
            else:
                kind = foreign_key(key)
                foreign.append(f"{key} ({kind})" if kind else key)
        if foreign:
            self.notices.append(f"{path}: no options of this script, ignored: {', '.join(sorted(foreign))}")

    def values(self) -> dict[str, Any]:
        """The value of every option; a broken one has its default, and a mistake."""
        values = {name: spec.default for name, spec in self.specs.items()}
        idle: dict[str, list[str]] = {}  # reason -> options
        for name, (value, where) in list(self.raw.items()):
            if name in self.refused:
                if value not in (False, 0, "", "0", [], None):
                    self.mistakes.append(Mistake(f"{where}: {self.refused[name]}"))
                continue
            if name in self.unused:
                if value not in (False, "", []):
                    idle.setdefault(self.unused[name], []).append(name)
                continue
            spec = self.specs[name]
            try:
                read = read_value(value, spec)
            except ValueError as error:
                got = "something else" if spec.rules["secret"] else repr(value)
                self.mistakes.append(Mistake(f"{where}: {error}, got {got}"))
                self.broken.add(name)
                continue
            if read is UNSET:
                del self.raw[name]
                continue
            values[name] = read
            if spec.rules["no_effect"] and read != spec.default:
                self.notices.append(f"{where} changes nothing: {spec.rules['no_effect']}")
        if idle:
            told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in idle.items())
            self.notices.append(f"these options change nothing here: {told}")
        return values


def _unchecked(group: type[OptionGroup], values: Mapping[str, Any]) -> OptionGroup:
    """An instance whose rules the caller checks, so that all mistakes can be collected before any is raised."""
    made = object.__new__(group)
    for field in dataclasses.fields(group):
        object.__setattr__(made, field.name, values[field.name])
    return made


def _line_of(text: str, key: str) -> int:
    """The line that sets `key` last, as later sections win; 1 if the key is spelt in a way that isn't searched for."""
    lines = [
        n for n, line in enumerate(text.splitlines(), 1) if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line)
    ]
    return lines[-1] if lines else 1


def write_config(path: Path | None, options: Options) -> None:
    """Write the options that differ from their defaults as TOML. Raises RunError if the file exists already."""
    if path is None:
        raise OptionError("--output_config needs --config_file: the file to write")
    try:
        about_the_file = {spec.name for spec in specs_of(ConfigOptions)}
        with open(path, "x", encoding="utf-8") as file:
            for name, value in options.changed().items():
                if name not in about_the_file:
                    file.write(f"{name} = {as_toml(value)}\n")
    except FileExistsError:
        raise RunError(f"--output_config: {path} exists already; remove it or name another --config_file") from None
    print(f"options written to {path}")


# ------------------------------------------------------------------------------------------------- argparse, and main


class _CommandLineError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise _CommandLineError(message)


def _make_parser(description: str, groups: Sequence[type[OptionGroup]], hidden: Iterable[str]) -> _Parser:
    """A parser that only splits words: types and choices are checked by read_value, for command line and TOML alike."""
    parser = _Parser(
        usage="%(prog)s [options]",
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    for group in groups:
        title = (group.__doc__ or "").splitlines()[0].rstrip(".")
        section = parser.add_argument_group(title)
        for spec in specs_of(group):
            text = _help(spec)
            if spec.is_switch:
                section.add_argument(f"--{spec.name}", action="store_true", help=text)
            else:
                nargs = "*" if spec.is_list else None
                metavar = spec.rules["metavar"] or (
                    None if spec.rules["choices"] is None else "{" + ",".join(map(str, spec.rules["choices"])) + "}"
                )
                section.add_argument(
                    f"--{spec.name}", nargs=nargs, help=text, metavar=metavar or _METAVARS.get(spec.kinds, "VALUE")
                )
    for name in hidden:
        parser.add_argument(f"--{name}", nargs="*", action=_GivenAtAll, help=argparse.SUPPRESS)
    return parser


_METAVARS = {(int,): "N", (float,): "X", (str,): "TEXT", (Path,): "PATH", (int, float): "N"}


class _GivenAtAll(argparse.Action):
    """A refused or unused option: whatever follows it, it was given."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001 - argparse's signature
        setattr(namespace, self.dest, values or True)


def _help(spec: Spec) -> str:
    default = "" if spec.default in (None, False, "") else f" (default: {spec.default})"
    no_effect = f"; changes nothing here: {spec.rules['no_effect']}" if spec.rules["no_effect"] else ""
    return (spec.rules["help"] + no_effect + default).replace("%", "%%")
