"""OptionReader: option values from the command line and --config_file, and all mistakes in them."""

import argparse
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.errors import Mistake, OptionError
from library.foreign_keys import foreign_key
from library.option_types import UNSET, Spec, did_you_mean, nearest, read_value, specs_of

_OFF: tuple[Any, ...] = (False, 0, "", "0", [], None)
_UNSET: tuple[Any, ...] = (False, "", [])


class OptionReader:
    """Collects raw values, where each was given, and every mistake on the way.

    Attributes:
        raw: values as given, and where, by option.
        mistakes: what is wrong so far.
        notices: what has no effect.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        unsupported: Mapping[str, str],
        no_effect: Mapping[str, str],
    ):
        """Start without values.

        Args:
            specs: the options of the script, by name.
            unsupported: other options that are mistakes, with the reason.
            no_effect: other options that have no effect, with the reason.
        """
        self.raw: dict[str, tuple[Any, str]] = {}
        self.mistakes: list[Mistake] = []
        self.notices: list[str] = []
        self._specs, self._unsupported, self._no_effect = specs, unsupported, no_effect
        self._invalid: set[str] = set()  # mistakes that follow from those of these aren't reported

    def add(self, mistakes: Iterable[Mistake]) -> None:
        """Add mistakes, except those that only follow from an invalid value."""
        self.mistakes += [m for m in mistakes if not self._invalid.intersection(m.about)]

    @property
    def sources(self) -> dict[str, str]:
        """Where each option was given."""
        return {name: source for name, (_, source) in self.raw.items()}

    @property
    def config_file(self) -> Path | None:
        """The path given by --config_file, with its suffix."""
        value = self._raw_value("config_file")
        if value is None:
            return None
        return Path(value if value.endswith(".toml") else f"{value}.toml")

    @property
    def writes_config(self) -> bool:
        """Whether --output_config is given."""
        return bool(self._raw_value("output_config"))

    def _raw_value(self, name: str) -> Any:
        return self.raw.get(name, (None, ""))[0]

    # ------------------------------------------------------------------------------ command line

    def read_command_line(
        self, description: str, groups: Sequence[type], argv: Sequence[str] | None
    ) -> None:
        """Read the command line. Exits with status 0 after --help.

        Args:
            description: the head of --help.
            groups: the option groups, in the order of --help.
            argv: the arguments; None: those of the process.
        """
        parser = _make_parser(description, groups, [*self._unsupported, *self._no_effect])
        try:
            given, unknown = parser.parse_known_args(argv)
        except _CommandLineError as error:
            self.mistakes.append(Mistake(f"{error}; see --help"))
            return
        for name, value in vars(given).items():
            self.raw[name] = (value, f"--{name}")
        follows_unknown = False  # the words after an unknown option are its values
        for word in unknown:
            if word.startswith("-"):
                self.mistakes.append(Mistake(self._unknown_option(word)))
                follows_unknown = True
            elif not follows_unknown:
                self.mistakes.append(
                    Mistake(f"unexpected word {word!r} on the command line; see --help")
                )

    def _unknown_option(self, word: str) -> str:
        name = word.lstrip("-").split("=")[0]
        kind = None if name in self._specs else foreign_key(name)  # a known name lacks a dash
        hint = f"; it is {kind}" if kind else did_you_mean(name, self._specs)
        dashes = "" if word.startswith("--") else " (options start with two dashes)"
        return f"{word.split('=')[0]} is not an option of this script{hint}{dashes}"

    # --------------------------------------------------------------------------------- TOML file

    def read_toml(self, path: Path) -> None:
        """Read the config file; what the command line gave wins.

        Raises:
            OptionError: the file can't be read. What follows from its absence isn't reported.
        """
        text = self._text_of(path)
        values = self._parse(path, text)
        is_strict = bool(self._raw_value("strict_config") or values.get("strict_config"))
        foreign = []
        for key, value in values.items():
            source = f"{path}, line {_line_of(text, key)}: {key}"
            if key in self._specs or key in self._unsupported or key in self._no_effect:
                self.raw.setdefault(key, (value, source))
                continue
            kind = foreign_key(key)
            if kind is None and nearest(key, self._specs):
                hint = did_you_mean(key, self._specs)
                self.mistakes.append(Mistake(f"{source} is not an option of this script{hint}"))
            elif is_strict:
                self.mistakes.append(
                    Mistake(
                        f"{source} is not an option of this script ({kind or 'unknown'}), and "
                        "--strict_config is set"
                    )
                )
            else:
                foreign.append(f"{key} ({kind})" if kind else key)
        if foreign:
            keys = ", ".join(sorted(foreign))
            self.notices.append(f"{path}: ignored, as they are not options of this script: {keys}")

    def _text_of(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise self._error(f"--config_file {path}: no such file") from None
        except UnicodeDecodeError:
            raise self._error(f"--config_file {path}: it is not UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise self._error(f"--config_file {path}: can't be read as TOML: {error}") from None

    def _parse(self, path: Path, text: str) -> dict[str, Any]:
        """Return the values of all sections: their names only group keys for the user."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            hint = ""
            if "Unescaped" in str(error):
                hint = "; write Windows paths in 'single quotes', or with /"
            raise self._error(
                f"--config_file {path}: can't be read as TOML: {error}{hint}"
            ) from None
        values: dict[str, Any] = {}
        for key, value in tables.items():
            values |= value if isinstance(value, dict) else {key: value}
        return values

    def _error(self, text: str) -> OptionError:
        return OptionError(*self.mistakes, text)

    # ------------------------------------------------------------------------------------ values

    def values(self) -> dict[str, Any]:
        """Return the value of every option; that of an invalid one is its default."""
        values = {name: spec.default for name, spec in self._specs.items()}
        without_effect: dict[str, list[str]] = {}  # reason -> options
        for name, (value, source) in list(self.raw.items()):
            if name in self._unsupported:
                if value not in _OFF:
                    self.mistakes.append(Mistake(f"{source}: {self._unsupported[name]}"))
            elif name in self._no_effect:
                if value not in _UNSET:
                    without_effect.setdefault(self._no_effect[name], []).append(name)
            else:
                values[name] = self._checked(self._specs[name], value, source)
        if without_effect:
            reasons = [f"{', '.join(names)} ({why})" for why, names in without_effect.items()]
            self.notices.append(f"these options change nothing here: {'; '.join(reasons)}")
        return values

    def _checked(self, spec: Spec, value: Any, source: str) -> Any:
        """Return a value as the option's type; the default where it is unset or invalid."""
        try:
            checked = read_value(value, spec)
        except ValueError as error:
            shown = "something else" if spec.rules["secret"] else repr(value)
            self.mistakes.append(Mistake(f"{source}: {error}, got {shown}"))
            self._invalid.add(spec.name)
            return spec.default
        if checked is UNSET:
            del self.raw[spec.name]
            return spec.default
        if spec.rules["no_effect"] and checked != spec.default:
            self.notices.append(f"{source} changes nothing: {spec.rules['no_effect']}")
        return checked


