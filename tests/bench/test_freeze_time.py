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


def test_with_a_store_a_frozen_block_costs_nothing(capsys):
    own = {"freeze.store.views": 1, "optim.thaw": "()", "freeze.layers": "()"}
    own |= {"freeze.t_0": 0.5}
    changes = runs.TINY_FREEZING | own
    words = [f"--config.{k}={v}" for k, v in changes.items()]
    words = ["--config=configs/localmim.py:smoke", *words, "--steps=1", "--turns=1"]
    with_store = freeze_time.run(words)["phases"]
    without = freeze_time.run([*words, "--config.freeze.store.views=0"])["phases"]
    # 4 of 16 patches and the class token, 16 floats each.
    assert [r.get("stored_bytes_per_view") for r in with_store][-1] == 5 * 16 * 4
    for key in ("xla_gflop_per_image", "formula_ratio"):
        assert with_store[0][key] == without[0][key]
        assert with_store[-1][key] < 0.9 * without[-1][key]
    capsys.readouterr()
