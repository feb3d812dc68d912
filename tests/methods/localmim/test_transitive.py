"""Transitive distillation: its value, where its gradient goes, frozen blocks."""

import functools

import jax
import numpy as np
import pytest

from vitssl import tree
from vitssl.data import views
from vitssl.methods import base
from vitssl.methods.localmim import method, stages, store, transitive
from vitssl.models import decoder, vit
from vitssl.ops import random_masking
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}
KEY = jax.random.key(1)


def _method(boundary=0, dtype="float32", remat=False, **own):
    one = (0.5,)
    return method.LocalMIM(
        run=base.Run(10, 2, 4, 0, 1, one, one),
        model=vit.ViT(16, 4, 2, 4, 16, positions="sincos", dtype=dtype, remat=remat),
        augment=views.SingleCrop(16),
        decoder=decoder.Decoder(width=16, heads=2),
        stages=stages.Stages((3,), (1.0,), ("pixel",)),
        masking=random_masking.Masking(),
        prefix=store.Prefix(boundary),
        transitive=transitive.Transitive(**own),
    )


def _batch():
    rng = np.random.default_rng(0)
    return {"global": rng.integers(0, 256, (4, 1, 16, 16, 1), np.uint8)}


@functools.cache
def _fresh():
    shapes = jax.eval_shape(_batch)
    make = jax.jit(lambda: _method().init(KEY, shapes), compiler_options=QUICK)
    return make()


def _leaves(*blocks):
    """Return the names of all leaves of some blocks, and of what is before them."""
    names = tree.flat(_fresh()[0])
    own = tuple(f"encoder/block_{k}/" for k in blocks)
    return frozenset(n for n in names if n.startswith((*own, "encoder/patch_embed/")))


def _loss(m, frozen=frozenset(), params=None):
    params, extra = params or _fresh()[0], {}
    run = functools.partial(m.loss, phase=step.Phase(frozen, m.phase(0)))
    value = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=QUICK)
    (loss, (_, metrics)), grads = value(params, extra, _batch(), KEY)
    return float(loss), metrics, tree.flat(grads)


def _numpy(m, pairs):
    """Return the term, from the encoder's own outputs for the same masks."""
    params, _ = _fresh()
    image = (_batch()["global"][:, 0] / 255.0 - 0.5) / 0.5
    draw, _ = jax.random.split(KEY)
    masks = m.masking.draw(draw, 4, m.grid, m.phase(0).visible)
    out = {k: np.asarray(x) for k, x in m.encode(params, image, masks).items()}
    assert out[0].shape == (4, 1 + m.phase(0).visible, 16)
    unit = {
        k: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        for k, x in out.items()
    }
    gaps = [((unit[k] - unit[k + 1]) ** 2).mean() for k in pairs]
    return sum(gaps) / len(m.transitive.learners(4))


@pytest.mark.parametrize(
    ("blocks", "frozen", "pairs"),
    [((), (), (0, 1, 2)), ((), (0, 1), (2,)), ((1, 2), (1,), (2,)), ((0,), (0,), ())],
)
def test_blocks_learn_from_the_next_unless_they_froze(blocks, frozen, pairs):
    m, plain = _method(weight=2.0, blocks=blocks), _method()
    leaves = _leaves(*frozen) if frozen else frozenset()
    loss, metrics, _ = _loss(m, leaves)
    want = _numpy(m, pairs)
    np.testing.assert_allclose(metrics["transitive"], want, rtol=1e-4)
    bare, without, _ = _loss(plain, leaves)
    np.testing.assert_allclose(loss, bare + 2.0 * want, rtol=1e-5)
    assert "transitive" not in without and (want > 0.01 or not pairs)


def test_no_gradient_reaches_the_later_block():
    found = _loss(_method(weight=1.0, blocks=(1,)))[2]
    bare = _loss(_method())[2]
    moved = {k for k in found if not np.allclose(found[k], bare[k], atol=1e-7)}
    assert any(k.startswith("encoder/block_1/") for k in moved)
    assert any(k.startswith("encoder/block_0/") for k in moved)
    assert not any(
        k.startswith(("encoder/block_2/", "encoder/block_3/")) for k in moved
    )


def test_a_prefix_that_sees_whole_images_has_frozen_and_learns_nothing():
    m = _method(boundary=2, weight=1.0)
    frozen = _leaves(0, 1) | {"encoder/cls"}
    assert np.isfinite(_loss(m, frozen)[0])
    live = {*tree.flat(_fresh()[0])} - frozen
    assert m.transitive.pairs(4, live) == (2,)


def test_it_takes_the_options_of_the_trainer():
    """Freezing within a run, recomputed blocks, half precision, micro-batches."""
    m = _method(weight=0.5)
    loss, metrics, grads = _loss(m)
    again, _, slopes = _loss(_method(remat=True, weight=0.5))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for k, g in grads.items():
        np.testing.assert_allclose(slopes[k], g, atol=1e-6, err_msg=k)
    half = _loss(_method(dtype="bfloat16", weight=0.5))[1]["transitive"]
    np.testing.assert_allclose(half, metrics["transitive"], rtol=0.03)
    params, extra = _fresh()
    spec = optim.Optim("adamw", 1e-3, "constant", 0.0, 0.0, 0.0, 0.0)
    freeze = freezeout.FreezeOut("linear", 0.3, layers=m.freeze_layers())
    counts = dict(total_steps=10, steps_per_epoch=2, batch_size=4)
    optimizer = optim.make(spec, params, **counts, freeze=freeze)
    for at, dropped in ((0, 0), (8, 1)):
        phase = step.phase_at(m, optimizer, at)
        assert bool(phase.frozen) == bool(dropped)
        state = step._state(at, params, extra, optimizer, KEY, phase)
        one = jax.jit(
            step.make(m, optimizer, 2), static_argnums=2, compiler_options=QUICK
        )
        new, metrics = one(state, _batch(), phase)
        assert metrics["nonfinite"] == 0 and metrics["transitive"] > 0
        old, new = tree.flat(params), tree.flat(new.params)
        still = {k for k in old if np.array_equal(old[k], new[k])}
        assert still == phase.frozen


def test_blocks_with_none_to_learn_from_are_one_line():
    for blocks in ((3,), (1, 1)):
        (line,) = _method(weight=1.0, blocks=blocks).check()
        assert f"transitive.blocks={blocks}: different blocks below 3" in line
