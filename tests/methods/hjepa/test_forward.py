"""The multi-crop step: what every strategy computes, and what must not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.hjepa import tiny
from vitssl import tree
from vitssl.methods.hjepa import levels, masks, predictor, slots
from vitssl.models import patches

# Every strategy with its own masks and with the original's use of them.
EVERY = [
    (dict(strategy=s, levels=k, mode=m), p)
    for s in masks.STRATEGIES
    for k, m, p in (("per_level", "drop", "spatial"), ("finest", "zero", "sequence"))
]


def _run(m, batch, seed=0):
    params, extra = tiny.init(m, seed)
    return tiny.grad(m, params, extra, batch, tiny.KEY)


def _jit(function):
    return jax.jit(function, compiler_options=tiny.QUICK)


def _close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        a,
        b,
    )


@pytest.mark.parametrize("masking, pooling", EVERY)
def test_every_trained_leaf_learns_and_the_target_does_not(masking, pooling):
    m = tiny.method(masking=masking, levels=dict(pooling=pooling))
    batch = tiny.batch(m)
    params, extra = tiny.init(m)
    value = jax.grad(lambda p, e, b: m.loss(p, e, b, tiny.KEY)[0], (0, 1))
    grads, of_extra = _jit(value)(params, extra, batch)
    still = [k for k, g in tree.flat(grads).items() if not np.any(g)]
    assert not still
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not any(np.any(g) for g in jax.tree.leaves(of_extra))


def test_a_plain_step_is_the_modules_one_after_the_other():
    """G = 1, L = 0, image by image, without packing, padding or stacking."""
    m = tiny.method(
        multicrop=dict(num_global_crops=1, num_local_crops=0),
        masking=dict(strategy="global_only", levels="finest"),
    )
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    encoder, net = m.model, m.predictor_module
    weights = {k: {"params": v} for k, v in params.items()}
    total, number = np.zeros(2), np.zeros(2)
    for i in range(3):
        image = patches.normalise(batch["global"][i], m.run.mean, m.run.std)
        seen = np.flatnonzero(batch["global_context"][i, 0, 0])[None]
        asked = np.flatnonzero(batch["global_targets"][i, 0, 0])
        tokens, _ = encoder.apply(weights["encoder"], image, keep=jnp.asarray(seen))
        position = encoder.apply(weights["encoder"], (6, 6), method="position_table")
        guess = net.apply(weights["predictor"], tokens[:, 1:], position[asked][None])
        truth, _ = encoder.apply({"params": extra["target"]}, image)
        truth = truth[:, 1:][:, asked]
        members = levels.Members(
            jnp.asarray(asked)[None], jnp.array([len(asked)]), (6, 6)
        )
        p, t = (
            m.levels_module.apply(weights["levels"], x, members) for x in (guess, truth)
        )
        for k in range(2):
            valid = p[k][1]
            error = np.square(p[k][0] - t[k][0])[valid]
            total[k] += error.mean(-1).sum()
            number[k] += len(error)
    loss, (_, metrics) = tiny.loss(m, params, extra, batch, tiny.KEY)
    np.testing.assert_allclose(loss, total / number @ (1.0, 0.5), rtol=1e-5)
    for k in range(2):
        np.testing.assert_allclose(
            metrics[f"loss_h{k}"], (total / number)[k], rtol=1e-5
        )


@pytest.mark.parametrize("mode", ["drop", "zero"])
def test_every_image_of_a_batch_is_predicted_as_if_alone(mode):
    m = tiny.method(masking=dict(mode=mode))
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    together = tiny.terms(m, params, extra, batch)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        alone = tiny.terms(m, params, extra, one)
        for ours, theirs in ((together.near, alone.near), (together.far, alone.far)):
            for k, level in ours.levels.items():
                own = jax.tree.map(lambda x, i=i: x[i : i + 1], level)
                valid = own.valid
                np.testing.assert_array_equal(valid, theirs.levels[k].valid)
                for name in ("prediction", "target"):
                    a, b = getattr(own, name), getattr(theirs.levels[k], name)
                    np.testing.assert_allclose(a[valid], b[valid], atol=1e-5)


def test_padding_has_no_influence_to_the_last_bit(monkeypatch):
    m = tiny.method()
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    pack = patches.pack

    def other_padding(mask, slots):
        """Fill the padding with the last non-members instead of the first."""
        keep, count = pack(mask, slots)
        turned, _ = pack(mask[..., ::-1], slots)
        padding = ~patches.valid(count, slots)
        return jnp.where(padding, mask.shape[-1] - 1 - turned, keep), count

    def loss(params, extra, batch):
        return m.loss(params, extra, batch, tiny.KEY)[0]

    before = _jit(loss)(params, extra, batch)
    monkeypatch.setattr(patches, "pack", other_padding)
    after = _jit(lambda *a: loss(*a))(params, extra, batch)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "strategy, levels",
    [("global_only", "finest"), ("cross_crop_prediction", "per_level")],
)
def test_packing_changes_nothing(strategy, levels):
    masking = dict(strategy=strategy, levels=levels)
    packed = tiny.method(masking=masking)
    padded = tiny.method(masking=masking | dict(packed=False))
    batch = tiny.batch(packed)
    (a, (_, of_a)), grad_a = _run(packed, batch)
    (b, _), grad_b = _run(padded, batch)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    _close(grad_a, grad_b, 2e-5)
    assert of_a["dropped_context"] == of_a["dropped_targets"] == 0.0


def test_few_slots_drop_context_and_say_so_but_no_target():
    m = tiny.method(masking=dict(slots=0.2))
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    loss, (_, metrics) = tiny.loss(m, params, extra, batch, tiny.KEY)
    assert np.isfinite(loss)
    assert 0.02 < metrics["dropped_context"] < 0.6
    assert metrics["dropped_targets"] == 0.0
    found = tiny.terms(m, params, extra, batch).near.levels[0].valid.sum()
    assert found == batch["global_targets"][:, :, 0].sum()
    # The same again: what is dropped does not depend on chance.
    assert loss == tiny.loss(m, params, extra, batch, tiny.KEY)[0]


def test_the_order_of_a_batch_does_not_matter():
    m = tiny.method()
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    turned = {k: v[[2, 0, 1]] for k, v in batch.items()}
    a = tiny.loss(m, params, extra, batch, tiny.KEY)[0]
    b = tiny.loss(m, params, extra, turned, tiny.KEY)[0]
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_global_crops_are_interchangeable():
    m = tiny.method()
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    turned = {k: v[:, ::-1] if "global" in k else v for k, v in batch.items()}
    a = tiny.loss(m, params, extra, batch, tiny.KEY)[0]
    b = tiny.loss(m, params, extra, turned, tiny.KEY)[0]
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_one_local_crop_is_context_in_both_strategies_that_use_it():
    changed = dict(multicrop=dict(num_local_crops=1))
    a, b = (
        tiny.method(masking=dict(strategy=s), **changed) for s in masks.STRATEGIES[1:]
    )
    batch, (params, extra) = tiny.batch(a), tiny.init(a)
    x, y = (tiny.loss(m, params, extra, batch, tiny.KEY)[0] for m in (a, b))
    np.testing.assert_allclose(x, y, rtol=1e-6)


def test_without_local_crops_all_strategies_are_one():
    changed = dict(multicrop=dict(num_local_crops=0))
    every = [tiny.method(masking=dict(strategy=s), **changed) for s in masks.STRATEGIES]
    batch, (params, extra) = tiny.batch(every[0]), tiny.init(every[0])
    losses = [tiny.loss(m, params, extra, batch, tiny.KEY)[0] for m in every]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_who_hears_whom():
    """Gradient of each kind of loss with respect to the pixels of each kind of crop."""
    m = tiny.method()
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    pixels = {k: jnp.float32(batch[k]) / 255 for k in ("global", "local")}
    fixed = {k: v for k, v in batch.items() if k not in pixels}

    def losses(pixels):
        out = m.terms(m.networks(params, extra, train=False), fixed | pixels)
        return out.near.losses.sum(1), out.far.losses.sum(1)

    near, far = _jit(jax.jacrev(losses))(pixels)

    def heard(jacobian, kind):  # [C, B, c, H, W, 3] -> [C, c]
        x = np.abs(jacobian[kind]).sum((1, 3, 4, 5)) > 0
        return x.tolist()

    # A global crop hears itself, and all local crops, but not the other global one.
    assert heard(near, "global") == [[True, False], [False, True]]
    assert heard(near, "local") == [[True] * 4] * 2
    # A masked local crop hears all global ones, itself and the unmasked local ones.
    assert heard(far, "global") == [[True, True]] * 2
    assert heard(far, "local") == [[True, False, True, True], [False, True, True, True]]


def test_hidden_patches_reach_no_prediction_when_they_are_dropped():
    m = tiny.method(masking=dict(strategy="global_only", levels="finest"))
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    seen = batch["global_context"][:, :, 0].reshape(3, 2, 6, 6)
    hidden = ~np.kron(seen, np.ones((4, 4), bool))[..., None]
    changed = batch | {
        "global": np.where(hidden, 255 - batch["global"], batch["global"])
    }
    a, b = (
        tiny.terms(m, params, extra, x).near.levels[0].prediction
        for x in (batch, changed)
    )
    valid = tiny.terms(m, params, extra, batch).near.levels[0].valid
    np.testing.assert_array_equal(a[valid], b[valid])


def test_local_weight_and_view_weight_are_factors():
    plain = tiny.method()
    batch, (params, extra) = tiny.batch(plain), tiny.init(plain)
    terms = tiny.terms(plain, params, extra, batch)
    w = np.array([1.0, 0.5])
    near, far = ((r.losses @ w).mean() for r in (terms.near, terms.far))
    for weight in (1.0, 0.3):
        m = tiny.method(objective=dict(local_weight=weight))
        loss = tiny.loss(m, params, extra, batch, tiny.KEY)[0]
        np.testing.assert_allclose(loss, near + weight * far, rtol=1e-5)
    m = tiny.method(
        masking=dict(strategy="global_only"), objective=dict(view_weight=0.7)
    )
    params, extra = tiny.init(m)
    terms = tiny.terms(m, params, extra, batch)
    loss, (_, metrics) = tiny.loss(m, params, extra, batch, tiny.KEY)
    near = (terms.near.losses @ w).mean()
    np.testing.assert_allclose(loss, near + 0.7 * terms.view, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_view"], terms.view, rtol=1e-6)


def test_the_view_loss_compares_pooled_features_of_every_pair():
    m = tiny.method(masking=dict(strategy="global_only"))
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    net = m.networks(params, extra, train=False)
    each = []
    for i in range(3):
        for g in range(2):
            image = patches.normalise(batch["global"][i, g][None], *_scale(m))
            truth = net.project(
                net.encode_target(image).mean(1), target=True, method="coarse"
            )
            for c in range(4):
                image = patches.normalise(batch["local"][i, c][None], *_scale(m))
                guess = net.project(
                    net.predict(net.encode(image)[1])[:, 0], method="coarse"
                )
                each.append(np.square(guess - truth).mean())
    got = tiny.terms(m, params, extra, batch).view
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)


def _scale(m):
    return m.run.mean, m.run.std


@pytest.mark.parametrize("pooling", ["spatial", "sequence"])
def test_gradients_are_finite_where_a_level_has_no_target(pooling):
    m = tiny.method(levels=dict(pooling=pooling), objective=dict(normalize=True))
    batch = tiny.batch(m)
    for key in ("global_targets", "local_targets"):
        batch[key] = batch[key].copy()
        batch[key][:, :, 1] = False  # Level 1, everywhere.
        batch[key][0] = False  # And the first image altogether.
    (loss, (_, metrics)), grads = _run(m, batch)
    assert np.isfinite(loss) and metrics["loss_h1"] == 0.0 < metrics["loss_h0"]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_crop_by_crop_gives_the_same_loss_and_gradient():
    plain = tiny.method()
    m = tiny.method(masking=dict(accumulate_crops=True))
    batch = tiny.batch(m)
    (a, (_, of_a)), grad_a = _run(plain, batch)
    (b, (_, of_b)), grad_b = _run(m, batch)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    _close(grad_a, grad_b, 1e-5)
    for name in of_a:
        np.testing.assert_allclose(of_a[name], of_b[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accumulate_crops", [False, True])
def test_paths_drop_in_the_context_but_never_in_the_target(accumulate_crops):
    m = tiny.method(
        model=dict(drop_path=0.5, depth=2),
        predictor=dict(drop_path=0.5, depth=2),
        masking=dict(accumulate_crops=accumulate_crops),
    )
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    keys = jax.random.split(tiny.KEY, 3)
    values = {float(tiny.loss(m, params, extra, batch, k)[0]) for k in keys}
    assert len(values) == 3
    again = tiny.loss(m, params, extra, batch, keys[0])[0]
    assert float(again) in values
    targets = {
        float(tiny.loss(m, params, extra, batch, k)[1][1]["target_std"]) for k in keys
    }
    assert len(targets) == 1


def test_half_precision_stays_close_and_finite():
    full = tiny.method()
    half = tiny.method(dtype="bfloat16")
    batch, (params, extra) = tiny.batch(full), tiny.init(full)
    a, _ = tiny.loss(full, params, extra, batch, tiny.KEY)
    (b, _), grads = _run(half, batch)
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=0.05)
    for g in jax.tree.leaves(grads):
        assert g.dtype == jnp.float32 and np.isfinite(g).all()


def test_batch_norm_moves_its_averages_and_uses_the_batch():
    m = tiny.method(levels=dict(norm="batchnorm"))
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    assert m.couples_batch and not tiny.method().couples_batch
    _, (after, _) = tiny.loss(m, params, extra, batch, tiny.KEY)
    stats = tree.flat(after["stats"])
    assert set(stats) == {
        f"proj_{k}/norm/{x}" for k in range(2) for x in ("mean", "var")
    }
    for name, value in stats.items():
        assert np.any(value != tree.flat(extra["stats"])[name])
    jax.tree.map(np.testing.assert_array_equal, after["target"], extra["target"])


def test_without_a_target_encoder_gradients_flow_through_the_targets():
    changed = dict(
        masking=dict(strategy="global_only"), objective=dict(type="hjepa_sigreg")
    )
    m = tiny.method(ema=dict(target_encoder=False), **changed)
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    assert set(extra) == set() and m.after(params, extra, jnp.int32(0)) == extra
    (a, _), grad_a = tiny.grad(m, params, extra, batch, tiny.KEY)
    copied = tiny.method(**changed)
    extra = {"target": params["encoder"], "momentum": jnp.float32(0.9)}
    (b, _), grad_b = tiny.grad(copied, params, extra, batch, tiny.KEY)
    np.testing.assert_allclose(a, b, rtol=1e-6)  # The same value, other gradients.
    assert not np.allclose(
        grad_a["encoder"]["pos_embed"], grad_b["encoder"]["pos_embed"], rtol=1e-3
    )


def test_colours_may_be_changed_on_the_device():
    plain = dict(masking=dict(strategy="global_only", levels="finest"))
    m = tiny.method(multicrop=dict(colour="device", num_local_crops=0), **plain)
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    a, b = (tiny.loss(m, params, extra, batch, jax.random.key(k))[0] for k in (0, 1))
    assert np.isfinite(a) and a != b
    off = dict(global_color_jitter=0.0, num_local_crops=0)
    x, y = (
        tiny.loss(
            tiny.method(multicrop=off | c, **plain), params, extra, batch, tiny.KEY
        )
        for c in (dict(colour="device"), dict(colour="host"))
    )
    np.testing.assert_allclose(x[0], y[0], rtol=1e-6)


def test_the_complement_of_the_targets_may_be_the_context():
    given = dict(strategy="global_only", levels="finest", packed=False)
    m = tiny.method(masking=given | dict(context="complement"))
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    everything = batch | {
        k: np.ones_like(v) for k, v in batch.items() if k.endswith("_context")
    }
    plain = tiny.method(masking=given)
    a = tiny.loss(m, params, extra, batch, tiny.KEY)[0]
    b = tiny.loss(plain, params, extra, everything, tiny.KEY)[0]
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_extra_context_carries_the_role_of_its_crop():
    m = tiny.method()
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    before = tiny.terms(m, params, extra, batch)
    for role, near, far in (
        (predictor.GLOBAL, False, True),
        (predictor.LOCAL, True, True),
    ):
        changed = dict(params)
        # Not a constant: the predictor's first LayerNorm would take it out again.
        other = jnp.arange(16.0)
        roles = params["predictor"]["roles"].at[role].add(other)
        changed["predictor"] = params["predictor"] | {"roles": roles}
        after = tiny.terms(m, changed, extra, batch)
        assert np.allclose(before.near.losses, after.near.losses) != near
        assert np.allclose(before.far.losses, after.far.losses) != far


def test_slots_hold_everything_the_sampler_draws_when_asked_to():
    for changed in (
        dict(),
        dict(base_scale=(0.15, 0.2)),
        dict(sampler="multiblock"),
        dict(sampler="ijepa"),
        dict(context="complement"),
        dict(levels="finest"),
        dict(mode="zero"),
    ):
        m = tiny.method(masking=changed).masking
        for grid in ((14, 14), (6, 6), (4, 4)):
            room = slots.slots(m, grid)
            rng = np.random.default_rng(5)
            seen, asked = masks.hierarchical(rng, m, grid, 300)
            asked = asked.any(2)[:, : m.passes]
            seen = seen[:, : m.passes] if m.context == "block" else ~asked
            seen, asked = seen.sum(-1), asked.sum(-1)
            if m.mode == "zero":
                seen = np.full_like(seen, grid[0] * grid[1])
            assert seen.max() <= room.visible <= grid[0] * grid[1]
            assert asked.max() <= room.targets <= grid[0] * grid[1]
            assert (seen + asked).max() <= room.sequence
            tight = slots.slots(dataclasses.replace(m, slots=0.7), grid)
            assert all(a <= b for a, b in zip(tight, room, strict=True))
            assert (asked <= tight.targets).mean() > 0.995
