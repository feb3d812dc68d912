"""Heads at several blocks: their loss, what it trains, what names the classes."""

import functools

import jax
import numpy as np
import pytest

from vitssl import tree
from vitssl.methods import base
from vitssl.methods.classify import method, mix, objective, views
from vitssl.models import head, hvit, vit
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}
VIT = vit.ViT(16, 3, 2, 4, 8)
HVIT = hvit.HViT(8, (1, 2), (1, 2), 4, 8, spectral_channels=1, dfca_heads=2)


def _method(model=VIT, consistency=0.0, smoothing=0.0, **own):
    channels = 4 if model is HVIT else 1
    return method.Classify(
        run=base.Run(10, 5, 6, 3, channels, (0.5,) * channels, (0.5,) * channels),
        model=model,
        augment=views.Augment(size=8),
        head=head.Head(**dict(init_std=0.5) | own),
        mix=mix.Mix(),
        objective=objective.Objective(
            smoothing=smoothing, consistency=consistency, ema=0.9
        ),
    )


def _batch(m):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 8, 8, m.run.channels), np.uint8)
    return {"image": image, "label": np.arange(6, dtype=np.int32) % 3}


@functools.cache
def _fresh(m):
    shapes = jax.eval_shape(lambda: _batch(m))
    run = jax.jit(lambda: m.init(jax.random.key(0), shapes), compiler_options=QUICK)
    return run()


@functools.cache
def _numpy(m):
    """Return the log-probabilities [heads, B, K], by numpy from the blocks' outputs."""
    params, _ = _fresh(m)
    image = (_batch(m)["image"] / 255.0 - 0.5) / 0.5
    net = {"params": params["backbone"]}
    out = jax.jit(lambda x: m.model.apply(net, x), compiler_options=QUICK)(image)
    if m.model is HVIT:
        seen = [np.asarray(x).mean((1, 2)) for x in out["stages"]]
    else:
        pick = (
            (lambda x: x[:, 0]) if m.head.pool == "cls" else lambda x: x[:, 1:].mean(1)
        )
        seen = [pick(np.asarray(out[1]["blocks"][n - 1])) for n in m.head.blocks]
        if m.head.pool == "cls":
            seen[-1] = np.asarray(out[0][:, 0])
    found = []
    for n, x in zip(m.head.blocks, seen, strict=True):
        own = params["head"].get(f"block_{n}", params["head"])
        if "norm" in own:
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        y = x @ np.asarray(own["kernel"])
        found.append(y - np.log(np.exp(y).sum(-1, keepdims=True)))
    return np.stack(found)


def _loss(m):
    params, extra = _fresh(m)
    run = functools.partial(m.loss, phase=step.Phase(frozenset(), None))
    value = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=QUICK)
    return value(params, extra, _batch(m), jax.random.key(0))


