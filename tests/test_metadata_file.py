"""Metadata files, and the datasets that they make."""

import json
import logging
from pathlib import Path

import pytest
from messages import mentioning, mentions
from PIL import Image
from scanning import BUCKETS, samples_of

from library.data.captions import CaptionSettings
from library.data.dataset_config import read_datasets
from library.data.metadata_file import MetadataError, read_entries
from library.data.options import DATA_OPTIONS
from library.data.scan import scan
from library.errors import OptionError
from library.options import read_options
from library.size import Size


def entries(path: Path, **settings) -> list:
    return list(read_entries(path, CaptionSettings(**settings)))


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def scanned(json_file: Path, folder: Path | None, *argv: object, **settings):
    words = [
        "--in_json",
        json_file,
        *BUCKETS,
        *([] if folder is None else ["--train_data_dir", folder]),
        *argv,
    ]
    options = read_options("", DATA_OPTIONS, [str(word) for word in words])
    return scan(read_datasets(options)[0], **settings)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pics").mkdir()
    for name, size in (("a.png", (128, 96)), ("b.JPG", (96, 128))):
        Image.new("RGB", size).save(
            tmp_path / "pics" / name, format="png" if name.endswith("png") else "jpeg"
        )
    return tmp_path / "pics"


@pytest.mark.parametrize(
    "values, settings, expected",
    [
        ({"caption": "a cat"}, {}, "a cat"),
        ({"caption": "a cat", "tags": "cat, hat"}, {}, "a cat,cat, hat"),
        ({"tags": "cat, hat"}, {}, "cat, hat"),
        ({"caption": None, "tags": "cat"}, {"enable_wildcard": True}, "cat"),
        ({"caption": "one\n\ntwo", "tags": "x\ny"}, {"enable_wildcard": True, "caption_separator": ";"}, "one;x;y\ntwo;x;y"),
        ({}, {}, ""),
    ],
)  # fmt: skip
def test_caption_and_tags_become_one_caption(values, settings, expected, tmp_path):
    (entry,) = entries(write(tmp_path / "m.json", {"a.png": values}), **settings)
    assert entry.caption == expected and entry.tags == (values.get("tags") or "")


def test_json_lines_say_the_same(tmp_path):
    rows = [
        {"image_path": "a.png", "caption": "one"},
        {"image_path": "b.png", "tags": "two", "image_size": [8, 9]},
    ]
    path = write(tmp_path / "m.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n")
    assert [(entry.key, entry.caption, entry.size) for entry in entries(path)] == [("a.png", "one", None), ("b.png", "two", Size(8, 9))]  # fmt: skip


@pytest.mark.parametrize(
    "name, content, tokens",
    [
        ("m.json", "{", ["JSON", "line 1"]),
        ("m.json", "[]", ["object"]),
        ("m.json", "[" * 100_000, ["JSON"]),
        ("m.json", '{"a.png": {}, "a.png": {}}', ["'a.png'", "twice|duplicate|more than once"]),
        ("m.json", '{"a.png": 3}', ["'a.png'", "caption", "int"]),
        ("m.json", '{"a.png": {"caption": 3}}', ["'a.png'", "caption", "3"]),
        ("m.json", '{"a.png": {"image_size": [0, 4]}}', ["'a.png'", "image_size", "[0, 4]"]),
        ("m.json", '{"a.png": {"image_size": [1e999, 4]}}', ["'a.png'", "image_size", "inf"]),
        ("m.json", '{"\\u0000": {}}', ["NUL"]),
        ("m.jsonl", '{"image_path": "a"}\n{"caption": "b"}', ["line 2", "image_path"]),
        ("m.jsonl", '{"image_path": "a"}\n\nnonsense', ["line 3", "JSON"]),
    ],
)
def test_fault_56_hostile_metadata_is_told_with_its_place(name, content, tokens, tmp_path):
    with pytest.raises(MetadataError, match=mentioning(*tokens)):
        entries(write(tmp_path / name, content))


def test_fault_56_all_bad_entries_are_told_at_once(folder, tmp_path):
    path = write(tmp_path / "m.json", '{"a.png": 3, "b.JPG": {"tags": []}, "a.png": {}}')
    with pytest.raises(OptionError) as error:
        scanned(path, folder)
    assert len(error.value.mistakes) == 3


def test_keys_are_absolute_or_inside_the_folder_with_their_ending_or_without(folder, tmp_path):
    path = write(
        tmp_path / "m.json", {str(folder / "a.png"): {"caption": "one"}, "b": {"caption": "two"}}
    )
    (dataset,) = scanned(path, folder)
    assert [(Path(s.file).name, s.caption, s.size) for s in dataset.samples] == [("a.png", "one", Size(128, 96)), ("b.JPG", "two", Size(96, 128))]  # fmt: skip
    assert dataset.samples[1].text_file == folder / "b_te_outputs.npz"
    with pytest.raises(OptionError, match=mentioning("m.json", "1", "image_dir", "b")):
        scanned(path, None)


def test_a_size_in_the_metadata_spares_looking_at_the_image(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "library.data.scan.read_image_info", lambda file: pytest.fail(f"looked at {file}")
    )
    path = write(tmp_path / "m.json", {"a.png": {"caption": "one", "image_size": [128, 96]}})
    (sample,) = samples_of(scanned(path, folder))
    assert sample.size == Size(128, 96)


def test_images_that_arent_there_are_listed_or_left_out(folder, tmp_path, caplog):
    logging.getLogger("library").propagate = True
    path = write(tmp_path / "m.json", {"a.png": {}, "c.png": {}, "d": {}})
    with pytest.raises(OptionError) as error:
        scanned(path, folder)
    assert mentions(str(error.value), "c.png", folder, path) and mentions(
        str(error.value), "d", folder, path
    )
    assert len(samples_of(scanned(path, folder, skip_bad_images=True))) == 1
    assert mentions(caplog.text, "WARNING", "2", "--skip_bad_images") and mentions(
        caplog.text, "c.png", folder
    )


def test_repeats_come_from_dataset_repeats(folder, tmp_path):
    path = write(tmp_path / "m.json", {"a.png": {}})
    (dataset,) = scanned(path, folder, "--dataset_repeats", 3)
    assert dataset.num_samples == 3


def test_keys_for_folders_are_refused_in_metadata_datasets(folder, tmp_path):
    path = write(tmp_path / "m.json", {"a.png": {}})
    text = f"[[datasets]]\nresolution = 64\ncaption_extension = '.txt'\n[[datasets.subsets]]\nmetadata_file = '{path.as_posix()}'\nclass_tokens = 'x'\n"
    config = write(tmp_path / "d.toml", text)
    options = read_options("", DATA_OPTIONS, ["--dataset_config", str(config)])
    with pytest.raises(OptionError) as error:
        read_datasets(options)
    assert all(
        mentions(str(error.value), "d.toml", key, "metadata_file")
        for key in ("'caption_extension'", "'class_tokens'")
    )
