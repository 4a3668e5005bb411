"""Options: command line over file over default, every mistake at once, and what real config files carry."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import script

from library.errors import Mistake, OptionError, RunError
from library.foreign_keys import foreign_key
from library.option_types import DatasetKey, did_you_mean, edits, specs_of
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
    "line, expected",
    [
        ("steps = 'many'", "expected a whole number, got 'many'"),
        ("steps = 1.5", "expected a whole number, got 1.5"),
        ("steps = true", "expected a whole number, got True"),
        ("steps = 0", "must be at least 1, got 0"),
        ("learning_rate = nan", "expected a finite number, got nan"),
        ("learning_rate = -1", "must be at least 0, got -1"),
        ("kind = 'c'", "expected one of a, b"),
        ("flag = 'yes'", "expected true or false, got 'yes'"),
        ("name = ['x']", "expected text"),
        ("warmup = 1.5", "expected a whole number of steps, or a share"),
        ("length = 100", "expected one of 150, 225"),
    ],
)
def test_a_wrong_value_is_reported_with_its_line_and_what_is_expected(line, expected, tmp_path):
    (text,) = mistakes_of(toml=f"# first line\n{line}\n", tmp_path=tmp_path)
    assert "run.toml, line 2: " in text and expected in text


def test_an_unknown_key_in_the_config_file_is_named_with_its_file_and_nearest_option(tmp_path):
    (text,) = mistakes_of(toml="[loss]\nlearning_rat = 5\n", tmp_path=tmp_path)
    assert text.endswith(
        "run.toml, line 2: learning_rat is not an option of this script; did you mean 'learning_rate'?"
    )


def test_foreign_keys_get_one_line_together(tmp_path):
    options = read(
        toml="epoch = 1\nsdxl = true\nnoise_offset_type = 'Original'\nblock_lr = '1'\nsomething_else = 3\n",
        tmp_path=tmp_path,
    )
    (line,) = options.notices
    assert all(
        key in line
        for key in (
            "epoch",
            "sdxl",
            "noise_offset_type",
            "block_lr (an option of sdxl_train.py)",
            "something_else",
        )
    )


@pytest.mark.parametrize(
    "key, owner",
    [
        ("block_lr", "an option of sdxl_train.py"),
        ("network_module", "an option of sdxl_train_network.py"),
        ("token_string", "an option of sdxl_train_textual_inversion.py"),
        ("cond_emb_dim", "an option of sdxl_train_control_net_lllite.py"),
        ("images_per_prompt", "an option of sdxl_gen_img.py"),
        ("t5xxl", "written by a GUI or for another model"),
        ("something_else", None),
    ],
)
def test_what_owns_a_key_is_read_from_the_scripts(key, owner):
    assert foreign_key(key) == owner


def test_keys_of_other_scripts_are_found_without_numpy_and_torch():
    program = """
        import sys
        from library.foreign_keys import foreign_key
        assert foreign_key("block_lr") and not {"numpy", "torch", "PIL"} & sys.modules.keys()
        print("fine")
    """
    done = script("-c", textwrap.dedent(program))
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_strict_config_makes_every_unknown_key_a_mistake(tmp_path):
    texts = mistakes_of(
        "--strict_config", toml="epoch = 1\nsomething_else = 3\n", tmp_path=tmp_path
    )
    assert len(texts) == 2


def test_all_mistakes_are_reported_together(tmp_path):
    texts = mistakes_of(
        "--steps",
        "x",
        "--nam",
        "y",
        "--flag",
        "--name",
        "z",
        toml="learning_rat = 1\nkind = 'c'\n",
        tmp_path=tmp_path,
    )
    assert len(texts) == 5
    for piece in (
        "--steps: expected a whole number",
        "--nam is not an option",
        "learning_rat",
        "kind: expected one of",
        "exclude each other",
    ):
        assert any(piece in text for text in texts), piece


def test_mistakes_that_follow_from_an_invalid_value_are_not_reported():
    def check(options):
        if options[Group].steps < 100:
            yield Mistake("too few steps", ("steps",))

    assert mistakes_of("--steps", "x", checks=[check]) == [
        "--steps: expected a whole number, got 'x'"
    ]
    assert mistakes_of("--steps", "5", checks=[check]) == ["too few steps"]


def test_abbreviations_are_refused_with_the_complete_name():
    assert mistakes_of("--learning_rat", "1") == [
        "--learning_rat is not an option of this script; did you mean 'learning_rate'?"
    ]


def test_an_option_without_its_value_is_a_mistake():
    (text,) = mistakes_of("--steps")
    assert "expected one argument" in text


def test_options_without_effect_give_a_notice_when_set():
    (line,) = read("--quiet").notices
    assert line == "--quiet changes nothing: it never did"
    assert read().notices == []


def test_refused_options_are_mistakes_with_a_reason_unless_they_are_off(tmp_path):
    refused = {"deepspeed": "not here; leave it out"}
    assert mistakes_of("--deepspeed", refused=refused) == ["--deepspeed: not here; leave it out"]
    assert (
        "deepspeed: not here"
        in mistakes_of(toml="deepspeed = true\n", tmp_path=tmp_path, refused=refused)[0]
    )
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
    assert (options.steps, options.rates, options.flag, options.folder) == (
        3,
        (1.0, 2.0),
        True,
        Path("a/b"),
    )


def test_output_config_never_overwrites(tmp_path):
    (tmp_path / "out.toml").write_text("steps = 5\n", encoding="utf-8")
    with pytest.raises(RunError, match="exists already"):
        read("--config_file", str(tmp_path / "out.toml"), "--output_config", "--steps", "3")
    assert (tmp_path / "out.toml").read_text(encoding="utf-8") == "steps = 5\n"


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    assert "no such file" in mistakes_of("--config_file", str(tmp_path / "none.toml"))[0]
    assert "can't be read as TOML" in mistakes_of(toml="steps = = 3", tmp_path=tmp_path)[0]


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 6\n")
    assert read("--config_file", str(path))[Group].steps == 6


def test_given_knows_what_the_user_set_be_it_the_default():
    options = read("--steps", "10")
    assert options.given("steps") and not options.given("kind")


def test_a_group_that_breaks_its_own_rules_cant_be_made():
    with pytest.raises(OptionError, match="exclude each other"):
        Group(flag=True, name="x")


def test_edits_counts_single_letter_changes():
    assert [edits("kitten", "sitting"), edits("", "abc"), edits("same", "same")] == [3, 3, 0]
    assert (
        did_you_mean("min_snr_gama", ["min_snr_gamma", "seed"]) == "; did you mean 'min_snr_gamma'?"
    )
    assert did_you_mean("zzz", ["seed"]) == ""


@dataclass(frozen=True)
class Flagged(OptionGroup, affects_result=False, stored_in_image=False):
    """Options that say what they are"""

    folder: Path | None = option(None, "a folder", private=True)
    size: int = option(
        5,
        "a size",
        affects_result=True,
        dataset_key=DatasetKey(("general",), name="file_size", default=7),
    )
    key: str | None = option(None, "a key", secret=True, stored_in_image=True)


def test_an_option_is_what_its_declaration_says_and_otherwise_what_its_group_says():
    folder, size, key = specs_of(Flagged)
    assert [spec.affects_result for spec in (folder, size, key)] == [False, True, False]
    assert [spec.stored_in_image for spec in (folder, size, key)] == [False, False, True]
    assert [spec.is_private for spec in (folder, size, key)] == [True, False, True]
    assert all(
        spec.affects_result and spec.stored_in_image and not spec.is_private
        for spec in specs_of(Group)
    )


def test_a_key_of_the_dataset_file_is_its_option_with_the_differences_it_declares():
    size = specs_of(Flagged)[1]
    key = size.as_dataset_key()
    assert (key.name, key.default, key.kinds, key.is_list) == ("file_size", 7, (int,), False)
    assert size.dataset_key.tables == ("general",)


def test_changed_options_are_those_that_are_kept_and_no_secrets():
    options = read_options("test", [Flagged], ["--folder", "a", "--size", "6", "--key", "x"])
    assert options.changed() == {"folder": "a", "size": 6}
    assert options.changed(lambda spec: spec.affects_result) == {"size": 6}
