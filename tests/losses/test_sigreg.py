import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import errors
from vitssl.losses import sigreg

# Compiled whole: operation by operation is ten times slower on a first run.
PER_SLICE = jax.jit(sigreg.per_slice, static_argnames="kind")
SIGREG = jax.jit(sigreg.sigreg, static_argnames=("kind", "slices"))
TWO_VIEWS = jax.jit(sigreg.two_views, static_argnames=("kind", "slices"))
KINDS = tuple(sigreg.TESTS)


def _statistic_by_loops(x, kind, eps=1e-6):
    """Statistic of one column in float64, sums and integrals one term at a time."""
    x = x.astype(np.float64)
    if kind != "lejepa":
        x = (x - x.mean()) / (x.std(ddof=1) + eps)
    if kind == "reference_points":
        r = sigreg.quantiles(17).astype(np.float64)
        xx, xr, rr = (
            np.mean([np.exp(-((s - t) ** 2) / 2) for s in a for t in b])
            for a, b in ((x, x), (x, r), (r, r))
        )
        return xx - 2 * xr + rr
    t = np.linspace(0, 3, 17) if kind == "lejepa" else np.linspace(0.2, 4, 32)
    values = [
        np.exp(-(s**2) / 2)
        * (
            (np.cos(s * x).mean() - np.exp(-(s**2) / 2)) ** 2
            + np.sin(s * x).mean() ** 2
        )
        for s in t
    ]
    integral = np.trapezoid(values, t)
    return 2 * len(x) * integral if kind == "lejepa" else integral


