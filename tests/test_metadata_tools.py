"""The tools that make and clean fine-tuning metadata: every rule by hand, and files as they really lie about."""

import doctest
import json
import logging
from pathlib import Path

import pytest
from messages import mentioning, mentions
from running import script

from library.errors import OptionError, RunError
from library.log import log
from tools import clean_captions_and_tags, merge_captions_to_metadata, merge_dd_tags_to_metadata
from tools.clean_captions_and_tags import clean_caption, clean_tags


@pytest.fixture(autouse=True)
def restored():
    yield
    log.handlers[:] = []
    log.propagate = True
    log.setLevel(logging.NOTSET)


def captions(*words: object) -> None:
    merge_captions_to_metadata.main([str(word) for word in words])


def tags(*words: object) -> None:
    merge_dd_tags_to_metadata.main([str(word) for word in words])


def clean(*words: object) -> None:
    clean_captions_and_tags.main([str(word) for word in words])


def lay(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files; pictures need no content, as these tools look at names alone."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def entries(path: Path) -> dict:
    return json.loads(path.read_text(encoding="ascii"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    return lay(
        tmp_path / "my pictures",
        {"b.png": "", "a.jpg": "", "a.caption": " a cat \n", "b.caption": "a dog"},
    )


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.json"


# --------------------------------------------------------------------------------------------------------- merging


def test_captions_are_merged_by_stem_in_name_order_with_indent_2(folder, out):
    captions(folder, out)
    expected = '{\n  "a": {\n    "caption": "a cat"\n  },\n  "b": {\n    "caption": "a dog"\n  }\n}'
    assert out.read_text(encoding="ascii") == expected


def test_tags_come_from_txt_files_and_keep_the_other_fields(folder, out):
    lay(folder, {"a.txt": "1cat, solo", "b.txt": "1dog"})
    captions(folder, out)
    tags(folder, out)
    assert entries(out) == {
        "a": {"caption": "a cat", "tags": "1cat, solo"},
        "b": {"caption": "a dog", "tags": "1dog"},
    }


def test_a_second_merge_replaces_its_own_field_and_keeps_entries_of_other_images(folder, out):
    lay(
        out.parent,
        {"out.json": '{"a": {"caption": "old", "image_size": [8, 8]}, "elsewhere": {"tags": "x"}}'},
    )
    captions(folder, out)
    assert entries(out) == {
        "a": {"caption": "a cat", "image_size": [8, 8]},
        "elsewhere": {"tags": "x"},
        "b": {"caption": "a dog"},
    }


def test_in_json_wins_over_an_existing_out_json_and_is_left_alone(folder, out, tmp_path):
    lay(tmp_path, {"out.json": '{"old": {}}', "in.json": '\ufeff{"first": {}}'})
    captions(folder, out, "--in_json", tmp_path / "in.json")
    assert list(entries(out)) == ["first", "a", "b"]
    assert (tmp_path / "in.json").read_text(encoding="utf-8-sig") == '{"first": {}}'


def test_full_path_keys_are_the_paths_of_the_images(folder, out):
    captions("--full_path", folder, out)
    assert entries(out) == {
        str(folder / "a.jpg"): {"caption": "a cat"},
        str(folder / "b.png"): {"caption": "a dog"},
    }


def test_keys_are_absolute_paths_wherever_the_tool_runs(folder, out, monkeypatch):
    monkeypatch.chdir(folder.parent)
    captions("--full_path", folder.name, out)
    assert list(entries(out)) == [str(folder / "a.jpg"), str(folder / "b.png")]


def test_sub_folders_are_searched_with_recursive_only(folder, out):
    lay(folder, {"deep/er/a.webp": "", "deep/er/a.caption": "a fox"})
    captions(folder, out)
    assert list(entries(out)) == ["a", "b"]
    out.unlink()
    captions(folder, out, "--full_path", "--recursive")
    assert [Path(key).relative_to(folder).as_posix() for key in entries(out)] == [
        "a.jpg",
        "b.png",
        "deep/er/a.webp",
    ]


def test_every_ending_is_taken_in_any_case_and_nothing_else(tmp_path, out):
    endings = ["png", "jpg", "JPEG", "WebP", "bmp", "avif", "jxl", "HEIC", "heif"]
    lay(tmp_path / "p", {f"{i}.{ending}": "" for i, ending in enumerate(endings)})
    lay(
        tmp_path / "p",
        {f"{i}.caption": str(i) for i in range(9)} | {"x.gif": "", "y.npz": "", "png": ""},
    )
    (tmp_path / "p" / "folder.png").mkdir()
    captions(tmp_path / "p", out)
    assert entries(out) == {str(i): {"caption": str(i)} for i in range(9)}


@pytest.mark.parametrize(
    "words", [["--caption_extension", ".note"], ["--caption_extension", "note"], ["--caption_extention", "note"],
              ["--caption_extention", ".note", "--caption_extension", ".other"]],
)  # fmt: skip
def test_the_ending_of_the_text_files_has_its_dot_or_not_and_the_misspelt_option_wins(
    folder, out, words
):
    lay(folder, {"a.note": "A", "b.note": "B", "a.other": "", "b.other": ""})
    captions(folder, out, *words)
    assert entries(out) == {"a": {"caption": "A"}, "b": {"caption": "B"}}


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("\ufeffa cat", "a cat"),
        ("\r\n a cat \r\n\r\nthat sleeps\r\n", "a cat \n\nthat sleeps"),
        ("naïve 日本 🐈", "naïve 日本 🐈"),
        ("", ""),
    ],
)
def test_the_whole_file_is_the_caption_stripped(tmp_path, out, raw, expected):
    captions(lay(tmp_path / "p", {"x.png": "", "x.caption": raw}), out)
    assert entries(out) == {"x": {"caption": expected}}


def test_names_with_spaces_dots_brackets_and_other_scripts(tmp_path, out):
    names = ["猫 [1]", "a.b.c", "ü — x"]
    lay(
        tmp_path / "π [0-9]",
        {f"{name}.png": "" for name in names} | {f"{name}.caption": name for name in names},
    )
    captions(tmp_path / "π [0-9]", out)
    assert entries(out) == {name: {"caption": name} for name in sorted(names)}


def test_debug_logs_each_entry(folder, out, capsys):
    captions(folder, out)
    assert "a cat" not in capsys.readouterr().err
    captions(folder, out, "--debug")
    err = capsys.readouterr().err
    assert "a: a cat" in err and "b: a dog" in err


# ----------------------------------------------------------------------------------------------- merging: mistakes


def test_all_texts_that_cant_be_read_are_told_at_once_and_nothing_is_written(folder, out):
    lay(
        folder,
        {
            "a.caption": b"caf\xe9",
            "c.png": "",
            "d.png": "",
            "e.png": "",
            "d.caption": "un été".encode("utf-16"),
        },
    )
    (folder / "e.caption").mkdir()
    before = snapshot(folder.parent)
    with pytest.raises(RunError) as error:
        captions(folder, out)
    head, *lines = str(error.value).splitlines()
    assert mentions(head, "4", "5")
    assert [line.strip().removeprefix(str(folder))[1:10] for line in lines] == [
        f"{stem}.caption" for stem in "acde"
    ]
    claims = [("UTF-8", "byte 3"), ("c.png",), ("UTF-8", "byte 0")]
    assert all(mentions(line, *claim) for line, claim in zip(lines, claims, strict=False))
    assert snapshot(folder.parent) == before


def test_two_images_of_one_stem_are_refused_by_name(folder, out):
    lay(folder, {"b.webp": ""})
    with pytest.raises(
        OptionError, match=mentioning(folder / "b.png", folder / "b.webp", "'b'", "--full_path")
    ):
        captions(folder, out)
    assert not out.exists()
    captions(folder, out, "--full_path")
    assert len(entries(out)) == 3


@pytest.mark.parametrize(
    "raw, tokens",
    [
        ("{", ["JSON", "line 1"]),
        ("", ["JSON", "line 1"]),
        (b"\xff\xfe{}", ["JSON", "utf-8"]),
        ("[" * 100_000, ["JSON"]),
        ("[]", ["JSON", "object", "list"]),
        ("null", ["JSON", "object", "null"]),
        ('{"a": {}, "b": "text"}', ["object", "'b'", "text|string"]),
        ('{"a": [1]}', ["object", "'a'", "list"]),
    ],
)
@pytest.mark.parametrize("tool", ["merge", "clean"])
def test_input_that_is_no_metadata_is_refused_in_one_sentence(folder, out, raw, tokens, tool):
    lay(out.parent, {"out.json": raw})
    before = snapshot(out.parent)
    with pytest.raises(RunError) as error:
        captions(folder, out) if tool == "merge" else clean(out, out)
    assert mentions(str(error.value), out, *tokens) and "\n" not in str(error.value)
    assert snapshot(out.parent) == before


@pytest.mark.parametrize(
    "words, tokens",
    [
        (["{folder}", "{out}", "--recursive"], ["--recursive", "--full_path"]),
        (["{folder}/nowhere", "{out}"], ["nowhere", "folder"]),
        (["{folder}/empty", "{out}"], ["empty", ".png"]),
        (["{folder}", "{out}", "--in_json", "{folder}/none.json"], ["none.json", "file"]),
        (["{folder}"], ["out_json", "--help"]),
        (["{folder}", "{out}", "third"], ["third", "--help"]),
        (["{folder}", "{out}", "--full"], ["--full", "--help"]),
    ],
)
@pytest.mark.parametrize("merge", [captions, tags])
def test_wrong_usage_is_an_option_error(folder, out, words, tokens, merge):
    (folder / "empty").mkdir()
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        merge(*(word.format(folder=folder, out=out) for word in words))
    assert not out.exists()


def test_an_output_that_cant_be_written_is_told(folder, tmp_path):
    with pytest.raises(RunError, match=mentioning(tmp_path / "no" / "out.json", "No such file")):
        captions(folder, tmp_path / "no" / "out.json")


def test_mistakes_are_told_by_exit_status_and_in_one_line(folder, out, tmp_path):
    tool = "tools/merge_captions_to_metadata.py"
    wrong = script(tool, folder, out, "--recursive")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and mentions(
        wrong.stderr, "error", "--recursive"
    )
    (folder / "a.caption").unlink()
    failed = script(tool, folder, out)
    assert (
        failed.returncode == 1
        and mentions(failed.stderr, folder / "a.caption")
        and "Traceback" not in failed.stderr
    )
    listed = script("tools/clean_captions_and_tags.py", lay(tmp_path, {"x": "[]"}) / "x", out)
    assert (listed.returncode, listed.stderr.count("\n")) == (1, 1)


def test_the_tools_import_nothing_heavy():
    code = "import sys; from tools import merge_captions_to_metadata, clean_captions_and_tags; print(*sys.modules)"
    assert not {"torch", "numpy", "PIL"} & set(script("-c", code).stdout.split())


# -------------------------------------------------------------------------------------------------------- cleaning


def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(clean_captions_and_tags)
    assert results.attempted == 4 and results.failed == 0


@pytest.mark.parametrize(
    "before, after",
    [
        ("1girl, long_hair, smile", "1girl, long hair, smile"),
        ("^_^, o_o, a_^_^_b", "^_^, o o, a ^_^ b"),
        ("1girl,solo ,  , hat,", "1girl, solo, hat"),
        ("1girl, rating:safe, score", "1girl"),
        ("1girl, rating_explicit", "1girl"),
        ("rating:safe, 1girl", "rating:safe, 1girl"),  # only what follows ", rating" is cut
        ("celebrating, 1girl", "celebrating, 1girl"),
        ("", ""),
        # groups, with several people only
        ("1girl, long hair, short hair", "1girl, long hair, short hair"),
        ("2girls, long hair, short hair", "2girls"),
        ("2boys, very_long_hair, medium_hair, hat", "2boys, hat"),
        ("multiple girls, bob cut, hime cut", "multiple girls"),
        ("2girls, blue eyes, light brown eyes, closed eyes", "2girls"),
        ("2girls, long sleeves, puffy sleeves", "2girls"),
        ("2girls, twintails, side ponytail, hair bun", "2girls"),
        ("2girls, blonde hair, dark_blue_hair, two-tone hair", "2girls"),
        ("2girls, long hair, black hair, red hair", "2girls, long hair"),  # colours go, the length stays
        ("2girls, long hair, black hair, blue eyes, bob cut, long sleeves, braid",
         "2girls, long hair, black hair, blue eyes, bob cut, long sleeves, braid"),  # one of each group stays
        # a word that is the end of another tag
        ("1girl, shirt, white shirt", "1girl, white shirt"),
        ("1girl, white shirt, shirt, t-shirt", "1girl, white shirt, t-shirt"),
        ("girl, 1girl", "girl, 1girl"),  # a part of a word is no word
        ("hair, hair ornament", "hair, hair ornament"),
        ("hat, hat", "hat, hat"),
        ("2girls, hair, long hair, short hair", "2girls, hair"),  # groups go first
    ],
)  # fmt: skip
def test_tags_are_cleaned(before, after):
    assert clean_tags(before) == after
    assert clean_tags(after) == after


@pytest.mark.parametrize(
    "before, after",
    [
        ("a woman and a Lady with two women", "a girl and a girl with two girls"),
        ("a person's hat", "a girl's hat"),
        ("ladies and other females", "girls and other girls"),
        ("a personal ladybug", "a personal ladybug"),
        ("a female person", "a girl"),
        ("a female female character", "a girl"),  # takes a second pass
        ("an anime girl", "a girl"),
        ("An anime elf", "An elf"),
        ("a cartoon elf", "an elf"),
        ("a cartoon picture of a cat", "a cat"),
        ("a cat in anime style, on a mat", "a cat, on a mat"),
        ("a cat, anime-style", "a cat"),
        ("anime, a cat", "a cat"),
        ("a screenshot of a cartoon.", "a screenshot."),
        ("an animated cat", "an animated cat"),
        ("  a   cat ", "a cat"),
        ("a cat\nand a woman", "a cat\nand a girl"),
        ("", ""),
    ],
)
def test_captions_are_cleaned(before, after):
    assert clean_caption(before) == after
    assert clean_caption(after) == after


def test_replacements_that_go_in_circles_end():
    assert clean_caption("a", ((r"^a$", "b"), (r"^b$", "c"), (r"^c$", "b"))) in ("b", "c")
    assert clean_caption("tick", ((r"^tick$", "tock "), (r"^tock$", "tick"))) in ("tick", "tock")


def test_a_metadata_file_is_cleaned_and_other_fields_stay(tmp_path, out):
    before = {
        "ü": {
            "tags": "2girls, red_hair, blue_hair",
            "caption": "two women",
            "image_size": [64, 64],
        },
        "b": {"tags": "long_hair", "caption": None},
        "c": {},
    }
    clean(lay(tmp_path, {"in.json": json.dumps(before, ensure_ascii=False)}) / "in.json", out)
    after = {
        "ü": {"tags": "2girls", "caption": "two girls", "image_size": [64, 64]},
        "b": {"tags": "long hair", "caption": None},
        "c": {},
    }
    assert out.read_text(encoding="ascii") == json.dumps(after, indent=2)


def test_entries_without_tags_or_caption_are_told(tmp_path, out, capsys):
    path = lay(
        tmp_path,
        {
            "in.json": json.dumps(
                {str(i): {"tags": "a"} for i in range(7)} | {"x": {"caption": "b"}}
            )
        },
    )
    clean(path / "in.json", out)
    err = capsys.readouterr().err
    assert mentions(err, "WARNING", "1", "8", "tags", "x") and mentions(
        err, "WARNING", "7", "8", "caption", "0, 1, 2, 3, 4", "2 more"
    )
    assert not mentions(err, "6", "caption")
    clean(path / "in.json", out, "--debug")
    err = capsys.readouterr().err
    assert mentions(err, "6", "caption") and mentions(err, "x", "caption", "'b' -> 'b'")


@pytest.mark.parametrize("debug_at", [0, 1, 2, 3])
def test_of_three_files_the_second_is_read_and_the_third_written(tmp_path, out, debug_at, capsys):
    lay(tmp_path, {"in.json": '{"a": {"tags": "x_y"}}'})
    words = ["unused", tmp_path / "in.json", out]
    words.insert(debug_at, "--debug")
    clean(*words)
    assert entries(out) == {"a": {"tags": "x y"}} and not Path("unused").exists()
    assert mentions(capsys.readouterr().err, "WARNING", "unused")


@pytest.mark.parametrize(
    "words, tokens", [(["a"], ["out_json", "--help"]), (["none.json", "b"], ["none.json", "file"]),
                      (["a", "b", "c", "d"], ["d", "--help"])],
)  # fmt: skip
def test_wrong_usage_of_the_cleaner_is_an_option_error(words, tokens):
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        clean(*words)


def test_tags_that_are_no_text_are_refused_by_entry(tmp_path, out):
    lay(
        tmp_path,
        {
            "in.json": '{"a": {"tags": ["x"]}, "b": {"tags": "y", "caption": 5}, "c": {"caption": null}}'
        },
    )
    with pytest.raises(RunError, match=mentioning("in.json", "tags of 'a'", "caption of 'b'")):
        clean(tmp_path / "in.json", out)
    assert not out.exists()
