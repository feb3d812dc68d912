"""What each phase of a run cost, with a clock that is set by hand."""

import json

import pytest

from vitssl.run import phases


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_seconds_are_those_of_steps_alone(clock):
    cost = phases.Phases()
    cost.enter(0, 0, 4e12)
    for _ in range(3):
        clock(2.0)
        cost.step()
    clock(50.0)
    cost.pause(50.0)  # An evaluation.
    cost.enter(3, 7, 1e12)
    clock(1.0)
    cost.step()
    cost.leave()
    clock(1000.0)  # The final evaluation.
    assert [r["seconds"] for r in cost.rows] == [6.0, 1.0]
    assert cost.totals() == {"time/train_seconds": 7.0, "compute/tflop": 13.0}
    assert "25.0%" in cost.table().splitlines()[-1]


def test_a_resumed_run_goes_on_in_its_row(clock):
    first = phases.Phases()
    first.enter(0, 2, 1e12)
    clock(3.0)
    first.step()
    second = phases.Phases(json.loads(json.dumps(first.state())))
    clock(500.0)  # Nobody ran.
    second.enter(1, 2, 1e12)
    clock(4.0)
    second.step()
    second.leave()
    (row,) = second.rows
    assert (row["from"], row["steps"], row["seconds"]) == (0, 2, 7.0)


def test_shapes_that_take_turns_keep_one_row_each(clock):
    cost = phases.Phases()
    for at in range(6):
        cost.enter(at, 0, (1 + at % 2) * 1e12)
        clock(1.0 + at % 2)
        cost.step()
    cost.leave()
    assert [(r["steps"], r["seconds"]) for r in cost.rows] == [(3, 3.0), (3, 6.0)]
