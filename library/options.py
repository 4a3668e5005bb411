"""Options: dataclass fields that are also options of the command line and of --config_file.

The command line wins over the config file, the config file over defaults. Each package declares its
option groups in its own `options.py`, next to the code that they configure. Nothing here imports
torch, so that all mistakes of a run are reported together, in a fraction of a second.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from library.errors import Mistake, OptionError, RunError
from library.option_reader import OptionReader
from library.option_types import DatasetKey, Spec, as_toml, specs_of


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
    """Declare a dataclass field that is also the option `--<field name>`, of the field's type.

    Args:
        default: the value where neither the command line nor the config file sets the option.
        help: one lower-case phrase: effect, unit, what it excludes. The help printer adds the
            default.
        choices: the accepted values. Like the bounds, they are checked for the command line and for
            TOML.
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
        affects_result: whether options of this group affect what a run learns, unless they say
            otherwise.
        stored_in_image: whether generated images store options of this group, unless they say
            otherwise.
    """

    affects_result: ClassVar[bool] = True
    stored_in_image: ClassVar[bool] = True

    def __init_subclass__(
        cls,
        *,
        affects_result: bool | None = None,
        stored_in_image: bool | None = None,
        **keywords: Any,
    ):
        super().__init_subclass__(**keywords)
        if affects_result is not None:
            cls.affects_result = affects_result
        if stored_in_image is not None:
            cls.stored_in_image = stored_in_image

    def mistakes(self) -> Iterable[Mistake]:
        """Yield contradictions between the options of this group, whose values are valid."""
        return ()

    def __post_init__(self) -> None:
        mistakes = list(self.mistakes())
        if mistakes:
            raise OptionError(*mistakes)


G = TypeVar("G", bound=OptionGroup)


class Options:
    """The options of one run, by group: `options[LossOptions].min_snr_gamma`.

    Attributes:
        notices: what has no effect, to be logged once logging is set up.
    """

    def __init__(
        self, groups: Iterable[OptionGroup], sources: Mapping[str, str], notices: Sequence[str]
    ):
        """Keep the groups.

        Args:
            groups: one instance of each.
            sources: where the user gave each option.
            notices: what has no effect.
        """
        self._groups = {type(group): group for group in groups}
        self._sources = dict(sources)
        self.notices = list(notices)

    def __getitem__(self, group: type[G]) -> G:
        return typing.cast(G, self._groups[group])

    def __contains__(self, group: type[OptionGroup]) -> bool:
        return group in self._groups

    def given(self, name: str) -> bool:
        """Return whether the user set this option, even if to its default."""
        return name in self._sources

    def where(self, name: str) -> str:
        """Return how messages name this option: `--name`, or the line of the config file."""
        return self._sources.get(name, f"--{name}")

    def replaced(self, group: OptionGroup) -> "Options":
        """Return the same options with another instance of one group."""
        groups = {**self._groups, type(group): group}
        return Options(groups.values(), self._sources, self.notices)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and value of each option."""
        for group in self._groups.values():
            for field in dataclasses.fields(group):
                yield field.name, getattr(group, field.name)

    def specs(self) -> Iterator[tuple[Spec, Any]]:
        """Yield what is known about each option, and its value."""
        for group in self._groups.values():
            for spec in specs_of(type(group)):
                yield spec, getattr(group, spec.name)

    def changed(self, keep: Callable[[Spec], bool] = lambda spec: True) -> dict[str, Any]:
        """Return the options that differ from their defaults, without secrets, for TOML.

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
    """Configuration file."""

    config_file: Path | None = option(
        None,
        "TOML file with option values; the command line wins over it; .toml is added when missing",
        private=True,
    )
    output_config: bool = option(
        False, "write the options that differ from their defaults to --config_file, and exit"
    )
    strict_config: bool = option(False, "refuse unknown keys in --config_file, instead of warning")


def read_options(
    description: str,
    groups: Sequence[type[OptionGroup]],
    argv: Sequence[str] | None = None,
    *,
    checks: Sequence[Check] = (),
    refused: Mapping[str, str] | None = None,
    unused: Mapping[str, str] | None = None,
) -> Options:
    """Read the options of `groups` from the command line, --config_file and defaults.

    Exits with status 0 after --help and --output_config.

    Args:
        description: the script's docstring, the head of its --help.
        groups: the script's option groups, in the order of --help.
        argv: the arguments; None: those of the process.
        checks: functions that look for contradictions between groups.
        refused: options of sd-scripts that can't be used, each with the reason and the
            alternative.
        unused: options of sd-scripts that change nothing, each with the reason, which is logged
            when the option is set.

    Raises:
        OptionError: with every mistake.
    """
    all_groups: list[type[OptionGroup]] = [ConfigOptions, *groups]
    specs = {spec.name: spec for group in all_groups for spec in specs_of(group)}
    reader = OptionReader(specs, refused or {}, unused or {})
    reader.read_command_line(description, all_groups, argv)
    if reader.config_file is not None and not reader.writes_config:
        reader.read_toml(reader.config_file)
    values = reader.values()

    instances = [_unchecked(group, values) for group in all_groups]
    options = Options(instances, reader.sources, reader.notices)
    for instance in instances:
        reader.add(instance.mistakes())
    for check in checks:
        reader.add(check(options))
    if reader.mistakes:
        raise OptionError(*reader.mistakes)
    if reader.writes_config:
        write_config(reader.config_file, options)
        raise SystemExit(0)
    return options


def _unchecked(group: type[OptionGroup], values: Mapping[str, Any]) -> OptionGroup:
    """Return an instance whose mistakes the caller collects, instead of raising the first."""
    instance = object.__new__(group)
    for field in dataclasses.fields(group):
        object.__setattr__(instance, field.name, values[field.name])
    return instance


def write_config(path: Path | None, options: Options) -> None:
    """Write the options that differ from their defaults as TOML.

    Raises:
        OptionError: there is no path.
        RunError: the file exists already.
    """
    if path is None:
        raise OptionError("--output_config needs --config_file: the file to write")
    about_the_file = {spec.name for spec in specs_of(ConfigOptions)}
    try:
        with open(path, "x", encoding="utf-8") as file:
            for name, value in options.changed().items():
                if name not in about_the_file:
                    file.write(f"{name} = {as_toml(value)}\n")
    except FileExistsError:
        raise RunError(
            f"--output_config: {path} exists already; remove it or name another --config_file"
        ) from None
    print(f"options written to {path}")
