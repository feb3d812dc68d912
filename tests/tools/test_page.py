"""The page of a run: self-contained, with what the run made, and well formed."""

import html.parser
import shutil
import subprocess

import numpy as np
import pytest

from tests.tools import made
from vitssl import errors
from vitssl.tools import charts, page, workdir

VOID = {"meta", "link", "img", "line"}


class Reader(html.parser.HTMLParser):
    """Checks that tags are closed; collects images, headings and foreign addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.headings, self.foreign = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href") and not (value or "").startswith("data:"):
                self.foreign.append(value)
        if tag == "img":
            self.images.append(dict(attrs)["alt"])

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_of_a_finished_run(tmp_path):
    run = made.run(tmp_path / "a <b>")
    matrix = np.array([[13, 1], [0, 14]])
    np.savez(run / "scores.npz", **{"val/confusion": matrix, "val/other": matrix})
    text = page.page(workdir.workdir(run))
    found = Reader(text)
    assert found.foreign == [] and "<script" not in text
    assert found.headings[0] == "Results" and found.headings[-1] == "Config"
    for heading in ("Training", "Timing and memory", "Neighbours", "Confusion matrix"):
        assert heading in found.headings
    # The run's own picture of its curves would show them twice.
    assert found.images == [
        "Test images and those with the nearest features.",
        "anything else",
    ]
    assert "a &lt;b&gt;" in text and "a <b>" not in text
    assert "val/confusion" in text and ">13</span>" in text and ">14</span>" in text
    assert 'aria-label="loss"' in text and 'aria-label="wd"' not in text
    assert "<td>50.0%</td>" in text and "<td>25.0%</td>" in text  # Final k-NN.
    assert "&quot;lr&quot;: 0.003" in text and "0.10.2" in text


def test_a_run_that_has_just_begun_or_failed_has_a_page(tmp_path):
    run = made.run(tmp_path / "a", picture=False, state="failed", error="E: no <disk>")
    (run / "metrics.jsonl").write_text("")
    text = page.page(workdir.workdir(run))
    Reader(text)
    assert "E: no &lt;disk&gt;" in text and "has not run yet" in text
    assert "--draw" in text


def test_of_many_classes_the_worst_confusions_are_listed(tmp_path):
    run = made.run(tmp_path / "a")
    matrix = np.eye(40, dtype=int) * 50
    matrix[3, 7], matrix[9, 2] = 21, 33
    np.savez(run / "scores.npz", confusion=matrix)
    text = page.page(workdir.workdir(run))
    Reader(text)
    first, second = "<td>9</td><td>2</td><td>33</td>", "<td>3</td><td>7</td><td>21</td>"
    assert 0 < text.index(first) < text.index(second)


def test_a_damaged_file_of_scores_is_named(tmp_path):
    run = made.run(tmp_path / "a")
    (run / "scores.npz").write_bytes(b"PK no zip")
    with pytest.raises(errors.UsageError, match="scores.npz: damaged"):
        page.page(workdir.workdir(run))


def test_final_rows_are_those_of_the_evaluation(tmp_path):
    rows = page.final_rows(workdir.workdir(made.run(tmp_path / "a", knn=0.5)))
    assert rows == [
        {"features": "trained", "knn/top1": 0.5},
        {"features": "untrained", "knn/top1": 0.25},
        {"features": "raw pixels", "knn/top1": 0.75},
    ]


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.12, 0.48, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (-1.0, 7.0, [-2.0, 0.0, 2.0, 4.0, 6.0, 8.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert charts._ticks(low, high) == pytest.approx(ticks)


def test_a_curve_goes_through_its_points():
    svg = charts.lines("x", [("a", [0, 10], [0.0, 1.0])])
    left, bottom = charts._LEFT, charts._HEIGHT - charts._BOTTOM
    right, top = charts._WIDTH - charts._RIGHT, charts._TOP
    assert f'd="M{left}.0,{bottom}.0 {right}.0,{top}.0"' in svg
    nan = float("nan")
    assert 'd="M48.0' in charts.lines("x", [("a", [0, 5, 10], [0.0, nan, 1.0])])
    assert "no finite value" in charts.lines("x", [("a", [0], [nan])])


def test_three_orders_of_magnitude_are_drawn_logarithmically():
    assert "x (log)" in charts.lines("x", [("a", [0, 1], [1e-4, 1.0])])
    assert "x (log)" not in charts.lines("x", [("a", [0, 1], [1e-2, 1.0])])
    assert "x (log)" not in charts.lines("x", [("a", [0, 1], [0.0, 1.0])])


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_shows_it_without_a_word(tmp_path):
    path = tmp_path / "report.html"
    text = page.page(workdir.workdir(made.run(tmp_path / "a")))
    # The title tells what the browser made of the pictures.
    probe = (
        "<script>onload = () => { document.title = [...document.images].every("
        "i => i.complete && i.naturalWidth > 0) + ' ' + document.images.length + ' ' + "
        "document.querySelectorAll('svg path').length }</script></body>"
    )
    path.write_text(text.replace("</body>", probe))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        + ["--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    assert "<title>true 2 4</title>" in done.stdout, done.stdout[:2000]
