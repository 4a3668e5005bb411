"""Where log records go: stderr, a file instead, or plain lines on stdout; and other processes keep quiet."""

import logging
import sys

import pytest

from library.log import LogOptions, log, progress_bar, start_logging
from library.options import read_options


@pytest.fixture(autouse=True)
def restored():
    yield
    log.handlers[:] = []
    log.setLevel(logging.NOTSET)


def start(*argv: object) -> None:
    start_logging(read_options("t", [LogOptions], [str(word) for word in argv]))
    log.debug("detail")
    log.info("told")
    log.warning("warned")


def test_records_go_to_stderr_with_time_and_level(capsys):
    start()
    out, err = capsys.readouterr()
    assert out == "" and "INFO    told" in err and "WARNING warned" in err and "detail" not in err


def test_simple_means_plain_lines_on_stdout(capsys):
    start("--console_log_simple")
    assert capsys.readouterr() == ("told\nwarned\n", "")


def test_the_level_is_the_users(capsys):
    start("--console_log_level", "WARNING")
    assert "told" not in capsys.readouterr().err
    start("--console_log_level", "DEBUG")
    assert "detail" in capsys.readouterr().err


def test_a_log_file_is_emptied_and_replaces_the_console(tmp_path, capsys):
    path = tmp_path / "run.log"
    path.write_text("old")
    start("--console_log_file", path)
    text = path.read_text(encoding="utf-8")
    assert (
        "told" in text and "old" not in text.replace("told", "") and capsys.readouterr() == ("", "")
    )


def test_other_processes_keep_quiet(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    start()
    assert capsys.readouterr() == ("", "")
    assert progress_bar("x", 3).disable


def test_notices_about_options_are_logged(tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text("sdxl = true\n")
    start("--config_file", config)
    assert "not options of this script: sdxl" in capsys.readouterr().err


def test_a_progress_bar_into_a_file_writes_few_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress_bar("steps", 1000) as bar:
        for _ in range(1000):
            bar.update()
    assert capsys.readouterr().err.count("\r") <= 3