def _line_of(text: str, key: str) -> int:
    """Return the line that sets `key` last, as later sections win; 1 for unusual spellings."""
    pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
    last = 1
    for i, line in enumerate(text.splitlines(), 1):
        if pattern.match(line):
            last = i
    return last


# ---------------------------------------------------------------------------------------- argparse


class _CommandLineError(Exception):
    """The command line can't be split into options and values."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise _CommandLineError(message)


class _WasGiven(argparse.Action):
    """Notes that an unsupported option is given, with or without values."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001 - argparse's
        setattr(namespace, self.dest, values or True)


def _make_parser(description: str, groups: Sequence[type], hidden: Iterable[str]) -> _Parser:
    """Return a parser that only splits words: read_value checks types and choices."""
    parser = _Parser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for group in groups:
        title = (group.__doc__ or "").splitlines()[0].rstrip(".")
        section = parser.add_argument_group(title)
        for spec in specs_of(group):
            if spec.is_switch:
                section.add_argument(f"--{spec.name}", action="store_true", help=_help(spec))
            else:
                section.add_argument(
                    f"--{spec.name}",
                    nargs="*" if spec.is_list else None,
                    metavar=_metavar(spec),
                    help=_help(spec),
                )
    for name in hidden:
        parser.add_argument(f"--{name}", nargs="*", action=_WasGiven, help=argparse.SUPPRESS)
    return parser


_METAVARS = {(int,): "N", (float,): "X", (str,): "TEXT", (Path,): "PATH", (int, float): "N"}


def _metavar(spec: Spec) -> str:
    if spec.rules["metavar"]:
        return spec.rules["metavar"]
    if spec.rules["choices"] is not None:
        return "{" + ",".join(map(str, spec.rules["choices"])) + "}"
    return _METAVARS.get(spec.kinds, "VALUE")


def _help(spec: Spec) -> str:
    text = spec.rules["help"]
    if spec.rules["no_effect"]:
        text += f"; changes nothing here: {spec.rules['no_effect']}"
    if spec.default not in (None, False, ""):
        text += f" (default: {spec.default})"
    return text.replace("%", "%%")
