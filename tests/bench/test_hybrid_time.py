"""The cost formula of hybrid patch sizes against the products of the traced step."""

import jax
import jax.numpy as jnp
import pytest

from vitssl import errors
from vitssl.bench import clock, count, hybrid_flops, hybrid_time


def _shallow(case, mode):
    """The step of a mode with fewer blocks: they are all alike."""
    one = hybrid_time.step(hybrid_time.CASES[case], mode)
    module = one.module.clone(
        encoder=one.module.encoder.clone(depth=2),
        predictor=one.module.predictor.clone(depth=1),
    )
    return hybrid_time.Step(one.case, module)


@pytest.mark.parametrize("case", hybrid_time.CASES)
@pytest.mark.parametrize("mode", hybrid_time.MODES)
def test_the_formula_is_what_a_step_multiplies(case, mode):
    one = _shallow(case, mode)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = one.shapes(1)
    state = jax.eval_shape(one.init, key, shapes)
    traced = count.products(one.grad, *state, shapes, key)
    assert abs(hybrid_time.formula(one) / traced - 1) < 0.02


def test_the_counter_agrees_with_xla_on_products_alone():
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 8, 16), (16, 32)))

    def two(a, b):
        return jnp.einsum("bij,bik->bjk", a, a), a @ b

    want = jax.jit(two).lower(a, b).cost_analysis()["flops"]
    assert count.products(two, a, b) == want == 2 * 3 * 8 * 16 * (16 + 32)


def test_the_counter_counts_every_turn_of_a_loop_and_convolutions():
    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    loop = count.products(
        lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5), a
    )
    assert loop == 5 * 2 * 4**3
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    found = count.products(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        image,
        kernel,
    )
    assert found == 2 * 4 * 4 * 2 * 2 * 3 * 5


def test_fine_queries_over_coarse_keys_are_what_saves():
    """64 pixels of Sentinel-2, p=8, q=1: the claims of the table of modes."""
    case = hybrid_time.CASES["s2"]
    cost = {
        mode: hybrid_time.formula(hybrid_time.step(case, mode))
        for mode in hybrid_time.MODES
    }
    assert cost["all_p"] == cost["processing"]
    assert cost["processing"] < cost["mixed_k"] < cost["mixed"] < cost["output"]
    # Upsampling before the predictor hardly saves anything; its queries may stay.
    assert 1.5 < cost["all_q"] / cost["output"] < 2.5
    assert 8 < cost["all_q"] / cost["mixed"] < 14
    assert cost["all_q"] / cost["mixed_k"] > 50
    assert hybrid_flops.predictor(8, 4, 4, 8, width=2, depth=0) == 2 * 4 * 12


def test_an_unknown_case_or_mode_is_refused():
    with pytest.raises(errors.UsageError, match="case='moon': one of s2, s2s1, rgb"):
        hybrid_time.run(["--cases=moon"])
    with pytest.raises(errors.UsageError, match="mode='fast': one of all_p"):
        hybrid_time.run(["--cases=s2", "--modes=fast"])


def test_a_small_step_is_measured(monkeypatch, capsys):
    small = _shallow("s2", "all_p")
    monkeypatch.setattr(hybrid_time, "step", lambda *a, **k: small)
    found = hybrid_time.run(["--cases=s2", "--modes=all_p", "--batch=4", "--steps=1"])
    (row,) = found["rows"]
    assert row["ms_per_step"] > 0 and row["loss"] > 0 and row["peak_bytes"] > 0
    assert row["times_less"] == 1 and '"mode": "all_p"' in capsys.readouterr().err
    assert "times_faster" not in row  # There is nothing to compare with.


def test_times_faster_is_by_turns(monkeypatch):
    """The machine is three times slower in the second turn: of both modes."""
    now, calls = [0.0], {4.0: 0, 100.0: 0}
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    class Fake:
        figures, metrics = {"needed_bytes": 0}, {"loss": 0.0}

        def __init__(self, ms):
            self.ms = ms

        def __call__(self):
            calls[self.ms] += 1  # Three of them are the warm-up, three a turn.
            now[0] += self.ms / 1e3 * (3 if calls[self.ms] > 6 else 1)

    found = hybrid_time.measure({"mixed_k": Fake(4.0), "all_q": Fake(100.0)}, 5, 2)
    assert found["mixed_k"]["turns"] == pytest.approx([25.0, 25.0])
    assert found["mixed_k"]["times_faster"] == pytest.approx(25)
    assert found["all_q"]["turns"] == [1, 1]
    # Of 4 and 12, three each.
    assert found["mixed_k"]["ms_per_step"] == pytest.approx(8.0)
