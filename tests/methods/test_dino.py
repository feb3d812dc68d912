"""DINO against its paper in numpy: scores, loss, centre, teacher, one whole step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import tree
from vitssl.data import multicrop
from vitssl.methods import base
from vitssl.methods.dino import method
from vitssl.models import vit

NET = dict(width=8, depth=1, heads=2, patch=4, image_size=8, positions="sincos")


def _method(**own):
    crops = dict(
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
        multicrop=multicrop.MultiCrop(**crops | own.pop("multicrop", {})),
        head=method.Head(outputs=6, hidden=8, bottleneck=4, **own.pop("head", {})),
        teacher=method.Teacher(**own.pop("teacher", {})),
        **own,
    )


def _batch(seed=0, small=2):
    draw = np.random.default_rng(seed).integers
    kinds = {"global": (3, 2, 8, 8, 1), "local": (3, small, 4, 4, 1)}
    return {k: draw(0, 256, shape, np.uint8) for k, shape in kinds.items() if shape[1]}


@functools.cache
def _fresh(of, spread=1.0):
    """Return (params, extra) whose teacher is another network, with a centre."""
    batch = {"global": jax.ShapeDtypeStruct((3, 2, 8, 8, 1), jnp.uint8)}
    (params, extra), (other, _) = (of.init(jax.random.key(k), batch) for k in (0, 1))
    centre = jnp.linspace(-0.1, 0.2, of.head.outputs)
    return params, extra | {"teacher": other, "centre": centre}


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _cross_entropy(teacher, student, centre, heat=0.04, cold=0.1):
    """Eq. 3 of the paper: the mean over all pairs of different crops."""
    found = []
    for g in range(teacher.shape[1]):
        for v in range(student.shape[1]):
            if g != v:
                p = _softmax((teacher[:, g] - centre) / heat)
                log_q = np.log(_softmax(student[:, v] / cold))
                found.append(-(p * log_q).sum(-1).mean())
    return np.mean(found)


def test_the_loss_is_the_cross_entropy_of_all_pairs_of_different_crops():
    of = _method(teacher=dict(temperature=0.07, warmup_epochs=2.0))
    params, extra = _fresh(of)
    batch = _batch()
    run = jax.jit(of.loss, static_argnames="phase")
    kinds = [of.scores(params, batch[k]) for k in ("global", "local")]
    student = np.concatenate(kinds, 1).astype(float)
    teacher = np.asarray(of.scores(extra["teacher"], batch["global"]), float)
    for step, heat in ((0, 0.04), (5, 0.055), (10, 0.07), (15, 0.07)):
        value, _ = run(params, extra, batch, jax.random.key(0), step=step)
        want = _cross_entropy(teacher, student, np.asarray(extra["centre"]), heat)
        np.testing.assert_allclose(value, want, rtol=1e-5)


def test_the_centre_and_the_teacher_follow_after_the_step():
    of = _method()
    params, extra = _fresh(of)
    batch = _batch()
    _, (moved, _) = of.loss(params, extra, batch, jax.random.key(0))
    found = of.after(params, moved, 5)
    teacher = of.scores(extra["teacher"], batch["global"])
    want = 0.9 * extra["centre"] + 0.1 * np.mean(teacher, (0, 1))
    np.testing.assert_allclose(found["centre"], want, rtol=1e-5)
    m = 1 - 0.004 * (np.cos(np.pi * 5 / 20) + 1) / 2
    before, now = tree.flat(extra["teacher"]), tree.flat(params)
    for name, leaf in tree.flat(found["teacher"]).items():
        want = m * before[name] + (1 - m) * now[name]
        np.testing.assert_allclose(leaf, want, rtol=1e-5, atol=1e-7)
