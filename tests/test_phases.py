"""What each kind of step cost."""

from vitssl import phases


def test_phases_that_take_turns_share_a_row():
    found = phases.Phases()
    for at, flops in enumerate((5.0, 7.0, 5.0, 5.0, 7.0)):
        found.enter(at, 0, flops)
        found.step()
    rows = [(r["from"], r["flops"], r["steps"]) for r in found.state()]
    assert rows == [(0, 5.0, 3), (1, 7.0, 2)]
    assert found.totals()["compute/tflop"] == 29e-12


def test_a_resumed_run_goes_on_in_its_row():
    first = phases.Phases()
    first.enter(0, 3, 5.0)
    first.step()
    second = phases.Phases(first.state())
    second.enter(1, 3, 5.0)
    second.step()
    second.enter(2, 4, 5.0)
    second.step()
    rows = [(r["from"], r["frozen"], r["steps"]) for r in second.state()]
    assert rows == [(0, 3, 2), (2, 4, 1)]
