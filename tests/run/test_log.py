"""Metrics one step late, their means across a resume, files that survive a kill."""

import json
import logging
import signal
import sys
import types

import numpy as np
import pytest

from vitssl import errors
from vitssl.run import guard, log

SPEC = log.Log(every_steps=2, tensorboard=False)


def _values(loss, bad=0.0):
    return {"loss": loss, "grad_norm": 1.0, "nonfinite": bad}


def test_metrics_are_read_one_step_late():
    metrics = log.Metrics(SPEC, {})
    metrics.push(0, _values(1.0))
    assert metrics.count == 0
    metrics.push(1, _values(3.0))
    assert metrics.count == 1 and metrics.last["loss"] == 1.0
    metrics.drain()
    assert metrics.means()["loss"] == 2.0
    assert metrics.count == 0


def test_means_continue_after_a_checkpoint():
    whole, first = log.Metrics(SPEC, {}), log.Metrics(SPEC, {})
    for i in range(4):
        whole.push(i, _values(0.1 * i))
    whole.drain()
    for i in range(2):
        first.push(i, _values(0.1 * i))
    first.drain()
    second = log.Metrics(SPEC, json.loads(json.dumps(first.state())))
    for i in range(2, 4):
        second.push(i, _values(0.1 * i))
    second.drain()
    assert second.means() == whole.means()


def test_the_mean_of_what_is_measured_now_and_then_is_over_those_steps():
    metrics, nan = log.Metrics(SPEC, {}), float("nan")
    for i, rank in enumerate([nan, 4.0, nan, 8.0]):
        if i == 2:  # A checkpoint between.
            metrics.drain()
            metrics = log.Metrics(SPEC, json.loads(json.dumps(metrics.state())))
        metrics.push(i, _values(float(i)) | {"rank": rank, "never": nan})
    metrics.drain()
    means = metrics.means()
    assert means["rank"] == 6.0 and means["loss"] == 1.5 and "never" not in means
    metrics.push(4, _values(1.0) | {"rank": 2.0})
    metrics.drain()
    assert metrics.means()["rank"] == 2.0


def test_what_a_checkpoint_holds_stands_still_while_it_is_written():
    metrics = log.Metrics(SPEC, {})
    metrics.push(0, _values(2.0))
    metrics.drain()
    held = metrics.state()
    metrics.push(1, _values(5.0))
    metrics.drain()
    assert held["sums"]["loss"] == 2.0 and held["count"] == 1


def test_non_finite_steps_do_not_enter_the_mean_and_three_in_a_row_stop():
    metrics = log.Metrics(SPEC, {})
    nan = float("nan")
    for i, bad in enumerate([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]):
        metrics.push(i, _values(nan if bad else 2.0, bad))
    metrics.drain()
    assert metrics.nonfinite == 4 and metrics.sums["loss"] == 4.0
    metrics.push(6, _values(nan, 1.0))
    with pytest.raises(errors.NonFiniteError, match="step 6: 3 non-finite"):
        metrics.drain()


