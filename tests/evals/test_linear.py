"""The linear probe: pooling, SGD as torch does it, logistic regression, folds."""

import jax
import numpy as np
import optax
import pytest
import sklearn.linear_model
import sklearn.metrics

from vitssl.evals import accuracy, linear


def _clusters(rows=90, width=6, classes=3, seed=0, spread=0.7):
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(99).normal(size=(classes, width))
    label = rng.integers(0, classes, rows)
    x = centre[label] + spread * rng.normal(size=(rows, width))
    return x.astype(np.float32), label


def _params(rng, d, classes, attention=False):
    def dense(n, m):
        return {
            "kernel": rng.normal(size=(n, m)).astype(np.float32),
            "bias": rng.normal(size=m).astype(np.float32),
        }

    params = {"classifier": dense(d, classes)}
    if attention:
        params |= {
            "attention_fc1": dense(d, d // 4),
            "attention_fc2": dense(d // 4, 1),
        }
    return params


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_pooling_is_what_it_says(pooling, normalise):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 7, 8)).astype(np.float32)
    params = _params(rng, 8, 3, pooling == "attention")
    x = tokens.astype(float)
    if pooling == "attention":
        p, q = params["attention_fc1"], params["attention_fc2"]
        score = np.maximum(x @ p["kernel"] + p["bias"], 0) @ q["kernel"] + q["bias"]
        share = np.exp(score) / np.exp(score).sum(1, keepdims=True)
        pooled = (x * share).sum(1)
    else:
        pooled = x.mean(1) if pooling == "mean" else x.max(1)
    if normalise:
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    truth = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    probe = linear.LinearProbe(3, pooling, normalise)
    np.testing.assert_allclose(linear.logits(probe, params, tokens), truth, rtol=2e-4)


def test_there_is_no_class_token_to_pool():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    params = linear.init(linear.LinearProbe(2), tokens)
    with pytest.warns(UserWarning, match="no class token"):
        found = linear.LinearProbe(2, "cls").apply({"params": params}, tokens)
    truth = linear.LinearProbe(2, "mean").apply({"params": params}, tokens)
    np.testing.assert_array_equal(found, truth)


def test_a_probe_starts_near_zero_and_its_attention_as_torch_does():
    tokens = np.zeros((1, 2, 400), np.float32)
    params = linear.init(linear.LinearProbe(100, "attention"), tokens)
    kernel = params["classifier"]["kernel"]
    assert kernel.std() == pytest.approx(0.01, rel=0.03)
    assert not params["classifier"]["bias"].any()
    for name, bound in (("attention_fc1", 1 / 20), ("attention_fc2", 1 / 10)):
        assert 0.95 * bound < abs(params[name]["kernel"]).max() <= bound
        assert 0 < abs(params[name]["bias"]).max() <= bound


def test_a_row_of_zeros_does_not_poison_a_normalised_probe():
    x, label = _clusters()
    x[3] = 0
    probe = linear.LinearProbe(3, normalise=True)
    start = linear.init(probe, x)
    params, _ = linear.train(probe, start, x, label, recipe=linear.SGD(2))
    assert np.isfinite(params["classifier"]["kernel"]).all()


def _sgd_by_loops(x, label, w, b, recipe, rates):
    """Full-batch SGD with momentum in float64, as torch.optim.SGD has it."""
    x, w, b = x.astype(float), w.astype(float), b.astype(float)
    one_hot, vw, vb, losses = np.eye(w.shape[1])[label], 0, 0, []
    for lr in rates:
        score = x @ w + b
        p = np.exp(score) / np.exp(score).sum(1, keepdims=True)
        losses.append(-np.log((p * one_hot).sum(1)).mean())
        g = (p - one_hot) / len(x)
        vw = recipe.momentum * vw + x.T @ g + recipe.weight_decay * w
        vb = recipe.momentum * vb + g.sum(0) + recipe.weight_decay * b
        w, b = w - lr * vw, b - lr * vb
    return w, b, losses


