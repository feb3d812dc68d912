"""Latent masked modelling as a method: what trains, what leaks, what is read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import tree
from vitssl.data import modalities
from vitssl.data import states as tokens
from vitssl.data.sources import fields
from vitssl.methods import base
from vitssl.methods.latent_mim import (
    hybrid,
    masks,
    network,
    objective,
    readout,
    shapes,
    target,
    views,
)
from vitssl.methods.latent_mim import method as latent_mim
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("sentinel2_l2a", "worldcover")
MAPS = ("worldcover",)
P, Q, SIDE, B = 4, 2, 2, 3
RUN = base.Run(10, 2, B, 4, 1, (0.0,), (1.0,))
KEY = jax.random.key(5)


def method(**given):
    own = dict(
        inputs=dict(modalities=NAMES),
        network=dict(
            size="",
            width=16,
            heads=2,
            depth=1,
            decoder_depth=1,
            base_patch=P,
            drop_path=0.0,
        ),
        hybrid=dict(
            processing_patch_size=(P,),
            output_patch_size=Q,
            upsampler="skip",
            visible_loss_weight=0.5,
            loss_tokens_per_modality=24,
        ),
        mask=dict(decode_only=MAPS),
        sampling=dict(token_budget=40, min_side=SIDE, max_side=SIDE, tile=16, times=2),
        augment={},
        objective={},
        target={},
        readout=dict(times=2),
        measures=dict(classes=6),
    )
    types = dict(
        inputs=latent_mim.Inputs,
        network=network.Network,
        hybrid=hybrid.Hybrid,
        mask=masks.Strategy,
        sampling=shapes.Sampling,
        augment=views.Augment,
        objective=objective.Objective,
        target=target.Target,
        readout=readout.Readout,
        measures=readout.Measures,
    )
    made = {k: types[k](**own[k] | given.get(k, {})) for k in types}
    return latent_mim.LatentMIM(run=given.get("run", RUN), **made)


WORLD = fields.Fields(size=16, gaps=0.4, modalities=NAMES)
SAMPLES = [WORLD.sample(i) for i in range(B)]


def batch_of(m, at=0):
    view = m.transform()
    rows = [
        view(dict(s, index=i, step=at), np.random.default_rng((at, i)))
        for i, s in enumerate(SAMPLES)
    ]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def init(m, batch):
    return m.init(jax.random.key(0), batch)


@functools.partial(jax.jit, static_argnums=(0, 5), compiler_options=QUICK)
def grad(m, params, extra, batch, rng, phase):
    run = functools.partial(m.loss, phase=phase)
    return jax.value_and_grad(run, has_aux=True)(params, extra, batch, rng)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def features(m, params, image):
    return m.features(params, {}, image)


@pytest.fixture(scope="module")
def ready():
    m = method()
    batch = batch_of(m)
    params, extra = init(m, batch)
    # Some start at zero, where a neighbour has no gradient.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params
    )
    phase = step.Phase(frozenset(), m.phase(0))
    return m, params, extra, batch, phase


def test_everything_trains_and_the_parts_add_up(ready):
    m, params, extra, batch, phase = ready
    (loss, (_, metrics)), grads = grad(m, params, extra, batch, KEY, phase)
    still = {k for k, g in tree.flat(grads).items() if not (np.asarray(g) != 0).any()}
    # Maps are predicted and never read.
    unread = {k for k in tree.flat(params) if k.split("/")[-2:][0] == "worldcover_0"}
    assert still == unread | {"encoder/encodings/worldcover"}
    parts = [metrics[f"loss_{k}"] for k in ("tokens", "visible", "contrast")]
    np.testing.assert_allclose(loss, sum(parts), rtol=1e-5)
    assert float(metrics["patch/p"]) == P and float(metrics["patch/q"]) == Q
    read = np.mean(
        [(batch[f"view/{n}_mask"] == tokens.ONLINE).sum() / (2 * B) for n in NAMES[:1]]
    )
    np.testing.assert_allclose(metrics["tokens/encoder"], read, rtol=1e-5)
    predicted = [
        np.minimum(
            24,
            (P // Q) ** 2
            * (batch[f"view/{n}_mask"] == tokens.DECODER).reshape(2 * B, -1).sum(1),
        ).mean()
        for n in NAMES
    ]
    np.testing.assert_allclose(metrics["tokens/loss"], sum(predicted), rtol=1e-5)


def test_pixels_that_are_neither_read_nor_predicted_change_nothing(ready):
    m, params, extra, batch, phase = ready
    name = "sentinel2_l2a"
    (loss, _), _ = grad(m, params, extra, batch, KEY, phase)
    mask = batch[f"view/{name}_mask"]  # [B, V, h, w, T, S]
    states = {"unused": (tokens.TARGET_ONLY, tokens.MISSING), "used": (tokens.DECODER,)}
    for used, kinds in states.items():
        x = batch[f"view/{name}"].copy()
        where = np.isin(mask, kinds).repeat(P, 2).repeat(P, 3)
        for i, bands in enumerate(modalities.find(name).channels):
            x[..., list(bands)] += 3.0 * where[..., i, None]
        changed = batch | {f"view/{name}": x}
        (other, _), _ = grad(m, params, extra, changed, KEY, phase)
        assert (float(other) == float(loss)) == (used == "unused"), used


def test_the_target_is_the_first_projection_and_stays(ready):
    m, params, extra, batch, _ = ready
    first, kept = init(m, batch)
    jax.tree.map(
        np.testing.assert_array_equal, kept["target"], first["encoder"]["patch_embed"]
    )
    assert m.after(params, extra, 0) is extra
    loaded = m.adopt(params, extra)["target"]
    jax.tree.map(
        np.testing.assert_array_equal, loaded, params["encoder"]["patch_embed"]
    )


def test_a_moving_target_follows_with_the_momentum_of_the_next_step():
    m = method(target=dict(start=0.9, end=1.0))
    old, new = ({"a": np.float32([x])} for x in (1.0, 2.0))
    extra = {"target": old}
    after = m.after({"encoder": {"patch_embed": new}}, extra, np.int32(3))
    np.testing.assert_allclose(after["target"]["a"], 2 - (0.9 + 4 * 0.1 / 10))


@pytest.mark.parametrize(
    "changes, want",
    [
        ({}, "output patch 2 px, target patch 2 px; upsampler skip, decoder mixed"),
        (
            dict(decoder="processing", upsampler="nearest", visible_loss_weight=0.0),
            "output patch 2 px, target patch 4 px; upsampler nearest, decoder process",
        ),
        (
            dict(output_patch_size=0, visible_loss_weight=0.0),
            "output patch the same, target patch the same; upsampler skip",
        ),
    ],
)
def test_the_start_says_the_patches_of_both_sides(changes, want, monkeypatch):
    said = []
    monkeypatch.setattr(latent_mim.logger, "info", lambda text, *a: said.append(a[0]))
    latent_mim._announce.cache_clear()
    method(hybrid=changes).transform()
    first = "Hybrid patch size configuration: processing patch 4 px, "
    assert first + want in said[0]


def test_phases_say_the_shapes_of_their_batches():
    m = method(
        hybrid=dict(processing_patch_size=(4, 2), output_patch_size=2),
        sampling=dict(min_side=1, max_side=3, times=12, token_budget=60),
    )
    seen = set()
    for at in range(30):
        shape = m.phase(at)
        x = batch_of(m, at)["view/sentinel2_l2a"]
        assert x.shape[2:5] == (shape.side * shape.p,) * 2 + (shape.times,)
        seen.add(shape)
    assert {s.p for s in seen} == {2, 4} and {s.side for s in seen} == {1, 2, 3}
    assert len(seen) == 6  # Of each patch and side one number of time steps.


def image_of(times):
    view = views.Evaluation((modalities.find(NAMES[0]),), 16, times)
    rows = [view(dict(s, index=i)) for i, s in enumerate(SAMPLES)]
    cut = len("image/")
    return {
        k[cut:]: np.stack([r[k] for r in rows]) for k in rows[0] if k[:cut] == "image/"
    }


def test_features_of_every_place_ignore_what_is_missing(ready):
    m, params = ready[:2]
    whole = image_of(2)
    gone = whole["sentinel2_l2a"].copy()
    gone[:, :, :, 1] = modalities.MISSING
    found = features(m, params, whole | {"sentinel2_l2a": gone})
    assert found["tokens"].shape == (B, (16 // Q) ** 2, 16)
    assert found["tokens_p"].shape == (B, (16 // P) ** 2, 16)
    short = {k: v[:, :1] if k == "timestamps" else v for k, v in whole.items()}
    short["sentinel2_l2a"] = gone[:, :, :, :1]
    alone = features(m, params, short)
    for key, value in found.items():
        np.testing.assert_allclose(value, alone[key], atol=2e-5, err_msg=key)
        assert np.asarray(value).std() > 0


def test_means_in_place_count_what_is_seen():
    rng = np.random.default_rng(0)
    x = {n: rng.normal(size=(1, 2, 2, 3, 2, 4)).astype(np.float32) for n in "ab"}
    mask = {n: rng.integers(0, 2, (1, 2, 2, 3, 2)) for n in "ab"}
    mask["a"][0, 1, 1] = tokens.MISSING
    got = np.asarray(readout.in_place(x, mask))
    for i in range(2):
        for j in range(2):
            each = [x[n][0, i, j][mask[n][0, i, j] == 0] for n in "ab"]
            each = [e.mean(0) for e in each if len(e)]
            want = np.mean(each, 0) if each else np.zeros(4)
            np.testing.assert_allclose(got[0, i, j], want, atol=1e-6)


def test_times_side_by_side_are_the_means_of_each():
    rng = np.random.default_rng(1)
    x = {"a": rng.normal(size=(2, 2, 2, 3, 2, 4)).astype(np.float32)}
    mask = {"a": rng.integers(0, 2, (2, 2, 2, 3, 2))}
    apart = np.asarray(readout.in_place(x, mask, "times"))
    for t in range(3):
        one = {"a": x["a"][:, :, :, t : t + 1]}, {"a": mask["a"][:, :, :, t : t + 1]}
        want = readout.in_place(*one)
        np.testing.assert_allclose(apart[..., 4 * t : 4 * t + 4], want, atol=1e-6)


def test_centred_targets_lose_the_mean_of_what_is_valid_of_their_bandset():
    rng = np.random.default_rng(2)
    goal = rng.normal(size=(3, 5, 4)).astype(np.float32) + 7
    valid, bandset = rng.random((3, 5)) < 0.7, rng.integers(0, 2, (3, 5))
    got = np.asarray(target.centred(goal, valid, bandset, 2))
    for s in range(2):
        of = bandset == s
        mean = goal[of & valid].mean(0)
        np.testing.assert_allclose(got[of], goal[of] - mean, atol=1e-5)
    empty = target.centred(goal, np.zeros((3, 5), bool), bandset, 2)
    np.testing.assert_array_equal(empty, goal)


@pytest.mark.parametrize("drawn", (24, 1000))
def test_of_a_world_that_is_the_same_everywhere_nothing_is_to_be_predicted(drawn):
    """With targets centred by bandset they are 0; means of others would be left."""
    m = method(
        hybrid=dict(
            processing_patch_size=(P,),
            output_patch_size=Q,
            loss_tokens_per_modality=drawn,
        )
    )
    batch = batch_of(m)
    band = np.arange(12, dtype=np.float32)
    for name in [k for k in batch if k == "view/sentinel2_l2a"]:
        batch[name] = np.broadcast_to(band, batch[name].shape)
    params, extra = init(m, batch)
    phase = step.Phase(frozenset(), m.phase(0))
    rows = m.embed(params, extra, batch, KEY, phase=phase)
    pair = rows["asked"]["sentinel2_l2a"]
    bandset = rows["asked_bandset"]["sentinel2_l2a"]
    assert len(np.unique(bandset[pair.valid])) > 1
    assert np.abs(pair.target).max() > 0.1
    got = target.centred(pair.target, pair.valid, bandset, 3)
    np.testing.assert_allclose(got[np.asarray(pair.valid)], 0, atol=1e-4)


def test_pictures_are_a_sensor_of_their_own():
    m = method(
        inputs=dict(modalities=("rgb",)),
        mask=dict(type="random", decode_only=()),
        augment=dict(turns="flip"),
        run=dataclasses.replace(RUN, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    assert list(m.check()) == []
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (B, 16, 16, 3), np.uint8)
    row = m.transform()(dict(image=image[0], index=0, step=0), rng)
    assert row["view/rgb"].shape == (2, 8, 8, 1, 3)
    view = m.evaluation_transform(16)(dict(image=image[0], index=0))
    np.testing.assert_allclose(
        view["image/rgb"][:, :, 0], (image[0] / 255 - 0.5) / 0.25, atol=1e-5
    )
    batch = {k: np.stack([v] * B) for k, v in row.items()}
    params = jax.eval_shape(m.init, jax.random.key(0), batch)[0]
    found = jax.eval_shape(lambda p, x: m.features(p, {}, x), params, image)
    assert found["tokens"].shape == (B, 64, 16)


def test_blocks_freeze_in_order_and_the_predictor_never(ready):
    m, params = ready[:2]
    names = list(tree.flat(params))
    found = tree.match(names, m.freeze_layers(), what="layers", default=-1)
    assert found["encoder/patch_embed/sentinel2_l2a_0/kernel"] == 0
    assert found["encoder/block_0/norm1/scale"] == 1
    assert {v for k, v in found.items() if not k.startswith("encoder/")} == {-1}


def test_outputs_hold_what_a_probe_needs(ready):
    m, params, extra = ready[:3]
    image = image_of(2)
    batch = {f"image/{k}": jnp.asarray(v) for k, v in image.items()}
    batch["truth"] = jnp.zeros((B, 16, 16), jnp.int32)
    found = jax.eval_shape(lambda p, b: m.outputs(p, extra, b), params, batch)
    assert found["tokens"].shape == (B, 8, 8, 16)
    assert found["truth"].shape == (B, 16, 16)
    assert found["pixels"].shape == (B, 16, 16, 2 * 12)
    assert m.outputs(params, extra, {"image/x": 0}) == {}
