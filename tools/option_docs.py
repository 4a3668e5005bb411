"""Write docs/options.md: every option of every script, as the scripts themselves declare them.

python tools/option_docs.py
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import RunError, run
from library.files import write_atomically
from library.option_types import Spec, specs_of
from library.options import Check, ConfigOptions, OptionGroup, option, read_options
from tools.metadata_tool import ToolParser

# In the order of the page. A new script is one line here.
SCRIPTS = (
    "sdxl_train.py",
    "sdxl_train_network.py",
    "sdxl_train_textual_inversion.py",
    "sdxl_train_control_net_lllite.py",
    "sdxl_gen_img.py",
    "tools/cache_latents.py",
    "tools/cache_text_encoder_outputs.py",
    "prepare_buckets_latents.py",
    "tools/merge_captions_to_metadata.py",
    "tools/merge_dd_tags_to_metadata.py",
    "tools/clean_captions_and_tags.py",
    "tools/before_after.py",
    "tools/make_tiny_sdxl.py",
    "tools/make_tiny_dataset.py",
    "tools/option_docs.py",
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"

_HEAD = """# Options

Made by `make docs` from what the scripts declare; each script's `--help` prints the same. What they do together is in
[training.md](training.md) and [dataset.md](dataset.md).

An option is given on the command line (`--name value`, a switch as `--name`, a list as several words) or, where a script has `--config_file`, as
`name = value` in that TOML file; section names there only group. The command line wins over the file, the file over the default. In the file
`""`, `[]` and, for options that aren't switches, `false` mean "not set". A "–" as default means that nothing is set.

