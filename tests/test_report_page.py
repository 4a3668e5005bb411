"""The report page shows what the step log says, where the axes say it is, and loads nothing from outside."""

import io
import json
import random
import re
import shutil
import subprocess
import time
from base64 import b64encode
from html.parser import HTMLParser

import numpy as np
import pytest
from messages import mentions
from PIL import Image

from library.training.monitoring.chart import thinned
from library.training.monitoring.report_page import medians_of_runs, trailing_mean, write_report_page
from library.training.monitoring.step_log import read_step_log

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def step_line(step, **others):
    return {"step": step, "epoch": 1, "grad_norm": 0.5, "seconds": 2.0 * step, "loss/current": 0.1, **others}


def validation_line(step, loss):
    return {"step": step, "loss/validation/step_average": loss, "loss/validation/step_divergence": 0.01}


def page_of(folder, lines, **others):
    """The page's text. Lines are JSON objects, or text as it stands."""
    log_file, page = folder / "run-log.jsonl", folder / "run-report.html"
    log_file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    write_report_page(log_file, page, **{"title": "run", "options": {}, "facts": [], "samples": [], **others})
    return page.read_text(encoding="utf-8")


def figure(page, title):
    (found,) = re.findall(rf"<figure[^>]*><h2>{title}.*?</figure>", page, re.DOTALL)
    return found


def points(chart, name):
    """The line's points in the drawing's units, [N, 2]."""
    (found,) = re.findall(rf'<polyline [^>]*points="([^"]*)"><title>{re.escape(name)}</title>', chart)
    return np.array([[float(number) for number in point.split(",")] for point in found.split()])


def read_off(chart, name):
    """(steps, values) of the line's points, read against the numbers that are written beside the axes."""
    across, up = (
        [(float(share) / 100, float(text.replace(",", ""))) for share, text in re.findall(pattern, chart)]
        for pattern in (r'<span class="x[^>]*left:([\d.]+)%">([^<]+)', r'<span class="y[^>]*top:([\d.]+)%">([^<]+)')
    )
    x, y = (points(chart, name) / (1000, 300)).T
    return tuple(np.polyval(np.polyfit(*zip(*ticks, strict=True), 1), at) for ticks, at in ((across, x), (up, y)))


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(buffer, "jpeg")
    return buffer.getvalue()


