"""LocalMIM: parameter counts, stages that end, masks, targets, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config, tree
from vitssl.bench import flops
from vitssl.data import views
from vitssl.methods import base
from vitssl.methods.localmim import method, stages, targets
from vitssl.models import decoder, patches, vit
from vitssl.ops import random_masking
from vitssl.optim import freezeout
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}
SIZES = {
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
}


def _method(width=16, depth=7, heads=2, size=32, patch=8, channels=3, **own):
    model = dict(width=width, depth=depth, heads=heads, patch=patch, image_size=size)
    return method.LocalMIM(
        run=base.Run(
            total_steps=10,
            steps_per_epoch=2,
            batch_size=4,
            classes=0,
            channels=channels,
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
        ),
        model=vit.ViT(**model, positions="sincos", **own.pop("model", {})),
        augment=views.SingleCrop(size=size),
        decoder=decoder.Decoder(**dict(width=16, heads=2) | own.pop("decoder", {})),
        stages=stages.Stages(**own.pop("stages", {})),
        masking=random_masking.Masking(**own.pop("masking", {})),
        target=targets.Targets(**own.pop("target", {})),
    )


def _shapes(m, batch=1):
    side, c = m.augment.size, m.run.channels
    return {"global": jax.ShapeDtypeStruct((batch, 1, side, side, c), jnp.uint8)}


@functools.cache
def _fresh(m):
    """Parameters of the right shapes, drawn by numpy: nothing is compiled."""
    params, extra = jax.eval_shape(m.init, jax.random.key(0), _shapes(m))
    rng = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)

    return jax.tree.map(draw, params), jax.tree.map(draw, extra)


def _batch(m, seed=0):
    rng = np.random.default_rng(seed)
    shape = (m.run.batch_size, 1, m.augment.size, m.augment.size, m.run.channels)
    return {"global": rng.integers(0, 256, shape, np.uint8)}


def _full_size(name, **own):
    width, depth, heads = SIZES[name]
    return _method(
        width,
        depth,
        heads,
        224,
        16,
        decoder=dict(width=256, heads=8),
        stages=own,
    )


@pytest.mark.parametrize(
    "name, encoder, total",
    [
        ("s", 21_589_248, 25_463_276),
        ("b", 85_645_824, 89_916_140),
        ("l", 303_097_856, 307_632_364),
    ],
)
def test_parameter_counts_are_the_originals(name, encoder, total):
    m = _full_size(name)
    params, _ = jax.eval_shape(m.init, jax.random.key(0), _shapes(m))
    norm = tree.size(params["encoder"].pop("norm"))  # The last stage's.
    assert tree.size(params["encoder"]) == encoder
    assert tree.size(params) + norm == total


def test_a_decoder_at_every_block_has_the_originals_parameters():
    m = _full_size(
        "b",
        blocks=tuple(range(12)),
        scales=(8.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.5),
    )
    params, _ = jax.eval_shape(m.init, jax.random.key(0), _shapes(m))
    assert tree.size(params) == 98_847_492
    assert tree.size(params["decoder_0"]) == 1_160_923


# (schedule, t_0): what design and paper quote for ViT-B, 100 epochs, 10 of warm-up.
SCHEDULES = [
    ("cubic", 0.65, 0.247),
    ("cubic", 0.70, 0.219),
    ("cubic", 0.75, 0.189),
    ("cubic", 0.80, 0.157),
    ("cubic", 0.85, 0.122),
    ("cubic", 0.90, 0.084),
    ("squared", 0.70, 0.161),
    ("linear", 0.50, 0.149),
]


@functools.cache
def _costs():
    """XLA's FLOPs per image with 0..12 layers frozen; lowered, never compiled."""
    batch = 32
    m = _full_size("b")
    params, extra = jax.eval_shape(m.init, jax.random.key(0), _shapes(m))
    names = tree.flat(params)
    found = tree.match(list(names), m.freeze_layers(), what="layers", default=-1)
    key = jax.eval_shape(lambda: jax.random.key(0))
    costs = []
    for n in range(13):
        frozen = frozenset(k for k, i in found.items() if 0 <= i < n)
        trained, constant = tree.split(params, frozen)
        phase = step.Phase(frozen, m.phase(0))

        def loss(trained, constant, batch, key, phase=phase):
            both = tree.merge(trained, constant)
            return m.loss(both, extra, batch, key, phase=phase)[0]

        lowered = jax.jit(jax.value_and_grad(loss)).lower(
            trained, constant, _shapes(m, batch), key
        )
        costs.append(lowered.cost_analysis()["flops"] / batch)
    return costs