CASES = {
    "vit": _method(blocks=(1, 2, 3)),
    "class token": _method(blocks=(2, 3), weights=(1.0, 3.0), pool="cls"),
    "hvit": _method(HVIT, blocks=(1, 3), weights=(0.5, 2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_weighted_mean_over_heads_and_each_has_a_gradient(name):
    m = CASES[name]
    log_p, label = _numpy(m), _batch(m)["label"]
    each = -log_p[:, np.arange(6), label].mean(-1)
    weight = np.array(m.head.weights or (1.0,) * len(each))
    (value, (_, metrics)), grads = _loss(m)
    np.testing.assert_allclose(value, (weight * each).sum() / weight.sum(), rtol=1e-4)
    for n, want in zip(m.head.blocks, each, strict=True):
        np.testing.assert_allclose(metrics[f"loss_block_{n}"], want, rtol=1e-4)
    still = {k for k, g in tree.flat(grads).items() if not np.any(g)}
    # What comes after the features that the heads see.
    assert not any(k.startswith("head/") for k in still)
    assert not any("/block_" in k and "spectral" not in k for k in still)


@pytest.mark.parametrize("name", ["vit", "class token"])
def test_the_last_head_names_the_classes_or_all_by_their_mean_probability(name):
    m = CASES[name]
    given, log_p = (*_fresh(m), _batch(m)["image"]), _numpy(m)
    last = jax.nn.log_softmax(jax.jit(m.logits, compiler_options=QUICK)(*given))
    np.testing.assert_allclose(last, log_p[-1], rtol=1e-4, atol=1e-5)
    own = dict(blocks=m.head.blocks, weights=m.head.weights, pool=m.head.pool)
    m = _method(**own, predict="average")
    found = jax.jit(m.logits, compiler_options=QUICK)(*given)
    weight = np.array(m.head.weights or (1.0,) * len(log_p))[:, None, None]
    want = (weight * np.exp(log_p)).sum(0) / weight.sum()
    np.testing.assert_allclose(np.exp(found), want, rtol=1e-4, atol=1e-6)
    assert set(m.class_logits(*given)) == {"ema"}


def test_heads_keep_their_batch_statistics_beside_streams_of_an_hvit():
    m = _method(HVIT, consistency=0.5, blocks=(1, 3), batchnorm=True, pool="mean")
    (value, (extra, metrics)), grads = _loss(m)
    assert np.isfinite(value) and metrics["consistency"] > 0
    before, after = tree.flat(_fresh(m)[1]["stats"]), tree.flat(extra["stats"])
    assert set(after) == {"mean", "var", "block_1/mean", "block_1/var"} == set(before)
    assert all(np.any(after[k] != before[k]) for k in after)
    assert {"aux_rgb", "aux_spectral", "head", "backbone"} == set(grads)


def test_heads_take_the_options_of_the_trainer():
    """Micro-batches, recomputed blocks, freezing, rates by layer, the average."""
    plain = _method(blocks=(1, 2, 3))
    remat = _method(VIT.clone(remat=True), blocks=(1, 2, 3))
    params, extra = _fresh(plain)

    def run(m, accumulate, at=0):
        spec = optim.Optim(
            "adamw", 1e-3, "constant", 0.0, 0.0, 0.0, 0.0, layer_decay=0.5
        )
        freeze = freezeout.FreezeOut("linear", 0.3, layers=m.freeze_layers())
        optimizer = optim.make(
            spec, params, total_steps=10, steps_per_epoch=5, batch_size=6, freeze=freeze
        )
        phase = step.phase_at(m, optimizer, at)
        state = step._state(at, params, extra, optimizer, jax.random.key(0), phase)
        one = jax.jit(
            step.make(m, optimizer, accumulate),
            static_argnums=2,
            compiler_options=QUICK,
        )
        new, metrics = one(state, _batch(m), phase)
        return optimizer, phase, new, metrics

    optimizer, _, whole, metrics = run(plain, 1)
    for other in (run(plain, 3), run(remat, 1)):
        np.testing.assert_allclose(other[3]["loss"], metrics["loss"], rtol=1e-5)
        for k, x in whole.opt.mu.items():
            np.testing.assert_allclose(other[2].opt.mu[k], x, atol=1e-6, err_msg=k)
    rates = optimizer.lr_factor
    assert rates["head/block_1/kernel"] == rates["head/kernel"] == 1
    assert rates["backbone/block_0/attn/qkv/kernel"] == 0.5**3
    ema, old = tree.flat(whole.extra["ema"]), tree.flat(params)
    assert all(np.any(ema[k] != old[k]) for k in ema if k.startswith("head/block_1/"))
    _, phase, late, _ = run(plain, 1, at=8)
    new = tree.flat(late.params)
    still = {k for k in old if np.array_equal(old[k], new[k])}
    unused = {"backbone/norm/scale", "backbone/norm/bias"}  # By pool="gap".
    assert still == phase.frozen | unused and "backbone/block_1/norm1/scale" in still
    assert not any(k.startswith("head") for k in still)


@pytest.mark.parametrize(
    ("model", "blocks"),
    [(VIT, (1, 2)), (VIT, (2, 1, 3)), (VIT, (0, 3)), (VIT, (3, 4)), (HVIT, (2, 3))],
)
def test_blocks_without_a_place_for_a_head_are_one_line(model, blocks):
    (line,) = _method(model, blocks=blocks, pool="mean").check()
    known = "1, 3" if model is HVIT else "1, 2, 3"
    assert f"head.blocks={blocks}: rising" in line and f"({known})" in line


def test_what_the_section_cannot_combine_is_one_line():
    (line,) = head.Head(blocks=(1, 2), weights=(1.0,)).check()
    assert line == "weights has 1 entries for the 2 of blocks=(1, 2)"
    (line,) = head.Head(predict="average").check()
    assert "needs blocks" in line
