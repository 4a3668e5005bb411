"""The pages hold: docs/options.md is what the scripts declare; configs, dataset files, commands, options and links work.

A block of code is checked by its language (sh, bash: commands) or by the comment above it: `<!-- KIND: tested -->`, with a KIND
of CHECKS below. One that can't be checked says `<!-- not tested: reason -->`. A file in configs/ says it in its first line.
"""

import importlib
import inspect
import json
import re
import shlex
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from messages import mentioning

from library.data.dataset_config import read_datasets
from library.data.options import DATA_OPTIONS
from library.errors import OptionError, RunError
from library.generation.prompts.line import LINE_OPTIONS
from library.generation.sample_prompts import INLINE_OPTIONS, read_sample_prompts
from library.option_types import read_value
from library.options import read_options
from library.training.monitoring.trackers import read_tracker_config
from library.training.options.objective import LossOptions
from tools.option_docs import PAGE, SCRIPTS, Declared, declared_by, main, page, slug

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
TRAINING = "sdxl_train_network.py"

# Scripts without options, or for those who work on the suite.
OFF_THE_PAGE = {"tools/quickstart.py"}
# Pages for users: every option that they name exists. differences.md speaks of those of sd-scripts too.
NAMES_OPTIONS = [
    "README.md",
    "docs/dataset.md",
    "docs/training.md",
    "docs/fine_tune.md",
    "docs/memory.md",
    "docs/generate.md",
]
PROGRAMS = {"pip", "tensorboard", "wandb", "hf"}  # not ours, so their words aren't checked
MODULES = {"venv", "pip", "pytest"}


# ------------------------------------------------------------------------------------------------------ the option page


def test_the_option_page_is_what_the_scripts_declare():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make docs"


def test_check_tells_a_stale_page_and_writes_nothing(monkeypatch, tmp_path):
    stale = tmp_path / "options.md"
    stale.write_text("# Options\n", encoding="utf-8")
    monkeypatch.setattr("tools.option_docs.PAGE", stale)
    monkeypatch.setattr("tools.option_docs.ROOT", tmp_path)
    with pytest.raises(RunError, match=mentioning("options.md", "make docs")):
        main(["--check"])
    assert stale.read_text(encoding="utf-8") == "# Options\n"
    main([])
    main(["--check"])


def test_every_script_is_on_the_option_page():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"))
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert found - OFF_THE_PAGE == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_declares_is_what_its_help_tells(script, capsys):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    declared = declared_by(script)
    told = set(re.findall(r"^  (?:-h, )?--(\w+)", capsys.readouterr().out, re.MULTILINE)) - {"help"}
    assert told == declared.names - set(declared.refused) - set(declared.unused)


# ----------------------------------------------------------------------------------------------------- blocks of the pages


class Block(NamedTuple):
    """Code of a page. Attributes: line: where it starts; marker: the comment above it, or ""."""

    page: Path
    line: int
    language: str
    marker: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line == "```":
            comment = re.fullmatch(r"<!-- (.*) -->", lines[start - 1]) if start else None
            text = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(
                Block(
                    path, start + 1, lines[start][3:].strip(), comment[1] if comment else "", text
                )
            )
            start = None
    assert start is None, f"{path}:{start}: the block isn't closed"
    return found


def block_of_config(path: Path) -> Block:
    """The whole file. Its first line says `# sdxl_train_network.py: …`, or `(part)` before the colon, or `# dataset: …`."""
    text = path.read_text(encoding="utf-8")
    first = re.match(r"# (?:(\S+\.py)|(\w+))( \(part\))?:", text)
    assert first, f"{path}: the first line must name the script that it is for"
    kind = first[2] or ("config part" if first[3] else "config")
    return Block(path, 1, "toml", f"{kind}{' ' + first[1] if first[1] else ''}: tested", text)


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