def _formula(n):
    """The cost model of the system's document, with only visible patches embedded."""
    decoders = tuple(
        flops.stage_decoder(196, 49, inner=768, width=256, scale=s, out=27)
        for s in (4.0, 2.0, 1.0, 0.5)
    )
    return sum(
        flops.localmim(
            n,
            embed=2 * 49 * 768 * 768,
            linear=24 * 768**2 * 50,
            attention=4 * 50**2 * 768,
            decoders=decoders,
            stage_layers=(2, 4, 10, 12),
            depth=12,
            target=5.4e6,
        )
    )


@pytest.mark.parametrize("schedule, t_0, quoted", SCHEDULES)
def test_freezing_saves_what_the_formula_says(schedule, t_0, quoted):
    warm = 0.1
    active = [
        warm + (1 - warm) * freezeout.ratio(schedule, t_0, i, 12) for i in range(13)
    ]
    shares = np.diff(active, prepend=0.0)
    ours = float((shares * _costs()).sum())
    want = float((shares * [_formula(n) for n in range(13)]).sum())
    assert abs(ours / want - 1) < 0.02
    assert abs(flops.saving(_costs(), active) - quoted) < 0.02 * (1 - quoted)


def test_a_frozen_stage_leaves_the_loss_and_the_program():
    m = _method()
    params, extra = _fresh(m)
    args = params, extra, _batch(m), jax.random.key(1)
    own = tree.match(list(tree.flat(params)), m.freeze_layers(), what="x", default=-1)
    losses = {}
    for n in (0, 3):
        frozen = frozenset(k for k, i in own.items() if 0 <= i < n)
        phase = step.Phase(frozen, m.phase(0))
        run = jax.jit(functools.partial(m.loss, phase=phase), compiler_options=QUICK)
        loss, (_, metrics) = run(*args)
        losses[n] = {k: float(v) for k, v in metrics.items() if "loss_stage" in k}
        assert abs(float(loss) - sum(losses[n].values())) < 1e-5
    assert set(losses[3]) == set(losses[0]) - {"loss_stage0"}
    for k, value in losses[3].items():
        assert abs(value - losses[0][k]) < 1e-5


def test_masks_hide_the_share_that_is_asked_for():
    m = _method(masking=dict(ratio=0.75, schedule=((2.0, 0.5),)))
    assert m.phase(0).visible == 4 and m.phase(4).visible == 8  # Of 16; 2 steps/epoch.
    masks = m.masking.draw(jax.random.key(0), 64, m.grid, 4)
    assert (np.asarray(masks.mask.sum(1)) == 12).all()
    both = np.concatenate([masks.keep, masks.hidden], axis=1)
    assert (np.sort(both, axis=1) == np.arange(16)).all()
    hits = np.zeros(16)
    np.add.at(hits, np.asarray(masks.keep).ravel(), 1)
    assert hits.min() > 4  # Every patch is seen sometimes: 16 times on average.


def test_distance_gathers_the_visible_patches():
    def spread(d):
        m = _method(size=64, masking=dict(distance=d))
        keep = np.asarray(m.masking.draw(jax.random.key(0), 128, m.grid, 16).keep)
        cells = np.stack(np.divmod(keep, 8), -1).astype(float)
        return cells.std(1).mean()

    assert spread(1.0) < 0.6 * spread(0.0)


