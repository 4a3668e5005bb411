"""The report page shows the values of the step log, escapes its texts, and loads nothing from outside."""

import hashlib
import html
import io
import json
import random
import re
import shutil
import statistics
import subprocess
import time
from base64 import b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.training.monitoring import report_page
from library.training.monitoring.report_page import (
    medians_of_runs,
    thinned,
    trailing_mean,
    write_report_page,
)
from library.training.monitoring.step_log import read_step_log

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def step_line(step, **others):
    return {
        "step": step,
        "epoch": 1,
        "grad_norm": 0.5,
        "seconds": 2.0 * step,
        "loss/current": 0.1,
        **others,
    }


def validation_line(step, loss):
    return {
        "step": step,
        "loss/validation/step_average": loss,
        "loss/validation/step_divergence": 0.01,
    }


def page_of(folder, lines, **others):
    """The page's text. Lines are JSON objects, or text that is written unchanged."""
    log_file, page = folder / "run-log.jsonl", folder / "run-report.html"
    log_file.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    write_report_page(
        log_file, page, **{"title": "run", "options": {}, "facts": [], "samples": [], **others}
    )
    return page.read_text(encoding="utf-8")


def charts_of(page):
    """The charts' data by title, as the page's script reads it."""
    (text,) = re.findall(
        r'<script type="application/json" id="chart-data">(.*?)</script>', page, re.DOTALL
    )
    charts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the data"))
    titles = re.findall(r"<figure[^>]*><h2>(.*?)[ <]", page)
    assert [chart["title"].split()[0] for chart in charts] == titles
    return {chart["title"]: chart for chart in charts}


def notes_of(page):
    return re.findall(r'<p class="note">(.*?)</p>', page)


def points(chart, name):
    """(steps, values) of the line, without the steps at which only other lines have a value."""
    (line,) = [line for line in chart["lines"] if line["name"] == name]
    # The cursor reads every line at one step.
    assert len(line["values"]) == len(chart["steps"])
    found = [
        (step, value)
        for step, value in zip(chart["steps"], line["values"], strict=True)
        if value is not None
    ]
    return np.array(found).T


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(buffer, "jpeg")
    return buffer.getvalue()


class Structure(HTMLParser):
    """Collects the tags, their attributes and the text outside of styles and scripts; fails if a tag isn't closed in place."""

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
        if self._open and self._open[-1] not in ("style", "script"):
            self.text.append(data)


def test_the_data_of_a_line_are_the_values_and_steps_of_the_log(tmp_path):
    losses = [0.31, 0.12, 0.25, 0.07, 0.18]
    lines = [step_line(10 * i, **{"loss/current": loss}) for i, loss in enumerate(losses, start=1)]
    lines += [validation_line(50, 0.22), {"step": 60, "loss/validation/epoch_average": 0.5}]
    chart = charts_of(page_of(tmp_path, lines))["Loss"]
    steps, values = points(chart, "each step")
    assert (steps.tolist(), values.tolist()) == ([10, 20, 30, 40, 50], losses)
    means = points(chart, "mean of the last 10")
    np.testing.assert_allclose(
        means, [[10, 20, 30, 40, 50], [0.31, 0.215, 0.226667, 0.1875, 0.186]], rtol=1e-6
    )
    assert points(chart, "validation").tolist() == [[50], [0.22]]
    assert points(chart, "validation after epochs").tolist() == [[60], [0.5]]
    low, high = chart["range"]
    assert low < 0.07 and high > 0.5


def test_seconds_per_step_skip_the_start_of_a_resumed_run(tmp_path):
    seconds = [10.0, 12.0, 15.0, 1.0, 3.5]  # the third step's process ended
    lines = [step_line(i, seconds=at) for i, at in enumerate(seconds, start=1)]
    steps, values = points(charts_of(page_of(tmp_path, lines))["Speed"], "each step")
    assert (steps.tolist(), values.tolist()) == ([2, 3, 5], [2.0, 3.0, 2.5])


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    log_file = tmp_path / "log.jsonl"
    lines = [step_line(i, **{"loss/current": 0.1}) for i in (1, 2, 3, 4)]
    lines[2:2] = [validation_line(2, 0.5)]
    lines += [
        validation_line(4, 0.6),
        step_line(3, **{"loss/current": 0.9}),
        validation_line(3, 0.7),
    ]
    log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    step_log = read_step_log(log_file)
    assert list(step_log.steps) == [1, 2, 3]
    assert step_log.column("loss/current").tolist() == [0.1, 0.1, 0.9]
    assert [list(column) for column in step_log.validations["step"]] == [[2, 3], [0.5, 0.7]]


