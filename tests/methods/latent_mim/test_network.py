"""Patch embeddings of any size, encodings, encoder and predictor of fields."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import fields
from vitssl import tree
from vitssl.data import modalities, states
from vitssl.methods.latent_mim import embed, encodings
from vitssl.ops import resize
from vitssl.run import devices

QUICK = {"xla_backend_optimization_level": 0}


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def _embed(resizing, patch, base=8, side=16):
    module = embed.FlexiPatchEmbed(4, base, 2, resizing)
    rng = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(base, base, 2, 4)), jnp.float32),
        "bias": jnp.zeros(4),
    }
    image = jnp.asarray(rng.normal(size=(1, side, side, 2)), jnp.float32)
    return functools.partial(module.apply, {"params": params}, patch=patch), image


@pytest.mark.parametrize(
    "resizing, patch, touched",
    [
        ("input", 1, 25),
        ("input", 2, 9),
        ("input", 4, 4),
        ("input", 8, 1),
        ("weights", 1, 1),
        ("weights", 2, 1),
        ("weights", 4, 1),
        ("weights", 8, 1),
    ],
)
def test_how_many_tokens_a_pixel_reaches(resizing, patch, touched):
    embed, image = _embed(resizing, patch)
    moved = embed(image.at[0, 7, 7].add(1.0)) - embed(image)
    assert (np.abs(moved).max(-1) > 1e-5).sum() == touched


def test_a_resized_kernel_answers_alike_on_the_resized_patch():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(4, 4, 2, 3)), jnp.float32)
    patch = jnp.asarray(rng.normal(size=(4, 4, 2)), jnp.float32)
    want = jnp.einsum("pqc,pqcd->d", patch, kernel)
    large = resize.image(patch[None], 8, 8)[0]
    got = jnp.einsum("pqc,pqcd->d", large, resize.kernel(kernel, 8))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert resize.kernel(kernel, 4) is kernel


def test_the_matrix_of_resizing_is_what_jax_does():
    x = np.random.default_rng(0).normal(size=(12, 12, 1)).astype(np.float32)
    for new in (5, 12, 32):
        m = resize.matrix(12, new)
        want = np.einsum("ah,bw,hwc->abc", m, m, x)
        np.testing.assert_allclose(resize.image(x, new, new), want, atol=1e-5)
        start, weight = resize.windows(12, 4, new)
        full = np.zeros((4, new, 12))
        for i in range(4):
            full[i, :, start[i] : start[i] + weight.shape[-1]] = weight[i]
        np.testing.assert_allclose(
            full.reshape(4 * new, 12), resize.matrix(12, 4 * new), atol=1e-6
        )


def test_missing_values_count_as_zero_and_reach_no_neighbour():
    mods = (fields.OPTICAL,)
    module = embed.PatchEmbeddings(mods, 8, 4)
    data = fields.batch(mods)
    params = quick(functools.partial(module.init, patch=2))(jax.random.key(0), data)
    run = quick(functools.partial(module.apply, patch=2))
    gone = data["optical"].at[:, 3, 3].set(modalities.MISSING)
    found = run(params, data | {"optical": gone})["optical"]
    zero = run(params, data | {"optical": data["optical"].at[:, 3, 3].set(0.0)})
    np.testing.assert_array_equal(found, zero["optical"])
    assert np.abs(found).max() < 100


def test_one_time_after_the_other_is_the_same_and_smaller():
    module = embed.PatchEmbeddings(fields.ALL, 8, 4)
    data = fields.batch()
    params = quick(functools.partial(module.init, patch=2))(jax.random.key(0), data)
    want = quick(functools.partial(module.apply, patch=2))(params, data)
    slow = functools.partial(module.clone(by_time=True).apply, patch=2)
    got = quick(slow)(params, data)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=1e-6)
    text = str(jax.make_jaxpr(slow)(params, data))
    assert "scan" in text and "[2,2,16,16,2]" not in text


@pytest.mark.parametrize("patch, by_time", [(4, False), (2, False), (2, True)])
def test_every_device_embeds_its_own_images_and_no_others(patch, by_time):
    module = embed.PatchEmbeddings(fields.ALL, 8, 4, by_time=by_time)
    given = {
        m.name: np.random.default_rng(0).normal(size=(8, *m.shape(8, 3)))
        for m in fields.ALL
    }
    params = module.clone(by_time=False).init(jax.random.key(0), given, patch)
    split = devices.batch_sharding(devices.mesh(devices.Mesh(), 8))
    step = quick(jax.value_and_grad(lambda p, x: _waves(module.apply(p, x, patch))))
    want = step(params, given)
    spread = jax.device_put(given, split)
    text = step.lower(params, spread).compile().as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    got = step(params, spread)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def _waves(found):
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(found))


def test_a_pixel_mask_is_read_in_the_corner_of_a_patch():
    data = fields.batch((fields.HEIGHT,))
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.integers(0, 4, (2, 8, 8, 1, 1)))
    got = embed.token_mask(data | {"height_mask": pixels}, fields.HEIGHT, 4)
    np.testing.assert_array_equal(got, pixels[:, ::4, ::4])
    absent = embed.token_mask({"height": data["height"]}, fields.HEIGHT, 4)
    assert (np.asarray(absent) == states.ONLINE).all()


def test_a_mask_of_another_shape_is_refused():
    data = fields.batch((fields.HEIGHT,)) | {"height_mask": jnp.zeros((2, 3, 2, 1, 1))}
    with pytest.raises(ValueError, match=r"height_mask has shape \(2, 3, 2, 1, 1\)"):
        embed.token_mask(data, fields.HEIGHT, 4)


def test_finer_pixels_make_the_same_tokens():
    fine = modalities.Modality("photo", (("r",),), factor=4)
    module = embed.PatchEmbeddings((fine,), 8, 2)
    x = {"photo": jnp.ones((1, 32, 32, 1, 1))}
    init = functools.partial(module.init, patch=2)
    like = jax.eval_shape(init, jax.random.key(0), x)["params"]
    assert like["photo_0"]["kernel"].shape == (8, 8, 1, 8)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), like)
    assert module.apply({"params": params}, x, 4)["photo"].shape == (1, 2, 2, 1, 1, 8)


def test_standard_frequencies_span_what_the_paper_says():
    code = encodings.sincos(np.arange(5), 8, "standard")
    w = 10000.0 ** (-2 * np.arange(4) / 8)
    np.testing.assert_allclose(code[3], [*np.sin(3 * w), *np.cos(3 * w)])
    legacy = encodings.sincos([1.0], 8)
    np.testing.assert_allclose(np.arcsin(legacy[0, 3]), 10000.0 ** (-3 / 16))


def test_centres_of_coarse_cells_lie_among_their_fine_ones():
    corner = [encodings.space((2, 2), 8, s) for s in (8.0, 1.0)]
    assert (corner[0][0, 0] == corner[1][0, 0]).all()
    coarse = encodings.space((1, 1), 8, 3.0, anchor="center")
    fine = encodings.space((3, 3), 8, 1.0, anchor="center")
    np.testing.assert_allclose(coarse[0, 0], fine[1, 1])


def test_encodings_need_a_width_that_splits():
    module = encodings.CompositeEncodings(fields.ALL, 24)
    with pytest.raises(ValueError, match="width=24 must be divisible by 16"):
        module.init(jax.random.key(0), {}, jnp.zeros((1, 1, 3)), 4)


def test_every_part_of_the_encoding_tells_what_it_should():
    module = encodings.CompositeEncodings(fields.ALL, 32, channels="random")
    shapes = {m.name: m.tokens(2, 2) for m in fields.ALL}
    dates = jnp.asarray([[[1, 0, 2020], [1, 6, 2020]], [[9, 3, 2021], [9, 3, 2021]]])
    params = module.init(jax.random.key(0), shapes, dates, 4)
    found = module.apply(params, shapes, dates, 4)
    x = np.asarray(found["optical"])  # [B, h, w, T, S, D]
    part = [x[..., 8 * i : 8 * (i + 1)] for i in range(4)]
    np.testing.assert_array_equal(part[0][0, 1, 0, 1], params["params"]["optical"])
    np.testing.assert_array_equal(part[1][0, 0, 0, 1, 0], part[1][1, 1, 1, 1, 1])
    assert (part[2][1, :, :, 0] == part[2][1, :, :, 1]).all()
    assert np.abs(part[2][0, 0, 0, 0, 0] - part[2][0, 0, 0, 1, 0]).max() > 0.1
    assert len(np.unique(part[3][0, :, :, 0, 0].reshape(4, -1), axis=0)) == 4
    assert not found["height"][..., 8:24].any() and found["height"][..., 24:].any()
    assert found["weather"][..., 8:24].any() and not found["weather"][..., 24:].any()
    assert not found["place"][..., 8:].any() and found["place"].shape == (1, 1, 32)


def test_only_what_is_online_counts():
    """Whatever is hidden or missing may hold anything, here where p is the base."""
    module, data = fields.system(q=4).encoder, fields.batch()
    params = fields.params(fields.system(q=4))["encoder"]
    run = quick(lambda p, b: module.apply({"params": p}, b, 4, slots=16))
    seen = run(params, data)
    wild = dict(data)
    for m in (fields.OPTICAL, fields.HEIGHT):
        hidden = np.asarray(data[f"{m.name}_mask"]) != states.ONLINE
        sets = [hidden[..., g : g + 1] for g in range(len(m.channels))]
        bands = [
            np.repeat(s, len(c), -1) for s, c in zip(sets, m.channels, strict=True)
        ]
        pixels = np.concatenate(bands, -1).repeat(4, 1).repeat(4, 2)
        wild[m.name] = jnp.where(pixels, 1e3, data[m.name])
    other = run(params, wild)
    np.testing.assert_allclose(seen.pooled, other.pooled, atol=1e-5)
    for name, x in seen.tokens.items():
        np.testing.assert_allclose(x, other.tokens[name], atol=1e-5)
        hidden = np.asarray(seen.mask[name]) != states.ONLINE
        assert not np.asarray(x)[hidden].any() and np.asarray(x)[~hidden].any()


def test_a_sample_without_any_visible_token_is_finite():
    system = fields.system(fields.ALL[:2])
    data = fields.batch(fields.ALL[:2])
    for name in ("optical", "height"):
        mask = data[f"{name}_mask"]
        data[f"{name}_mask"] = mask.at[0].set(states.DECODER)

    @jax.grad
    def grad(params):
        view = system.apply({"params": params}, data, slots=8)
        return sum((a.prediction**2).sum() for a in view.asked.values()) + (
            view.pooled.sum()
        )

    found = quick(grad)(fields.params(system))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(found))


def test_remat_changes_neither_names_nor_numbers():
    plain = fields.system(fields.ALL[:2])
    lean = fields.system(fields.ALL[:2], encoder=dict(remat=True))
    params, data = fields.params(plain), fields.batch(fields.ALL[:2])
    assert tree.flat(params).keys() == tree.flat(fields.params(lean)).keys()

    def pooled(module):
        def run(p):
            return module.encoder.apply({"params": p}, data, 4, slots=8).pooled.sum()

        return quick(jax.grad(run))(params["encoder"])

    for a, b in zip(*map(jax.tree.leaves, (pooled(plain), pooled(lean))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_drop_path_acts_in_training_alone():
    system = fields.system(fields.ALL[:2], encoder=dict(drop_path=0.5))
    params, data = fields.params(system)["encoder"], fields.batch(fields.ALL[:2])

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, train):
        rngs = {"drop_path": key}
        return system.encoder.apply(
            {"params": params}, data, 4, train=train, rngs=rngs
        ).pooled

    keys = [jax.random.key(i) for i in range(2)]
    assert (run(keys[0], False) == run(keys[1], False)).all()
    assert len({run(jax.random.key(i), True).tobytes() for i in range(4)}) > 1


def _embedded(module, fields):
    return module.patch_embed(fields, 4)


def test_leaving_at_zero_everywhere_is_the_projection_alone():
    module, data = fields.system().encoder, fields.batch()
    data = {k: v for k, v in data.items() if not k.endswith("_mask")}
    params = fields.params(fields.system())["encoder"]
    none = {m.name: 0 for m in fields.ALL}
    some = none | {"height": 1}

    def run(params):
        apply = functools.partial(module.apply, {"params": params}, data, 4)
        plain = module.apply({"params": params}, data, method=_embedded)
        return plain, *(apply(exits=e).tokens for e in (none, some))

    plain, left, mixed = quick(run)(params)
    for name, x in plain.items():
        np.testing.assert_array_equal(left[name], x)
        assert np.abs(mixed[name] - x).max() > 0.1  # Normed, at least.
