import jax
import numpy as np
import pytest

from vitssl import errors
from vitssl.losses import vicreg

# Compiled whole: operation by operation is ten times slower on a first run.
VICREG = jax.jit(vicreg.vicreg, static_argnames="covariance")
TERMS = jax.jit(vicreg.variance_covariance, static_argnames="covariance")


def _terms_by_loops(rows, threshold=1.0, eps=1e-4, paper=True):
    """Variance and covariance of float64 rows, one entry at a time."""
    rows = rows.astype(np.float64)
    n, width = rows.shape
    mean = rows.sum(0) / n
    variance = covariance = 0.0
    for i in range(width):
        own = sum((r[i] - mean[i]) ** 2 for r in rows) / (n - 1)
        variance += max(0.0, threshold - (own + eps) ** 0.5) / width
        for j in range(width):
            if i != j:
                c = sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in rows) / (n - 1)
                covariance += c * c / (width if paper else width * (width - 1))
    return variance, covariance


def _views(shape=(6, 4), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=0.7, size=(2, *shape)).astype(np.float32)


@pytest.mark.parametrize("covariance", ["paper", "mean"])
@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_terms_are_those_of_the_paper(covariance, threshold):
    a, b = _views()
    options = dict(threshold=threshold, eps=1e-3)
    loss, parts = VICREG(a, b, covariance=covariance, **options)
    va, ca = _terms_by_loops(a, paper=covariance == "paper", **options)
    vb, cb = _terms_by_loops(b, paper=covariance == "paper", **options)
    invariance = np.square(a.astype(np.float64) - b).mean()
    want = dict(variance_a=va, variance_b=vb, covariance_a=ca, covariance_b=cb)
    want |= dict(invariance=invariance, variance=(va + vb) / 2)
    want["covariance"] = (ca + cb) / 2
    assert set(parts) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    total = 25 * invariance + 25 * (va + vb) / 2 + (ca + cb) / 2
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_published_covariance_is_width_minus_one_times_the_mean():
    a, _ = _views((9, 5))
    _, paper = TERMS(a)
    _, mean = TERMS(a, covariance="mean")
    np.testing.assert_allclose(paper, 4 * mean, rtol=1e-6)


def test_tokens_are_rows():
    a, b = _views((5, 3, 2))
    _, rows = VICREG(a, b)
    np.testing.assert_allclose(
        [rows["variance_a"], rows["covariance_a"]],
        _terms_by_loops(a.reshape(15, 2)),
        rtol=1e-5,
    )


def test_halves_leave_out_an_odd_sample_and_double_a_single_one():
    z, valid = np.arange(10).reshape(5, 2), np.arange(5)
    a, b, va, vb = vicreg.halves(z, valid)
    np.testing.assert_array_equal(np.concatenate([a, b]), z[:4])
    np.testing.assert_array_equal(np.concatenate([va, vb]), valid[:4])
    a, b, va, vb = vicreg.halves(z[:1])
    assert (a == b).all() and len(a) == 1 and va is None and vb is None


def test_rows_that_do_not_count_change_nothing():
    a, b = _views((4, 3, 5))
    valid_a, valid_b = np.random.default_rng(1).random((2, 4, 3)) < 0.7
    spoiled = [
        np.where(v[..., None], z, np.nan) for z, v in ((a, valid_a), (b, valid_b))
    ]

    def loss(a, b):
        return VICREG(a, b, valid_a, valid_b)

    (_, parts), slopes = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(*spoiled)
    want = _terms_by_loops(a[valid_a])
    np.testing.assert_allclose([parts["variance_a"], parts["covariance_a"]], want, 1e-5)
    both = valid_a & valid_b
    invariance = np.square(a[both].astype(np.float64) - b[both]).mean()
    np.testing.assert_allclose(parts["invariance"], invariance, rtol=1e-5)
    for slope, valid in zip(slopes, (valid_a, valid_b), strict=True):
        assert (slope[~valid] == 0).all() and (slope[valid] != 0).any()


def test_collapse_costs_the_threshold_and_white_noise_nothing():
    constant = np.full((8, 4), 3.0)
    loss, parts = VICREG(constant, constant, eps=1e-8)
    np.testing.assert_allclose(parts["variance"], 1.0, atol=2e-4)
    np.testing.assert_allclose(loss, 25.0, atol=5e-3)
    # Columns of a Hadamard matrix: variance above 1, covariance exactly 0.
    h = np.array([[1, 1], [1, -1]])
    white = 1.1 * np.kron(np.kron(h, h), h)[:, 1:].astype(np.float32)
    loss, _ = VICREG(white, white)
    np.testing.assert_allclose(loss, 0, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("valid", [False, True])
def test_gradients_are_finite_on_constants_and_single_rows(rows, valid):
    mask = np.arange(rows) == 0 if valid else None
    grad = jax.jit(jax.value_and_grad(lambda a, b: vicreg.vicreg(a, b, mask, mask)[0]))
    for z in (np.zeros((rows, 4)), np.full((rows, 4), 0.1)):
        value, slope = jax.device_get(grad(z, z))
        assert np.isfinite(value) and np.isfinite(slope).all()


def test_order_of_samples_and_of_dimensions_does_not_matter():
    a, b = _views((7, 5))
    want, _ = VICREG(a, b)
    order, axes = np.random.default_rng(2).permutation(7), [3, 1, 4, 0, 2]
    got, _ = VICREG(a[order][:, axes], b[order][:, axes])
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_invariance_pulls_halves_of_a_batch_together_but_not_two_views():
    # The same images twice: nothing to pull. Different images: everything.
    z = _views((8, 4))[0]
    _, views = VICREG(z, z)
    _, fake = VICREG(*vicreg.halves(z))
    assert views["invariance"] == 0 and fake["invariance"] > 0.3


def test_adapted_weights_move_to_small_terms():
    parts = dict(invariance=np.float32(1), variance=np.float32(3))
    parts |= dict(covariance=np.float32(4), variance_a=np.float32(9))
    got = vicreg.adapt((25.0, 25.0, 1.0), parts, momentum=0.9, eps=2.0)
    want = 0.9 * np.array([25, 25, 1]) + 0.1 * np.array([27, 21, 1.2])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    slope = jax.jit(
        jax.grad(lambda z: vicreg.adapt((1, 1, 1), vicreg.vicreg(z, z[::-1])[1]).sum())
    )
    assert (slope(_views((4, 3))[0]) == 0).all()
    a, b = _views()
    loss, parts = VICREG(a, b, weights=got)
    terms = [parts[name] for name in ("invariance", "variance", "covariance")]
    np.testing.assert_allclose(loss, np.dot(got, terms), rtol=1e-6)


def test_wrong_options_say_what_is_allowed():
    a, b = _views()
    with pytest.raises(errors.UsageError, match="'sum'.*paper, mean"):
        vicreg.vicreg(a, b, covariance="sum")
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(5, 4\)"):
        vicreg.vicreg(a, b[:5])
