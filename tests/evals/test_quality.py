import functools

import jax
import numpy as np
import pytest

from vitssl.evals import quality
from vitssl.run import evaluation

# Compiled whole: operation by operation is ten times slower on a first run.
COLLAPSE = jax.jit(quality.collapse_metrics, static_argnames=("centre", "rows"))


def _features(rows=40, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + 0.3


@pytest.mark.parametrize("shape", [(40, 6), (5, 12)])
@pytest.mark.parametrize("centre", [True, False])
def test_singular_values_are_those_of_an_svd(shape, centre):
    x = _features(*shape)
    truth = np.linalg.svd(x - centre * x.mean(0), compute_uv=False)
    got = quality.singular_values(x, centre=centre)
    np.testing.assert_allclose(got, truth, rtol=1e-6, atol=1e-6)


def test_effective_rank_counts_equal_directions():
    assert quality.effective_rank(np.zeros(4)) == 0
    for k in (1, 3):
        values = np.array([2.0] * k + [0.0] * 5)
        np.testing.assert_allclose(quality.effective_rank(values), k)
    # Entropy by hand: p = (3/4, 1/4).
    by_hand = np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    np.testing.assert_allclose(quality.effective_rank(np.array([3.0, 1.0])), by_hand)


def test_rankme_is_published_and_not_centred():
    x = _features()
    values = np.linalg.svd(x, compute_uv=False)
    p = values / values.sum() + 1e-7
    np.testing.assert_allclose(quality.rankme(x), np.exp(-(p * np.log(p)).sum()), 1e-9)
    # A large mean is one direction to RankMe and nothing to the effective rank.
    shifted = x + 1e6
    assert quality.rankme(shifted) < 1.01
    rank = quality.rank_metrics(shifted)
    want = quality.rank_metrics(x)["effective_rank"]
    np.testing.assert_allclose(rank["effective_rank"], want, rtol=1e-4)


def test_rank_metrics_of_two_known_directions():
    x = np.zeros((4, 10))
    x[:, 0], x[:, 1] = [3, -3, 3, -3], [1, 1, -1, -1]
    got = quality.rank_metrics(x)
    assert got["n_components_99"] == 2 and got["feature_dim"] == 10
    np.testing.assert_allclose(got["variance_first_component"], 0.9)
    np.testing.assert_allclose(got["variance_first_10"], 1.0)
    np.testing.assert_allclose(got["singular_value_max"], 6.0)
    np.testing.assert_allclose(got["singular_value_mean"], 8.0 / 4)
    assert quality.rank_metrics(x, variance_threshold=0.8)["n_components_99"] == 1
    assert quality.rank_metrics(x, variance_threshold=1.0)["n_components_99"] <= 4


def test_variances_and_correlations_are_numpys():
    x = _features()
    got = quality.variance_metrics(x)
    off = ~np.eye(6, dtype=bool)
    truth = {
        "mean_variance": x.var(0).mean(),
        "std_variance": x.var(0).std(),
        "min_variance": x.var(0).min(),
        "max_variance": x.var(0).max(),
        "mean_feature": x.mean(),
        "std_feature": x.std(),
        "mean_covariance": np.cov(x.T)[off].mean(),
        "mean_abs_correlation": np.abs(np.corrcoef(x.T)[off]).mean(),
    }
    assert set(got) == set(truth)
    for name, value in truth.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)


def test_equal_dimensions_correlate_fully_whatever_their_number():
    # With the zero diagonal counted in, as the original does, this would be 0.5.
    x = np.repeat(np.arange(5.0)[:, None], 2, 1)
    got = quality.variance_metrics(x)
    np.testing.assert_allclose(got["mean_abs_correlation"], 1.0)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_angles_are_over_all_pairs_of_different_rows(rows):
    x = _features(20, 4)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    cosine = np.array([unit[i] @ unit[j] for i, j in pairs])
    square = np.array([np.square(unit[i] - unit[j]).sum() for i, j in pairs])
    got = quality.angle_metrics(x, rows=rows)
    truth = {
        "mean_similarity": cosine.mean(),
        "std_similarity": cosine.std(),
        "min_similarity": cosine.min(),
        "max_similarity": cosine.max(),
        "mean_self_similarity": 1.0,
        "uniformity": np.log(np.exp(-2 * square).mean()),
        "uniformity_cosine": np.log(np.exp(2 * cosine).mean()),
    }
    assert set(got) == set(truth)
    for name, value in truth.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-7, err_msg=name)


