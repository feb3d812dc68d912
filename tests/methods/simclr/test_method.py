"""SimCLR: its loss on any devices, what trains, what freezes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config, tree
from vitssl.data import resolution
from vitssl.losses import contrastive
from vitssl.methods import base
from vitssl.methods.simclr import method, views
from vitssl.models import hvit, vit
from vitssl.ops import jitter
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim
from vitssl.run import devices, step

QUICK = {"xla_backend_optimization_level": 0}
PLAIN = vit.ViT(16, 2, 2, 4, 16, drop_path=0.1)
TREE = hvit.HViT(width=8, depths=(1, 1), heads=(1, 2), patch=4, image_size=16)


def _method(model=PLAIN, batch_size=8, size=16, **own):
    return method.SimCLR(
        run=base.Run(
            total_steps=20,
            steps_per_epoch=5,
            batch_size=batch_size,
            classes=0,
            channels=3,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        ),
        model=model,
        augment=views.Views(size=size, **own.pop("augment", {})),
        projector=method.Projector(width=8, **own.pop("projector", {})),
        objective=method.Objective(**own.pop("objective", {})),
        **own,
    )


def _batch(of, seed=0):
    """Images whose class shows in their colour, through the method's own views."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(of.run.batch_size):
        image = rng.integers(0, 80, (24, 20, 3)) + rng.integers(0, 170, 3)
        example = dict(image=image.astype(np.uint8), label=0, index=i)
        rows.append(of.transform()(example, rng))
    return {"global": np.stack([row["global"] for row in rows])}


@functools.cache
def _fresh(of):
    shapes = {"global": jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.uint8)}
    make = jax.jit(lambda: of.init(jax.random.key(0), shapes), compiler_options=QUICK)
    return make()


def _optimizer(params, **spec):
    values = dict(
        name="adamw",
        lr=3e-3,
        schedule="constant",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=0.0,
        clip_norm=0.0,
    )
    freeze = spec.pop("freeze", None)
    return optim.make(
        optim.Optim(**values | spec),
        params,
        total_steps=20,
        steps_per_epoch=5,
        batch_size=8,
        freeze=freeze,
    )


def test_the_loss_is_nt_xent_of_the_projected_views():
    of = _method(TREE)  # Nothing is dropped in it: training is evaluation.
    params, extra = _fresh(of)
    batch = _batch(of)
    value, (_, metrics) = jax.jit(of.loss, static_argnames="phase")(
        params, extra, batch, jax.random.key(0), phase=None
    )
    z = []
    for v in (0, 1):
        x = of.features(params, extra, batch["global"][:, v])["pooled"]
        h = (
            x @ params["projector"]["fc1"]["kernel"]
            + params["projector"]["fc1"]["bias"]
        )
        last = params["projector"]["fc2"]
        z.append(np.maximum(h, 0) @ last["kernel"] + last["bias"])
    want, _ = contrastive.nt_xent(*z, temperature=0.07)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    assert 0 <= float(metrics["contrast/accuracy"]) <= 1


@pytest.mark.parametrize("batchnorm", [False, True])
def test_four_devices_give_the_loss_and_gradient_of_one(batchnorm):
    of = _method(TREE, projector=dict(batchnorm=batchnorm))
    params, extra = _fresh(of)
    batch = _batch(of)
    grad = functools.partial(jax.value_and_grad(of.loss, has_aux=True), phase=None)
    run = jax.jit(grad, compiler_options=QUICK)
    (want, (stats, _)), slopes = run(params, extra, batch, jax.random.key(0))
    mesh = devices.mesh(devices.Mesh(), 8)
    assert mesh.size == 4
    split = jax.device_put(batch, devices.batch_sharding(mesh))
    whole = jax.device_put((params, extra), devices.replicated(mesh))
    (got, (other, _)), found = run(*whole, split, jax.random.key(0))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert jax.tree.structure(stats) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_plain_vit_learns_to_tell_the_images_of_a_batch_apart():
    of = _method(objective=dict(temperature=0.2))
    params, extra = _fresh(of)
    optimizer = _optimizer(params)
    phase = step.phase_at(of, optimizer, 0)
    state = step._state(0, params, extra, optimizer, jax.random.key(0), phase)
    run = jax.jit(step.make(of, optimizer), static_argnums=2, compiler_options=QUICK)
    losses, batch = [], _batch(of)
    for _ in range(20):
        state, metrics = run(state, batch, phase)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    before, after = tree.flat(params), tree.flat(state.params)
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert moved == set(before), set(before) - moved


@pytest.mark.parametrize("model", [PLAIN, TREE], ids=["vit", "hvit"])
def test_freezeout_freezes_blocks_and_nothing_else(model):
    of = _method(model)
    params, extra = _fresh(of)
    freeze = freezeout.FreezeOut(schedule="linear", t_0=0.3, layers=of.freeze_layers())
    optimizer = _optimizer(params, freeze=freeze)
    first, late = (step.phase_at(of, optimizer, i) for i in (0, 15))
    assert not first.frozen
    assert "encoder/block_0/mlp/fc1/kernel" in late.frozen
    assert not any(k.startswith("projector") for k in late.frozen)
    state = step._state(0, params, extra, optimizer, jax.random.key(0), first)
    state = step.enter(state, late, optimizer).replace(step=jnp.int32(15))
    run = jax.jit(step.make(of, optimizer), static_argnums=2, compiler_options=QUICK)
    new, _ = run(state, _batch(of), late)
    before, after = tree.flat(params), tree.flat(new.params)
    still = {k for k in before if np.array_equal(before[k], after[k])}
    assert still == set(late.frozen)


