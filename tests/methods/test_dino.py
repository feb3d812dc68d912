"""DINO, iBOT and KoLeo against their papers in numpy: a whole step, what trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import plain
from vitssl.data import crops
from vitssl.losses import assignment
from vitssl.methods import base
from vitssl.methods.dino import method, objective
from vitssl.models import prototypes, vit, xavier
from vitssl.optim import optimizer as optim
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}
NET = dict(width=8, depth=1, heads=2, patch=4, image_size=8, positions="sincos")


def _method(**own):
    views = dict(
        num_global_crops=2,
        num_local_crops=own.pop("locals", 2),
        global_crop_size=8,
        local_crop_size=4,
        global_crop_scale=(0.5, 1.0),
        local_crop_scale=(0.2, 0.5),
        global_color_jitter=0.0,
        local_color_jitter=0.0,
        color_jitter_prob=0.0,
        horizontal_flip_prob=0.0,
        interpolation="fast",
        colour="host",
    )
    return method.DINO(
        run=base.Run(
            total_steps=20,
            steps_per_epoch=5,
            batch_size=3,
            classes=0,
            channels=1,
            mean=(0.5,),
            std=(0.25,),
        ),
        model=vit.ViT(**NET | own.pop("model", {})),
        multicrop=crops.MultiCrop(**views | own.pop("multicrop", {})),
        start=xavier.Start(own.pop("start", "normal")),
        head=prototypes.Head(outputs=6, hidden=8, bottleneck=4, **own.pop("head", {})),
        objective=objective.Objective(**own),
    )


def _batch(seed=0, small=2):
    draw = np.random.default_rng(seed).integers
    kinds = {"global": (3, 2, 8, 8, 1), "local": (3, small, 4, 4, 1)}
    return {k: draw(0, 256, shape, np.uint8) for k, shape in kinds.items() if shape[1]}


@functools.cache
def _fresh(of):
    """Return (params, extra) drawn by numpy; the teacher is another network."""
    batch = {"global": jax.ShapeDtypeStruct((3, 2, 8, 8, 1), jnp.uint8)}
    shapes = jax.eval_shape(of.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes
    )


def _loss(of, params, extra, batch, step=0):
    """Return the loss, metrics and new extra, and the gradient, of one batch."""
    run = jax.jit(jax.value_and_grad(of.loss, has_aux=True), compiler_options=QUICK)
    return run(params, extra, batch, jax.random.key(3), step=step)


def _numpy(batch, kind):
    return (batch[kind] / 255 - 0.5) / 0.25


def _encode(p, at, crops, **own):
    """Return class tokens [B, V, D] and patch tokens [B, V, N, D] of crops."""
    b, v = crops.shape[:2]
    flat = crops.reshape(b * v, *crops.shape[2:])
    cls, x = plain.vit(p, f"{at}encoder", flat, patch=4, heads=2, **own)
    return cls.reshape(b, v, -1), x.reshape(b, v, *x.shape[1:])


def _sort(p, at, x):
    """Return the scores of the head, its last layer weight-normalised."""
    for i in range(2):
        x = plain.gelu(plain.linear(p, f"{at}/fc{i}", x))
    x = plain.linear(p, f"{at}/fc2", x)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    last = p[f"{at}/last"]
    scores = x @ (last / np.sqrt((last**2).sum(0)))
    return scores * p.get(f"{at}/lengths", 1.0)


def _cross(p, scores):
    return -(p * np.log(plain.softmax(scores / 0.1))).sum(-1)


def _numpy_loss(p, fixed, of, batch, heat):
    """Return DINO's loss with a running centre: Eq. 3 and algorithm 1."""
    both = [_encode(p, "", _numpy(batch, k))[0] for k in ("global", "local")]
    scores = _sort(p, "head", np.concatenate(both, 1))
    right = _sort(
        fixed, "teacher/head", _encode(fixed, "teacher/", _numpy(batch, "global"))[0]
    )
    target = plain.softmax((right - fixed["centre/view"]) / heat)
    pairs = [(g, v) for g in range(2) for v in range(scores.shape[1]) if g != v]
    each = [_cross(target[:, g], scores[:, v]).mean() for g, v in pairs]
    return np.mean(each), right


