import jax
import numpy as np
import pytest

from vitssl.losses import contrastive

# Compiled whole: operation by operation is ten times slower on a first run.
NT_XENT = jax.jit(contrastive.nt_xent, static_argnames=("temperature", "cosine"))


def _by_loops(a, b, temperature, cosine=True):
    """Loss, accuracy and mean similarities in float64, one anchor at a time."""
    z = np.concatenate([a, b]).astype(np.float64)
    if cosine:
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    n, losses, hits, positives, negatives = len(z), [], [], [], []
    for i in range(n):
        j = (i + n // 2) % n
        others = [z[i] @ z[k] for k in range(n) if k != i]
        rest = [z[i] @ z[k] for k in range(n) if k not in (i, j)]
        losses.append(
            np.log(np.sum(np.exp(np.array(others) / temperature)))
            - z[i] @ z[j] / temperature
        )
        hits.append(all(z[i] @ z[j] > s for s in rest))
        positives.append(z[i] @ z[j])
        negatives += rest
    return [np.mean(v) for v in (losses, hits, positives, negatives)]


def _views(batch=6, width=5, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(batch, width)).astype(np.float32)
    return a, (a + rng.normal(size=a.shape)).astype(np.float32)


NAMES = ("accuracy", "positive_similarity", "negative_similarity")


@pytest.mark.parametrize("batch, temperature", [(2, 0.5), (7, 0.07)])
@pytest.mark.parametrize("cosine", [True, False])
def test_nt_xent_is_the_sum_in_the_paper(batch, temperature, cosine):
    a, b = _views(batch)
    loss, metrics = NT_XENT(a, b, temperature=temperature, cosine=cosine)
    truth = _by_loops(a, b, temperature, cosine)
    got = [loss, *(metrics[name] for name in NAMES)]
    np.testing.assert_allclose(got, truth, rtol=1e-4)


def test_chance_is_log_of_the_candidates_and_no_hit():
    ones = np.ones((4, 3))
    loss, metrics = NT_XENT(ones, ones, temperature=0.1)
    np.testing.assert_allclose(loss, np.log(7), rtol=1e-6)
    assert metrics["accuracy"] == 0


def test_orthogonal_images_are_the_optimum():
    z = np.eye(4)
    loss, metrics = NT_XENT(z, 2 * z, temperature=0.05)
    np.testing.assert_allclose(loss, np.log1p(6 * np.exp(-20)), atol=1e-6)
    assert metrics["accuracy"] == 1
    np.testing.assert_allclose(metrics["positive_similarity"], 1, rtol=1e-6)
    # The original's mean over masked entries is -inf.
    assert metrics["negative_similarity"] == 0


def test_similarities_are_cosines_whatever_the_temperature():
    a, b = _views()
    for temperature in (0.01, 10.0):
        _, metrics = NT_XENT(a, b, temperature=temperature)
        assert -1 <= metrics["negative_similarity"] < metrics["positive_similarity"] < 1


def test_pairs_that_do_not_count_are_neither_anchors_nor_negatives():
    a, b = _views()
    valid = np.array([1, 0, 1, 1, 0, 1], bool)

    def loss(a, b, valid):
        return NT_XENT(a, b, valid, temperature=0.2)

    spoiled = [np.where(valid[:, None], z, np.nan) for z in (a, b)]
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (got, metrics), slope = jax.device_get(grad(*spoiled, valid))
    (want, wanted), dense = jax.device_get(grad(a[valid], b[valid], None))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5)
    np.testing.assert_allclose(slope[valid], dense, rtol=1e-4, atol=1e-6)
    assert (slope[~valid] == 0).all()


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("valid", [None, np.array([1, 0, 0]), np.zeros(3)])
@pytest.mark.parametrize("z", [np.zeros((3, 4)), np.ones((3, 4))])
def test_gradients_are_finite_on_constants_and_single_rows(z, valid, cosine):
    def loss(a, b):
        value, metrics = NT_XENT(a, b, valid, temperature=0.1, cosine=cosine)
        return value, metrics

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, metrics), slopes = jax.device_get(grad(z, z))
    assert all(np.isfinite(x).all() for x in (value, *metrics.values(), *slopes))


def test_a_batch_of_one_has_nothing_to_learn():
    a, b = _views(1)
    loss, metrics = NT_XENT(a, b, temperature=0.1)
    assert loss == 0 and all(np.isfinite(v) for v in metrics.values())


def test_no_pair_that_counts_is_a_loss_of_zero():
    a, b = _views()
    # Not compiled: a compiler may fold 0 * nan to the 0 this is about.
    loss, metrics = contrastive.nt_xent(a, b, np.zeros(6), temperature=0.1)
    assert loss == 0 and all(v == 0 for v in metrics.values())


def test_order_of_samples_and_of_views_does_not_matter():
    a, b = _views()
    want, _ = NT_XENT(a, b, temperature=0.1)
    order = np.random.default_rng(1).permutation(len(a))
    got, _ = NT_XENT(b[order], a[order], temperature=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_cosine_ignores_the_length_of_rows_and_a_rotation():
    a, b = _views()
    want, _ = NT_XENT(a, b, temperature=0.1)
    q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))
    turned = [(100 * z @ q).astype(np.float32) for z in (a, b)]
    got, _ = NT_XENT(*turned, temperature=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_tokens_are_rows():
    a, b = _views(6)
    want, _ = NT_XENT(a, b, temperature=0.1)
    tokens = [z.reshape(2, 3, 5) for z in (a, b)]
    got, _ = NT_XENT(*tokens, np.ones((2, 3)), temperature=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_wrong_options_say_what_is_allowed():
    a, b = _views()
    with pytest.raises(ValueError, match=r"\(6, 5\).*\(5, 5\)"):
        contrastive.nt_xent(a, b[:5], temperature=0.1)


@pytest.mark.parametrize("batch, temperature", [(2, 0.5), (7, 0.07)])
def test_infonce_is_two_cross_entropies_across_the_views(batch, temperature):
    a, b = np.random.default_rng(0).normal(size=(2, batch, 5)).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    x, y = (u.astype(np.float64) for u in unit)
    total = 0.0
    for i in range(batch):
        for one, other in ((x, y), (y, x)):
            s = [one[i] @ other[j] / temperature for j in range(batch)]
            total += np.log(np.exp(s).sum()) - s[i]
    loss, metrics = contrastive.infonce(a, b, temperature=temperature)
    np.testing.assert_allclose(loss, total / (2 * batch), rtol=1e-5)
    similarity = x @ y.T
    np.testing.assert_allclose(
        metrics["positive_similarity"], np.diag(similarity).mean(), rtol=1e-4
    )
    others = similarity[~np.eye(batch, dtype=bool)].mean()
    np.testing.assert_allclose(metrics["negative_similarity"], others, rtol=1e-3)


def test_infonce_at_chance_at_the_optimum_and_of_nothing():
    same = np.ones((4, 3), np.float32)
    loss, metrics = contrastive.infonce(same, same, temperature=0.1)
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-5)
    assert metrics["accuracy"] == 0  # A tie is no hit.
    apart = np.eye(4, dtype=np.float32)
    loss, metrics = contrastive.infonce(apart, apart, temperature=0.01)
    assert float(loss) < 1e-5 and metrics["accuracy"] == 1
    assert contrastive.infonce(same[:0], same[:0], temperature=0.1)[0] == 0