class Structure(HTMLParser):
    """Notes the tags, their attributes and the text outside of styles; fails if a tag isn't closed where it should be."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text.append(data)


def test_a_point_of_a_line_is_at_the_value_and_the_step_of_its_log_line(tmp_path):
    losses = [0.31, 0.12, 0.25, 0.07, 0.18]
    lines = [step_line(10 * i, **{"loss/current": loss}) for i, loss in enumerate(losses, start=1)]
    lines += [validation_line(50, 0.22)]
    chart = figure(page_of(tmp_path, lines), "Loss")
    steps, values = read_off(chart, "each step")
    np.testing.assert_allclose(steps, [10, 20, 30, 40, 50], atol=0.1)
    np.testing.assert_allclose(values, losses, atol=1e-3)
    np.testing.assert_allclose(read_off(chart, "mean of the last 10")[1][[1, 4]], [0.215, 0.186], atol=1e-3)
    np.testing.assert_allclose(read_off(chart, "validation"), [[50], [0.22]], atol=0.1)


def test_seconds_per_step_leave_out_where_a_resumed_run_starts_its_clock_again(tmp_path):
    seconds = [10.0, 12.0, 15.0, 1.0, 3.5]  # the third step's process ended
    lines = [step_line(i, seconds=at) for i, at in enumerate(seconds, start=1)]
    steps, values = read_off(figure(page_of(tmp_path, lines), "Speed"), "each step")
    np.testing.assert_allclose(steps, [2, 3, 5], atol=0.01)
    np.testing.assert_allclose(values, [2.0, 3.0, 2.5], atol=0.02)


def test_a_resumed_run_replaces_the_steps_that_it_does_again(tmp_path):
    log_file = tmp_path / "log.jsonl"
    lines = [step_line(i, **{"loss/current": 0.1}) for i in (1, 2, 3, 4)]
    lines[2:2] = [validation_line(2, 0.5)]
    lines += [validation_line(4, 0.6), step_line(3, **{"loss/current": 0.9}), validation_line(3, 0.7)]
    log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = read_step_log(log_file)
    assert list(told.steps) == [1, 2, 3]
    assert told.column("loss/current").tolist() == [0.1, 0.1, 0.9]
    assert [list(column) for column in told.validations["step"]] == [[2, 3], [0.5, 0.7]]


def test_torn_lines_and_unknown_or_missing_numbers_leave_the_rest_as_it_is(tmp_path):
    lines = [
        step_line(1, grad_norm=None, new_key={"a": [1]}),
        '{"step": 2, "loss/cur{"step": 2}\n',
        '[1]\n"step"\n\n\x00\n{"step": "3", "loss/current": 1}\n{"step": true, "loss/current": 1}\n{"loss/current": 1}\n',
        step_line(3, grad_norm=float("nan"), **{"loss/current": None}),
        step_line(4, memory_gib=5.5, **{"loss/current": 10**400}),
        step_line(5, **{"loss/current": 0.2, "lr/unet": "fast"}),
        '{"step": 6, "epoch": 1, "loss/current": 0.',
    ]
    page = page_of(tmp_path, lines)
    assert len(points(figure(page, "Loss"), "each step")) == 2
    assert len(points(figure(page, "Memory"), "in use")) == 1
    assert mentions(figure(page, "Gradient norm"), "norm", "2", "4")
    assert "Learning rate" not in page


def test_rates_that_are_equal_share_a_line_and_rates_far_apart_get_a_logarithmic_axis(tmp_path):
    lines = [step_line(i, **{"lr/unet": 1e-4, "lr/te1": 5e-5, "lr/te2": 5e-5}) for i in (1, 2, 3)]
    chart = figure(page_of(tmp_path, lines), "Learning rate")
    np.testing.assert_allclose(read_off(chart, "te1, te2")[1], 5e-5, rtol=1e-2)
    np.testing.assert_allclose(read_off(chart, "unet")[1], 1e-4, rtol=1e-2)
    assert "logarithmic" not in chart
    lines = [step_line(i, **{"lr/unet": 1.0, "d*lr/unet": 1e-4}) for i in (1, 2, 3)]
    chart = figure(page_of(tmp_path, lines), "Learning rate")
    decade = np.diff([float(top) for top in re.findall(r'class="y" style="top:([\d.]+)%', chart)][:2])[0]
    apart = (points(chart, "d*lr unet") - points(chart, "unet"))[:, 1] / 300 * 100
    np.testing.assert_allclose(apart / abs(decade), 4, rtol=1e-2)
    assert "logarithmic" in chart


def test_text_from_outside_is_shown_and_never_read_as_html(tmp_path):
    evil = '<script>alert("1")</script>\'&amp; BODY {x}'
    page = page_of(
        tmp_path, [step_line(1, **{f"lr/{evil}": 1e-4})], title=evil, options={evil: [evil, 1]}, facts=[(evil, evil)],
        samples=[(evil, evil, jpeg("red"))],
    )  # fmt: skip
    found = Structure(page)
    text = "".join(found.text)
    assert text.count(evil) == 10  # title, heading, line and legend, fact, option, prompt, label
    image = {"src": f"data:image/jpeg;base64,{b64encode(jpeg('red')).decode()}", "alt": f"sample, {evil}"}
    assert found.tags.count(("img", image)) == 1
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "i", "span", "small", "div", "figure",
        "svg", "path", "polyline", "table", "tr", "th", "td", "img",
    }  # fmt: skip


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = page_of(tmp_path, [step_line(1), step_line(2)], samples=[("000002", "a dog", jpeg("red"))])
    assert not re.search(r"http|<script|<link|@import|@font-face|url\(|\son\w+=", page)
    assert re.findall(r'src="([^,"]*)', page) == ["data:image/jpeg;base64"]


def test_samples_stand_in_rows_of_time_and_columns_of_prompts(tmp_path):
    red, blue = jpeg("red"), jpeg("blue")
    samples = [
        ("e000000", "a", red),
        ("000250", "a", red),
        ("000250", "b", red),
        ("e000002", "b", blue),
        ("e000002", "b", red),
    ]
    page = page_of(tmp_path, [], samples=samples)
    rows = re.findall(r"<tr><th>([^<]+)</th>(.*?)</tr>", page)
    assert [name for name, _ in rows] == ["before", "step 250", "epoch 2"]
    cells = [["img" in cell for cell in re.findall(r"<td>(.*?)</td>", row)] for _, row in rows]
    assert cells == [[True, False, False], [True, True, False], [False, True, True]]


def test_without_steps_the_page_says_so(tmp_path):
    write_report_page(
        tmp_path / "none.jsonl", tmp_path / "page.html", title="run", options={"lr": 1}, facts=[("network", "LoRA")], samples=[]
    )  # fmt: skip
    for page in ((tmp_path / "page.html").read_text(), page_of(tmp_path, [validation_line(0, 0.1)])):
        assert mentions(page, "no step|no steps")
        assert "<figure" not in page and "nan" not in page


def test_a_single_step_and_values_that_never_change_are_drawn(tmp_path):
    for lines in ([step_line(7)], [step_line(i, grad_norm=0, **{"lr/unet": 0}) for i in (1, 2, 3)]):
        page = page_of(tmp_path, lines)
        assert len(points(figure(page, "Loss"), "each step")) == len(lines)
        assert "nan" not in page and "inf" not in page


def test_a_hundred_thousand_steps_make_a_small_page_in_two_seconds(tmp_path):
    rng = random.Random(0)
    lines = [
        step_line(
            i, grad_norm=rng.random(), seconds=i + rng.random() / 2, memory_gib=5 + rng.random(),
            **{"loss/current": rng.random(), "loss/average": 0.5, "lr/unet": i * 1e-9, "lr/textencoder": i * 2e-9},
        )
        for i in range(1, 100_001)
    ]  # fmt: skip
    lines[77_777]["loss/current"] = 9.0
    page_of(tmp_path, lines)
    texts = (tmp_path / "run-log.jsonl").read_text().splitlines()
    started = time.process_time()
    for text in texts:
        json.loads(text)
    reading = time.process_time() - started
    started = time.process_time()
    write_report_page(
        tmp_path / "run-log.jsonl", tmp_path / "run-report.html", title="run", options={}, facts=[], samples=[]
    )
    assert time.process_time() - started < max(2, 3 * reading)  # the second one for a machine that is busy or slow
    page = (tmp_path / "run-report.html").read_text()
    assert len(page) < 1_000_000
    line = points(figure(page, "Loss"), "each step")
    assert 1000 < len(line) <= 1500
    assert line[line[:, 1].argmin(), 0] == pytest.approx(777.8, abs=0.1)  # what is thinned keeps its extremes


def test_smoothing_and_thinning_by_hand():
    nan = float("nan")
    np.testing.assert_allclose(trailing_mean(np.array([nan, 1, 2, nan, 6]), 3), [nan, 1, 1.5, 1.5, 4])
    assert thinned(np.array([3, 1, 2, 9, 4, 0, 5, 6]), 6).tolist() == [0, 1, 3, 5, 7]
    at, medians, size = medians_of_runs(np.arange(1, 13), np.array([50, 50, 1, 1, 90, 2, 2, 3, 3, 70, 3, 3]))
    assert (at.tolist(), medians.tolist(), size) == ([7, 12], [2, 3], 5)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_light_and_dark(tmp_path):
    lines = [step_line(i, **{"loss/current": 0.1 + (i % 7) / 50, "lr/unet": 1e-4}) for i in range(1, 40)]
    page_of(tmp_path, lines, samples=[("000010", "a dog", jpeg((250, 0, 250)))])
    shots = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1600",
                f"--user-data-dir={tmp_path / 'browser'}", f"--blink-settings=preferredColorScheme={number}",
                f"--screenshot={shot}", (tmp_path / "run-report.html").as_uri(),
            ],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        shots[scheme] = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    backgrounds = {scheme: shot[2, 2].mean() for scheme, shot in shots.items()}
    assert backgrounds["light"] > 230 and backgrounds["dark"] < 50
    for shot in shots.values():
        drawn = np.abs(shot - shot[2, 2]).max(axis=-1) > 60
        assert 0.01 < drawn.mean() < 0.5
        assert (np.abs(shot - (250, 0, 250)).max(axis=-1) < 12).sum() > 20_000  # the sample, 12 rem wide
    blue = {"light": (0x25, 0x63, 0xC9), "dark": (0x7A, 0xB0, 0xFF)}
    for scheme, shot in shots.items():
        assert (np.abs(shot - blue[scheme]).max(axis=-1) < 4).sum() > 300  # the smoothed loss