def test_views_are_drawn_one_by_one():
    of = _method(batch_size=2)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    example = dict(image=image, label=3, index=7)
    run = of.transform()
    a, b = (run(example, np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(a["global"], b["global"]) and a["label"] == 3
    assert not np.array_equal(a["global"][0], a["global"][1])
    other = run(example, np.random.default_rng(1))["global"]
    assert not np.array_equal(a["global"], other)
    # Spectral planes are cropped and mirrored, and keep their values.
    planes = np.concatenate([image // 2, np.full((40, 40, 1), 9, np.uint8)], -1)
    got = run(dict(example, image=planes), np.random.default_rng(0))["global"]
    assert got.shape[-1] == 4 and (got[..., 3] == 9).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_the_device_are_those_of_the_host(channels):
    """Mean and spread of the pixels; planes of a spectral image keep their values."""
    paint = dict(jitter=(0.4, 0.4, 0.4, 0.1), blur_prob=0.5, grayscale_prob=0.3)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 24, channels), np.uint8)
    draws = np.random.default_rng(1)
    still = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    of = {k: views.Views(24, **still, **paint, colour=k) for k in ("host", "device")}
    host = np.stack([of["host"].view(pixels, draws) for _ in range(400)])
    plain = np.stack([of["device"].view(pixels, draws) for _ in range(400)])
    np.testing.assert_array_equal(plain, np.broadcast_to(pixels, plain.shape))
    m = _method(augment=still | paint | {"colour": "device"}, size=24)
    recipe = m.augment.recipe(24)
    device = np.asarray(jitter.augment(jax.random.key(0), plain, **recipe))
    np.testing.assert_array_equal(device[..., 3:], plain[..., 3:])
    for measure in (np.mean, np.std):
        a, b = (measure(x[..., :3], (1, 2, 3)) for x in (device, host))
        # 400 draws: the mean of each of these is known to about 1.5 grey levels.
        assert abs(a.mean() - b.mean()) < 4
        np.testing.assert_allclose(
            np.quantile(a, (0.1, 0.9)), np.quantile(b, (0.1, 0.9)), atol=8
        )


def test_the_loss_colours_what_the_host_left_alone():
    m = _method(TREE, augment=dict(colour="device"))
    params, extra = _fresh(m)
    batch = _batch(m)
    run = jax.jit(lambda key: m.loss(params, extra, batch, key, phase=None)[0])
    one, again, other = (run(jax.random.key(k)) for k in (0, 0, 1))
    assert one == again != other
    host = _method(TREE)
    run = jax.jit(lambda key: host.loss(params, extra, batch, key, phase=None)[0])
    assert run(jax.random.key(0)) == run(jax.random.key(1)) != one


def test_sides_that_change_are_compiled_once_each():
    growing = resolution.Resolution(start=8)
    m = _method(TREE, resolution=growing)
    assert [m.phase(t) for t in (0, 5, 15, 19)] == [8, 8, 16, 16]
    params, extra = _fresh(m)
    optimizer = _optimizer(params)
    compiled = []

    def build(phase, batch):
        function = step.make(m, optimizer)
        compiled.append(phase.method)
        return jax.jit(lambda s, b: function(s, b, phase), compiler_options=QUICK)

    executables = {}
    phase = step.phase_at(m, optimizer, 0)
    state = step._state(0, params, extra, optimizer, jax.random.key(0), phase)
    transform, rng = m.transform(), np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 24, 20, 3), np.uint8)
    for at in (0, 14, 15, 16):
        rows = [transform(dict(image=x, step=at), rng)["global"] for x in image]
        phase = step.phase_at(m, optimizer, at)
        if phase not in executables:
            executables[phase] = build(phase, None)
        state, metrics = executables[phase](state, {"global": np.stack(rows)})
        assert metrics["nonfinite"] == 0
    assert compiled == [8, 16] and int(state.step) == 4


def test_impossible_settings_are_one_line_each():
    (line,) = _method(size=18).check()
    assert "augment.size=18: must be a multiple of model.patch=4" in line
    (line,) = _method(TREE, objective=dict(pool="cls")).check()
    assert "objective.pool=cls: this model has" in line
    (line,) = _method(batch_size=1).check()
    assert "2 or more, for negatives" in line
    lines = list(views.Views(8, ratio=(2.0, 1.0), blur_kernel=4).check())
    assert lines[0] == "ratio=(2.0, 1.0): smallest <= largest" and len(lines) == 2
    problems = config.Problems()
    wrong = dict(size=0, jitter=(1.0, 1.0, 1.0, 0.9), flip=1.5)
    config.section(views.Views, wrong, "augment", problems)
    assert sorted(problems) == [
        "augment.flip=1.5: in [0, 1]",
        "augment.jitter=(1.0, 1.0, 1.0, 0.9): every value in [0, 0.5]",
        "augment.size=0: 1 or more",
    ]