@pytest.mark.parametrize("lengths", [False, True])
def test_a_whole_step_is_the_papers(lengths):
    """Loss and gradient in numpy, then AdamW, the teacher and the centre."""
    of = _method(
        head=dict(lengths=lengths), teacher_temperature=0.07, warmup_epochs=2.0
    )
    (params, extra), batch, key = _fresh(of), _batch(), jax.random.key(3)
    spec = dict(name="adamw", lr=1e-2, schedule="constant", warmup_epochs=0.0)
    spec |= dict(min_lr=0.0, wd=0.04, wd_end=0.4, wd_schedule="cosine", clip_norm=0.0)
    spans = dict(total_steps=20, steps_per_epoch=5, batch_size=3)
    optimizer = optim.make(optim.Optim(**spec), params, **spans)
    phase = step.phase_at(of, optimizer, 0)
    state = step._state(0, params, extra, optimizer, key, phase)
    state = state.replace(step=jnp.int32(5))
    run = jax.jit(step.make(of, optimizer), static_argnums=2, compiler_options=QUICK)
    new, metrics = run(state, batch, phase)

    p, fixed = plain.leaves(params), plain.leaves(extra)
    loss = functools.partial(_numpy_loss, fixed=fixed, of=of, batch=batch, heat=0.055)
    want, right = loss(p)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    grads = {k: np.asarray(v, float) / 0.1 for k, v in new.opt.mu.items()}
    rng = np.random.default_rng(2)
    for only in (".", "encoder", "head/last", "head/fc", "lengths"):
        towards = {
            k: rng.normal(size=v.shape) * (only == "." or only in k)
            for k, v in p.items()
        }
        slope = plain.slope(lambda q: loss(q)[0], p, towards)
        got = sum((grads[k] * towards[k]).sum() for k in p)
        np.testing.assert_allclose(got, slope, rtol=2e-3, atol=1e-4)
    wd = 0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * 5 / 20)) / 2
    after = plain.leaves(new.params)
    m = 1 - 0.004 * (np.cos(np.pi * 5 / 20) + 1) / 2
    teacher = plain.leaves(new.extra["teacher"])
    for k, leaf in after.items():
        moved = grads[k] / (abs(grads[k]) + 1e-8)
        np.testing.assert_allclose(leaf, p[k] - 0.01 * (moved + wd * p[k]), atol=1e-5)
        want = m * fixed[f"teacher/{k}"] + (1 - m) * leaf
        np.testing.assert_allclose(teacher[k], want, atol=1e-6)
    # The centre takes what it began with in "mean", too: other micro-batches.
    entering = fixed["mean/view"] + right.mean((0, 1))
    want = 0.9 * fixed["centre/view"] + 0.1 * entering
    np.testing.assert_allclose(new.extra["centre"]["view"], want, rtol=1e-5, atol=1e-6)
    assert not np.any(new.extra["mean"]["view"])


def test_hidden_patches_are_sorted_as_the_teacher_sorts_them():
    """iBOT's Eq. 2: own centre, own head, the mean by crop, crops without count 0."""
    of = _method(locals=0, patch=1.0, shared=False, ratio=(0.3, 0.9))
    (params, extra), batch = _fresh(of), _batch(small=0)
    (_, (moved, metrics)), _ = _loss(of, params, extra, batch)
    _, draw, *_ = jax.random.split(jax.random.key(3), 4)
    hidden = np.asarray(of.objective.hide(draw, (3, 2), 4))
    assert 0 < hidden.any(-1).sum() < 6 and hidden.sum(-1).max() <= 3
    p, fixed, crops = plain.leaves(params), plain.leaves(extra), _numpy(batch, "global")
    own = dict(hidden=hidden.reshape(6, 4), token=p["mask_token"])
    cls, x = _encode(p, "", crops, **own)
    right_cls, right = _encode(fixed, "teacher/", crops)
    scores = _sort(fixed, "teacher/patch_head", right)
    target = plain.softmax((scores - fixed["centre/patch"]) / 0.04)
    each = _cross(target, _sort(p, "patch_head", x)) * hidden
    want = (each.sum(-1) / np.maximum(hidden.sum(-1), 1)).mean()
    np.testing.assert_allclose(metrics["loss_patch"], want, rtol=1e-4)
    # The class tokens are of the crops with hidden patches.
    target = _sort(fixed, "teacher/head", right_cls) - fixed["centre/view"]
    each = _cross(plain.softmax(target[:, ::-1] / 0.04), _sort(p, "head", cls))
    np.testing.assert_allclose(metrics["loss_view"], each.mean(), rtol=1e-4)
    want = fixed["mean/patch"] + scores[hidden].mean(0)
    np.testing.assert_allclose(moved["mean"]["patch"], want, rtol=1e-4, atol=1e-6)


def test_koleo_is_of_the_class_tokens_of_each_global_crop():
    of = _method(koleo=0.1)
    (params, extra), batch = _fresh(of), _batch()
    (total, (_, metrics)), _ = _loss(of, params, extra, batch)
    cls, _ = _encode(plain.leaves(params), "", _numpy(batch, "global"))
    want = 0.0
    for crop in np.moveaxis(cls, 1, 0):
        x = crop / np.linalg.norm(crop, axis=-1, keepdims=True)
        apart = np.linalg.norm(x[:, None] - x[None], axis=-1) + 9 * np.eye(3)
        want -= np.log(apart.min(1)).mean()
    np.testing.assert_allclose(metrics["loss_koleo"], want, rtol=1e-3)
    whole = metrics["loss_view"] + 0.1 * metrics["loss_koleo"]
    np.testing.assert_allclose(total, whole, rtol=1e-6)