def _features(rows=12, width=5, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def _gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _along(slices, width):
    a = np.random.default_rng(7).normal(size=(slices, width))
    return (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_sums_over_rows(kind):
    z = 0.4 + 1.7 * _features()
    along = _along(7, 5)
    got = PER_SLICE(z, along, kind=kind)
    want = [_statistic_by_loops(z @ np.asarray(a), kind) for a in along]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    mean = SIGREG(z, along=along, kind=kind)
    np.testing.assert_allclose(mean, np.mean(want), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_count_change_nothing(kind):
    z, along = _features(), _along(3, 5)
    valid = np.arange(12) % 3 > 0
    spoiled = np.where(valid[:, None], z, np.nan)

    def loss(z, v):
        return SIGREG(z, along=along, valid=v, kind=kind)

    grad = jax.jit(jax.value_and_grad(loss))
    got, slope = jax.device_get(grad(spoiled, valid))
    want, dense = jax.device_get(grad(z[valid], None))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(slope[valid], dense, rtol=1e-4, atol=1e-6)
    assert (slope[~valid] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, 500])
def test_blocks_give_the_values_and_gradients_of_one_piece(kind, elements, monkeypatch):
    z, along = _features(10, 4), _along(11, 4)

    def run():  # A new function each time: nothing compiled is used again.
        def loss(z):
            return sigreg.sigreg(z, along=along, kind=kind)

        return jax.jit(jax.value_and_grad(loss))(z)

    want, slope = run()
    monkeypatch.setattr(sigreg, "ELEMENTS", elements)
    got, blocked = run()
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(blocked, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_slices_or_row_pairs(kind, monkeypatch):
    monkeypatch.setattr(sigreg, "ELEMENTS", 2**14)
    z = jax.ShapeDtypeStruct((300, 8), jnp.float32)
    along = jax.ShapeDtypeStruct((256, 8), jnp.float32)
    loss = jax.grad(lambda z, a: sigreg.sigreg(z, along=a, kind=kind))
    used = jax.jit(loss).lower(z, along).compile().memory_analysis()
    # In one piece: 300 x 256 x 17 numbers (5 MB), or 300 x 300 x 256 (92 MB).
    assert used.temp_size_in_bytes < 1.5e6


def test_lejepa_of_a_gaussian_is_its_known_mean_whatever_the_number_of_rows():
    t = np.linspace(0, 3, 17)
    weight = np.exp(-t * t / 2) * np.where((t == 0) | (t == 3), 0.1875, 0.375)
    known = (weight * (1 - np.exp(-t * t))).sum()
    for rows in (32, 512):
        z = _gaussian(rows, rows, 64)
        got = SIGREG(z, jax.random.key(0), slices=512)
        np.testing.assert_allclose(got, known, rtol=0.12)
    np.testing.assert_allclose(known, 1.05, atol=0.01)


def test_only_lejepa_sees_shrinking_and_shifting():
    z = _gaussian(0, 256, 16)
    spoiled = {"shrunk": 1e-3 * z, "shifted": z + 5, "collapsed": 1e-3 * z + 5}
    for kind in KINDS:
        along = _along(16, 16)
        normal = SIGREG(z, along=along, kind=kind)
        for name, other in spoiled.items():
            got = SIGREG(other, along=along, kind=kind)
            if kind == "lejepa":
                assert got > 30 * normal, name
            else:
                np.testing.assert_allclose(got, normal, rtol=0.05, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_of_the_distribution_matters_to_every_kind(kind):
    z = _gaussian(0, 512, 1)
    two = np.sign(z)  # Mean 0, variance 1, two points.

    def loss(z):
        return SIGREG(z, along=np.ones((1, 1), np.float32), kind=kind)

    assert loss(two) > 10 * loss(z)


def test_rotation_changes_nothing_on_average():
    z = _features(64, 6) * np.array([3, 1, 1, 0.3, 1, 1], np.float32)
    q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))
    along = _along(4096, 6)
    want = SIGREG(z, along=along)
    # Rotating features and directions alike is exact; features alone, on average.
    turned = z @ q.astype(np.float32)
    exact = SIGREG(turned, along=along @ q.astype(np.float32))
    np.testing.assert_allclose(exact, want, rtol=1e-4)
    other = SIGREG(turned, jax.random.key(5), slices=4096)
    np.testing.assert_allclose(other, want, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_samples_does_not_matter(kind):
    z, along = _features(), _along(3, 5)
    want = SIGREG(z, along=along, kind=kind)
    got = SIGREG(z[::-1].reshape(4, 3, 5), along=along, kind=kind)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("valid", [None, np.arange(6) == 0, np.zeros(6)])
def test_gradients_are_finite_on_constants_and_single_rows(kind, valid):
    along = _along(3, 4)

    def loss(z):
        return SIGREG(z, along=along, valid=valid, kind=kind)

    grad = jax.jit(jax.value_and_grad(loss))
    for z in (np.zeros((6, 4)), np.full((6, 4), 0.1)):
        value, slope = jax.device_get(grad(z))
        assert np.isfinite(value) and np.isfinite(slope).all()


def test_descent_on_lejepa_spreads_a_collapsed_batch():
    z = 0.1 * _gaussian(0, 64, 4) + 1
    loss = jax.jit(jax.grad(lambda z, k: SIGREG(z, k, slices=16)))
    for i in range(100):
        z = z - 0.5 * loss(z, jax.random.key(i))
    np.testing.assert_allclose(z.mean(0), 0, atol=0.25)
    np.testing.assert_allclose(z.std(0), 1, atol=0.3)


def test_directions_are_unit_and_fixed_by_their_key():
    a = sigreg.directions(jax.random.key(0), 50, 8)
    np.testing.assert_allclose(np.square(a).sum(1), 1, rtol=1e-5)
    z = _features(8, 8)
    one, same, other = (SIGREG(z, jax.random.key(k), slices=50) for k in (0, 0, 1))
    assert one == same != other
    np.testing.assert_allclose(one, SIGREG(z, along=a), rtol=1e-6)


def test_two_views_add_the_invariance():
    a, b = _features(seed=0), _features(seed=1)
    along = _along(9, 5)
    loss, parts = TWO_VIEWS(a, b, along=along, weights=(2.0, 3.0))
    each = [SIGREG(z, along=along) for z in (a, b)]
    invariance = np.square(a - b).mean()
    np.testing.assert_allclose([parts["sigreg_a"], parts["sigreg_b"]], each, 1e-6)
    np.testing.assert_allclose(parts["invariance"], invariance, rtol=1e-6)
    np.testing.assert_allclose(loss, 2 * invariance + 1.5 * sum(each), rtol=1e-5)
    tokens = a.reshape(6, 2, 5), b.reshape(6, 2, 5)
    flat, _ = TWO_VIEWS(*tokens, along=along, weights=(2.0, 3.0))
    np.testing.assert_allclose(flat, loss, rtol=1e-5)


def test_wrong_options_say_what_is_allowed():
    z = _features()
    with pytest.raises(errors.UsageError, match="'epps'.*lejepa, char_function"):
        sigreg.sigreg(z, jax.random.key(0), kind="epps")
    with pytest.raises(ValueError, match="key"):
        sigreg.sigreg(z)
    with pytest.raises(ValueError, match=r"\(3,\).*\(12,\)"):
        sigreg.sigreg(z, jax.random.key(0), valid=np.ones(3))
