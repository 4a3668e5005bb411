"""Options: command line over file over default, every mistake at once, and what real config files carry."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from messages import mentioning, mentions

from library.errors import Mistake, OptionError, RunError
from library.option_types import did_you_mean, edits
from library.options import OptionGroup, option, read_options


@dataclass(frozen=True)
class Group(OptionGroup):
    """Some options"""

    learning_rate: float = option(1e-3, "rate", at_least=0)
    steps: int = option(10, "steps", at_least=1)
    name: str | None = option(None, "name")
    kind: str = option("a", "kind", choices=("a", "b"))
    flag: bool = option(False, "a switch")
    rates: tuple[float, ...] | None = option(None, "rates")
    words: tuple[str, ...] | None = option(None, "words")
    length: int | None = option(None, "length", choices=(150, 225), unset=(75,))
    warmup: int | float = option(0, "warm-up")
    folder: Path | None = option(None, "folder")
    quiet: bool = option(False, "nothing", no_effect="it never did")

    def mistakes(self):
        if self.flag and self.name:
            yield Mistake("--flag and --name exclude each other", ("flag", "name"))


def read(*argv, toml=None, tmp_path=None, **settings):
    if toml is not None:
        path = tmp_path / "run.toml"
        path.write_text(toml, encoding="utf-8")
        argv = ("--config_file", str(path), *argv)
    return read_options("test", [Group], list(argv), **settings)


def mistakes_of(*argv, **settings) -> list[str]:
    with pytest.raises(OptionError) as error:
        read(*argv, **settings)
    return [mistake.text for mistake in error.value.mistakes]


def test_the_command_line_beats_the_file_which_beats_the_default(tmp_path):
    options = read("--steps", "3", toml="[a]\nsteps = 2\nname = 'x'\n", tmp_path=tmp_path)[Group]
    assert (options.steps, options.name, options.kind) == (3, "x", "a")


def test_the_files_name_may_lack_its_ending(tmp_path):
    (tmp_path / "run.toml").write_text("steps = 4\n", encoding="utf-8")
    assert read("--config_file", str(tmp_path / "run"))[Group].steps == 4


def test_later_sections_win(tmp_path):
    assert read(toml="[a]\nsteps = 2\n[b]\nsteps = 5\n", tmp_path=tmp_path)[Group].steps == 5


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("learning_rate = 1", "learning_rate", 1.0),
        ('learning_rate = "1e-4"', "learning_rate", 1e-4),
        ('steps = "8"', "steps", 8),
        ("steps = 8.0", "steps", 8),
        ("flag = 1", "flag", True),
        ("flag = 0", "flag", False),
        ("flag = false", "flag", False),
        ("name = false", "name", None),
        ('name = ""', "name", None),
        ("rates = 1e-3", "rates", (1e-3,)),
        ("rates = []", "rates", None),
        ("length = 75", "length", None),
        ('length = "75"', "length", None),
        ("length = 150", "length", 150),
        ("warmup = 0.1", "warmup", 0.1),
        ('warmup = "10%"', "warmup", 0.1),
        ("warmup = 30", "warmup", 30),
        ("words = 'conv_dim=1'", "words", ("conv_dim=1",)),
        ("folder = 'C:/x'", "folder", Path("C:/x")),
    ],
)
def test_values_of_real_files_are_taken(line, name, value, tmp_path):
    assert getattr(read(toml=line + "\n", tmp_path=tmp_path)[Group], name) == value


def test_numbers_in_percent_and_lists_on_the_command_line():
    options = read("--warmup", "5%", "--rates", "1e-3", "2e-3")[Group]
    assert options.warmup == 0.05 and options.rates == (1e-3, 2e-3)


@pytest.mark.parametrize(
    "line, tokens",
    [
        ("steps = 'many'", ["steps", "number|integer", "'many'"]),
        ("steps = 1.5", ["steps", "whole number|integer", "1.5"]),
        ("steps = true", ["steps", "number|integer", "True"]),
        ("steps = 0", ["steps", "1", "0"]),
        ("learning_rate = nan", ["learning_rate", "finite", "nan"]),
        ("learning_rate = -1", ["learning_rate", "0", "-1"]),
        ("kind = 'c'", ["kind", "a, b", "'c'"]),
        ("flag = 'yes'", ["flag", "true", "false", "'yes'"]),
        ("name = ['x']", ["name", "text|string", "['x']"]),
        ("warmup = 1.5", ["warmup", "0.1", "10%", "1.5"]),
        ("length = 100", ["length", "150, 225", "100"]),
    ],
)
def test_a_wrong_value_is_told_with_file_line_found_and_expected(line, tokens, tmp_path):
    (text,) = mistakes_of(toml=f"# first line\n{line}\n", tmp_path=tmp_path)
    assert mentions(text, "run.toml", "line 2", *tokens)


def test_an_unknown_key_in_the_config_file_is_named_with_its_file_and_nearest_option(tmp_path):
    (text,) = mistakes_of(toml="[loss]\nlearning_rat = 5\n", tmp_path=tmp_path)
    assert mentions(text, "run.toml", "line 2", "learning_rat", "'learning_rate'|--learning_rate")


def test_foreign_keys_get_one_line_together(tmp_path):
    options = read(
        toml="epoch = 1\nsdxl = true\nnoise_offset_type = 'Original'\nblock_lr = '1'\nsomething_else = 3\n",
        tmp_path=tmp_path,
    )
    (line,) = options.notices
    assert all(
        key in line for key in ("epoch", "sdxl", "noise_offset_type", "block_lr", "sdxl_train.py", "something_else")
    )


def test_strict_config_makes_every_unknown_key_a_mistake(tmp_path):
    texts = mistakes_of("--strict_config", toml="epoch = 1\nsomething_else = 3\n", tmp_path=tmp_path)
    assert len(texts) == 2


def test_all_mistakes_are_told_at_once(tmp_path):
    texts = mistakes_of(
        "--steps", "x", "--nam", "y", "--flag", "--name", "z", toml="learning_rat = 1\nkind = 'c'\n", tmp_path=tmp_path
    )
    assert len(texts) == 5
    for tokens in (
        ["--steps", "'x'"],
        ["--nam"],
        ["line 1", "learning_rat"],
        ["line 2", "kind", "'c'"],
        ["--flag", "--name"],
    ):
        assert mentions(texts, *tokens), tokens


def test_what_follows_from_a_broken_option_is_not_told():
    def check(options):
        if options[Group].steps < 100:
            yield Mistake("too few steps", ("steps",))

    (text,) = mistakes_of("--steps", "x", checks=[check])
    assert mentions(text, "--steps", "'x'")
    assert mistakes_of("--steps", "5", checks=[check]) == ["too few steps"]


def test_abbreviations_are_refused_with_the_whole_name():
    (text,) = mistakes_of("--learning_rat", "1")
    assert mentions(text, "--learning_rat", "'learning_rate'|--learning_rate")


def test_an_option_without_its_value_is_told():
    (text,) = mistakes_of("--steps")
    assert mentions(text, "--steps", "argument|value")


def test_options_without_effect_are_told_when_set():
    (line,) = read("--quiet").notices
    assert mentions(line, "--quiet", "it never did")
    assert read().notices == []


def test_refused_options_are_told_with_the_reason_and_switched_off_ones_are_no_mistake(tmp_path):
    refused = {"deepspeed": "not here; leave it out"}
    (text,) = mistakes_of("--deepspeed", refused=refused)
    assert mentions(text, "--deepspeed", "not here; leave it out")
    (text,) = mistakes_of(toml="deepspeed = true\n", tmp_path=tmp_path, refused=refused)
    assert mentions(text, "line 1", "deepspeed", "not here; leave it out")
    read(toml="deepspeed = false\n", tmp_path=tmp_path, refused=refused)


def test_output_config_writes_what_differs_from_the_defaults_and_reads_back(tmp_path):
    path = tmp_path / "out.toml"
    with pytest.raises(SystemExit) as stop:
        read(
            "--config_file",
            str(path),
            "--output_config",
            "--steps",
            "3",
            "--rates",
            "1",
            "2",
            "--flag",
            "--folder",
            "a/b",
        )
    assert stop.value.code == 0
    assert "config_file" not in path.read_text(encoding="utf-8")
    options = read("--config_file", str(path))[Group]
    assert (options.steps, options.rates, options.flag, options.folder) == (3, (1.0, 2.0), True, Path("a/b"))


def test_output_config_never_overwrites(tmp_path):
    (tmp_path / "out.toml").write_text("steps = 5\n", encoding="utf-8")
    with pytest.raises(RunError, match=mentioning("--output_config", tmp_path / "out.toml", "--config_file")):
        read("--config_file", str(tmp_path / "out.toml"), "--output_config", "--steps", "3")
    assert (tmp_path / "out.toml").read_text(encoding="utf-8") == "steps = 5\n"


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    (text,) = mistakes_of("--config_file", str(tmp_path / "none.toml"))
    assert mentions(text, "--config_file", tmp_path / "none.toml", "file")
    (text,) = mistakes_of(toml="steps = = 3", tmp_path=tmp_path)
    assert mentions(text, "--config_file", tmp_path / "run.toml", "TOML", "line 1")


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 6\n")
    assert read("--config_file", str(path))[Group].steps == 6


def test_given_knows_what_the_user_set_be_it_the_default():
    options = read("--steps", "10")
    assert options.given("steps") and not options.given("kind")


def test_a_group_that_breaks_its_own_rules_cant_be_made():
    with pytest.raises(OptionError, match=mentioning("--flag", "--name")):
        Group(flag=True, name="x")


def test_edits_counts_single_letter_changes():
    assert [edits("kitten", "sitting"), edits("", "abc"), edits("same", "same")] == [3, 3, 0]
    assert mentions(did_you_mean("min_snr_gama", ["min_snr_gamma", "seed"]), "min_snr_gamma")
    assert did_you_mean("zzz", ["seed"]) == ""
