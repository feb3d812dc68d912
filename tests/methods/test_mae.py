"""MAE and SimMIM against their papers in numpy: one whole step of each, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import plain
from vitssl import tree
from vitssl.data import views
from vitssl.methods import base
from vitssl.methods.mae import method
from vitssl.models import decoder, vit
from vitssl.ops import random_masking
from vitssl.optim import optimizer as optim
from vitssl.run import step

NET = dict(width=8, depth=2, heads=2, patch=4, image_size=16, positions="sincos")
QUICK = {"xla_backend_optimization_level": 0}
SIMMIM = dict(hidden="token", loss="l1", normalise=False)


def _method(objective=(), masking=(), size=16, **own):
    return method.MAE(
        run=base.Run(
            total_steps=20,
            steps_per_epoch=5,
            batch_size=3,
            classes=0,
            channels=3,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        ),
        model=vit.ViT(**NET | own),
        augment=views.SingleCrop(size=size),
        decoder=decoder.Decoder(width=8, depth=1, heads=2),
        objective=method.Objective(**dict(objective)),
        masking=random_masking.Masking(**dict(masking)),
    )


@functools.cache
def _fresh(of):
    """Parameters drawn by numpy: large enough that every part of them tells."""
    shapes = {"global": jax.ShapeDtypeStruct((3, 1, 16, 16, 3), jnp.uint8)}
    params, _ = jax.eval_shape(of.init, jax.random.key(0), shapes)
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, params)


def _batch():
    rng = np.random.default_rng(1)
    return {"global": rng.integers(0, 256, (3, 1, 16, 16, 3), np.uint8)}


def _numpy_loss(p, image, masks, of):
    """Return the loss of either method, from its paper."""
    net, order = dict(patch=4, heads=2), np.asarray(masks.order)
    seen, hidden = order[:, : masks.visible], order[:, masks.visible :]
    target = plain.cells(image, 4)
    if of.objective.normalise:
        spread = np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
        target = (target - target.mean(-1, keepdims=True)) / spread
    if of.objective.hidden == "token":
        away = np.zeros(order.shape, bool)
        np.put_along_axis(away, hidden, True, 1)
        own = dict(hidden=away, token=p["mask_token"])
        _, x = plain.vit(p, "encoder", image, **net, **own)
        found = plain.linear(p, "decoder", x)
    else:
        cls, x = plain.vit(p, "encoder", image, **net, keep=seen)
        cls, x = (plain.linear(p, "decoder/embed", y) for y in (cls, x))
        full = np.tile(p["decoder/mask_token"], (len(image), order.shape[1], 1))
        np.put_along_axis(full, seen[..., None], x, 1)
        x = np.concatenate([cls[:, None], full + plain.sincos(4, 8)], 1)
        x = plain.norm(p, "decoder/norm", plain.block(p, "decoder/block_0", x, 2))
        found = plain.linear(p, "decoder/pred", x[:, 1:])
    error = np.take_along_axis(found - target, hidden[..., None], 1)
    return np.mean(error**2 if of.objective.loss == "mse" else abs(error))


CASES = {
    "mae": ({}, {}),
    "mae, raw pixels": (dict(normalise=False), dict(ratio=0.5)),
    "simmim": (SIMMIM, dict(ratio=0.6, block=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_whole_step_is_the_papers(case):
    """Loss, gradient and update against numpy; gradients in random directions."""
    of = _method(*CASES[case])
    params, batch, key = _fresh(of), _batch(), jax.random.key(3)
    spec = dict(name="adamw", lr=1e-2, schedule="constant", warmup_epochs=0.0)
    spec |= dict(min_lr=0.0, wd=0.1, clip_norm=0.0)
    spans = dict(total_steps=20, steps_per_epoch=5, batch_size=3)
    optimizer = optim.make(optim.Optim(**spec), params, **spans)
    phase = step.phase_at(of, optimizer, 0)
    state = step._state(0, params, {}, optimizer, key, phase)
    run = jax.jit(step.make(of, optimizer), static_argnums=2, compiler_options=QUICK)
    new, metrics = run(state, batch, phase)

    draw, _ = jax.random.split(jax.random.fold_in(key, 0))
    masks = of.masking.draw(draw, 3, (4, 4), phase.method)
    image = (batch["global"][:, 0] / 255 - 0.5) / 0.25
    p = plain.leaves(params)
    loss = functools.partial(_numpy_loss, image=image, masks=masks, of=of)
    np.testing.assert_allclose(metrics["loss"], loss(p), rtol=1e-5)
    grads = {k: np.asarray(v, float) / 0.1 for k, v in new.opt.mu.items()}
    rng = np.random.default_rng(2)
    for only in (".", "encoder/block_0", "decoder", "mask_token", "cls"):
        towards = {
            k: rng.normal(size=v.shape) * (only == "." or only in k)
            for k, v in p.items()
        }
        want = plain.slope(loss, p, towards)
        got = sum((grads[k] * towards[k]).sum() for k in p)
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4)
    for k, leaf in tree.flat(new.params).items():
        want = p[k] - 0.01 * (grads[k] / (abs(grads[k]) + 1e-8) + 0.1 * p[k])
        np.testing.assert_allclose(leaf, want, atol=1e-5)


def test_squares_are_hidden_as_a_whole_and_as_many_as_simmim_hides():
    masking = random_masking.Masking(ratio=0.6, block=2)
    visible = masking.visible(196, 0.0)
    assert 196 - visible == 4 * np.ceil(0.6 * 49)
    masks = masking.draw(jax.random.key(0), 50, (14, 14), visible)
    mask = np.asarray(masks.mask).reshape(50, 7, 2, 7, 2)
    assert (mask.sum((1, 2, 3, 4)) == 196 - visible).all()
    assert (mask == mask[:, :, :1, :, :1]).all()
    assert 0 < mask.mean(0).min() and mask.mean(0).max() < 1  # Not always the same.


def test_a_fresh_network_has_mae_s_initial_values():
    of = _method(width=32)
    params, _ = of.init(jax.random.key(0), _batch())
    found = {k: np.asarray(v) for k, v in tree.flat(params).items()}
    for name, leaf in found.items():
        if name.endswith("kernel"):
            kernel = leaf.reshape(-1, leaf.shape[-1])
            bound = np.sqrt(6 / sum(kernel.shape))
            assert 0.9 * bound < abs(kernel).max() <= bound, name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not leaf.any(), name
        elif name.endswith(("cls", "mask_token")):
            assert 0.01 < leaf.std() < 0.03, name


def test_what_is_drawn_has_the_image_s_colours_where_the_target_stands():
    of = _method()
    crops, hidden, stages = of.pictures(_fresh(of), {}, _batch(), None)[
        "reconstruction"
    ]
    predicted, target = stages["pixels"]["pixels"]
    np.testing.assert_allclose(target, crops / 255, atol=1e-4)
    assert predicted.shape == target.shape and hidden.sum() == 3 * 12


def test_impossible_settings_are_one_line_each():
    (line,) = _method(size=18).check()
    assert line.startswith("augment.size=18: must be a multiple of model.patch=4")
    (line,) = _method(registers=2).check()
    assert "model.registers=0 (or objective.hidden=token)" in line
    assert not list(_method(SIMMIM, registers=2).check())
    (line,) = _method(masking=dict(block=3)).check()
    assert line == "masking.block=3: must divide the grid of 4 x 4 patches"
    (line,) = _method(masking=dict(ratio=0.99)).check()
    assert line == "masking.ratio: leaves none or all of the 16 patches visible"
