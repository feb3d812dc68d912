"""Cross-entropy, focal loss and their sum against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config
from vitssl.methods.classify import objective

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(6, 4))).astype(np.float32)
LABEL = np.array([0, 1, 2, 3, 3, 1], np.int32)
WEIGHT = np.array([0.5, 1.0, 2.0, 4.0], np.float32)


def _log_p(i):
    x = LOGITS[i].astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_and_smoothing_are_pytorchs(smoothing, weighted):
    w = WEIGHT.astype(float) if weighted else np.ones(4)
    above = below = 0.0
    for i, y in enumerate(LABEL):
        own = (1 - smoothing) * w[y] * -_log_p(i)[y]
        spread = smoothing / 4 * sum(w[c] * -_log_p(i)[c] for c in range(4))
        above, below = above + own + spread, below + w[y]
    got = objective.labelled(
        LOGITS, LABEL, smoothing=smoothing, weight=WEIGHT if weighted else None
    )
    np.testing.assert_allclose(got, above / below, rtol=1e-5)


def test_focal_is_the_formula_and_its_limits():
    p = np.array([np.exp(_log_p(i)[y]) for i, y in enumerate(LABEL)])
    want = -WEIGHT[LABEL] * (1 - p) ** 1.5 * np.log(p)
    run = functools.partial(objective.focal, LOGITS, LABEL)
    got = run(gamma=1.5, alpha=WEIGHT, reduction="none")
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(run(gamma=1.5, alpha=WEIGHT), want.mean(), rtol=1e-4)
    # Without focus it is the cross-entropy.
    ce = objective.labelled(LOGITS, LABEL)
    np.testing.assert_allclose(run(gamma=0.0), ce, rtol=1e-5)
    # A certain answer costs nothing, and has a finite slope.
    sure = jnp.array([[60.0, -60.0]])
    value, slope = jax.value_and_grad(
        lambda x: objective.focal(x, jnp.array([0]), gamma=2.0)
    )(sure)
    assert float(value) == 0 and np.isfinite(slope).all()


def test_class_weights_balance_the_classes_there_are():
    counts = np.array([1, 3, 0, 4])
    got = objective.class_weights(counts)
    np.testing.assert_allclose(got, [2.0, 2 / 3, 1.0, 0.5], rtol=1e-6)
    full = counts > 0
    np.testing.assert_allclose((got * counts)[full], np.full(3, 2.0), rtol=1e-6)


def test_the_objective_adds_what_it_says():
    run = lambda **k: objective.Objective(**k)(LOGITS, LABEL, WEIGHT)  # noqa: E731
    ce = run(smoothing=0.1)
    focal = run(loss="focal", focal_alpha=(0.25,))
    both = run(
        loss="combined",
        smoothing=0.1,
        focal_alpha=(0.25,),
        ce_weight=0.3,
        focal_weight=2.0,
    )
    np.testing.assert_allclose(both, 0.3 * ce + 2.0 * focal, rtol=1e-6)
    want = objective.focal(LOGITS, LABEL, gamma=2.0) / 4
    np.testing.assert_allclose(focal, want, rtol=1e-6)
    plain = objective.Objective()(LOGITS, LABEL, None)
    np.testing.assert_allclose(plain, objective.labelled(LOGITS, LABEL))


def test_the_average_forgets_its_start_quickly_with_a_warmup():
    slow, quick = (
        objective.Objective(ema=0.99),
        objective.Objective(ema=0.99, ema_warmup=True),
    )
    assert slow.decay(0) == slow.decay(10**6) == 0.99
    got = [float(quick.decay(n)) for n in (0, 8, 10**6)]
    np.testing.assert_allclose(got, [2 / 11, 10 / 19, 0.99], rtol=1e-6)


def test_impossible_objectives_are_one_line_each():
    for keys, text in (
        (dict(loss="focal", smoothing=0.1), "neither smoothing nor class weights"),
        (dict(balanced=True, class_weights=(1.0, 2.0)), "given by class_weights"),
        (dict(ema_warmup=True), "needs ema"),
    ):
        (line,) = objective.Objective(**keys).check()
        assert text in line
    problems = config.Problems()
    wrong = dict(focal_gamma=-1.0, focal_alpha=(-1.0,), ema=1.0)
    config.section(objective.Objective, wrong, "objective", problems)
    assert sorted(problems) == [
        "objective.ema=1.0: in [0, 1)",
        "objective.focal_alpha=(-1.0,): every value 0 or more",
        "objective.focal_gamma=-1.0: 0 or more",
    ]
    made = objective.Objective(class_weights=(1.0, 2.0), focal_alpha=(1.0, 1.0, 1.0))
    lines = list(made.faults(4))
    assert lines == [
        "focal_alpha has 3 numbers for 4 classes",
        "class_weights has 2 numbers for 4 classes",
    ]
    assert not list(made.faults(0))  # Of data that are not open yet nothing is known.