@pytest.mark.parametrize(
    "schedule, rates",
    [
        ("cosine", [0.5 * (1 + np.cos(np.pi * e / 7)) for e in range(7)]),
        ("step", [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001]),
    ],
)
def test_sgd_is_torchs_with_the_rate_of_the_epoch(schedule, rates):
    x, label = _clusters()
    recipe = linear.SGD(7, 0.3, schedule, weight_decay=0.01, batch_size=1000)
    rates = 0.3 * np.array(rates)
    probe = linear.LinearProbe(3)
    start = linear.init(probe, x, seed=5)
    params, history = linear.train(probe, start, x, label, recipe=recipe)
    first = start["classifier"]
    w, b, losses = _sgd_by_loops(
        x, label, np.array(first["kernel"]), np.array(first["bias"]), recipe, rates
    )
    np.testing.assert_allclose(params["classifier"]["kernel"], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params["classifier"]["bias"], b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history[:, 0], losses, rtol=1e-5)
    np.testing.assert_allclose(history[:, 1], rates, rtol=1e-5, atol=1e-8)


def test_an_epoch_meets_every_sample_once_and_the_last_batch_is_smaller():
    # With momentum 0 and one feature per sample, the steps do not mix: sample i
    # moves row i of the kernel once per epoch, by lr / (size of its batch).
    m, size = 10, 4
    x, label = np.eye(m, dtype=np.float32), np.zeros(m, int)
    recipe = linear.SGD(1, lr=1e-3, momentum=0.0, batch_size=size)
    probe = linear.LinearProbe(2)
    zero = jax.tree.map(np.zeros_like, linear.init(probe, x))
    params, history = linear.train(probe, zero, x, label, recipe=recipe)
    moved = np.sort(np.asarray(params["classifier"]["kernel"])[:, 0])
    truth = 0.5e-3 / np.array([4] * 8 + [2] * 2)
    np.testing.assert_allclose(moved, truth, rtol=1e-2)
    assert history[0, 0] == pytest.approx(np.log(2), abs=1e-3)