def test_lines_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    writers = log.Writers(tmp_path, SPEC, 2, {}, "x")
    writers.scalars(3, {"loss": 0.5})
    writers.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_a_writer_that_fails_is_dropped_with_one_warning(tmp_path, monkeypatch):
    writers = log.Writers(tmp_path, SPEC, 0, {}, "x")

    def broken(step, values):
        raise OSError("quota")

    writers._others["wandb"] = (broken, lambda: None)
    # Not caplog: who listens to the package's logger depends on the tests before.
    said = []
    monkeypatch.setattr(log.logger, "warning", lambda text, *a: said.append(text % a))
    writers.scalars(1, {"loss": 1.0})
    writers.scalars(2, {"loss": 1.0})
    assert said == ["wandb failed and is off from now on: quota"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_that_is_not_there_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = log.Log(every_steps=1, tensorboard=False, wandb="project")
    writers = log.Writers(tmp_path, spec, 0, {}, "x")
    writers.scalars(1, {"loss": 1.0})
    assert writers._others == {}


class _Wandb(types.ModuleType):
    """Stands in for wandb: remembers what it was given."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.lines = [], []

    def init(self, **given):
        self.runs.append(given)
        return self

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        pass

    def Histogram(self, np_histogram):  # noqa: N802 - as wandb calls it.
        return np_histogram


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := _Wandb())
    return module


def _to_wandb(workdir, **keys):
    spec = log.Log(every_steps=1, tensorboard=False, wandb="project", **keys)
    workdir.mkdir(exist_ok=True)
    return log.Writers(workdir, spec, 0, {"seed": 1}, "demo")


def test_every_workdir_is_a_wandb_run_of_its_own_and_stays_it(wandb, tmp_path):
    for name in ("a", "b", "a"):
        _to_wandb(tmp_path / name)
    first, second, resumed = (run["id"] for run in wandb.runs)
    assert first == resumed != second and len(first) == 16
    assert (tmp_path / "a" / "wandb_id").read_text() == first + "\n"
    assert {run["name"] for run in wandb.runs} == {"demo"}


def test_a_given_wandb_run_is_gone_on_with_and_kept(wandb, tmp_path):
    for given in ("", "other", ""):
        _to_wandb(tmp_path, wandb_id=given)
    ids = [run["id"] for run in wandb.runs]
    assert ids[0] != "other" and ids[1:] == ["other", "other"]


def test_wandb_is_told_what_the_config_says(wandb, tmp_path):
    keys = dict(wandb_group="g", wandb_job_type="train", wandb_tags=("x", "y"))
    writers = _to_wandb(tmp_path, wandb_entity="lab", **keys)
    writers.scalars(3, {"loss": 0.5})
    _to_wandb(tmp_path)
    told, plain = wandb.runs
    want = dict(entity="lab", group="g", job_type="train", tags=("x", "y"))
    assert told.items() >= want.items()
    assert told.items() >= dict(project="project", resume="allow").items()
    assert {plain[key] for key in want} == {None}
    assert wandb.lines == [(3, {"loss": 0.5})]


def test_histograms_go_to_wandb_and_tensorboard_but_not_into_the_lines(wandb, tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    metrics = log.Metrics(SPEC, {})
    # Between -1 and 3: one value in the first half, three in the second.
    arrays = {"grad/head": np.array([-1.0, 3.0, 1.0, 3.0], np.float32)}
    metrics.push(0, _values(1.0) | arrays)
    metrics.drain()
    assert "grad/head" not in metrics.means()
    writers = log.Writers(
        tmp_path, log.Log(every_steps=1, wandb="project"), 0, {}, "demo"
    )
    writers.histograms(7, metrics.histograms | {"grad/body": np.zeros(4)})
    writers.close()
    ((step, found),) = wandb.lines
    counts, edges = found["grad/head"]
    assert step == 7 and set(found) == {"grad/head"}
    assert counts.tolist() == [1, 3] and edges.tolist() == [-1, 1, 3]
    assert (tmp_path / "metrics.jsonl").exists() is False
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["histograms"] == ["grad/head"]
    (event,) = events.Histograms("grad/head")
    value = event.histogram_value
    assert (event.step, value.min, value.max, value.num) == (7, -1, 3, 4)
    assert (value.bucket_limit, value.bucket) == ([1, 3], [1, 3])


def test_a_step_that_was_not_finite_has_no_histograms():
    metrics = log.Metrics(SPEC, {})
    for i, bad in enumerate((0.0, 1.0)):
        metrics.push(i, _values(1.0, bad) | {"grad/head": np.ones(4)})
    metrics.drain()
    assert metrics.histograms == {}


def test_tensorboard_files_hold_the_scalars(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    writers = log.Writers(tmp_path, log.Log(every_steps=1), 0, {}, "x")
    writers.scalars(7, {"loss": 0.25})
    writers.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    (found,) = events.Scalars("loss")
    assert (found.step, found.value) == (7, 0.25)


@pytest.mark.parametrize(
    "seconds, text",
    [(9.4, "9s"), (90, "1m30s"), (5400, "1h30m"), (float("inf"), "?")],
)
def test_durations(seconds, text):
    assert log.duration(seconds) == text


def test_the_progress_line_says_what_matters():
    values = {
        "loss": 0.5,
        "lr": 1e-3,
        "time/images_per_second_per_device": 321.0,
        "time/data_wait_percent": 2.0,
        "time/mfu_percent": 41.25,
        "time/eta_seconds": 75.0,
        "nonfinite_steps": 1,
    }
    line = log.progress(50, 1000, values)
    for part in ("50/1000", "loss 0.5000", "321 img/s/device", "data wait 2 %"):
        assert part in line
    for part in ("MFU 41.2 %", "ETA 1m15s", "skipped 1"):
        assert part in line


def test_the_clock_leaves_out_pauses():
    clock = log.Clock(100, 10, 2, flops_per_step=1e9, peak=1e12)
    clock._start -= 3.0
    clock.pause(1.0)
    for _ in range(4):
        clock.step(0.1)
    found = clock.read(20)
    assert found["time/step_seconds"] == pytest.approx(0.5, abs=0.05)
    assert found["time/eta_seconds"] == pytest.approx(40, rel=0.1)
    assert found["time/data_wait_percent"] == pytest.approx(20, rel=0.1)
    assert found["time/mfu_percent"] == pytest.approx(0.2, rel=0.1)


def test_the_pace_of_a_moment_is_not_told():
    clock = log.Clock(100, 10, 1)
    clock._start -= 4.0
    clock.step(0.0)
    assert clock.figures(1)["time/step_seconds"] == pytest.approx(4.0, abs=0.1)
    assert clock.read(1)["time/step_seconds"] == pytest.approx(4.0, abs=0.1)
    clock.step(0.0)  # At once: the last pace stands, for the steps that are left.
    found = clock.figures(50)
    assert found["time/step_seconds"] == pytest.approx(4.0, abs=0.1)
    assert found["time/eta_seconds"] == pytest.approx(200, rel=0.05)
    assert clock.read(2)["time/step_seconds"] < 1.0  # What is logged is what was.


def test_a_terminal_that_hung_up_does_not_end_the_run(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

    package = logging.getLogger("vitssl")
    before = package.handlers[:], package.level, package.propagate
    log.to_terminal()
    try:
        monkeypatch.setattr("sys.stdout", Gone())
        logging.getLogger("vitssl.run.loop").info("a line")
        guard.Signals()._handle(signal.SIGTERM, None)
    finally:
        monkeypatch.undo()
        package.handlers[:], package.level, package.propagate = before
