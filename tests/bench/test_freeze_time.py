"""The figures of `vitssl.bench freeze` that do not depend on the machine."""

import pytest

from tests import runs
from vitssl.bench import freeze_time
from vitssl.run import build, experiment, feed


def test_a_run_is_its_phases_weighted_with_their_steps():
    rows = [
        {"steps": 30, "time_ratio": 1.0, "formula_ratio": 1.0},
        {"steps": 10, "time_ratio": 0.6, "formula_ratio": 0.5},
        {"steps": 60, "time_ratio": 0.4, "formula_ratio": 0.2},
    ]
    found = freeze_time.whole(rows)
    # (30 + 6 + 24) / 100 against (30 + 5 + 12) / 100: 0.40 of 0.53 is saved.
    assert found == {"time": 0.6, "formula": 0.47, "realised": round(0.40 / 0.53, 2)}
    counted = [row | {"time_ratio": None} for row in rows]
    assert freeze_time.whole(counted) == {"formula": 0.47}


def test_a_batch_grows_until_a_step_costs_or_takes_what_the_first_does():
    rows = [
        {"formula_ratio": 1.0, "peak_bytes": 100},
        {"formula_ratio": 0.8, "peak_bytes": 50},  # By FLOPs: 80, of 4 each.
        {"formula_ratio": 0.3, "peak_bytes": 50},  # By memory: 128.
        {"formula_ratio": 0.5, "peak_bytes": None},
    ]
    assert freeze_time.grown(rows, 64, 4) == (80, 128, 128)


# A store opens at the one event, before step 5 of 8.
STORED = runs.TINY_FREEZING | {
    "optim.thaw": "()",
    "freeze.layers": "(('(encoder/(cls|patch_embed|block_0)|norm_0).*', 0), "
    "('decoder_0/.*', 0), ('encoder/(block_[12]|norm)/.*', 1))",
    "freeze.store.views": 1,
}


@pytest.fixture(scope="module")
def figures():
    """Of a run with a store, and counted without one."""
    words = [f"--config.{k}={v}" for k, v in STORED.items()]
    words = ["--config=configs/localmim.py:smoke", *words, "--steps=1", "--turns=1"]
    without = freeze_time.run([*words, "--config.freeze.store.views=0", "--count"])
    return freeze_time.run(words), without


def test_memory_and_moments_shrink_with_every_phase(figures, capsys):
    rows = figures[0]["phases"]
    assert sum(r["steps"] for r in rows) == 8 and len(rows) == 2
    moments = [r["optimizer_bytes"] for r in rows]
    assert moments[0] > moments[1] > 0
    for key in ("xla_gflop_per_image", "xla_gbyte"):
        assert rows[0][key] > rows[1][key] > 0
    table = freeze_time._text(figures[0])
    assert "| layers frozen | steps |" in table and "stall/steps" in table
    assert f'grow_batch="{figures[0]["grow_batch"]}"' in table


def test_an_event_that_leaves_the_store_as_it_is_opens_nothing(monkeypatch):
    words = [f"{k}={v}" for k, v in STORED.items()]
    loaded = experiment.load("configs/localmim.py:smoke", words)
    parts, opened = build.build(experiment.read(loaded)), []
    assert [at for at in range(1, 8) if parts.phase(at) != parts.phase(at - 1)] == [5]
    monkeypatch.setattr(feed.Feed, "open", _noted(feed.Feed.open, opened))
    freeze_time.beside(parts, 6, parts.fresh().params, 1.0)
    assert opened == [5]
    freeze_time.beside(parts, 5, parts.fresh().params, 1.0)
    assert opened == [5, 4, 5]


def _noted(function, steps):
    def call(self, at, *rest):
        steps.append(at)
        return function(self, at, *rest)

    return call


def test_with_a_store_a_frozen_block_costs_nothing(figures):
    with_store, without = (found["phases"] for found in figures)
    # 4 of 16 patches and the class token, 16 floats each.
    assert with_store[-1]["stored_bytes_per_view"] == 5 * 16 * 4
    assert with_store[-1]["stall_steps"] > 0
    # A batch is 16 pictures of 256 pixels, and as many views.
    assert 16 * (256 + 320) < with_store[-1]["host_bytes"] < 3e6
    for key in ("xla_gflop_per_image", "formula_ratio"):
        assert with_store[0][key] == without[0][key]
        assert with_store[-1][key] < 0.98 * without[-1][key]
    assert without[-1]["time_ratio"] is None
    assert set(figures[1]["whole"]) == {"formula"}