@pytest.mark.parametrize(
    "block", [*BLOCKS, *map(block_of_config, CONFIGS)], ids=lambda block: block.name
)
def test_a_block_of_code_holds(block, tmp_path, monkeypatch):
    if block.language in ("sh", "bash"):
        for line in filter(str.strip, block.text.splitlines()):
            check_command(line)
        return
    if reason := re.fullmatch(r"not tested: (.+)", block.marker):
        assert len(reason[1]) > 3
        return
    kind = re.fullmatch(r"([\w ]+?)(?: (\S+\.py))?: tested", block.marker)
    assert kind and kind[1] in CHECKS, (
        f"{block.name}: above it must stand <!-- {' | '.join(CHECKS)}: tested --> or <!-- not tested: reason -->"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    CHECKS[kind[1]](block, kind[2] or TRAINING)


def check_config(block: Block, script: str) -> None:
    """A whole config file of a script: read without a mistake, and without a word on options that do nothing."""
    make_stand_ins(tomllib.loads(block.text))
    Path("run.toml").write_text(block.text, encoding="utf-8")
    declared = declared_by(script)
    try:
        options = read_options(
            "", declared.groups[1:], ["--config_file", "run.toml"],
            checks=declared.checks, refused=declared.refused, unused=declared.unused,
        )  # fmt: skip
    except OptionError as error:
        raise AssertionError(f"{block.name}: {error}") from None
    assert not options.notices, f"{block.name}: {options.notices}"


# What a part of a config file is put into; what the part sets itself is left out.
WHOLE = {
    "pretrained_model_name_or_path": "model.safetensors", "train_data_dir": "pictures", "output_dir": "output", "resolution": 1024,
    "network_module": "networks.lora",
}  # fmt: skip


def check_part(block: Block, script: str) -> None:
    """Some lines of a config file."""
    own = tomllib.loads(block.text)
    known = declared_by(script).names
    rest = "".join(
        f"{name} = {json.dumps(value)}\n"
        for name, value in WHOLE.items()
        if name in known and name not in own
    )
    check_config(block._replace(text=rest + block.text), script)


def check_dataset(block: Block, _: str) -> None:
    """A dataset file: read without a mistake or notice. --masked_loss stands for the runs that masks are meant for."""
    make_stand_ins(tomllib.loads(block.text))
    Path("data.toml").write_text(block.text, encoding="utf-8")
    groups = [*DATA_OPTIONS, LossOptions]
    plans, notices = read_datasets(
        read_options("", groups, ["--dataset_config", "data.toml", "--masked_loss"])
    )
    assert plans and not notices, f"{block.name}: {notices}"


def check_prompts(block: Block, _: str) -> None:
    """A file of prompts: all are read, and nothing in them is left out."""
    path = Path(f"prompts.{block.language}")
    path.write_text(block.text, encoding="utf-8")
    prompts, problems = read_sample_prompts(path)
    assert prompts and not problems, f"{block.name}: {problems}"


def check_trackers(block: Block, _: str) -> None:
    Path("trackers.toml").write_text(block.text, encoding="utf-8")
    assert read_tracker_config(Path("trackers.toml"))


CHECKS = {
    "config": check_config,
    "config part": check_part,
    "dataset": check_dataset,
    "prompts": check_prompts,
    "trackers": check_trackers,
}

CLASS_FOLDERS = ("train_data_dir", "reg_data_dir")
FOLDERS = ("image_dir", "conditioning_data_dir")
NETWORK_FILES = ("network_weights", "base_weights")
FILES = ("metadata_file", "in_json", "sample_prompts", "log_tracker_config")


def make_stand_ins(table: dict) -> None:
    """What a file names, made here, so that its options are read as where everything is in its place."""
    for key, value in table.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                make_stand_ins(one)
            elif key in CLASS_FOLDERS:
                Path(one, "1_class").mkdir(parents=True, exist_ok=True)
            elif key in FOLDERS:
                Path(one).mkdir(parents=True, exist_ok=True)
            elif key in NETWORK_FILES:
                write_file(Path(one), a_lora())
            elif key in FILES:
                write_file(Path(one), b"")
            elif key == "dataset_config":
                write_file(
                    Path(one),
                    b"[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = '.'\n",
                )
            elif key == "network_module" and not one.startswith("networks."):
                write_file(
                    Path(one.partition(".")[0], "__init__.py"), b""
                )  # it need not be installed


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def a_lora() -> bytes:
    """The least that is taken for a LoRA by its header."""
    header = json.dumps(
        {"lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    )
    return struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4


# -------------------------------------------------------------------------------------------------------------- commands


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page outside of its blocks, with their numbers."""
    inside = {
        n
        for block in blocks_of(path)
        for n in range(block.line, block.line + block.text.count("\n") + 2)
    }
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if number not in inside:
            yield number, line


def commands_in(path: Path) -> Iterator[tuple[str, str]]:
    """(place, command) of the commands in indented lines and in `code`."""
    starts = re.compile(r"(python3?|py|make|accelerate launch|\.venv\S+|\w[\w/]*\.py) \S")
    for number, line in text_lines(path):
        pieces = [line.strip()] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        for piece in pieces:
            if starts.match(piece):
                yield f"{path.relative_to(ROOT).as_posix()}:{number}", piece


def all_commands() -> list[tuple[str, str]]:
    return [found for path in PAGES for found in commands_in(path)]


def test_commands_are_found_in_the_pages():
    found = [command for _, command in all_commands()]
    assert "accelerate launch sdxl_train_network.py --config_file run.toml" in found
    assert any("merge_captions_to_metadata.py" in command for command in found) and len(found) > 10


@pytest.mark.parametrize("place, command", all_commands())
def test_a_command_in_a_page_can_be_given(place, command):
    check_command(command)


def check_command(command: str) -> None:
    """The script is there, and it and its launcher know the options."""
    words = shlex.split(command.replace("\\", "/"), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, *words = words
    program = program.rpartition("/")[2] if not program.endswith(".py") else program
    if program in PROGRAMS:
        return
    if program == "make":
        assert set(words) <= set(
            re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        ), command
        return
    if program.endswith(".py"):
        words = [program, *words]
    elif program == "accelerate":
        words = after_launcher(words)
    else:
        assert program in ("python", "python3", "py"), (
            f"{command}: {program} is none of the programs known here"
        )
        words = [word for word in words if not re.fullmatch(r"-3\.\d+", word)]
        if words[0] == "-m":
            assert words[1] in MODULES, command
            return
    check_words(words[0], words[1:])


def after_launcher(words: list[str]) -> list[str]:
    """The words from the script on. accelerate's own must be known to it."""
    from accelerate.commands.launch import launch_command_parser

    assert words.pop(0) == "launch"
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    launch_command_parser().parse_args([*words[:start], "script.py"])
    return words[start:]


def check_words(script: str, words: list[str]) -> None:
    assert (ROOT / script).is_file(), f"{script}: no such script"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if not inspect.signature(module.main).parameters:
        assert not words, f"{script} has no options"
    elif words != ["--help"]:
        check_options(declared_by(script), words)


def check_options(declared: Declared, words: list[str]) -> None:
    if declared.parser is not None:
        declared.parser.parse_intermixed_args(words)
        return
    given: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            given.append((word[2:], []))
        else:
            assert given, f"{declared.script}: {word!r} is behind no option"
            given[-1][1].append(word)
    for name, values in given:
        assert name in declared.specs, f"{declared.script} has no --{name}"
        spec = declared.specs[name]
        assert (len(values) == 0) == spec.is_switch and (len(values) <= 1 or spec.is_list), (
            f"--{name} {values}"
        )
        for value in values:
            read_value(value, spec)


def test_a_wrong_command_is_noticed():
    for wrong in (
        "python sdxl_train_network.py --netwrk_dim 4",
        "python sdxl_train_network.py --network_dim",
        "python sdxl_train_network.py --fp16_master_weights_and_gradients",
        "python sdxl_train_nothing.py --help",
        "python prepare_buckets_latents.py images",
        "make coffee",
        "rm -rf images",
    ):
        with pytest.raises((AssertionError, OptionError)):
            check_command(wrong)


# ----------------------------------------------------------------------------------------------------- options and links


@pytest.mark.parametrize("name", NAMES_OPTIONS)
def test_every_option_that_a_page_names_exists(name):
    known = (
        {option for script in SCRIPTS for option in declared_by(script).names}
        | {"help"}
        | set(INLINE_OPTIONS)
        | set(LINE_OPTIONS)
    )
    named = {
        (number, option)
        for number, line in text_lines(ROOT / name)
        if "accelerate launch" not in line
        for option in re.findall(r"--(\w+)", line)
    }
    assert named
    unknown = [
        f"{name}:{number}: --{option}" for number, option in sorted(named) if option not in known
    ]
    assert not unknown, unknown


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    wrong = []
    for number, line in text_lines(path):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"\w+:", target):
                continue
            file, _, anchor = target.partition("#")
            linked = (path.parent / file) if file else path
            if not linked.exists() or (anchor and anchor not in anchors_of(linked)):
                wrong.append(f"{path.name}:{number}: {target}")
    assert not wrong, wrong


def anchors_of(path: Path) -> set[str]:
    headings = [
        line.lstrip("#").strip() for _, line in text_lines(path) if re.match(r"#{1,6} ", line)
    ]
    slugs = [slug(heading) for heading in headings]
    assert len(slugs) == len(set(slugs)), f"{path}: two headings have one anchor"
    return set(slugs)
