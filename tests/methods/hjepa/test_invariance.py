"""What crops say of each other: pairs, centred targets, LeJEPA; the centred R2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import plain
from tests.methods.hjepa import tiny
from vitssl.losses import sigreg
from vitssl.methods.hjepa import invariance
from vitssl.models import patches

ONLY = dict(masking=dict(strategy="global_only", levels="finest"))


def _method(local=2, **objective):
    own = dict(view_weight=0.5, view_projector=(8, 4)) | objective
    return tiny.method(
        objective=own, multicrop=dict(num_local_crops=local), **ONLY, batch_size=4
    )


def _pixels(m, image):
    return patches.normalise(image, m.run.mean, m.run.std)


@functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.QUICK)
def _pooled_target(m, params, extra, image):
    """Return the projected mean target tokens [B, D] of one crop of each image."""
    net = m.networks(params, extra, train=False)
    x = net.encode_target(_pixels(m, image)).mean(1)
    return net.project(x, target=True, method="coarse")


@functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.QUICK)
def _guess(m, params, extra, image, keep=None):
    """Return the prediction [B, D] from one crop of each image alone."""
    net = m.networks(params, extra, train=False)
    tokens = net.encode(_pixels(m, image), keep=keep)[1]
    return net.project(net.predict(tokens)[:, 0], method="coarse")


def _guesses(m, params, extra, batch):
    """Return the prediction of each crop alone, [B, V, D], the global ones first."""
    found = []
    for g in range(2):
        rows = []
        for i in range(len(batch["global"])):
            seen = batch["global_context"][i, g, 0] & ~batch["global_targets"][i, g, 0]
            keep = np.flatnonzero(seen)[None]
            image = batch["global"][i : i + 1, g]
            rows.append(_guess(m, params, extra, image, keep)[0])
        found.append(np.stack(rows))
    for c in range(batch["local"].shape[1]):
        found.append(_guess(m, params, extra, batch["local"][:, c]))
    return np.stack(found, 1)


@functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.QUICK)
def _rows(m, params, extra, batch):
    return m.rows(m.networks(params, extra, train=False), batch)


@pytest.mark.parametrize("target", ["plain", "centred"])
@pytest.mark.parametrize("pairs", ["local", "all"])
def test_every_pair_of_different_crops_is_compared(target, pairs):
    m = _method(view_target=target, view_pairs=pairs)
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    images = [batch["global"][:, g] for g in range(2)]
    truth = np.stack([_pooled_target(m, params, extra, x) for x in images], 1)
    guess = _guesses(m, params, extra, batch)
    if target == "centred":
        truth = (truth - truth.mean((0, 1))) / np.sqrt(truth.var((0, 1)) + 1e-5)
    crops = range(4) if pairs == "all" else (2, 3)
    each = [
        np.square(guess[:, v] - truth[:, g]).mean()
        for v in crops
        for g in range(2)
        if v != g
    ]
    assert len(each) == (6 if pairs == "all" else 4)
    terms = tiny.terms(m, params, extra, batch)
    np.testing.assert_allclose(terms.view, np.mean(each), rtol=2e-4)
    loss, (_, metrics) = tiny.loss(m, params, extra, batch, tiny.KEY)
    np.testing.assert_allclose(metrics["loss_view"], np.mean(each), rtol=2e-4)
    np.testing.assert_allclose(metrics["view_share"], 0.5 * np.mean(each) / loss, 1e-4)
    assert m.couples_batch == (target == "centred")


def test_a_constant_explains_a_plain_target_but_no_centred_one():
    rng = np.random.default_rng(0)
    common = 5 * rng.normal(size=(1, 1, 6))
    target = jnp.asarray(common + 0.1 * rng.normal(size=(40, 2, 6)), jnp.float32)
    constant = jnp.broadcast_to(target.mean((0, 1)), target.shape)
    explained = 1 - np.square(target - constant).sum() / np.square(target).sum()
    assert explained > 0.99
    centred = invariance.standardise(target)
    np.testing.assert_allclose(np.mean(centred, (0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(np.var(centred, (0, 1)), 1, rtol=0.02)


def test_global_crops_alone_are_enough_for_all_pairs_but_not_for_local_ones():
    m = _method(local=0, view_pairs="all")
    params, extra = tiny.init(m)
    assert "pooled_query" in params["predictor"]
    metrics = tiny.loss(m, params, extra, tiny.batch(m), tiny.KEY)[1][1]
    assert metrics["loss_view"] > 0
    params, _ = tiny.init(_method(local=0))
    assert "pooled_query" not in params["predictor"]
    # One global crop has no other to tell of; the local ones tell of it.
    own = dict(num_global_crops=1, num_local_crops=1)
    m = tiny.method(
        objective=dict(view_pairs="all"), multicrop=own, **ONLY, batch_size=4
    )
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    rows = _rows(m, params, extra, batch)
    assert rows.view.shape == (4, 1, 16)


def test_lejepa_is_the_distance_to_the_mean_global_projection_and_sigreg():
    m = _method(view_target="lejepa", view_sigreg=0.1)
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    assert m.couples_batch and set(params["projector"]) == {"fc0", "fc1"}
    net = m.networks(params, extra, train=False)
    rows = _rows(m, params, extra, batch)
    context = [np.asarray(rows.context.pooled[:, g]) for g in range(2)]
    local = [
        np.asarray(net.encode(_pixels(m, batch["local"][:, c]))[1].mean(1))
        for c in range(2)
    ]
    x = np.stack([*context, *local], 1)
    np.testing.assert_allclose(rows.view, x, rtol=1e-4, atol=1e-5)
    own = jax.tree.map(np.asarray, params["projector"])
    y = x @ own["fc0"]["kernel"] + own["fc0"]["bias"]
    y = np.maximum((y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + 1e-5), 0)
    z = y @ own["fc1"]["kernel"] + own["fc1"]["bias"]  # [B, V, P]
    apart = np.square(z - z[:, :2].mean(1, keepdims=True)).mean()
    along = sigreg.directions(tiny.KEY, 16, 4)
    each = [sigreg.sigreg(jnp.asarray(z[:, v]), along=along) for v in range(4)]
    loss, parts = invariance.lejepa(net, rows.view, 2, m.objective.view, tiny.KEY)
    np.testing.assert_allclose(loss, 0.9 * apart + 0.1 * np.mean(each), rtol=1e-4)
    np.testing.assert_allclose(parts["view_invariance"], apart, rtol=1e-4)


def test_lejepa_trains_the_encoder_through_every_crop_and_may_do_without_a_target():
    m = _method(view_target="lejepa")
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    pixels = {k: jnp.float32(batch[k]) / 255 for k in ("global", "local")}
    rest = {k: v for k, v in batch.items() if k not in pixels}

    def view(pixels):
        return m.terms(m.networks(params, extra, train=False), rest | pixels).view

    slope = jax.jit(jax.grad(view), compiler_options=tiny.QUICK)(pixels)
    for kind in pixels:
        assert (np.abs(slope[kind]).sum((0, 2, 3, 4)) > 0).all()
    grads = tiny.grad(m, params, extra, batch, tiny.KEY)[1]
    assert all(np.any(g) for g in jax.tree.leaves(grads["projector"]))
    objective = dict(view_target="lejepa", view_weight=1.0)
    free = tiny.method(
        objective=objective, ema=dict(target_encoder=False), **ONLY, batch_size=4
    )
    assert not list(free.check())


def test_dino_sorts_every_crop_as_the_targets_of_the_other_global_crops():
    m = _method(view_target="dino", view_temperatures=(0.2, 0.05))
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    assert m.couples_batch and not list(m.check())
    rows = _rows(m, params, extra, batch)
    assert rows.view.shape == (4, 4, 16)
    p = plain.leaves(params["projector"])

    def scores(x):
        for i in range(2):
            x = plain.gelu(plain.linear(p, f"fc{i}", x))
        x = plain.linear(p, "fc2", x)
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return x @ (p["last"] / np.linalg.norm(p["last"], axis=0))

    right = scores(np.asarray(rows.near.targets.tokens, float).mean(2))  # [B, G, K]
    q = np.exp(right.reshape(8, -1) / 0.05).T
    for _ in range(3):
        q /= q.sum(1, keepdims=True)
        q /= q.sum(0, keepdims=True)
    target = q.T.reshape(right.shape)
    log_p = np.log(plain.softmax(scores(np.asarray(rows.view, float)) / 0.2))
    pairs = [(g, v) for g in range(2) for v in range(4) if g != v]
    each = [-(target[:, g] * log_p[:, v]).sum(-1).mean() for g, v in pairs]
    terms = tiny.terms(m, params, extra, batch)
    np.testing.assert_allclose(terms.view, np.mean(each), rtol=1e-3)
    grads = tiny.grad(m, params, extra, batch, tiny.KEY)[1]
    assert all(np.any(g) for g in jax.tree.leaves(grads["projector"]))
    alone = dict(num_global_crops=1, num_local_crops=0)
    (line,) = tiny.method(
        objective=dict(view_target="dino"), multicrop=alone, **ONLY
    ).check()
    assert line.startswith("objective.view_target=dino: needs a second crop")


def test_own_positions_of_the_predictor_go_with_local_crops_that_predict():
    own = dict(predictor=dict(width=8, positions="sincos"))
    m = tiny.method(objective=dict(view_weight=0.5), **own, **ONLY, batch_size=4)
    assert not list(m.check())
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    net = m.networks(params, extra, train=False)
    tokens = net.encode(_pixels(m, batch["local"][:, 0]))[1]
    want = net.predict(tokens, place=net.positions((3, 3))[None])[:, 0]
    np.testing.assert_allclose(
        _rows(m, params, extra, batch).view[:, 0], want, atol=1e-5
    )
    plain = net.predict(tokens, place=jnp.zeros((1, 9, 8)))[:, 0]
    assert np.abs(want - plain).max() > 1e-3


def test_r2_is_the_explained_share_of_what_differs():
    rng = np.random.default_rng(0)
    target = (7 + rng.normal(size=(5, 4, 3))).astype(np.float32)
    valid = rng.random((5, 4)) < 0.7
    noise = 0.5 * rng.normal(size=target.shape).astype(np.float32)
    wrong = np.where(valid[..., None], target + noise, np.nan)
    rows = target[valid]
    want = 1 - np.square(noise[valid]).sum() / np.square(rows - rows.mean(0)).sum()
    np.testing.assert_allclose(invariance.r2(wrong, target, valid), want, rtol=1e-4)
    mean = np.broadcast_to(rows.mean(0), target.shape)
    np.testing.assert_allclose(invariance.r2(mean, target, valid), 0, atol=1e-5)
    # A cosine is not impressed by what differs.
    cosine = (mean * target).sum(-1) / np.linalg.norm(mean, axis=-1)
    assert (cosine / np.linalg.norm(target, axis=-1))[valid].mean() > 0.98
    assert invariance.r2(2 * target, target, valid, normalize=True) == 1.0


def test_where_something_lies_explains_nothing_of_its_content():
    rng = np.random.default_rng(0)
    place = rng.integers(0, 4, (30, 6))
    offset = 5 * rng.normal(size=(4, 3))
    target = (offset[place] + rng.normal(size=(30, 6, 3))).astype(np.float32)
    valid = rng.random((30, 6)) < 0.8
    means = [target[valid & (place == i)].mean(0) for i in range(4)]
    by_place = np.stack(means)[place]
    assert invariance.r2(by_place, target, valid) > 0.9
    got = invariance.r2(by_place, target, valid, place=place, places=4)
    np.testing.assert_allclose(got, 0, atol=1e-4)
    half = (by_place + target) / 2
    got = invariance.r2(half, target, valid, place=place, places=4)
    np.testing.assert_allclose(got, 0.75, atol=1e-4)


def test_the_step_logs_the_r2_of_every_level():
    m = _method()
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    terms = tiny.terms(m, params, extra, batch)
    metrics = tiny.loss(m, params, extra, batch, tiny.KEY)[1][1]
    for k in range(2):
        want = invariance.r2(*terms.near.levels[k])
        np.testing.assert_allclose(metrics[f"r2_h{k}"], want, rtol=1e-3, atol=1e-3)
        assert metrics[f"r2_content_h{k}"] < metrics[f"r2_h{k}"]
    assert metrics["r2_view"] < 1
