"""Patch discrimination and its relatives against loops, at chance, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.losses import contrastive
from vitssl.methods.latent_mim import objective
from vitssl.methods.latent_mim.objective import Pair

B, N, D = 3, 6, 5


def quick(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def _pairs(seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    for name in ("map", "optical"):
        p, t = rng.normal(size=(2, B, N, D)).astype(np.float32)
        valid = rng.random((B, N)) < 0.6
        valid[0, :2] = True
        found[name] = Pair(p, t, valid)
    found["map"].valid[1] = False  # A sample that has none.
    # Two targets alike, as on a map with few classes; in one sample there are no more.
    for b in (0, 2):
        found["map"].target[b, 1] = 2 * found["map"].target[b, 0]
        found["map"].valid[b, :2] = True
    found["map"].valid[0, 2:] = False
    return found


def _unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _by_loops(pair, tau, same=None):
    """Mean over samples of the mean over tokens; two loops, float64."""
    samples = []
    for b in range(B):
        at = np.flatnonzero(pair.valid[b])
        p, t = _unit(pair.prediction[b][at]), _unit(pair.target[b][at])
        each, alone = [], False
        for i in range(len(at)):
            logits = [
                p[i] @ t[j] / tau
                for j in range(len(at))
                if j == i or same is None or t[i] @ t[j] <= same
            ]
            alone |= len(logits) == 1 and same is not None
            each.append(np.log(np.exp(logits).sum()) - p[i] @ t[i] / tau)
        if len(at) and not alone:
            samples.append(2 * tau * np.mean(each))
    return np.mean(samples) if samples else 0.0


@pytest.mark.parametrize("tau, same", [(0.1, None), (0.3, 0.999)])
def test_it_is_the_sum_over_modalities_of_means_over_samples(tau, same):
    pairs = _pairs()
    loss, parts = objective.patch_discrimination(
        pairs, tau=tau, weights={"map": 0.5}, same_target=same, same_target_in=("map",)
    )
    want = {
        k: _by_loops(v, tau, same if k == "map" else None) for k, v in pairs.items()
    }
    for name, value in want.items():
        np.testing.assert_allclose(parts[name], value, rtol=2e-5)
    np.testing.assert_allclose(loss, 0.5 * want["map"] + want["optical"], rtol=2e-5)


@pytest.mark.parametrize("kind", objective.KINDS)
def test_what_does_not_count_changes_nothing(kind):
    pairs = _pairs()

    @quick
    @jax.value_and_grad
    def loss(predictions, targets):
        both = {k: Pair(predictions[k], targets[k], v.valid) for k, v in pairs.items()}
        return objective.patch_discrimination(both, kind=kind)[0]

    clean = {k: v.prediction for k, v in pairs.items()}
    goals = {k: v.target for k, v in pairs.items()}
    value, grad = loss(clean, goals)
    spoilt = {
        k: np.where(pairs[k].valid[..., None], v, np.nan) for k, v in clean.items()
    }
    wrong = {
        k: np.where(pairs[k].valid[..., None], v, np.nan) for k, v in goals.items()
    }
    other, moved = loss(spoilt, wrong)
    np.testing.assert_array_equal(value, other)
    for name, g in moved.items():
        np.testing.assert_array_equal(g, grad[name])
        assert not np.abs(g[~pairs[name].valid]).any()
        assert np.abs(g[pairs[name].valid]).max() > 0


def test_alike_predictions_score_chance_and_right_ones_almost_nothing():
    rng = np.random.default_rng(0)
    t = rng.normal(size=(B, N, D)).astype(np.float32)
    valid = np.ones((B, N), bool)
    loss = objective.patch_discrimination
    same = Pair(np.ones((B, N, D), np.float32), np.ones((B, N, D), np.float32), valid)
    np.testing.assert_allclose(loss({"x": same})[0], 0.2 * np.log(N), rtol=1e-5)
    assert loss({"x": Pair(t, t, valid)}, tau=0.01)[0] < 0.01
    empty = Pair(t, t, np.zeros((B, N), bool))
    assert loss({"x": empty})[0] == 0


def test_negatives_across_the_batch_make_it_harder():
    pairs = _pairs()
    each = {
        k: float(objective.patch_discrimination(pairs, kind=k)[0])
        for k in objective.KINDS
    }
    assert each["all_discrimination"] > each["patch_discrimination"]
    # One sample of three has no token of the map.
    one = objective.patch_discrimination(
        {"map": pairs["map"]}, kind="patch_discrimination"
    )[0]
    batch = objective.patch_discrimination(
        {"map": pairs["map"]}, kind="patch_discrimination_batch"
    )[0]
    np.testing.assert_allclose(batch, one * 2 / 3, rtol=1e-6)


def test_info_nce_at_chance_and_one_directional():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 4)).astype(np.float32)
    z, w = _unit(a) @ _unit(b).T / 0.2, 0.0
    for i in range(7):
        w += (np.log(np.exp(z[i]).sum()) - z[i, i]) / 7
    got = contrastive.infonce_one_way(a, b, temperature=0.2)
    np.testing.assert_allclose(got, w, rtol=1e-5)
    assert abs(float(got - contrastive.infonce_one_way(b, a, temperature=0.2))) > 1e-3
    ones = np.ones((7, 4), np.float32)
    np.testing.assert_allclose(
        contrastive.infonce_one_way(ones, ones), np.log(7), rtol=1e-5
    )


def test_koleo_pushes_rows_apart_and_ignores_what_does_not_count():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    valid = jnp.arange(8) < 6
    graded = quick(jax.value_and_grad(contrastive.koleo))
    value, grad = graded(x, valid)
    gaps = np.linalg.norm(_unit(x[:6])[:, None] - _unit(x[:6]), axis=-1)
    nearest = np.where(np.eye(6, dtype=bool), np.inf, gaps).min(1)
    np.testing.assert_allclose(value, -np.log(nearest).mean(), rtol=1e-5)
    assert np.isfinite(grad).all() and not np.abs(grad[6:]).any()
    assert graded(x - 0.1 * grad / np.abs(grad).max(), valid)[0] < value
    _, same = graded(jnp.ones((8, 3)), valid)
    assert np.isfinite(same).all()
