"""The hierarchical ViT as the backbone of a method that is not its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import whole_hvit
from vitssl import tree
from vitssl.methods import base
from vitssl.methods.classify import method, objective, views
from vitssl.models import head, hvit, vit
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}
SIZE = dict(width=8, depths=(1, 1), heads=(1, 2), patch=4, image_size=8)
SPECTRAL = dict(spectral_channels=2, dfca_heads=4)


def _method(channels=5, pool="mean_norm", size=8, **fields):
    return method.Classify(
        run=base.Run(
            total_steps=10,
            steps_per_epoch=5,
            batch_size=4,
            classes=3,
            channels=channels,
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
        ),
        model=hvit.HViT(**SIZE | SPECTRAL | fields),
        augment=views.Augment(size=size),
        head=head.Head(pool=pool, init_std=0.5, norm_eps=1e-5),
    )


@functools.cache
def _fresh(m):
    shape = (1, m.augment.size, m.augment.size, m.run.channels)
    shapes = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
    run = jax.jit(lambda: m.init(jax.random.key(0), shapes), compiler_options=QUICK)
    return run()


def _batch(m):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 8, 8, m.run.channels), np.uint8)
    return {"image": image, "label": np.arange(4, dtype=np.int32) % 3}


def test_a_classifier_on_it_is_the_whole_model_with_the_same_names():
    m = _method()
    params, extra = _fresh(m)
    batch = _batch(m)
    logits = jax.jit(m.logits, compiler_options=QUICK)(params, extra, batch["image"])
    whole = whole_hvit.HViTModel(m.model, 3)
    image = (batch["image"] / 255.0 - 0.5) / 0.5
    want = whole.apply({"params": params}, image)["logits"]
    np.testing.assert_allclose(logits, want, atol=1e-5)
    like = jax.eval_shape(whole.init, jax.random.key(0), image[:1])["params"]
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, params)
    found = jax.jit(m.features, compiler_options=QUICK)(params, extra, batch["image"])
    assert found["tokens"].shape == (4, 1, 16)
    assert set(found) == {"tokens", "pooled", "mean", "gap"}


def test_consistency_adds_what_the_streams_say_apart():
    m = _method(dfca_dropout=0.0)
    m = dataclasses.replace(m, objective=objective.Objective(consistency=0.5))
    params, extra = _fresh(m)
    batch = _batch(m)
    whole = whole_hvit.HViTModel(m.model, 3, consistency=True)
    image = (batch["image"] / 255.0 - 0.5) / 0.5
    like = jax.eval_shape(whole.init, jax.random.key(0), image[:1])["params"]
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, params)
    # Weights large enough that the streams disagree.
    params = jax.tree.map(lambda x: x + 0.1, params)
    out = whole.apply({"params": params}, image)
    p = jax.nn.softmax(out["logits"])
    apart = sum(
        (p * (jnp.log(p) - jax.nn.log_softmax(out[f"logits_{n}"]))).sum(-1).mean()
        for n in ("rgb", "spectral")
    )
    run = jax.jit(m.loss, static_argnames="phase", compiler_options=QUICK)
    value, (_, metrics) = run(params, extra, batch, jax.random.key(0), phase=None)
    hard = -jnp.log(p[jnp.arange(4), batch["label"]]).mean()
    assert apart > 0.01
    np.testing.assert_allclose(metrics["consistency"], apart, rtol=1e-3)
    np.testing.assert_allclose(value, hard + 0.5 * apart, rtol=1e-3)
    plain = dataclasses.replace(m, model=vit.ViT(16, 2, 2, 4, 8))
    assert any("streams of model.name=hvit" in line for line in plain.check())


def test_frozen_layers_of_both_streams_do_not_move_and_the_others_do():
    m = _method(drop_path=0.1, dropout=0.1)
    params, extra = _fresh(m)
    spec = optim.Optim(
        name="adamw",
        lr=0.1,
        schedule="constant",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=0.1,
        clip_norm=0.0,
    )
    freeze = freezeout.FreezeOut(schedule="linear", t_0=0.5, layers=m.freeze_layers())
    optimizer = optim.make(
        spec, params, total_steps=10, steps_per_epoch=5, batch_size=4, freeze=freeze
    )
    at = max(x for x in optimizer.frozen_from.values())  # All but the last layer.
    phase = step.phase_at(m, optimizer, at)
    frozen = {k.removeprefix("backbone/").split("/")[0] for k in phase.frozen}
    assert frozen == {
        *("patch_embed", "patch_norm", "pos_embed", "block_0", "merge_0", "spectral")
    }
    state = step._state(at, params, extra, optimizer, jax.random.key(0), phase)
    one = jax.jit(step.make(m, optimizer), static_argnums=2, compiler_options=QUICK)
    new, _ = one(state, _batch(m), phase)
    before, after = tree.flat(params), tree.flat(new.params)
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    # One token each: of one key the softmax is 1, so nothing trains the queries, but
    # weight decay moves them all the same; zeros stay where no gradient is.
    assert not moved & phase.frozen
    alive = {k.split("/")[1] for k in set(before) - phase.frozen if k.startswith("b")}
    assert alive == {"block_1", "norm", "dfca", "spectral"}
    for name in ("block_1/mlp/fc1", "spectral/block_1/mlp/fc1", "dfca/mlp/fc1"):
        assert f"backbone/{name}/kernel" in moved
    assert "head/norm/scale" in moved and "backbone/spectral/norm/scale" in moved


@pytest.mark.parametrize(
    "own, words",
    [
        (dict(channels=4), "data.channels=4: want model.rgb_channels=3 and"),
        (dict(pool="cls"), "head.pool=cls: there is no class token; use mean, gap"),
        (dict(size=10), "augment.size=10: must be a multiple of model.patch=4"),
    ],
)
def test_what_does_not_fit_is_one_line(own, words):
    (line,) = _method(**own).check()
    assert words in line


@pytest.mark.parametrize("channels", [3, 5])
def test_the_spectral_channels_may_be_missing(channels):
    assert not list(_method(channels=channels).check())


def test_what_is_drawn_are_the_maps_of_the_last_stage():
    m = _method(channels=3, size=24, depths=(1, 2), heads=(1, 2), remat=True)
    params, extra = _fresh(m)
    image = np.random.default_rng(0).integers(0, 256, (2, 20, 12, 3), np.uint8)
    found = m.pictures(params, extra, {}, image)
    assert found["grid"] == (3, 2)
    assert found["attention"].shape == (2, 2, 2, 6, 6)
    np.testing.assert_allclose(found["attention"].sum(-1), 1.0, rtol=1e-5)
    # The second map follows from what enters the last block.
    x = (image / np.float32(255) - 0.5) / 0.5
    net = {"params": params["backbone"]}
    tokens = m.model.apply(net, x)["merged"][0]
    tokens = m.model.apply(
        net, tokens, method=lambda n, t: n.block[1](t, None, None, False)
    )
    block = params["backbone"]["block_2"]
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    qkv = normed @ block["attn"]["qkv"]["kernel"]  # Fresh norms and biases do nothing.
    for head_ in range(2):
        q, k = (qkv[..., 16 * i + 8 * head_ :][..., :8] for i in (0, 1))
        want = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / 8**0.5)
        got = found["attention"][:, 1, head_]
        np.testing.assert_allclose(got, want, atol=1e-5)
