"""Upsampling of tokens that is aware of masks, and the system around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import fields
from vitssl import tree
from vitssl.data import states as tokens
from vitssl.methods.latent_mim import hybrid as hybrid_mim
from vitssl.methods.latent_mim import target as targets
from vitssl.models import patches, upsample

QUICK = {"xla_backend_optimization_level": 0}


def _tokens(seed=0, shape=(2, 3, 3, 2, 2, 4), share=0.5):
    rng = np.random.default_rng(seed)
    z = jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = rng.choice([tokens.ONLINE, tokens.DECODER], shape[:-1], p=[share, 1 - share])
    return z, jnp.asarray(mask)


def _by_loops(z, mask, r):
    """Bilinear between the visible tokens around a place; float64, four taps each."""
    z, seen = np.asarray(z, np.float64), np.asarray(mask) == tokens.ONLINE
    b, h, w, t, s, d = z.shape
    out = np.zeros((b, h * r, w * r, t, s, d))
    for i in range(h * r):
        for j in range(w * r):
            y, x = (i + 0.5) / r - 0.5, (j + 0.5) / r - 0.5
            total, weight = 0.0, 0.0
            for row in range(h):
                for column in range(w):
                    # Beyond the border the nearest row stands for the missing one.
                    near = max(0, 1 - abs(np.clip(y, 0, h - 1) - row))
                    near *= max(0, 1 - abs(np.clip(x, 0, w - 1) - column))
                    there = near * seen[:, row, column][..., None]
                    total = total + there * z[:, row, column]
                    weight = weight + there
            parent = seen[:, i // r, j // r][..., None]
            out[:, i, j] = np.where(parent, total / np.where(weight > 0, weight, 1), 0)
    return out


@pytest.mark.parametrize("r", [2, 4])
def test_upsampling_is_the_mean_of_visible_neighbours(r):
    z, mask = _tokens()
    got = upsample.upsample(z, mask, r)
    np.testing.assert_allclose(got, _by_loops(z, mask, r), atol=2e-6)


def test_constants_stay_and_hidden_values_never_show():
    z, mask = _tokens()
    seen = (mask == tokens.ONLINE)[..., None]
    fine = np.asarray(upsample.upsample_mask(mask, 4) == tokens.ONLINE)
    same = upsample.upsample(jnp.ones_like(z), mask, 4)
    np.testing.assert_allclose(same[..., 0], fine, atol=1e-6)
    wild = jnp.where(seen, z, jnp.nan)
    np.testing.assert_array_equal(
        upsample.upsample(wild, mask, 4), upsample.upsample(z, mask, 4)
    )


def test_the_mean_of_a_whole_grid_is_kept():
    z, _ = _tokens()
    got = upsample.upsample(z, None, 4).mean((1, 2))
    np.testing.assert_allclose(got, z.mean((1, 2)), atol=1e-6)


def test_turning_and_upsampling_commute():
    z, mask = _tokens()

    def turn(x):
        return jnp.rot90(x[:, :, ::-1], axes=(1, 2))

    turned = upsample.upsample(turn(z), turn(mask), 2)
    plain = turn(upsample.upsample(z, mask, 2))
    np.testing.assert_allclose(turned, plain, atol=1e-6)


def test_a_fine_mask_is_constant_within_a_patch():
    _, mask = _tokens()
    fine = np.asarray(upsample.upsample_mask(mask, 4))
    assert fine.dtype == mask.dtype
    blocks = fine.reshape(2, 3, 4, 3, 4, 2, 2)
    assert (blocks == np.asarray(mask)[:, :, None, :, None]).all()


@pytest.mark.parametrize(
    "p, q, match", [(4, 8, "larger"), (8, 3, "divide"), (4, 0, "1")]
)
def test_patches_that_do_not_fit_are_refused(p, q, match):
    with pytest.raises(ValueError, match=match):
        upsample.factor(p, q)


def test_a_field_that_the_patch_does_not_divide_is_refused():
    module = fields.system()
    wrong = fields.batch(pixels=12, p=4)
    wrong = {k: v for k, v in wrong.items() if not k.endswith("_mask")}
    wrong["height"] = wrong["height"][:, :10]
    with pytest.raises(ValueError, match="height: patch=4 does not divide 10x12"):
        module.apply({"params": fields.params(module)}, wrong)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "pixel_shuffle", "skip"])
def test_at_equal_patches_there_is_no_upsampler(mode):
    module = fields.system(p=4, q=4, upsampler=mode)
    data = fields.batch()
    up = upsample.Upsampler(fields.ALL, 4, 4, mode)
    z, mask = {"height": jnp.ones((1, 2, 2, 1, 1, 4))}, {"height": jnp.zeros((1, 2, 2))}
    fine, states = up.apply({}, z, mask, {})
    assert fine["height"] is z["height"] and states["height"] is mask["height"]
    assert "up" not in fields.params(module)
    text = {
        str(jax.make_jaxpr(_answers(_mode(module, d)))(fields.params(module), data))
        for d in ("mixed", "output", "processing")
    }
    assert len(text) == 1


def _mode(module, decoder):
    return dataclasses.replace(module, decoder=decoder)


def _answers(module, **given):
    """The function of (parameters, batch) that returns everything a loss looks at."""

    def run(params, data):
        view = module.apply({"params": params}, data, **given)
        return view.asked, view.pooled

    return run


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def test_slots_change_nothing_but_the_shape():
    module, data = fields.system(fields.ALL[:2]), fields.batch(fields.ALL[:2])
    params = fields.params(module)
    count = {
        m.name: (np.asarray(data[f"{m.name}_mask"])).reshape(2, -1)
        for m in module.modalities
    }
    slots = sum((x == tokens.ONLINE).sum(1) for x in count.values()).max()
    bounds = {k: int((x == tokens.DECODER).sum(1).max()) for k, x in count.items()}
    whole, pooled = quick(_answers(module))(params, data)
    tight = quick(_answers(module, slots=int(slots), bounds=bounds))
    tight, tight_pooled = tight(params, data)
    np.testing.assert_allclose(pooled, tight_pooled, atol=1e-5)
    for name, a in tight.items():
        full = whole[name]
        assert a.valid.sum() == full.valid.sum()
        assert a.valid.shape[1] == 4 * bounds[name] < full.valid.shape[1]
        want = np.take_along_axis(
            np.asarray(full.prediction), np.asarray(a.index)[..., None], 1
        )
        got = np.where(a.valid[..., None], a.prediction - want, 0)
        np.testing.assert_allclose(got, 0, atol=2e-5)


def test_sampled_queries_are_answered_as_among_all():
    module, data = fields.system(fields.ALL[:2]), fields.batch(fields.ALL[:2])
    params = fields.params(module)
    frozen = targets.projection(module.encoder)
    target = params["encoder"]["patch_embed"]

    def run(module):
        def answers(params, target, data, rng):
            view = module.apply({"params": params}, data, rngs={"tokens": rng})
            goal = targets.projected(frozen, target, data, view.asked, 2)
            return view.asked, goal

        return quick(answers)(params, target, data, jax.random.key(3))

    whole, full = run(module)
    some, goal = run(dataclasses.replace(module, loss_tokens=5))
    for name in ("optical", "height"):
        a, at = some[name], np.asarray(some[name].index)[..., None]
        for got, want in (
            (a.prediction, whole[name].prediction),
            (goal[name], full[name]),
        ):
            want = np.take_along_axis(np.asarray(want), at, 1)
            np.testing.assert_allclose(got, want, atol=2e-5)
        member = np.take_along_axis(np.asarray(whole[name].valid), at[..., 0], 1)
        assert (member | ~np.asarray(a.valid)).all()


def test_drawing_is_uniform_and_without_replacement():
    member = jnp.asarray([[True] * 6 + [False] * 4, [True] + [False] * 9])
    keys = jax.random.split(jax.random.key(0), 600)
    index, valid = jax.vmap(lambda k: hybrid_mim.draw(k, member, 3))(keys)
    assert valid[:, 0].all() and (valid[:, 1].sum(-1) == 1).all()
    first = np.sort(np.asarray(index[:, 0]), axis=-1)
    assert (np.diff(first) > 0).all()
    share = np.bincount(first.ravel(), minlength=10) / 600
    np.testing.assert_allclose(share, [0.5] * 6 + [0] * 4, atol=0.07)


def _largest(function, *args):
    """Return the numbers in the largest array that a function makes on the way."""

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for inner in eqn.params.values():
                if hasattr(inner, "jaxpr"):
                    yield from sizes(inner.jaxpr)

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


def test_the_encoder_never_sees_the_fine_grid():
    data = fields.batch()
    # Two times, two bandsets, 8 x 8 places, two samples, a width of 16.
    fine = 2 * 2 * 2 * 8 * 8 * 16
    module = fields.system(p=4, q=1)
    encode = _largest(
        lambda p, b: module.encoder.apply({"params": p}, b, 4),
        fields.params(module)["encoder"],
        data,
    )
    assert encode < fine
    whole = fields.system(p=4, q=1, decoder="output")
    assert _largest(_answers(whole), fields.params(whole), data) >= fine


def test_targets_get_no_gradient_and_everything_else_some():
    module, data = fields.system(), fields.batch()
    params = fields.params(module)
    frozen = targets.projection(module.encoder)

    def loss(params, target):
        view = module.apply({"params": params}, data)
        goal = targets.projected(frozen, target, data, view.asked, 2)
        each = [
            jnp.where(a.valid[..., None], (a.prediction - goal[k]) ** 2, 0).sum()
            for k, a in view.asked.items()
        ]
        return sum(each) + (view.pooled**2).sum()

    both = quick(jax.grad(loss, (0, 1)))
    moved, still = both(params, params["encoder"]["patch_embed"])
    assert not any(np.abs(g).any() for g in jax.tree.leaves(still))
    flat = {k: np.abs(v).max() for k, v in tree.flat(moved).items()}
    # A bias of all keys alike moves no softmax.
    stuck = {k for k, v in flat.items() if v < 1e-6 and not k.endswith("k/bias")}
    assert not stuck


LEARNED = {
    "mixed": (dict(decoder="mixed"), False),
    "keys": (dict(decoder="mixed", sampled_keys=True), True),
    "visible": (dict(decoder="mixed", visible_loss=True), True),
    "output": (dict(decoder="output"), True),
    "pooled": (dict(decoder="mixed", pool_at="output"), True),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_upsampler_trains_exactly_where_check_says_so(name):
    given, trained = LEARNED[name]
    module = fields.system(upsampler="skip", **given)
    keys = dict(given, visible_loss_weight=float(given.get("visible_loss", False)))
    keys.pop("visible_loss", None)
    section = hybrid_mim.Hybrid((4,), 2, "skip", **keys)
    assert bool(list(section.check())) != trained
    data, params = fields.batch(), fields.params(module)
    if not trained:
        assert "up" not in params
        assert "nothing trains it" in next(section.check())
        return

    def loss(up):
        view = module.apply(
            {"params": params | {"up": up}}, data, rngs={"tokens": jax.random.key(0)}
        )
        every = [*view.asked.values(), *view.visible.values()]
        each = [
            jnp.where(a.valid[..., None], a.prediction, 0).astype(jnp.float32) ** 2
            for a in every
        ]
        return sum(x.sum() for x in each) + (view.pooled**2).sum()

    grads = quick(jax.grad(loss))(params["up"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_skip_reads_no_pixel_of_another_token():
    module = fields.system(fields.ALL[:2], upsampler="skip", decoder="output")
    data, params = fields.batch(fields.ALL[:2]), fields.params(module)
    run = quick(lambda p, b: module.apply({"params": p}, b, method="features"))
    seen = run(params, data)
    hidden = np.asarray(data["optical_mask"][..., :1] != tokens.ONLINE)
    hidden = hidden & np.asarray(data["optical_mask"][..., 1:] != tokens.ONLINE)
    pixels = np.repeat(np.repeat(hidden, 4, 1), 4, 2)
    assert hidden.any()
    changed = data | {"optical": data["optical"] + 9.0 * pixels}
    other = run(params, changed)
    for name in ("optical", "height"):
        np.testing.assert_array_equal(
            seen["features_q"][name], other["features_q"][name]
        )
    where = np.asarray(seen["mask_q"]["optical"]) == tokens.ONLINE
    spread = np.asarray(seen["features_q"]["optical"])[..., 0].std(axis=(1, 2))
    assert where.any() and spread.max() > 0


def test_what_has_no_place_is_left_alone():
    data = fields.batch()
    module = fields.system()
    seen = module.apply({"params": fields.params(module)}, data, method="features")
    for name in ("weather", "place"):
        assert seen["features_q"][name] is seen["tokens_p"][name]
        assert seen["mask_q"][name] is seen["mask_p"][name]
    assert seen["features_q"]["height"].shape == (2, 4, 4, 1, 1, 16)


def test_the_predictor_reads_out_every_fine_place():
    data, module = fields.batch(), fields.system()
    apply = functools.partial(module.apply, {"params": fields.params(module)}, data)
    found = apply(method="features", mode="decoder")["features_q"]
    assert found["height"].shape == (2, 4, 4, 1, 1, 16)
    inside = np.asarray(found["height"]).reshape(2, 2, 2, 2, 2, 16)
    assert inside.std(axis=(2, 4)).max() > 1e-3


def test_children_stand_for_their_own_parent():
    shapes = {"optical": (3, 3, 2, 2), "place": (1,)}
    kinds = (fields.OPTICAL, fields.PLACE)
    places = hybrid_mim.draw_children(jax.random.key(0), shapes, kinds, 2, 4)
    assert set(places) == {"optical"}
    at = np.unravel_index(np.asarray(places["optical"]), (12, 12, 2, 2))
    parent = np.unravel_index(np.arange(36), (3, 3, 2, 2))
    for axis in range(2):
        assert (at[axis] // 4 == parent[axis]).all()
        assert set(np.unique(at[axis] % 4)) == {0, 1, 2, 3}
    for axis in (2, 3):
        assert (at[axis] == parent[axis]).all()


def test_keys_that_are_copies_differ_by_their_place_alone():
    """Of "nearest", a sampled key is its coarse token with the encodings of a child."""
    mods = (fields.OPTICAL, fields.PLACE)
    module = fields.system(mods, upsampler="nearest", sampled_keys=True)
    params, data = fields.params(module), fields.batch(mods)

    def keys(module):
        def run(params, data, rng):
            def context(module, fields):
                seen = module.encoder(fields, module.p)
                found = module._context(seen, seen.tokens, fields, 0)
                real = patches.valid(found.count, found.tokens.shape[1])
                return jnp.where(real[..., None], found.tokens, 0)

            rngs = {"tokens": rng}
            return module.apply({"params": params}, data, rngs=rngs, method=context)

        return quick(run)(params, data, jax.random.key(0))

    drawn, plain = keys(module), keys(dataclasses.replace(module, sampled_keys=False))
    difference = np.abs(np.asarray(drawn - plain))
    assert difference[..., 12:].max() > 1e-2  # The quarter that tells places.
    np.testing.assert_allclose(difference[..., :12], 0, atol=1e-5)


def test_too_many_output_tokens_are_refused_in_one_line():
    module = fields.system(decoder="output", max_output_tokens=80)
    with pytest.raises(ValueError, match="decoder=output.* makes 83 tokens at q=2"):
        jax.eval_shape(
            lambda p: module.apply({"params": p}, fields.batch()),
            fields.params(dataclasses.replace(module, max_output_tokens=99)),
        )


def test_bfloat16_is_of_the_networks_alone():
    given = dict(upsampler="skip", sampled_keys=True, visible_loss=True, loss_tokens=5)
    module = fields.system(encoder=dict(dtype="bfloat16", registers=1), **given)
    module = module.clone(predictor=module.predictor.clone(dtype="bfloat16"))
    frozen = targets.projection(module.encoder)

    def run(params, data):
        rngs = {"tokens": jax.random.key(0)}
        view = module.apply({"params": params}, data, slots=10, rngs=rngs)
        target = params["encoder"]["patch_embed"]
        return view, targets.projected(frozen, target, data, view.asked, 2)

    view, goal = jax.eval_shape(run, fields.params(module), fields.batch())
    assert {x.prediction.dtype for x in view.asked.values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(goal)} == {jnp.dtype("float32")}
    assert view.pooled.dtype == jnp.float32
