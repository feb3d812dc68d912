"""Several labels an image: a sigmoid each, in the loss, the scores and the views."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.methods.classify import test_method as plain
from vitssl.methods.classify import method, objective
from vitssl.run import step

LABELS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]])


def _loss(m, params, extra, batch, rng):
    phase = step.Phase(frozenset(), None)
    run = jax.jit(lambda *a: m.loss(*a, phase=phase), compiler_options=plain.QUICK)
    return run(params, extra, batch, rng)


def test_the_loss_is_the_cross_entropy_of_a_sigmoid_for_every_label():
    logits = np.array([[2.0, -1.0, 0.5], [30.0, -30.0, 0.0]])
    labels = np.array([[1, 0, 0], [1, 0, 1]])
    p = special.expit(logits)
    each = -np.where(labels, np.log(p), np.log1p(-p + 1e-300)).sum(1)
    got = objective.binary(jnp.asarray(logits), labels)
    np.testing.assert_allclose(got, each.mean(), rtol=1e-5)
    soft = labels * 0.8 + 0.1
    each = -(soft * np.log(p) + (1 - soft) * np.log(special.expit(-logits))).sum(1)
    got = objective.binary(jnp.asarray(logits), labels, smoothing=0.2)
    np.testing.assert_allclose(got, each.mean(), rtol=1e-5)


def test_mixed_images_have_the_mixed_labels():
    m = plain._method(
        objective=dict(loss="binary"), mix=dict(mixup=1.0), head=dict(init_std=5.0)
    )
    params, extra = plain._fresh(m)
    batch = plain._batch(m) | {"labels": LABELS.astype(np.uint8)}
    plainly = dataclasses.replace(m, mix=method.mixing.Mix())
    for one in (m, plainly):
        value, (_, metrics) = _loss(one, params, extra, batch, jax.random.key(1))
        assert np.isfinite(value) and 0 <= metrics["train_hit"] <= 1
        assert "train_top1" not in metrics
    # All with their own reverse: as if they were not mixed at all.
    batch = {k: np.concatenate([v[:3], v[:3][::-1]]) for k, v in batch.items()}
    quiet = dataclasses.replace(m.model, drop_path=0.0)
    values = [
        _loss(
            dataclasses.replace(one, model=quiet),
            params,
            extra,
            batch,
            jax.random.key(1),
        )
        for one in (m, plainly)
    ]
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-4)


def test_views_are_averaged_by_their_sigmoids():
    scoring = method.Scoring("flip")
    each = [np.array([[2.0, -60.0]]), np.array([[0.0, -70.0]])]
    ahead = iter(each)
    found = scoring.averaged(lambda _: next(ahead), np.zeros((1, 2, 2, 1)), True)
    want = special.expit(np.array([[2.0, 0.0]])).mean()
    np.testing.assert_allclose(special.expit(found[0, 0]), want, rtol=1e-6)
    # A probability of almost nothing is no -inf.
    np.testing.assert_allclose(found[0, 1], -60 - np.log(2), rtol=1e-4)


def test_scores_are_average_precisions_of_every_weight_and_view():
    m = plain._method(objective=dict(loss="binary", ema=0.9))
    logits = np.where(LABELS, 1.0, -1.0)
    rows = {"logits": logits, "ema_logits": -logits, "labels": LABELS}
    found = m.scores(rows | {"label": np.full(6, -1)})
    assert found["map"] == 1.0 and found["ema_map"] < 0.5
    assert found["ap"].tolist() == [1.0] * 3
    assert found["support"].tolist() == [3, 2, 3]
    numbers = {k: v for k, v in found.items() if not np.ndim(v)}
    table = m.written(numbers).split("\n")
    assert table[0] == "| scored | map | f1_macro | f1_micro | loss |"
    assert [line.split()[1] for line in table[2:]] == ["parameters", "ema"]
    assert table[2].split()[3] == "1.0000"
    assert m.several and not plain._method().several


@pytest.mark.parametrize("own", [dict(balanced=True), dict(class_weights=(1.0, 2.0))])
def test_there_are_no_class_weights(own):
    (line,) = objective.Objective(loss="binary", **own).check()
    assert line.startswith("loss=binary: has no class weights")


@pytest.mark.parametrize(
    "own",
    [
        dict(scoring=method.Scoring(calibration=True)),
        dict(head=dict(blocks=(1, 2), predict="average")),
    ],
)
def test_what_is_of_one_label_is_refused(own):
    found = list(plain._method(objective=dict(loss="binary"), **own).check())
    assert len(found) == 1 and "is of one label an image" in found[0]
    assert not list(plain._method(objective=dict(loss="binary")).check())
