"""Distillation against numpy: losses, grids, teachers of other sizes and kinds."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from vitssl import errors, tree
from vitssl.convert import backbone
from vitssl.data import crops
from vitssl.methods import base
from vitssl.methods.distill import method, objective, teacher
from vitssl.models import convnext, hvit, resnet, vit
from vitssl.run import build, experiment, loop, opened

STUDENT = vit.ViT(width=8, depth=1, heads=2, patch=4, image_size=16)
CROPS = crops.MultiCrop(
    num_global_crops=1,
    num_local_crops=2,
    global_crop_size=16,
    local_crop_size=8,
    global_crop_scale=(0.5, 1.0),
    local_crop_scale=(0.1, 0.5),
    global_color_jitter=0.0,
    local_color_jitter=0.0,
    color_jitter_prob=0.0,
    horizontal_flip_prob=0.5,
    interpolation="fast",
    colour="host",
)
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def _imported(**model):
    """Return weights of another width and patch, drawn large enough to tell."""
    own = dict(name="vit", width=12, depth=1, heads=2, patch=6, image_size=12) | model
    about = backbone.About(own, (0.4,) * 3, (0.2,) * 3, source="other")
    module = backbone.Backbone(about, {}).module()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
    rng = np.random.default_rng(0)
    leaves = {
        f"encoder/{k}": rng.normal(0, 0.4, x.shape).astype(np.float32)
        for k, x in tree.flat(shapes["params"]).items()
    }
    return backbone.Backbone(about, leaves)


def _method(found=None, model=STUDENT, **keys):
    run = base.Run(4, 2, 3, 0, 3, MEAN, STD, weights=lambda path, part: found)
    own = dict(teacher=teacher.Teacher("there" if found else "untrained"))
    return method.Distill(run=run, model=model, multicrop=CROPS, **own | keys)


def _batch():
    rng = np.random.default_rng(1)
    return {
        "global": rng.integers(0, 256, (3, 1, 16, 16, 3), np.uint8),
        "local": rng.integers(0, 256, (3, 2, 8, 8, 3), np.uint8),
    }


def _state(of):
    """Return (params, extra) with what `build.Parts.fresh` puts into it."""
    params, extra = of.init(jax.random.key(0), _batch())
    return params, extra | jax.tree.map(jnp.asarray, of.given())


def _norm(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


DISTANCES = {
    "cosine": lambda p, t: np.mean(1 - np.sum(_norm(p) * _norm(t), -1)),
    "mse": lambda p, t: np.mean(
        (p - (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-6))
        ** 2
    ),
    "mse, raw": lambda p, t: np.mean((p - t) ** 2),
}


def _key(name):
    kind, _, raw = name.partition(", ")
    return objective.Objective(kind, pooled=0.5, patches=2.0, standardise=not raw)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_loss_is_that_of_numpy_every_crop_counting_the_same(name):
    """A teacher of patch 6 sees crops of 16 px at 18, and those of 8 px at 6."""
    found = _imported()
    of = _method(found, objective=_key(name))
    (params, extra), batch = _state(of), _batch()
    value, (after, metrics) = jax.jit(of.loss)(params, extra, batch, jax.random.key(2))
    want, encode, module = {"pooled": 0.0, "tokens": 0.0}, found.encode(), STUDENT
    for kind, share, seen, grid in (("global", 1 / 3, 18, 4), ("local", 2 / 3, 6, 2)):
        image = batch[kind].reshape(-1, *batch[kind].shape[2:]).astype(np.float32) / 255
        near = (image - 0.5) / 0.25
        far = jax.image.resize(
            (image - 0.4) / 0.2, (len(image), seen, seen, 3), "linear"
        )
        right = encode.module.apply(found.variables(), far, method="features")
        tokens = right["tokens"].reshape(len(image), seen // 6, seen // 6, 12)
        tokens = jax.image.resize(tokens, (len(image), grid, grid, 12), "linear")
        left = module.apply({"params": params["encoder"]}, near, method="features")
        goal = {"pooled": right["cls"], "tokens": tokens.reshape(len(image), -1, 12)}
        ours = {"pooled": left["mean"], "tokens": left["tokens"]}
        for key, x in ours.items():
            head = params["heads"][key]
            line = np.asarray(x) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
            want[key] += share * DISTANCES[name](line, np.asarray(goal[key]))
    for key, number in want.items():
        np.testing.assert_allclose(metrics[f"distill/{key}"], number, rtol=2e-5)
    np.testing.assert_allclose(value, 0.5 * want["pooled"] + 2 * want["tokens"], 2e-5)
    jax.tree.map(np.testing.assert_array_equal, after["teacher"], found.variables())


def test_nothing_but_the_student_and_its_heads_learns():
    of = _method(_imported(), objective=objective.Objective(patches=0.0))
    params, extra = _state(of)
    assert set(params["heads"]) == {"pooled"}

    def loss(params, extra):
        return of.loss(params, extra, _batch(), jax.random.key(0))[0]

    own, teachers = jax.grad(loss, (0, 1))(params, extra)
    assert all(np.any(x) for x in jax.tree.leaves(own))
    assert not any(np.any(x) for x in jax.tree.leaves(teachers))


def test_grids_are_resampled_as_pixels_are():
    tokens = np.arange(16.0, dtype=np.float32).reshape(1, 16, 1)
    found = np.asarray(objective.resampled(jnp.asarray(tokens), 4))[0, :, 0]
    # A triangle over four pixels, of which three are there: 3/7, 3/7, 1/7.
    steps = found[1] - found[0], found[2] - found[0]
    assert steps == pytest.approx((11 / 7, 44 / 7))
    np.testing.assert_allclose(found.mean(), 7.5, rtol=1e-6)
    assert objective.resampled(tokens, 16) is tokens
    with pytest.raises(ValueError, match="no square grids"):
        objective.resampled(tokens, 6)


def test_a_student_with_batch_statistics_keeps_them_and_is_not_split():
    net = resnet.ResNet((1, 1, 1, 1), (4, 4, 4, 4), stem=4, kind="basic")
    of = _method(_imported(), model=net)
    params, extra = _state(of)
    _, (after, _) = of.loss(params, extra, _batch(), jax.random.key(0))
    before, now = (x["stats"]["encoder"]["bn1"]["mean"] for x in (extra, after))
    assert not of.divisible and np.any(before != now)
    found = of.features(params, after, _batch()["global"][:, 0])
    assert found["pooled"].shape == (3, net.width)


@pytest.mark.parametrize(
    "model",
    [
        hvit.HViT(width=8, depths=(1, 1), heads=(1, 2), patch=4, image_size=16),
        convnext.ConvNeXt((1, 1, 1, 1), (4, 4, 4, 8), output_stride=8),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_backbone_can_be_student_and_teacher(model):
    of = _method(model=model)  # Of an untrained network of its own kind.
    assert of.divisible and of.given() == {}
    params, extra = _state(of)
    value, _ = of.loss(params, extra, _batch(), jax.random.key(0))
    assert 0 < float(value) < 4
    same = jax.tree.map(np.array_equal, extra["teacher"]["params"], params["encoder"])
    assert not all(jax.tree.leaves(same))


def _load(*overrides):
    return experiment.load(f"{runs.ROOT}/configs/distill.py:smoke", overrides)


def _faulty(*overrides):
    with pytest.raises(errors.VitsslError) as caught:
        build.build(experiment.read(_load(*overrides)))
    return str(caught.value)


def test_what_a_teacher_cannot_be_is_one_line(tmp_path):
    assert "teacher.from: empty; give the workdir" in _faulty("teacher.from=")
    assert f"{tmp_path}: no complete checkpoint" in _faulty(f"teacher.from={tmp_path}")
    backbone.write(tmp_path, _imported())
    colours = _faulty(f"teacher.from={tmp_path}")
    assert "reads 3 channel(s), data.channels=1" in colours
    rgb = ["data.channels=3", f"data.mean={MEAN}", f"data.std={STD}"]
    there = [f"teacher.from={tmp_path}", *rgb]
    assert "an import has no part 'ema'" in _faulty(*there, "teacher.part=ema")
    mean = _imported(cls=False)
    backbone.write(tmp_path, dataclasses.replace(mean, about=mean.about))
    assert "pool=cls: mean (there is no class token)" in _faulty(*there)
    nothing = _faulty("objective.pooled=0.0", "objective.patches=0.0")
    assert "pooled=0 and patches=0: nothing to learn" in nothing
    small = _faulty("model.name=convnext", "multicrop.local_crop_size=31")
    assert "multicrop.local_crop_size=31: at least 32 pixels" in small
    assert "objective.pool=cls" in _faulty("objective.pool=cls", "model.cls=False")


def test_a_run_teaches_the_next_which_goes_on_with_the_teacher_it_began_with(tmp_path):
    own = ["evals.final=()", "evals.every_epochs=0", "log.tensorboard=False"]
    one, two = tmp_path / "one", tmp_path / "two"
    loop.run(experiment.read(_load(*own)), one, name="one")
    begun = [*own, f"teacher.from={one}", "checkpoint.every_epochs=0.0113"]
    loop.run(experiment.read(_load(*begun)), two, name="two")
    stored = opened.past(two).trees("extra")["extra"]
    taught = tree.flat(opened.past(one).network().variables())
    assert {k.removeprefix("teacher/") for k in stored} == set(taught)
    for name, leaf in taught.items():
        np.testing.assert_array_equal(stored[f"teacher/{name}"], leaf)
    whole = runs.state(two, 2)
    # Another network of the same kind lies there by now.
    shutil.rmtree(two / "checkpoints" / "2")
    shutil.rmtree(one)
    loop.run(experiment.read(_load(*own, "seed=5")), one, name="one")
    loop.run(experiment.read(_load(*begun)), two, name="two")
    again = runs.state(two, 2)
    assert all(np.array_equal(whole[k], again[k]) for k in whole)
    assert opened.past(two).encoder().about.model["width"] == 32
    assert json.loads((two / "config.json").read_text())["teacher"]["from"] == str(one)
