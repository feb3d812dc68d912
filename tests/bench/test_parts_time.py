"""The bench of part discovery: compiled twice, nothing run, and its formula."""

import pytest

from tests.methods.parts import test_method
from vitssl.bench import parts_time

SMALL = ("model.width=32", "model.depth=2", "model.image_size=56", "augment.size=56")
MORE = (
    "evals.image_size=56",
    "precision=float32",
    "model.heads=2",
    "model.registers=0",
)


def test_remat_recomputes_and_keeps_less():
    argv = [f"--config.{o}" for o in (*SMALL, *MORE, "optim.lr_batch=0")]
    found = parts_time.run([*argv, "--batch=8", "--config.objective.presence_group=0"])
    plain, remat = found["steps"]
    assert not plain["remat"] and remat["remat"]
    assert plain["parameters"] == remat["parameters"] > plain["trained"]
    assert found["flops_ratio"] > 1.0
    assert remat["temporary_bytes"] < plain["temporary_bytes"]


@pytest.mark.parametrize("frozen, want", [(True, 7.0), (False, 9.0)])
def test_the_formula_counts_three_passes(frozen, want):
    m = test_method.method()
    n, d, blocks = 16, 16, 1
    forward = 2 * n * d * 3 * 64 + blocks * (
        2 * 6 * d * d * (n + 2) + 4 * (n + 2) ** 2 * d
    )
    attention = blocks * 4 * (n + 2) ** 2 * d
    crossed = 2 * attention if frozen else 0.0
    assert parts_time.cost(m, frozen=frozen) == want * forward + crossed