def test_incomplete_lines_and_unknown_or_missing_values_do_not_affect_the_rest(tmp_path):
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
    charts = charts_of(page)
    assert points(charts["Loss"], "each step").tolist() == [[1, 5], [0.1, 0.2]]
    assert points(charts["Memory"], "in use").tolist() == [[4], [5.5]]
    assert notes_of(page) == ["no norm at 2 of 4 steps"]
    assert "Learning rate" not in charts and "Learning rate" not in page


def test_rates_that_are_equal_share_a_line_and_rates_far_apart_get_a_logarithmic_axis(tmp_path):
    lines = [step_line(i, **{"lr/unet": 1e-4, "lr/te1": 5e-5, "lr/te2": 5e-5}) for i in (1, 2, 3)]
    page = page_of(tmp_path, lines)
    chart = charts_of(page)["Learning rate"]
    assert points(chart, "te1, te2")[1].tolist() == [5e-5] * 3
    assert points(chart, "unet")[1].tolist() == [1e-4] * 3
    assert not chart["is_log"] and chart["range"][0] == 0
    assert "logarithmic" not in notes_of(page)
    lines = [step_line(i, **{"lr/unet": 1.0, "d*lr/unet": 1e-4}) for i in (1, 2, 3)]
    page = page_of(tmp_path, lines)
    chart = charts_of(page)["Learning rate"]
    assert points(chart, "d*lr unet")[1].tolist() == [1e-4] * 3
    assert chart["is_log"] and 0 < chart["range"][0] < 1e-4 and chart["range"][1] > 1
    assert notes_of(page) == ["logarithmic"]


def test_23_different_rates_make_a_small_chart(tmp_path):
    lines = [
        step_line(i, **{f"lr/block {b}": (b + 1) * 1e-5 * (i % (b + 7)) for b in range(23)})
        for i in range(1, 3001)
    ]
    chart = charts_of(page_of(tmp_path, lines))["Learning rate"]
    assert len(chart["lines"]) == 23
    assert 200 < len(chart["steps"]) < 600
    looks = [(line["color"], line["look"]) for line in chart["lines"]]
    assert len(set(looks[:16])) == 16  # the colors are used again, dashed


def test_a_spike_is_in_the_data_but_not_in_the_first_view(tmp_path):
    lines = [
        step_line(i, **{"loss/current": 9.0 if i == 120 else 0.1 + i % 7 / 100})
        for i in range(1, 301)
    ]
    page = page_of(tmp_path, lines)
    chart = charts_of(page)["Loss"]
    steps, values = points(chart, "each step")
    assert values[steps.tolist().index(120)] == 9.0
    assert chart["range"][1] < 2
    assert "outside: 1 of 300 steps" in notes_of(page)


def test_text_from_outside_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>\'&amp; BODY {x}'
    page = page_of(
        tmp_path, [step_line(1, **{f"lr/{evil}": 1e-4})], title=evil, options={evil: [evil, 1]}, facts=[(evil, evil)],
        samples=[(evil, evil, jpeg("red"))],
    )  # fmt: skip
    found = Structure(page)
    text = "".join(found.text)
    assert text.count(evil) == 8  # title, heading, fact (2), option (2), prompt, label
    assert charts_of(page)["Learning rate"]["lines"][0]["name"] == evil
    image = {
        "src": f"data:image/jpeg;base64,{b64encode(jpeg('red')).decode()}",
        "alt": f"sample, {evil}",
    }
    assert found.tags.count(("img", image)) == 1
    assert [tag for tag, _ in found.tags].count("script") == 3  # the data, uPlot, ours
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "span", "small", "div", "figure",
        "noscript", "script", "table", "tr", "th", "td", "img",
    }  # fmt: skip