def test_stages_may_move_to_other_blocks():
    m = _method(stages=dict(moves=((1.0, 2, 4, 5, 6),)))
    assert m.phase(0).blocks == (1, 3, 4, 6)
    assert m.phase(2).blocks == (2, 4, 5, 6)
    assert not list(m.check())


def test_a_curriculum_is_linear_between_its_epochs():
    spec = stages.Stages(curriculum=((0.0, 4, 3, 2, 1), (10.0, 1, 2, 3, 4)))
    got = spec.loss_weights((0, 1, 2, 3), jnp.float32(5.0))
    np.testing.assert_allclose(got, 2.5)
    np.testing.assert_allclose(spec.loss_weights((2, 3), jnp.float32(0.0)), [2, 1])


@pytest.mark.parametrize(
    "weighting, want",
    [
        ("uniform", [1, 1, 1]),
        ("n_minus_k", [3, 2, 1]),
        ("one_over_k", [1, 1 / 2, 1 / 3]),
        ("one_over_n_minus_k", [1 / 3, 1 / 2, 1]),
    ],
)
def test_each_weighting_weighs_the_stages_by_its_own_formula_alone(weighting, want):
    spec = stages.Stages(scales=(4.0, 2.0, 1.0), weighting=weighting)
    np.testing.assert_allclose(spec.loss_weights((0, 1, 2)), want, rtol=1e-6)
    np.testing.assert_allclose(spec.loss_weights((1, 2)), want[1:], rtol=1e-6)
    if weighting != "one_over_n_minus_k":  # Only it divides by zero at k = n.
        assert np.isfinite(spec.loss_weights((3,))).all()


@pytest.mark.parametrize(
    "own, channels",
    [
        (dict(targets=("pixel",)), 3 * 16),
        (dict(targets=("hog", "hog", "feature", "pixel")), 16),
    ],
)
def test_other_targets_have_their_own_channels_and_train(own, channels):
    m = _method(stages=own)
    params, extra = _fresh(m)
    assert params["decoder_2"]["pred"]["bias"].shape == (
        (16,) if "feature" in own["targets"] else (3 * 8 * 8,)
    )
    every = (0, 1, 2, 3)
    goals = jax.eval_shape(
        lambda p: m.goals(p, extra, jnp.ones((2, 32, 32, 3)), every), params
    )
    assert goals[1].shape == (2, 16, 2, 2, channels if len(own["targets"]) == 1 else 27)


def test_pixel_targets_are_standardised_cells():
    m = _method(stages=dict(targets=("pixel",)))
    image = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    goal = np.asarray(m.goals({}, {}, image, (2,))[2])[:, :, 0, 0]  # [B, N, 192]
    np.testing.assert_allclose(goal.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(goal.var(-1, ddof=1), 1.0, atol=1e-4)
    # Row, column, channel inside a cell; patch 1 is the second of the first row.
    cell = np.asarray(image[0, :8, 8:16]).reshape(-1)
    want = (cell - cell.mean()) / np.sqrt(cell.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(goal[0, 1], want, atol=1e-4)


def test_feature_targets_send_no_gradient_to_the_teacher():
    m = _method(stages=dict(targets=("feature",), scales=(1.0,) * 4))
    params, _ = _fresh(m)
    image = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    total = jax.grad(lambda p: m.goals(p, {}, image, (0,))[0].sum())
    grads = jax.jit(total, compiler_options=QUICK)(params)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


def test_the_bias_of_hog_comes_from_the_seed_and_stays():
    m = _method(target=dict(hog_bias=True))
    batch = _shapes(m)
    init = jax.jit(lambda: m.init(jax.random.key(0), batch)[1], compiler_options=QUICK)
    extra = init()
    bias = np.asarray(extra["hog_bias"])
    assert bias.shape == (4, 2) and np.abs(bias).max() <= 1 / 3 and bias.std() > 0.05
    assert m.after({}, extra, 0) is extra


def test_features_are_those_of_the_whole_image():
    m = _method()
    params, extra = _fresh(m)
    image = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3), np.uint8)
    run = jax.jit(m.features, compiler_options=QUICK)
    found = run(params, extra, image)
    assert found["tokens"].shape == (2, 6 * 4, 16)
    np.testing.assert_allclose(found["pooled"], found["tokens"].mean(1), atol=1e-6)
    np.testing.assert_allclose(found["gap"].mean(-1), 0.0, atol=1e-5)