def test_collapsed_features_raise_every_flag_and_healthy_ones_none():
    healthy = quality.feature_quality(np.random.default_rng(0).normal(size=(200, 16)))
    assert not any(value for name, value in healthy.items() if "collapse" in name)
    for constant in (0.0, 0.1, 3.7):
        flat = quality.feature_quality(np.full((50, 16), constant))
        assert all(value for name, value in flat.items() if "collapse" in name)
        assert flat["effective_rank"] == 0
        assert all(np.isfinite(v) for v in flat.values())
    line = np.random.default_rng(0).normal(size=(50, 1)) @ np.ones((1, 40))
    got = quality.feature_quality(line)
    assert got["rank_collapse"] and got["dimension_collapse"] and got["any_collapse"]
    assert not got["variance_collapse"]
    np.testing.assert_allclose(got["effective_rank"], 1.0)


def test_thresholds_of_the_flags_are_options():
    x = np.random.default_rng(0).normal(size=(200, 16))
    assert quality.feature_quality(x, variance=2.0)["variance_collapse"]
    assert quality.feature_quality(x, rank_ratio=1.0)["rank_collapse"]
    assert quality.feature_quality(x, components=1.1)["dimension_collapse"]


def test_subsample_is_spread_over_classes():
    x = np.arange(100)[:, None]
    got = quality.subsample(x, 10)
    assert len(got) == 10 and got[0] == 0 and got[-1] == 99
    assert len(quality.subsample(x, 100)) == 100
    labels = np.sort(np.arange(95) % 10)
    assert set(quality.subsample(labels, 20)) == set(range(10))


def test_metrics_do_not_depend_on_the_order_of_samples():
    x = _features()
    want, got = quality.feature_quality(x), quality.feature_quality(x[::-1])
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 4)), np.zeros(4), np.full((3, 2), np.nan)]
)
def test_unusable_features_are_refused(bad):
    with pytest.raises(ValueError, match="feature_quality"):
        quality.feature_quality(bad)


def test_collapse_metrics_are_the_centred_ones_of_the_evaluator():
    x = _features(60, 8).astype(np.float32)
    got = COLLAPSE(x)
    np.testing.assert_allclose(got["std"], x.std(0, ddof=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(got["norm"], np.linalg.norm(x, axis=1).mean(), rtol=1e-5)
    want = quality.rank_metrics(x)["effective_rank"]
    np.testing.assert_allclose(got["effective_rank"], want, rtol=1e-3)
    few = COLLAPSE(x, rows=5)["effective_rank"]
    want = quality.rank_metrics(x[:5])["effective_rank"]
    np.testing.assert_allclose(few, want, rtol=1e-3)


def test_collapse_metrics_of_the_original_are_an_option():
    tokens = np.random.default_rng(0).normal(size=(10, 3, 4)).astype(np.float32) + 2
    flat = tokens.reshape(10, 12)
    got = COLLAPSE(tokens, centre=False)
    np.testing.assert_allclose(got["std"], flat.std(ddof=1), rtol=1e-5)
    values = np.linalg.svd(flat, compute_uv=False)
    rank = quality.effective_rank(values)
    np.testing.assert_allclose(got["effective_rank"], rank, rtol=1e-3)


def test_a_mean_of_features_does_not_hide_their_collapse():
    x = np.full((32, 16), 0.3) * np.arange(16)
    got = COLLAPSE(x)
    assert got["std"] < 1e-6 and got["effective_rank"] == 0 and got["norm"] > 1
    hidden = COLLAPSE(x, centre=False)
    assert hidden["std"] > 1  # What the original logs for the same features.
    direction = np.linspace(-1, 1, 32)[:, None] * np.arange(16)
    rank = COLLAPSE(direction)["effective_rank"]
    np.testing.assert_allclose(rank, 1.0, rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 130])
def test_collapse_metrics_are_finite_and_without_gradient(rows):
    def loss(x):
        return sum(COLLAPSE(x).values())

    grad = jax.jit(jax.value_and_grad(loss))
    for x in (np.zeros((rows, 4)), np.ones((rows, 4))):
        value, slope = jax.device_get(grad(x))
        assert np.isfinite(value) and not np.any(slope)


def test_the_line_of_an_evaluation_warns_of_low_rank_and_gives_it():
    values = {"quality/collapsed": 1.0, "quality/effective_rank": 9.34}
    line = functools.partial(evaluation.Evaluation.line, None)
    assert "few directions in use (9.3; collapsed: near 1)" in line(165, values)
    # Features of an untrained network lie close together; it is no warning then.
    assert "WARNING" not in line(0, values)
    assert "WARNING" not in line(165, values | {"quality/collapsed": 0.0})
