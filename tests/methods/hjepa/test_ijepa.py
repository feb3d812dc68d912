"""I-JEPA, which is H-JEPA of one crop and one level, against its paper in numpy.

arXiv:2301.08243, section 3 and appendix A, and facebookresearch/ijepa src/train.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import plain
from tests.methods.hjepa import tiny
from vitssl import tree
from vitssl.methods.hjepa import slots
from vitssl.optim import optimizer as optim
from vitssl.run import experiment, step

MASKING = dict(
    strategy="global_only",
    sampler="ijepa",
    num_hierarchies=1,
    base_scale=(0.15, 0.2),
    context_scale=(0.85, 1.0),
    levels="finest",
    together=False,
)


def _method(**masking):
    return tiny.method(
        model=dict(positions="sincos", cls=False),
        predictor=dict(width=8, positions="sincos"),
        levels=dict(norm="targets"),
        multicrop=dict(num_global_crops=1, num_local_crops=0),
        objective=dict(type="smoothl1", weights=(1.0,), view_weight=0.0),
        ema=dict(start=0.996, end=1.0),
        masking=MASKING | masking,
    )


@functools.cache
def _fresh(of):
    """Return (params, extra) drawn by numpy; the target is another network."""
    shapes = jax.eval_shape(of.init, jax.random.key(0), tiny.batch(of))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes
    )


def _numpy_loss(p, fixed, of, batch):
    """Return the mean smooth-L1 distance over the patches of all blocks.

    A block is predicted from the context and mask tokens at its own places alone;
    targets are features of the whole image, normalised without parameters.
    """
    mean, std = np.array(of.run.mean), np.array(of.run.std)
    image = (batch["global"][:, 0] / 255 - mean) / std
    own = dict(patch=4, heads=2)
    truth = plain.standard(plain.vit(fixed, "target", image, **own)[1], 1e-5)
    table, total, count = plain.sincos(6, 8), 0.0, 0
    for i, blocks in enumerate(batch["global_targets"][:, 0]):  # [T or 1, N]
        visible = batch["global_context"][i, 0, 0] & ~blocks.any(0)
        seen = np.flatnonzero(visible)
        _, x = plain.vit(p, "encoder", image[i : i + 1], keep=seen[None], **own)
        x = plain.linear(p, "predictor/embed", x) + table[seen]
        for block in blocks:
            asked = np.flatnonzero(block)
            query = p["predictor/mask_token"] + table[asked]
            y = np.concatenate([query, x], 1)
            y = plain.blocks(p, "predictor", y, 2, 1e-5)[:, : len(asked)]
            y = plain.norm(p, "predictor/norm", y, 1e-5)
            far = np.abs(plain.linear(p, "predictor/head", y)[0] - truth[i, asked])
            total += np.where(far < 1, far**2 / 2, far - 0.5).mean(-1).sum()
            count += len(asked)
    return total / count


@pytest.mark.parametrize("together", [False, True])
def test_a_whole_step_is_the_paper_s(together):
    """Loss and gradient in numpy, then AdamW with growing decay, and the target."""
    of = _method(together=together)
    assert not list(of.check()) and not list(of.masking.check())
    (params, extra), batch, key = _fresh(of), tiny.batch(of), jax.random.key(3)
    assert set(params) == {"encoder", "predictor"}
    assert not {"cls", "pos_embed"} & set(params["encoder"])
    assert batch["global_targets"].shape == (3, 1, 1 if together else 4, 36)
    spec = dict(name="adamw", lr=1e-2, schedule="constant", warmup_epochs=0.0)
    spec |= dict(min_lr=0.0, wd=0.04, wd_end=0.4, wd_schedule="cosine", clip_norm=0.0)
    optimizer = optim.make(
        optim.Optim(**spec), params, total_steps=10, steps_per_epoch=2, batch_size=3
    )
    phase = step.phase_at(of, optimizer, 0)
    state = step._state(0, params, extra, optimizer, key, phase)
    state = state.replace(step=jnp.int32(5))
    run = step.make(of, optimizer)
    run = jax.jit(run, static_argnums=2, compiler_options=tiny.QUICK)
    new, metrics = run(state, batch, phase)

    p, fixed = plain.leaves(params), plain.leaves(extra)
    loss = functools.partial(_numpy_loss, fixed=fixed, of=of, batch=batch)
    np.testing.assert_allclose(metrics["loss"], loss(p), rtol=1e-4)
    grads = {k: np.asarray(v, float) / 0.1 for k, v in new.opt.mu.items()}
    rng = np.random.default_rng(2)
    for only in ("", "encoder", "predictor", "mask_token"):
        towards = {k: rng.normal(size=v.shape) * (only in k) for k, v in p.items()}
        got = sum((grads[k] * towards[k]).sum() for k in p)
        slope = plain.slope(loss, p, towards)
        np.testing.assert_allclose(got, slope, rtol=3e-3, atol=1e-4)
    wd = 0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * 5 / 10)) / 2
    m, target = 0.996 + 0.004 * 5 / 10, plain.leaves(new.extra["target"])
    for k, leaf in plain.leaves(new.params).items():
        moved = grads[k] / (abs(grads[k]) + 1e-8)
        np.testing.assert_allclose(leaf, p[k] - 0.01 * (moved + wd * p[k]), atol=1e-5)
        if k.startswith("encoder/"):
            name = k.removeprefix("encoder/")
            want = m * fixed[f"target/{name}"] + (1 - m) * leaf
            np.testing.assert_allclose(target[name], want, atol=1e-6)


def test_blocks_do_not_hear_each_other_unless_they_are_asked_together():
    """A prediction at a place of one block, when another block is taken away."""
    of = _method()
    (params, extra), batch = _fresh(of), tiny.batch(of)
    fewer = batch | {"global_targets": batch["global_targets"].copy()}
    gone = fewer["global_targets"][:, :, 3].copy()
    fewer["global_targets"][:, :, 3] = False
    # What that block hid stays hidden.
    hidden = fewer["global_context"] & ~gone[:, :, None]
    fewer["global_context"] = hidden
    a, b = (tiny.terms(of, params, extra, x).near.levels[0] for x in (batch, fewer))
    n = a.prediction.shape[2] // 4
    np.testing.assert_array_equal(a.prediction[:, :, :n], b.prediction[:, :, :n])
    assert a.valid[:, :, 3 * n :].any() and not b.valid[:, :, 3 * n :].any()


def test_there_is_room_for_the_largest_block_and_no_more():
    each, union = (
        slots.slots(_method(together=t, slots=0.7).masking, (14, 14))
        for t in (False, True)
    )
    # A fifth of 196 patches are 39; sides are rounded.
    assert 40 <= each.targets <= 48 < union.targets
    assert each.visible == union.visible and each.sequence < union.sequence


@pytest.mark.parametrize(
    "values, key",
    [
        (dict(num_hierarchies=2), "num_hierarchies=2"),
        (dict(strategy="cross_crop_prediction"), "strategy=cross_crop_prediction"),
    ],
)
def test_blocks_by_themselves_are_of_one_level_and_no_other_crop(values, key):
    (line,) = _method(**values).masking.check()
    assert line.startswith(f"{key}: together=False needs")


def test_the_recipe_has_no_levels_and_computed_positions():
    c = experiment.load("configs/hjepa.py:ijepa_vith14", ["data.source=fake"])
    read = experiment.read(c)
    m = read.method(read.run())
    shape = jax.ShapeDtypeStruct((1, 1, 224, 224, 3), np.uint8)
    params, extra = jax.eval_shape(m.init, jax.random.key(0), {"global": shape})
    assert set(params) == {"encoder", "predictor"} and "target_levels" not in extra
    # ViT-H/14 without its table of 256 positions, as I-JEPA's file has it.
    assert tree.size(params["encoder"]) == 630_434_560
    assert params["predictor"]["mask_token"].shape == (1, 1, 384)
    assert (m.levels.norm, m.predictor.positions) == ("targets", "sincos")
    assert not m.masking.together and m.objective.type == "smoothl1"