def test_pictures_show_the_predictions_that_the_loss_measures():
    m = _method(channels=1, stages=dict(targets=("hog", "pixel", "hog", "pixel")))
    (params, extra), batch = _fresh(m), _batch(m)
    found = m.pictures(params, extra, batch, None)["reconstruction"]
    crops, hidden, stages_ = found
    np.testing.assert_array_equal(crops, batch["global"][:, 0])
    assert (hidden.sum((1, 2)) == 12).all()
    names = ["stage 0: hog", "stage 1: pixel", "stage 2: hog", "stage 3: pixel"]
    assert list(stages_) == names
    # True pixels are the image, whatever normalised them.
    for name in (names[1], names[3]):
        _, true = stages_[name]["pixels"]
        np.testing.assert_allclose(true, crops / 255, atol=1e-4)
    image = patches.normalise(jnp.asarray(crops), m.run.mean, m.run.std)
    masks = m.masking.draw(jax.random.key(0), 4, m.grid, 4)
    losses = m.stage_losses(params, extra, image, masks, (0, 2), m.phase(0).blocks)
    for k, cells in ((0, 4), (2, 1)):
        ours, true = stages_[names[k]]["hog"]
        where = hidden.repeat(cells, 1).repeat(cells, 2)
        error = np.square(ours - true)[where].mean()
        np.testing.assert_allclose(error, losses[k], rtol=1e-4)


def test_pictures_of_features_have_a_vector_per_patch():
    m = _method(stages=dict(targets=("feature",), scales=(1.0,) * 4))
    (params, extra), batch = _fresh(m), _batch(m)
    stages_ = m.pictures(params, extra, batch, None)["reconstruction"][2]
    ours, true = stages_["stage 3: feature"]["tokens"]
    assert ours.shape == true.shape == (4, 4, 4, 16)
    np.testing.assert_allclose(true.mean(-1), 0.0, atol=1e-5)


def _lines(**own):
    return list(_method(**own).check())


def test_errors_name_the_key_and_what_is_allowed():
    (line,) = _lines(depth=6)
    assert "model.depth=6" in line and "the default needs depth 7" in line
    (line,) = _lines(stages=dict(blocks=(0, 1, 2, 5)))
    assert "the last must be 6" in line
    (line,) = _lines(size=36)
    assert line.startswith("augment.size=36: must be a multiple of model.patch=8")
    (line,) = _lines(patch=2, stages=dict(scales=(4.0, 2.0, 1.0, 0.5)))
    assert "cells of 0.5 pixels" in line
    lines = list(stages.Stages(scales=(4.0, 1.0), weights=(1.0,)).check())
    assert any("weights has 1 entries for 2 scales" in x for x in lines)
    problems = config.Problems()
    wrong = {"ratio": 1.0, "schedule": ((2.0, 0.0),)}
    config.section(random_masking.Masking, wrong, "masking", problems)
    assert problems[0] == "masking.ratio=1.0: in (0, 1)"
    assert problems[1].startswith("masking.schedule=((2.0, 0.0),): every value")


def test_dataclass_is_static():
    m = _method()
    assert hash(m) == hash(dataclasses.replace(m))