Where a value counts steps or is a share of them, `30` is 30 steps and `0.1` or `"10%"` a tenth of all.
"""


@dataclass(frozen=True)
class DocsOptions(OptionGroup):
    """The page."""

    check: bool = option(
        False, "write nothing; exit with status 1 if docs/options.md isn't what the scripts declare"
    )


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__ or "", [DocsOptions], argv)[DocsOptions]
    text = page()
    if not chosen.check:
        write_atomically(PAGE, lambda file: file.write(text.encode()))
        print(f"{PAGE.relative_to(ROOT)}: {len(SCRIPTS)} scripts")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise RunError(f"{PAGE.relative_to(ROOT)} is not what the scripts declare; run: make docs")


# ---------------------------------------------------------------------------------------------- what a script declares


@dataclass(frozen=True)
class Declared:
    """What a script reads: option groups, or words of a plain parser.

    Attributes:
        checks: functions that look for contradictions between the groups.
        refused, unused: options that end the run, and that change nothing, with the reason.
    """

    script: str
    description: str
    groups: Sequence[type[OptionGroup]] = ()
    checks: Sequence[Check] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    parser: argparse.ArgumentParser | None = None

    @property
    def specs(self) -> dict[str, Spec]:
        return {spec.name: spec for group in self.groups for spec in specs_of(group)}

    @property
    def names(self) -> set[str]:
        """The options that it knows, be they refused."""
        words = (
            [word for action in _arguments(self.parser) for word in action.option_strings]
            if self.parser
            else []
        )
        return {
            *self.specs,
            *self.refused,
            *self.unused,
            *(word.removeprefix("--") for word in words),
        }


class _Stopped(Exception):
    def __init__(self, declared: Declared):
        self.declared = declared


def declared_by(script: str) -> Declared:
    """What the script's main() asks to have read. It is stopped there, so nothing is read and nothing runs."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))

    def stop(
        description: str,
        groups: Sequence[type[OptionGroup]],
        argv: Sequence[str] | None = None,
        *,
        checks: Sequence[Check] = (),
        refused: Mapping[str, str] | None = None,
        unused: Mapping[str, str] | None = None,
    ) -> NoReturn:
        raise _Stopped(
            Declared(
                script, description, [ConfigOptions, *groups], checks, refused or {}, unused or {}
            )
        )

    def stop_parser(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise _Stopped(Declared(script, parser.description or "", parser=parser))

    ours = [m for name, m in sys.modules.items() if name.startswith(("library.", module.__name__))]
    with ExitStack() as patches:
        for one in ours:
            if getattr(one, "read_options", None) is read_options:
                patches.enter_context(patch.object(one, "read_options", stop))
        for door in ("parse_args", "parse_intermixed_args"):
            patches.enter_context(patch.object(ToolParser, door, stop_parser))
        try:
            module.main([])
        except _Stopped as stopped:
            return stopped.declared
    raise AssertionError(f"{script}: main() read no options")


# -------------------------------------------------------------------------------------------------------------- the page


def page() -> str:
    """Return the page. A group of several scripts is described once, after the scripts."""
    scripts = [declared_by(script) for script in SCRIPTS]
    users: dict[type[OptionGroup], list[str]] = {}
    for declared in scripts:
        for group in declared.groups:
            users.setdefault(group, []).append(declared.script)
    shared = [group for group, names in users.items() if len(names) > 1]
    lines = [_HEAD, *(f"- {_link(declared.script)}: {_summary(declared)}" for declared in scripts)]
    for number, declared in enumerate(scripts):
        before, after = scripts[:number], scripts[number + 1 :]
        lines += [
            "",
            f"## {declared.script}",
            *_about(declared.description),
            *_options(declared, shared),
        ]
        refused = {other.script: other.refused for other in before}
        lines += _by_reason(
            "Refused: these end the run before it starts.", declared.refused, refused
        )
        unused = {other.script: other.unused for other in before}
        listed = {name for other in before for name in other.names} | {
            name for other in after for name in other.specs
        }
        lines += _by_reason(
            "Without effect: these change nothing, and give a notice.",
            declared.unused,
            unused,
            listed,
        )
    lines += ["", "## Groups of several scripts"]
    for group in shared:
        lines += _group(group)
    return "\n".join(lines) + "\n"


def _options(declared: Declared, shared: Sequence[type[OptionGroup]]) -> Iterator[str]:
    if declared.parser is not None:
        yield from ("", *_table("argument", map(_argument_row, _arguments(declared.parser))))
        return
    if linked := [_link(_title(group)) for group in declared.groups if group in shared]:
        yield from ("", f"Described below, as other scripts have them too: {', '.join(linked)}.")
    for group in declared.groups:
        if group not in shared:
            yield from _group(group)


def _group(group: type[OptionGroup]) -> Iterator[str]:
    yield from ("", f"### {_title(group)}", "", *_table("option", map(_spec_row, specs_of(group))))


def _title(group: type[OptionGroup]) -> str:
    return (group.__doc__ or "").splitlines()[0].rstrip(".")


def _about(description: str) -> Iterator[str]:
    """A script's docstring: its words, and the commands in it as a block."""
    for paragraph in re.split(r"\n\s*\n", description.strip()):
        is_command = re.match(r"\s*(python|accelerate) ", paragraph)
        yield from (
            ("", "```sh", paragraph.strip(), "```") if is_command else ("", paragraph.strip())
        )


def _summary(declared: Declared) -> str:
    return re.split(r"[:.](?:\s|$)", declared.description.strip())[0]


def _by_reason(
    head: str,
    reasons: Mapping[str, str],
    before: Mapping[str, Mapping[str, str]],
    listed: Iterable[str] = (),
) -> Iterator[str]:
    """Options with one reason in one line.

    Args:
        before: the same of the scripts above; where one is equal, a link to it is enough.
        listed: names that are on the page already, and needn't be listed again.
    """
    if not reasons:
        return
    if same := next((script for script, others in before.items() if others == reasons), None):
        yield from ("", f"{head.partition(':')[0]}: the same as in {_link(same)}.")
        return
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    yield from ("", head, "")
    for reason, members in names.items():
        own = [f"`{name}`" for name in sorted(set(members) - set(listed))]
        others = ["options of other scripts on this page"] if len(own) < len(members) else []
        yield f"- {', '.join([*own, *others])}: {_marked(reason)}"


def _table(what: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {what} | value | default | meaning |"
    yield "|---|---|---|---|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _spec_row(spec: Spec) -> tuple[str, str, str, str]:
    no_effect = spec.rules["no_effect"]
    meaning = "; ".join(
        filter(None, (spec.rules["help"], no_effect and f"changes nothing here: {no_effect}"))
    )
    default = (
        "–"
        if spec.default is None or spec.default == ""
        else "off"
        if spec.is_switch
        else f"`{spec.default}`"
    )
    return f"`--{spec.name}`", _value(spec), default, _marked(meaning)


_KINDS = {
    (bool,): "switch", (int,): "whole number", (float,): "number", (str,): "text", (Path,): "path",
    (int, float): "steps, or a share of them",
}  # fmt: skip


def _value(spec: Spec) -> str:
    """What the option takes: its type or choices, its range, and what means "not set"."""
    rules = spec.rules
    if rules["choices"] is not None:
        value = " ".join(f"`{choice}`" for choice in rules["choices"])
    else:
        value = f"`{rules['metavar']}`" if "=" in (rules["metavar"] or "") else _KINDS[spec.kinds]
    limits = [
        f"{sign} {rules[rule]}"
        for rule, sign in (("at_least", "≥"), ("above", ">"), ("at_most", "≤"))
        if rules[rule] is not None
    ]
    ranged = f"{value} {', '.join(limits)}".strip()
    several = f"{ranged}; one or more" if spec.is_list else ranged
    unset = dict.fromkeys(
        f"`{one:g}`" if isinstance(one, float) else f"`{one}`" for one in rules["unset"]
    )
    return f"{several}; {', '.join(unset)}: not set" if unset else several


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.help is not argparse.SUPPRESS and a.dest != "help"]


def _argument_row(action: argparse.Action) -> tuple[str, str, str, str]:
    name = f"`{action.option_strings[0]}`" if action.option_strings else f"`{action.dest}`"
    value = (
        " ".join(f"`{choice}`" for choice in action.choices or ()) or _KINDS[(action.type or str,)]
    )
    is_switch = action.nargs == 0
    default = "required" if action.required else "off" if is_switch else f"`{action.default}`"
    meaning = re.sub(r" \(default: .*\)$", "", action.help or "")
    is_unset = action.default is None or action.default == ""
    return (
        name,
        "switch" if is_switch else value,
        default if action.required or not is_unset else "–",
        _marked(meaning),
    )


def _marked(text: str) -> str:
    """Options in `code`, and nothing that Markdown would take for its own."""
    escaped = re.sub(r"([|<*])", r"\\\1", text)
    return re.sub(r"(?<![\w`])--\w+", r"`\g<0>`", escaped)


def _link(heading: str) -> str:
    return f"[{heading.partition(' (')[0]}](#{slug(heading)})"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    run(main)
