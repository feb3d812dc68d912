"""The figures of `vitssl.bench freeze` that do not depend on the machine."""

from tests import runs
from vitssl.bench import freeze_time


def test_a_run_is_its_phases_weighted_with_their_steps():
    rows = [
        {"steps": 30, "time_ratio": 1.0, "formula_ratio": 1.0},
        {"steps": 10, "time_ratio": 0.6, "formula_ratio": 0.5},
        {"steps": 60, "time_ratio": 0.4, "formula_ratio": 0.2},
    ]
    found = freeze_time.whole(rows)
    # (30 + 6 + 24) / 100 against (30 + 5 + 12) / 100: 0.40 of 0.53 is saved.
    assert found == {"time": 0.6, "formula": 0.47, "realised": round(0.40 / 0.53, 2)}


def test_memory_and_moments_shrink_with_every_phase(capsys):
    changes = [f"--config.{k}={v}" for k, v in runs.TINY_FREEZING.items()]
    found = freeze_time.run(
        ["--config=configs/localmim.py:smoke", *changes, "--steps=1", "--turns=1"]
    )
    rows = found["phases"]
    assert sum(r["steps"] for r in rows) == 8 and len(rows) == 2
    moments = [r["optimizer_bytes"] for r in rows]
    assert moments[0] > moments[1] > 0
    flops = [r["xla_gflop_per_image"] for r in rows]
    assert flops[0] > flops[1] > 0
    assert "| layers frozen | steps |" in capsys.readouterr().err