def test_the_page_loads_no_other_files(tmp_path):
    page = page_of(
        tmp_path, [step_line(1), step_line(2)], samples=[("000002", "a dog", jpeg("red"))]
    )
    assert re.findall(r'src="([^,"]*)', page) == ["data:image/jpeg;base64"]
    assert not re.search(
        r"<script[^>]*src|<link|@import|@font-face|url\(|fetch\(|XMLHttpRequest|<[^>]*\son\w+=",
        page,
    )
    policy = dict(Structure(page).tags[4][1])
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']*)'", policy["content"]) == digests


def test_the_vendored_library_is_the_one_that_its_readme_names(tmp_path):
    """Its version and checksums are in the repository, and its license is in every page."""
    folder = Path(report_page.__file__).parent / "report_assets" / "uplot"
    notes = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        content = (folder / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"| `{name}` | `{hashlib.sha256(content).hexdigest()}` |" in notes
    version = re.findall(r"^# uPlot ([\d.]+)$", notes, re.MULTILINE)[0]
    page = page_of(tmp_path, [step_line(1)])
    assert f"github.com/leeoniya/uPlot (v{version})" in page
    assert (folder / "LICENSE").read_text(encoding="utf-8") in page


def test_samples_have_a_row_per_step_and_a_column_per_prompt(tmp_path):
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


def test_a_log_without_steps_is_mentioned_on_the_page(tmp_path):
    write_report_page(
        tmp_path / "none.jsonl", tmp_path / "page.html", title="run", options={"lr": 1}, facts=[("network", "LoRA")], samples=[]
    )  # fmt: skip
    for page in (
        (tmp_path / "page.html").read_text(),
        page_of(tmp_path, [validation_line(0, 0.1)]),
    ):
        assert "No step is complete yet." in page
        assert "<figure" not in page and "<script" not in page and "nan" not in page


def test_a_single_step_and_constant_values_have_charts(tmp_path):
    for lines in ([step_line(7)], [step_line(i, grad_norm=0, **{"lr/unet": 0}) for i in (1, 2, 3)]):
        charts = charts_of(page_of(tmp_path, lines))
        assert len(points(charts["Loss"], "each step")[0]) == len(lines)
        for chart in charts.values():
            assert chart["range"][0] < chart["range"][1]


def test_a_hundred_thousand_steps_make_a_small_page_quickly(tmp_path):
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

    def write() -> None:
        write_report_page(
            tmp_path / "run-log.jsonl",
            tmp_path / "run-report.html",
            title="run",
            options={},
            facts=[],
            samples=[],
        )

    # In pairs, so that a machine that is slow or busy is so for both. The ratio is 1.1; of twelve pairs on a busy machine of
    # two cores one was at 1.3 and all others within 0.1.
    assert median_ratio(write, lambda: [json.loads(text) for text in texts]) < 2
    page = (tmp_path / "run-report.html").read_text()
    assert len(page) < 300_000
    steps, values = points(charts_of(page)["Loss"], "each step")
    assert 1000 < len(steps) <= 1500
    # Thinning keeps the extremes.
    assert steps[values.argmax()] == 77_778 and values.max() == 9.0


def median_ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """How much longer one takes than the other, in CPU seconds: the median of five pairs, one after another."""

    def seconds(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return statistics.median(seconds(one) / seconds(other) for _ in range(5))


def test_smoothing_and_thinning_by_hand():
    nan = float("nan")
    np.testing.assert_allclose(
        trailing_mean(np.array([nan, 1, 2, nan, 6]), 3), [nan, 1, 1.5, 1.5, 4]
    )
    assert thinned(np.array([3, 1, 2, 9, 4, 0, 5, 6]), 6).tolist() == [0, 1, 3, 5, 7]
    at, medians, size = medians_of_runs(
        np.arange(1, 13), np.array([50, 50, 1, 1, 90, 2, 2, 3, 3, 70, 3, 3])
    )
    assert (at.tolist(), medians.tolist(), size) == ([7, 12], [2, 3], 5)


def browse(page, folder, *arguments):
    """Chromium's standard output for a page."""
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet, "--hide-scrollbars",
            "--window-size=1200,1600", "--virtual-time-budget=2000", f"--user-data-dir={folder / 'browser'}", *arguments,
            page.as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return done.stdout.decode()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_light_and_dark(tmp_path):
    lines = [
        step_line(i, **{"loss/current": 0.1 + (i % 7) / 50, "lr/unet": 1e-4}) for i in range(1, 40)
    ]
    page_of(tmp_path, lines, samples=[("000010", "a dog", jpeg((250, 0, 250)))])
    shots = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        settings = f"--blink-settings=preferredColorScheme={number}"
        browse(tmp_path / "run-report.html", tmp_path, settings, f"--screenshot={shot}")
        shots[scheme] = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    backgrounds = {scheme: shot[2, 2].mean() for scheme, shot in shots.items()}
    assert backgrounds["light"] > 230 and backgrounds["dark"] < 50
    for shot in shots.values():
        visible = np.abs(shot - shot[2, 2]).max(axis=-1) > 60
        assert 0.01 < visible.mean() < 0.5
        # The sample is 12 rem wide.
        assert (np.abs(shot - (250, 0, 250)).max(axis=-1) < 12).sum() > 20_000
    blue = {"light": (0x25, 0x63, 0xC9), "dark": (0x7A, 0xB0, 0xFF)}
    for scheme, shot in shots.items():
        assert (np.abs(shot - blue[scheme]).max(axis=-1) < 4).sum() > 300  # the smoothed loss


# The mouse enters the first chart and moves to its middle. To zoom, it drags from there to the right edge.
MOUSE = """<script>setTimeout(() => {
  const over = document.querySelector(".u-over"), box = over.getBoundingClientRect();
  for (const [kind, share] of EVENTS) {
    const place = { clientX: box.left + box.width * share, clientY: box.top + 9, movementX: 9 };
    over.dispatchEvent(new MouseEvent(kind, { ...place, bubbles: true }));
  }
}, 500);</script>"""
HOVER = [["mouseenter", 0.2], ["mousemove", 0.5]]
ZOOM = [
    *HOVER,
    ["mousedown", 0.5],
    ["mousemove", 0.75],
    ["mousemove", 1],
    ["mouseup", 1],
    ["mousemove", 0.6],
]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_legends_show_the_last_values_and_those_under_the_cursor(tmp_path):
    evil = "<b>lr</b></script>"
    lines = [
        step_line(i, **{"loss/current": i / 100, f"lr/{evil}": i * 1e-6}) for i in range(1, 12)
    ]
    text = page_of(tmp_path, [*lines[:4], validation_line(4, 0.125), *lines[4:]])

    def legends(page):
        browsed = browse(page, tmp_path, "--dump-dom")
        cells = re.findall(
            r'<div class="u-label">(.*?)</div></th><td class="u-value">(.*?)</td>', browsed
        )
        return [(html.unescape(name), value) for name, value in cells]

    shown = legends(tmp_path / "run-report.html")
    assert shown[:4] == [
        ("step", "11"),
        ("each step", "0.11"),
        ("mean of the last 10", "0.065"),
        ("validation", "0.125"),
    ]
    assert shown[4:6] == [("step", "11"), (evil, "1.1e-5")]
    # Each chart has a legend; no line has memory_gib.
    assert [name for name, _ in shown].count("step") == 4

    # The policy would not let the test's script run.
    text = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", text)
    # The middle of steps 1 to 11, and six tenths of 6 to 11.
    for events, step in ((HOVER, 6), (ZOOM, 9)):
        with_mouse = tmp_path / "mouse.html"
        script = MOUSE.replace("EVENTS", json.dumps(events))
        with_mouse.write_text(text.replace("</body>", script + "</body>"), encoding="utf-8")
        shown = legends(with_mouse)
        assert shown[:2] == [("step", f"{step}"), ("each step", f"{step / 100}")]
        assert shown[3] == ("validation", "0.125 (step 4)")
        assert shown[4:6] == [("step", f"{step}"), (evil, f"{step}e-6")]  # the other charts follow
