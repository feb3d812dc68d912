"""The page of a run: self-contained, with what the run made, and well formed."""

import html
import html.parser
import json
import re
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
        self.links, self.anchors, self.script = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href") and not (value or "").startswith(("data:", "#")):
                self.foreign.append(value)
            elif key == "href" and value.startswith("#"):
                self.links.append(value[1:])
            elif key == "id":
                self.anchors.append(value)
        if tag == "img":
            self.images.append(dict(attrs)["alt"])

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "script":
            self.script += data


def test_the_page_of_a_finished_run(tmp_path):
    run = made.run(tmp_path / "a <b>")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "knn/top1": 0.3}\n')
    matrix = np.array([[13, 1], [0, 14]])
    np.savez(run / "scores.npz", **{"val/confusion": matrix, "val/other": matrix})
    text = page.page(workdir.workdir(run))
    found = Reader(text)
    assert found.foreign == [] and found.script == charts.SCRIPT
    assert found.headings[0] == "Results" and found.headings[-1] == "Config"
    for heading in ("Loss", "Time and memory", "Neighbours", "Confusion"):
        assert heading in found.headings
    # Every section can be gone to; the verdict comes before all of them.
    assert found.links == found.anchors and len(found.links) == len(found.headings)
    assert text.index("Not decided: k-NN 50.0%, untrained 25.0%") < text.index("<nav")
    # The run's own picture of its curves would show them twice.
    assert found.images == [
        "Test images and the training images with the nearest features.",
        "anything else",
    ]
    assert "a &lt;b&gt;" in text and "a <b>" not in text
    assert (
        "val: 96.4% (82.3-99.4) of 28 right" in text
        and ">13</span>" in text
        and ">14</span>" in text
    )
    loss, knn = _chart(text, "loss"), _chart(text, "knn/top1")
    assert loss["unit"] == "step" and loss["series"][0][2][-1] == 0.02439
    # The end, of all images, and what it has to beat, are in the chart.
    assert knn["series"][0][1:] == [[20.0, 40.0], [0.3, 0.5]]
    assert knn["series"][1] == ["final", [40.0], [0.5]]
    assert all(f">{name}</text>" in text for name in ("untrained", "raw pixels"))
    assert 'aria-label="loss"' in text and 'aria-label="wd"' not in text
    assert "<td>50.0%</td>" in text and "<td>25.0%</td>" in text  # Final k-NN.
    assert "&quot;lr&quot;: 0.003" in text and "0.10.2" in text


def _chart(text, name):
    """Return the data of a chart."""
    found = re.search(f'aria-label="{name}" data-chart="([^"]*)"', text)
    return json.loads(html.unescape(found[1]))


def test_curves_are_by_epoch_where_the_run_says_how_long_one_is(tmp_path):
    run = made.run(tmp_path / "a", steps_per_epoch=8)
    text = page.page(workdir.workdir(run))
    loss = _chart(text, "loss")
    assert loss["unit"] == "epoch" and loss["series"][0][1][-1] == 5.0
    assert 'aria-label="time/eta_seconds"' not in text


def test_metrics_that_differ_in_a_number_are_one_chart_in_natural_order():
    keys = ["knn/top1", "lr/block_10", "lr/block_2", "loss_h0", "knn/top5", "lr"]
    assert page.families(keys) == [
        ["knn/top1"],
        ["lr/block_2", "lr/block_10"],
        ["loss_h0"],
        ["knn/top5"],
        ["lr"],
    ]


def test_a_collapse_is_said_first(tmp_path):
    run = made.run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "quality/collapsed": 1.0}\n')
    text = page.page(workdir.workdir(run))
    assert "Collapsed since step 20" in text[: text.index("<nav")]
    assert 'class="verdict collapsed"' in text


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
    # Of a square of 1000; the last step is not at its very edge.
    right = f"{1000 / 1.015:.1f}"
    assert f'd="M0.0,1000.0 {right},0.0"' in svg
    nan = float("nan")
    whole = charts.lines("x", [("a", [0, 5, 10], [0.0, nan, 1.0])])
    assert f'd="M0.0,1000.0 {right},0.0"' in whole
    assert "no finite value" in charts.lines("x", [("a", [0], [nan])])


def test_three_orders_of_magnitude_are_drawn_logarithmically():
    assert "x (log)" in charts.lines("x", [("a", [0, 1], [1e-4, 1.0])])
    assert "x (log)" not in charts.lines("x", [("a", [0, 1], [1e-2, 1.0])])
    assert "x (log)" not in charts.lines("x", [("a", [0, 1], [0.0, 1.0])])


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


PROBE = """<script>
const last = [...document.querySelectorAll(".chart")].find(
  c => c.getAttribute("aria-label") === "loss");
const area = last.getBoundingClientRect(), view = last.viewBox.baseVal;
const plot = last.querySelector(".plot");
function at(kind, share) {
  const x = +plot.getAttribute("x") + share * plot.getAttribute("width");
  last.dispatchEvent(new PointerEvent(kind, {bubbles: true,
    clientX: area.left + x / view.width * area.width, clientY: area.top + 60}));
}
onload = () => {
  at("pointermove", 1 / 1.015);
  const read = document.querySelector(".tip").innerText.replace(/\\s+/g, " ");
  at("pointerdown", 0.25);
  at("pointerup", 0.5);
  const zoomed = plot.getAttribute("viewBox").split(" ").map(Number).map(Math.round);
  const tick = last.querySelector("text.x").textContent;
  last.dispatchEvent(new MouseEvent("dblclick"));
  const images = [...document.images].every(i => i.complete && i.naturalWidth > 0);
  document.title = JSON.stringify({
    images: images && document.images.length, read, zoomed, tick,
    back: plot.getAttribute("viewBox"), again: last.querySelector("text.x").textContent
  });
};
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_shows_it_without_a_word_reads_off_and_zooms(tmp_path):
    path = tmp_path / "report.html"
    text = page.page(workdir.workdir(made.run(tmp_path / "a")))
    path.write_text(text.replace("</body>", PROBE))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        + ["--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    told = html.unescape(re.search("<title>({.*})</title>", done.stdout)[1])
    found = json.loads(told)
    assert found["images"] == 2
    assert found["read"] == "step 40 loss: 0.02439"
    left, top, wide, high = found["zoomed"]
    assert (left, wide) == (250, 250) and 0 < top < 1000 and 0 < high < 200
    assert (found["tick"], found["again"]) == ("10.15", "0")
    assert found["back"] == "0 0 1000 1000"