def test_the_order_of_the_samples_follows_the_seed():
    x, label = _clusters()
    probe = linear.LinearProbe(3)
    start = linear.init(probe, x)
    recipe = linear.SGD(3, batch_size=16)
    a, b, c = (
        linear.train(probe, start, x, label, recipe=recipe, seed=seed)[0]["classifier"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a["kernel"], b["kernel"])
    assert (a["kernel"] != c["kernel"]).any()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_probe_learns_clusters(pooling):
    x, label = _clusters(300)
    y, truth = _clusters(200, seed=1)
    if pooling == "attention":
        # One token tells, the others are noise without its mark in front.
        rng = np.random.default_rng(0)

        def hide(a):
            tokens = rng.normal(size=(len(a), 4, 7)).astype(np.float32)
            tokens[:, :, 0] = 0
            tokens[np.arange(len(a)), rng.integers(0, 4, len(a))] = np.pad(
                a, ((0, 0), (1, 0)), constant_values=3
            )
            return tokens

        x, y = hide(x), hide(y)
    probe = linear.LinearProbe(3, pooling)
    recipe = linear.SGD(30, batch_size=64)
    params, history = linear.train(
        probe, linear.init(probe, x), x, label, recipe=recipe
    )
    assert history[-1, 0] < 0.5 * history[0, 0]
    assert accuracy.measure(linear.logits(probe, params, y), truth)["top1"] > 0.85


def test_logits_do_not_depend_on_how_they_are_cut():
    x, _ = _clusters()
    probe = linear.LinearProbe(3)
    params = linear.init(probe, x)
    whole = linear.logits(probe, params, x)
    assert whole.shape == (90, 3)
    np.testing.assert_allclose(linear.logits(probe, params, x, rows=40), whole, 1e-5)


def test_measures_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    score, label = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    found = accuracy.measure(score, label)
    share = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    m = sklearn.metrics
    assert found["loss"] == pytest.approx(m.log_loss(label, share))
    assert found["top1"] == m.top_k_accuracy_score(label, score, k=1)
    assert found["top5"] == m.top_k_accuracy_score(label, score, k=5)
    guess = score.argmax(1)
    np.testing.assert_array_equal(found["confusion"], m.confusion_matrix(label, guess))


def test_of_equal_scores_the_lower_class_is_first():
    score = np.zeros((6, 6))
    score[:, 4] = 1
    # Class 4 first, then 0 1 2 3 5.
    assert accuracy.rank(score, np.arange(6)).tolist() == [1, 2, 3, 4, 0, 5]
    assert accuracy.top([0, 1, 2, 3, 4, 5], 6) == {"top1": 1 / 6, "top5": 5 / 6}
    # What was not named, -inf, is among no best, whatever its number.
    score[:, :4] = -np.inf
    assert accuracy.rank(score, np.arange(6)).tolist() == [6, 6, 6, 6, 0, 1]
    assert accuracy.top([0, 1], 2) == {"top1": 0.5}
    assert accuracy.top([0, 2], 3) == {"top1": 0.5, "top5": 1.0}


def test_cross_validation_tests_what_it_did_not_train_on():
    # Labels at random, and one feature per sample: trained rows are known by heart.
    label = np.random.default_rng(0).integers(0, 2, 40)
    x = 30 * np.eye(40, dtype=np.float32)
    found = linear.cross_validate(
        linear.LinearProbe(2), x, label, recipe=linear.SGD(20), parts=4
    )
    assert found.shape == (4,) and found.mean() < 0.75
    x, label = _clusters(100, spread=0.1)
    found = linear.cross_validate(
        linear.LinearProbe(3), x, label, recipe=linear.SGD(20)
    )
    assert found.tolist() == [1] * 5


@pytest.mark.parametrize("penalty", [1e-2, 1e-4])
def test_logistic_regression_is_scikit_learns(penalty):
    x, label = _clusters(200)
    x = x * 10 ** np.linspace(-3, 3, 6, dtype=np.float32) + 5  # Any units will do.
    params, chosen = linear.logistic(x, label, 3, penalties=(penalty,), iterations=500)
    assert chosen == penalty
    z = (x - x.mean(0)) / x.std(0)
    model = sklearn.linear_model.LogisticRegression(
        C=1 / (penalty * len(x)), tol=1e-8, max_iter=10_000
    ).fit(z, label)
    score = linear.logits(linear.LinearProbe(3), params, x)
    share = np.asarray(jax.nn.softmax(score))
    np.testing.assert_allclose(share, model.predict_proba(z), atol=3e-3)


def test_the_penalty_is_chosen_on_rows_held_out():
    # With 200 dimensions of noise 200 samples are learned by heart, but for a penalty.
    x, label = _clusters(200, spread=1.0)
    noise = np.random.default_rng(1).normal(size=(200, 200)).astype(np.float32)
    noisy = np.concatenate([x, noise], 1)
    assert linear.logistic(noisy, label, 3)[1] >= 0.1
    assert linear.logistic(x, label, 3)[1] <= 0.01
    y, truth = _clusters(500, spread=1.0, seed=1)
    y = np.concatenate([y, np.random.default_rng(2).normal(size=(500, 200))], 1)
    chosen, none = (
        accuracy.measure(linear.logits(linear.LinearProbe(3), params, y), truth)
        for params, _ in (
            linear.logistic(noisy, label, 3),
            linear.logistic(noisy, label, 3, penalties=(1e-6,)),
        )
    )
    assert chosen["loss"] < 0.5 * none["loss"] and chosen["top1"] > none["top1"]


def test_a_constant_feature_gets_no_weight():
    x, label = _clusters()
    x[:, 2] = 7
    params, _ = linear.logistic(x, label, 3)
    kernel = params["classifier"]["kernel"]
    assert not kernel[2].any() and abs(kernel[[0, 1, 3, 4, 5]]).min() > 0


def test_a_probe_trains_under_a_transfer_guard():
    x, label = _clusters()
    probe = linear.LinearProbe(3)
    params = linear.init(probe, x)
    with jax.transfer_guard("disallow"):
        params, _ = linear.train(probe, params, x, label, recipe=linear.SGD(2))
        linear.logits(probe, params, x)
        linear.logistic(x, label, 3)
    assert optax.tree.norm(params) > 0