def test_sinkhorn_shares_outputs_out_evenly_and_rows_that_do_not_count_do_not():
    scores = np.random.default_rng(0).normal(size=(4, 2, 5))
    valid = np.ones((4, 2), bool)
    valid[1, 0] = valid[3] = False
    found = assignment.sinkhorn(jnp.asarray(scores, jnp.float32), 0.5, valid)
    # As DINOv2 has it, of the rows that count.
    q = np.exp(scores[valid] / 0.5).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    np.testing.assert_allclose(found[valid], (q * q.shape[1]).T, rtol=1e-4)
    whole = assignment.sinkhorn(jnp.asarray(scores, jnp.float32), 0.5, rounds=60)
    np.testing.assert_allclose(whole.sum((0, 1)), 8 / 5, rtol=1e-3)
    np.testing.assert_allclose(whole.sum(-1), 1.0, rtol=1e-5)


def test_the_centre_s_share_of_a_step_is_the_same_in_micro_batches():
    of = _method(locals=0)
    (params, extra), batch = _fresh(of), _batch(small=0)
    (_, (whole, _)), _ = _loss(of, params, extra, batch)
    run = dataclasses.replace(of.run, accumulate=3)
    parts, found = dataclasses.replace(of, run=run), extra
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        (_, (found, _)), _ = _loss(parts, params, found, one)
    for a, b in zip(*map(jax.tree.leaves, (whole, found)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_mean_of_the_patches_may_be_sorted_instead_of_the_class_token():
    of = _method(compares="mean", koleo=0.1)
    (params, extra), batch = _fresh(of), _batch()
    (_, (_, metrics)), _ = _loss(of, params, extra, batch)
    p, fixed = plain.leaves(params), plain.leaves(extra)
    both = [_encode(p, "", _numpy(batch, k))[1].mean(2) for k in ("global", "local")]
    scores = _sort(p, "head", np.concatenate(both, 1))
    right = _encode(fixed, "teacher/", _numpy(batch, "global"))[1].mean(2)
    target = _sort(fixed, "teacher/head", right) - fixed["centre/view"]
    target = plain.softmax(target / 0.04)
    pairs = [(g, v) for g in range(2) for v in range(4) if g != v]
    each = [_cross(target[:, g], scores[:, v]).mean() for g, v in pairs]
    np.testing.assert_allclose(metrics["loss_view"], np.mean(each), rtol=1e-4)
    image = batch["global"][:, 0]
    found = of.features(params, extra, image)
    np.testing.assert_allclose(found["pooled"], found["mean"], atol=1e-6)


def test_an_encoder_may_start_as_mae_s():
    batch = {"global": jax.ShapeDtypeStruct((3, 2, 8, 8, 1), jnp.uint8)}
    wide = dict(width=32, heads=2)
    plain_, drawn = (
        jax.jit(_method(model=wide, start=start).init, compiler_options=QUICK)(
            jax.random.key(0), batch
        )
        for start in ("normal", "xavier")
    )
    for params, extra in (plain_, drawn):
        for a, b in zip(
            jax.tree.leaves(params), jax.tree.leaves(extra["teacher"]), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    a, b = (
        np.asarray(x[0]["encoder"]["block_0"]["mlp"]["fc1"]["kernel"])
        for x in (plain_, drawn)
    )
    limit = np.sqrt(6 / (32 + 128))
    assert a.std() < 0.021 and np.abs(b).max() <= limit
    np.testing.assert_allclose(b.std(), limit / np.sqrt(3), rtol=0.03)
    for x, y in zip(
        *(jax.tree.leaves(z[0]["head"]) for z in (plain_, drawn)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_features_are_the_teacher_s():
    of = _method()
    params, extra = _fresh(of)
    image = _batch()["global"][:, 0]
    found = of.features(params, extra, image)
    want, tokens = _encode(
        plain.leaves(extra), "teacher/", (image[:, None] / 255 - 0.5) / 0.25
    )
    np.testing.assert_allclose(found["pooled"], want[:, 0], rtol=1e-4, atol=1e-5)
    mean = tokens[:, 0].mean(1)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-5)


def test_impossible_settings_are_one_line_each():
    (line,) = _method(multicrop=dict(global_crop_size=10)).check()
    assert line.startswith("multicrop.global_crop_size=10: must be a multiple of")
    (line,) = _method(locals=0, multicrop=dict(num_global_crops=1)).check()
    assert line == "multicrop.num_global_crops=1: needs a second crop to compare"
    (line,) = _method(model=dict(cls=False)).check()
    assert line.startswith("model.cls=False: DINO sorts class tokens; set objective.")
    assert not list(_method(model=dict(cls=False), compares="mean").check())
    (line,) = objective.Objective(ratio=(0.5, 0.1)).check()
    assert line == "ratio=(0.5, 0.1): smallest <= largest"
