"""The index of known files: what was learnt holds while a file stays as it is."""

import os
import time
from pathlib import Path

import pytest

from library.data.file_index import FileIndex, file_stamp

OLD = time.time() - 100


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "data" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"content")
    os.utime(path, (OLD, OLD))
    return path


def learn(home: Path, file: Path, **facts) -> None:
    known = FileIndex(home)
    known.record(str(file.parent), file.name, file_stamp(file), **facts)
    known.save()


def facts_of(home: Path, file: Path) -> dict:
    return FileIndex(home).get(str(file.parent), file.name, file_stamp(file))


def test_what_was_learnt_is_known_in_another_process(file, tmp_path):
    learn(tmp_path / "home", file, look=[1, 2])
    learn(tmp_path / "home", file, decoded=True)
    assert facts_of(tmp_path / "home", file) == {"look": [1, 2], "decoded": True}


@pytest.mark.parametrize("change", ["time", "size"])
def test_nothing_is_known_of_a_file_that_changed(change, file, tmp_path):
    learn(tmp_path / "home", file, decoded=True)
    if change == "size":
        file.write_bytes(b"other content")
        os.utime(file, (OLD, OLD))
    else:
        os.utime(file, (OLD + 5, OLD + 5))
    assert facts_of(tmp_path / "home", file) == {}


def test_fault_55_a_file_of_this_moment_is_not_remembered(file, tmp_path):
    """It may change again within the resolution of its time stamp."""
    file.write_bytes(b"CONTENT")
    learn(tmp_path / "home", file, decoded=True)
    assert facts_of(tmp_path / "home", file) == {}


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"version": 1, "folder": 3}', b"\xff\xfe", b'{"version": 99}']
)
def test_an_index_that_cant_be_read_costs_time_alone(content, file, tmp_path):
    learn(tmp_path / "home", file, decoded=True)
    (index,) = (tmp_path / "home").iterdir()
    index.write_bytes(content)
    assert facts_of(tmp_path / "home", file) == {}
    learn(tmp_path / "home", file, decoded=True)
    assert facts_of(tmp_path / "home", file) == {"decoded": True}


def test_a_home_that_cant_be_written_is_no_error(file, tmp_path):
    (tmp_path / "home").write_text("a file")
    learn(tmp_path / "home", file, decoded=True)
    assert facts_of(tmp_path / "home", file) == {}
