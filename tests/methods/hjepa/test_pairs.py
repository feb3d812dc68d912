"""What the regularisers see, and with what weight."""

import jax
import numpy as np
import pytest

from vitssl.losses import sigreg, vicreg
from vitssl.methods.hjepa import forward, objective

# Compiled whole: operation by operation is ten times slower on a first run.
VICREG = jax.jit(vicreg.vicreg)
SIGREG = jax.jit(sigreg.sigreg, static_argnames="slices")


def _levels(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, 5) for n in (6, 3, 2)]
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


PREDICTIONS, TARGETS = _levels(seed=0), _levels(seed=1)


def _pairs(predictions=PREDICTIONS, targets=TARGETS, valids=(None,) * 3, **options):
    levels = zip(predictions, targets, valids, strict=True)
    return objective.pairs_of_levels(levels, **options)


def test_pool_is_the_mean_of_what_is_visible():
    tokens = PREDICTIONS[0]
    valid = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1] * 6, [0] * 6], bool)
    spoiled = np.where(valid[..., None], tokens, np.nan)
    got, slope = jax.value_and_grad(lambda t: forward.pool(t, valid).sum())(spoiled)
    pooled = forward.pool(spoiled, valid)
    for b in range(3):
        np.testing.assert_allclose(pooled[b], tokens[b][valid[b]].mean(0), rtol=1e-5)
    assert (pooled[3] == 0).all() and np.isfinite(slope).all()
    np.testing.assert_allclose(forward.pool(tokens), tokens.mean(1), rtol=1e-5)


def _halves(z):
    return VICREG(z[:2], z[2:4])[0]


def test_a_single_pair_takes_the_weight_of_its_level():
    weights = (1.0, 10.0, 100.0)
    context = [objective.Pair(*vicreg.halves(PREDICTIONS[0]))]
    term, parts = objective.vicreg_of(context, weights=weights)
    np.testing.assert_allclose(term, _halves(PREDICTIONS[0]), rtol=1e-6)
    term, parts = objective.vicreg_of(_pairs()[-1:], weights=weights)
    np.testing.assert_allclose(parts["vicreg"], _halves(PREDICTIONS[2]), rtol=1e-6)
    np.testing.assert_allclose(term, 100 * parts["vicreg"], rtol=1e-6)


def test_levels_are_weighted_and_may_have_their_own_settings():
    pairs = _pairs()
    each = [_halves(z) for z in PREDICTIONS]
    for weights, by in (((0.5,), (0.5,) * 3), ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))):
        term, parts = objective.vicreg_of(pairs, weights=weights)
        np.testing.assert_allclose(term, np.dot(by, each), rtol=1e-6)
        np.testing.assert_allclose(
            [parts[f"vicreg_h{k}"] for k in range(3)], each, 1e-6
        )
    settings = [dict(weights=(k, 0, 0)) for k in range(3)]
    term, parts = objective.vicreg_of(pairs, weights=(1.0,), settings=settings)
    invariances = [np.square(z[:2] - z[2:]).mean() for z in PREDICTIONS]
    np.testing.assert_allclose(term, np.dot(range(3), invariances), rtol=1e-5)


@pytest.mark.parametrize("batch, on_targets", [(4, True), (1, False)])
def test_targets_are_paired_with_predictions_on_request_or_for_a_single_sample(
    batch, on_targets
):
    p, t = ([z[:batch] for z in side] for side in (PREDICTIONS, TARGETS))
    pairs = _pairs(p, t, on_targets=on_targets)
    assert [pair.level for pair in pairs] == [0, 1, 2]
    for pair in pairs:
        np.testing.assert_array_equal(pair.a, t[pair.level])
        np.testing.assert_array_equal(pair.b, p[pair.level])


def test_padding_of_a_level_goes_with_its_half():
    valids = [np.random.default_rng(4).random(z.shape[:2]) < 0.7 for z in PREDICTIONS]
    pairs = _pairs(valids=valids)
    spoiled = [
        np.where(v[..., None], z, np.nan)
        for z, v in zip(PREDICTIONS, valids, strict=True)
    ]
    other = _pairs(spoiled, valids=valids)
    want, _ = objective.vicreg_of(pairs)
    got, _ = objective.vicreg_of(other)
    assert np.isfinite(want) and got == want
    dense, _ = objective.vicreg_of(_pairs())
    assert dense != want


def test_one_view_has_variance_and_covariance_but_no_invariance():
    a = PREDICTIONS[0].mean(1)
    term, parts = objective.vicreg_of([objective.Pair(a)], weights=(2.0,))
    variance, covariance = vicreg.variance_covariance(a)
    np.testing.assert_allclose(term, 2 * (25 * variance + covariance), rtol=1e-6)
    assert parts["vicreg_invariance"] == 0
    along = sigreg.directions(jax.random.key(0), 8, 5)
    term, parts = objective.sigreg_of([objective.Pair(a)], along=along, weight=0.3)
    np.testing.assert_allclose(parts["sigreg"], SIGREG(a, along=along), 1e-6)
    np.testing.assert_allclose(term, 0.3 * parts["sigreg"], rtol=1e-6)


def test_sigreg_of_two_views_is_their_mean_without_invariance():
    a, b = (z[0].mean(1) for z in (PREDICTIONS, TARGETS))
    key = jax.random.key(0)
    got, _ = objective.sigreg_of([objective.Pair(a, b)], key, slices=16)
    want = [SIGREG(z, key, slices=16) for z in (a, b)]
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-6)


def test_hybrid_weights_both_totals():
    a, b = (z[0].mean(1) for z in (PREDICTIONS, TARGETS))
    key, weights = jax.random.key(0), (3.0, 2.0, 1.0)
    loss, parts = objective.hybrid(
        objective.Pair(a, b),
        key,
        vicreg_weight=0.6,
        sigreg_weight=0.4,
        settings=dict(weights=weights),
        slices=16,
    )
    first, _ = vicreg.vicreg(a, b, weights=weights)
    second, _ = sigreg.two_views(a, b, key, weights=(3.0, 25.0), slices=16)
    np.testing.assert_allclose(loss, 0.6 * first + 0.4 * second, rtol=1e-6)
    np.testing.assert_allclose(
        [parts["vicreg"], parts["sigreg"]], [first, second], 1e-6
    )


def test_gradient_reaches_the_regularised_features():
    def loss(context):
        pairs = [objective.Pair(*vicreg.halves(context))]
        return (
            objective.vicreg_of(pairs)[0]
            + objective.sigreg_of(pairs, jax.random.key(0), slices=8)[0]
        )

    slope = jax.jit(jax.grad(loss))(PREDICTIONS[0])
    assert np.isfinite(slope).all() and (slope != 0).all()
