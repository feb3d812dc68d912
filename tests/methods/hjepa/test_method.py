"""H-JEPA as a method: parameters, EMA, features, phases, the checks of its config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.hjepa import tiny
from vitssl import config, tree
from vitssl.methods import base, table
from vitssl.methods.hjepa import levels
from vitssl.models import xavier


def test_it_is_in_the_table_and_keeps_the_contract():
    m = tiny.method()
    assert isinstance(m, table.METHODS["hjepa"])
    for name in ("transform", "init", "loss", "after", "phase", "features", "check"):
        assert callable(getattr(m, name)) and hasattr(base.Method, name)
    assert list(m.check()) == []
    assert hash(m) == hash(dataclasses.replace(m))


def test_the_target_starts_as_an_exact_copy_with_buffers_of_its_own():
    m = tiny.method()
    params, extra = tiny.init(m)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], extra["target"])
    ours, theirs = (
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(t)}
        for t in (params["encoder"], extra["target"])
    )
    assert not ours & theirs
    other, _ = tiny.init(m, seed=1)
    assert not np.array_equal(other["encoder"]["cls"], params["encoder"]["cls"])


def test_an_encoder_may_start_as_mae_s_and_the_target_with_it():
    m = dataclasses.replace(tiny.method(), start=xavier.Start("xavier"))
    params, extra = tiny.init(m)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], extra["target"])
    kernel = np.asarray(params["encoder"]["block_0"]["mlp"]["fc1"]["kernel"])
    limit = np.sqrt(6 / sum(kernel.shape))
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.1)
    assert np.abs(kernel).max() <= limit
    other, _ = tiny.init(tiny.method())
    for part in ("predictor", "levels"):  # These have starts of their own.
        jax.tree.map(np.testing.assert_array_equal, params[part], other[part])


@pytest.mark.parametrize(
    "strategy, view_weight, local_crops, want",
    [
        ("global_only", 0.25, 4, {"pooled_query"}),
        ("global_only", 0.25, 0, set()),
        ("global_only", 0.0, 4, set()),
        ("global_with_local_context", 0.25, 4, {"roles"}),
        ("cross_crop_prediction", 0.25, 4, {"roles"}),
        ("cross_crop_prediction", 0.25, 0, set()),
    ],
)
def test_parameters_nothing_uses_do_not_exist(strategy, view_weight, local_crops, want):
    m = tiny.method(
        masking=dict(strategy=strategy),
        objective=dict(view_weight=view_weight),
        multicrop=dict(num_local_crops=local_crops),
    )
    shapes = jax.eval_shape(lambda: m.init(jax.random.key(0), tiny.batch(m)))
    assert {"roles", "pooled_query"} & set(shapes[0]["predictor"]) == want


@pytest.mark.parametrize(
    "sizes, trained, everything",
    [
        ((192, 12, 3, 4, 3), 7_454_016, 12_978_432),
        ((384, 12, 6, 6, 6), 32_907_648, 54_573_312),
        ((768, 12, 12, 6, 12), 130_695_936, 216_494_592),
        ((1024, 24, 16, 6, 16), 383_087_616, 686_389_248),
    ],
)
def test_number_of_parameters_of_the_published_sizes(sizes, trained, everything):
    width, depth, heads, predictor_depth, predictor_heads = sizes
    m = tiny.method(
        model=dict(width=width, depth=depth, heads=heads, patch=16, image_size=224),
        predictor=dict(depth=predictor_depth, heads=predictor_heads, mlp_ratio=4.0),
        masking=dict(strategy="global_only", num_hierarchies=3),
    )
    image = jax.ShapeDtypeStruct((1, 2, 224, 224, 3), jnp.uint8)
    params, extra = jax.eval_shape(
        lambda image: m.init(jax.random.key(0), {"global": image}), image
    )
    assert tree.size(params) == trained
    assert tree.size(params) + tree.size(extra["target"]) == everything


@pytest.mark.parametrize("target", ["shared", "ema"])
def test_after_moves_the_targets_towards_the_new_parameters(target):
    m = tiny.method(
        levels=dict(target=target), ema=dict(start=0.5, end=1.0, warmup_steps=2)
    )
    params, extra = tiny.init(m)
    moved = jax.tree.map(lambda x: x + 1.0, params)
    for step, momentum in ((0, 0.5), (1, 0.5), (2, 0.5), (6, 0.75), (10, 1.0)):
        after = jax.jit(m.after)(moved, extra, jnp.int32(step))
        np.testing.assert_allclose(after["momentum"], momentum, rtol=1e-6)
        for name, source in (("target", "encoder"), ("target_levels", "levels")):
            assert (name in after) == (name == "target" or target == "ema")
            if name in after:
                want = jax.tree.map(
                    lambda old, new, m=momentum: m * old + (1 - m) * new,
                    extra[name],
                    moved[source],
                )
                jax.tree.map(
                    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                    after[name],
                    want,
                )


def test_phase_is_the_number_of_local_crops_of_the_epoch():
    m = tiny.method()
    assert {m.phase(i) for i in range(10)} == {4}
    m = tiny.method(
        multicrop=dict(
            adaptive=True,
            min_local_crops=1,
            max_local_crops=5,
            adaptive_warmup_epochs=2,
        )
    )
    assert [m.phase(i) for i in range(0, 8)] == [1, 1, 3, 3, 5, 5, 5, 5]
    example = dict(image=np.zeros((30, 30, 3), np.uint8), label=0, index=0, epoch=1)
    assert len(m.transform()(example, np.random.default_rng(0))["local"]) == 3


def test_crops_that_nothing_uses_are_not_made():
    m = tiny.method(
        masking=dict(strategy="global_only"), objective=dict(view_weight=0.0)
    )
    assert "local" not in tiny.batch(m) and m.phase(0) == 0
    assert "local" in tiny.batch(tiny.method())


@pytest.mark.parametrize("fpn", ["", "add"])
def test_features_of_images_of_any_size(fpn):
    m = tiny.method(levels=dict(fpn=fpn, fpn_width=8))
    params, extra = tiny.init(m)
    extra = extra | {"target": jax.tree.map(lambda x: 1.1 * x, extra["target"])}
    for side in (24, 40):
        n = (side // 4) ** 2
        image = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
        found = jax.jit(m.features)(params, extra, image)
        assert found["tokens"].shape == (2, n, 16)
        np.testing.assert_allclose(found["pooled"], found["tokens"].mean(1), atol=1e-5)
        assert found["cls"].shape == (2, 16)
        # One block: its tokens, normalised, are the last ones.
        np.testing.assert_allclose(found["last4"], found["pooled"], atol=1e-5)
        net = m.networks(params, extra, train=False)
        members = levels.everything(2, (side // 4, side // 4))
        for k in range(2):
            each = net.project(found["tokens"], members, only=(k,), target=True)[k][0]
            rows = -(-side // (4 * 2**k))
            assert each.shape == (2, rows * rows, 16)
            np.testing.assert_allclose(found[f"level{k}"], each.mean(1), atol=1e-5)


def test_float_images_are_taken_as_normalised():
    m = tiny.method()
    params, extra = tiny.init(m)
    image = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    mean, std = np.array(m.run.mean), np.array(m.run.std)
    normalised = ((image / 255 - mean) / std).astype(np.float32)
    a = m.features(params, extra, image)["pooled"]
    b = m.features(params, extra, normalised)["pooled"]
    np.testing.assert_allclose(a, b, atol=1e-5)


IMPOSSIBLE = [
    (dict(multicrop=dict(global_crop_size=26)), "global_crop_size=26", "24 and 28"),
    (dict(multicrop=dict(local_crop_size=10)), "local_crop_size=10", "8 and 12"),
    (dict(multicrop=dict(local_crop_size=4)), "local_crop_size=4", "2 x 2"),
    (dict(predictor=dict(heads=3)), "predictor.heads=3", "width 16"),
    (dict(predictor=dict(width=6, heads=4)), "predictor.heads=4", "width 6"),
    (dict(objective=dict(weights=(1.0,) * 3)), "objective.weights", "give 1 or 2"),
    (dict(ema=dict(target_encoder=False)), "target_encoder=False", "hjepa_sigreg"),
    (
        dict(
            ema=dict(target_encoder=False),
            levels=dict(target="ema"),
            objective=dict(type="hjepa_sigreg"),
        ),
        "levels.target=ema",
        "target_encoder",
    ),
    (
        dict(objective=dict(type="cjepa"), multicrop=dict(num_global_crops=1)),
        "objective.type=cjepa",
        "num_global_crops=2",
    ),
    (
        dict(objective=dict(type="cjepa"), model=dict(cls=False)),
        "objective.type=cjepa",
        "cls=True",
    ),
    (
        dict(objective=dict(type="combined", views="batch_halves")),
        "views=batch_halves",
        "mode=zero",
    ),
    (
        dict(levels=dict(norm="batchnorm"), masking=dict(accumulate_crops=True)),
        "accumulate_crops=True",
        "batchnorm",
    ),
    (
        dict(predictor=dict(positions="sincos")),
        "positions=sincos",
        "num_local_crops=0",
    ),
    (
        dict(
            predictor=dict(positions="sincos", width=6),
            multicrop=dict(num_local_crops=0),
        ),
        "positions=sincos",
        "multiple of 4, not 6",
    ),
]


@pytest.mark.parametrize("sections, key, fix", IMPOSSIBLE)
def test_what_cannot_be_combined_is_said_in_one_line(sections, key, fix):
    found = list(tiny.method(**sections).check())
    assert len(found) == 1 and key in found[0] and fix in found[0], found


@pytest.mark.parametrize(
    "section, values, key",
    [
        ("ema", dict(start=1.5), "start=1.5"),
        ("ema", dict(warmup_steps=-1), "warmup_steps=-1"),
        ("predictor", dict(depth=0), "depth=0"),
        ("predictor", dict(drop_path=1.0), "drop_path=1.0"),
        ("levels", dict(fpn_width=-1), "fpn_width=-1"),
        ("levels", dict(norm="targets", target="ema"), "target=ema"),
        ("levels", dict(norm="targets", fpn="add"), "fpn=add"),
        ("objective", dict(weights=(0.0,)), "weights=(0.0,)"),
        ("objective", dict(temperature=0.0), "temperature=0.0"),
        ("objective", dict(view_weight=-0.1), "view_weight=-0.1"),
        ("objective", dict(vicreg_adaptive=True), "vicreg_adaptive=True"),
    ],
)
def test_values_out_of_range_are_named(section, values, key):
    right = getattr(tiny.method(), section)
    given, found = dataclasses.asdict(right) | values, config.Problems()
    config.section(type(right), given, section, found)
    assert len(found) == 1 and found[0].startswith(f"{section}.{key}"), found
