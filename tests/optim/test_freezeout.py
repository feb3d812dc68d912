"""FreezeOut for any method: events, rates, and what the options mean."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import parts as recipe
from tests import runs
from tests.methods.parts import test_method as test_parts
from vitssl import config, errors, tree
from vitssl.methods import table
from vitssl.models import vit
from vitssl.optim import freezeout, optimizer
from vitssl.run import build, experiment

LAYERS = freezeout.vit_layers(3, "encoder/", (("head/.*", 3),))
NAMES = (
    "encoder/patch_embed/kernel",
    "encoder/cls",
    "encoder/block_0/attn/kernel",
    "encoder/block_1/attn/kernel",
    "encoder/block_2/attn/kernel",
    "head/kernel",
    "other/kernel",
)
ADAMW = dict(
    name="adamw",
    lr=0.1,
    schedule="cosine",
    warmup_epochs=1.0,
    min_lr=0.001,
    wd=0.0,
    clip_norm=0.0,
)


def _make(total=110, **freeze):
    params = {k: jnp.ones((2, 2)) for k in NAMES}
    spec = freezeout.FreezeOut(**dict(schedule="cubic", layers=LAYERS) | freeze)
    made = optimizer.make(
        optimizer.Optim(**ADAMW),
        params,
        total_steps=total,
        steps_per_epoch=10,
        batch_size=1,
        freeze=spec,
    )
    return made, params


def test_layers_freeze_in_order_and_the_last_never():
    made, _ = _make(t_0=0.8)
    # r = (0.8 + 0.2 i / 3)^3 of the 100 steps after ten of warm-up, then strictly more.
    want = {0: 10 + 51 + 1, 1: 10 + 65 + 1, 2: 10 + 81 + 1}
    got = {made.layers[k]: v for k, v in made.frozen_from.items()}
    assert got == want
    assert made.frozen(61) == frozenset()
    assert made.frozen(62) == {"encoder/patch_embed/kernel"}
    assert "encoder/cls" in made.frozen(76) and "encoder/cls" not in made.frozen(75)
    assert {"head/kernel", "encoder/block_2/attn/kernel"}.isdisjoint(made.frozen(109))
    assert "other/kernel" not in made.frozen(109)  # No rule: never.


def test_as_coded_the_class_token_never_freezes():
    made, _ = _make(cls_token=False)
    assert "encoder/cls" not in made.frozen_from


def test_without_the_patch_embedding_indices_count_from_block_0():
    made, _ = _make(patch_embed=False, t_0=0.8)
    assert "encoder/patch_embed/kernel" not in made.frozen_from
    # Now L = 2: r_0 is block 0's.
    assert made.frozen_from["encoder/block_0/attn/kernel"] == 10 + 51 + 1


@pytest.mark.parametrize("scale", [True, False])
def test_every_layer_has_its_own_cosine(scale):
    made, params = _make(t_0=0.8, scale_lr=scale)
    step, r = 40, 0.8**3
    grads = {k: jnp.ones((2, 2)) for k in params}
    # One Adam step from zero moments moves every weight by its rate, almost exactly.
    new, _, metrics = made.update(grads, made.init(params), params, step)
    moved = {k: float((params[k] - new[k]).mean()) for k in params}
    peak = 0.1 / r if scale else 0.1
    want = 0.5 * peak * (1 + np.cos(np.pi * 30 / (100 * r)))
    np.testing.assert_allclose(moved["encoder/patch_embed/kernel"], want, rtol=1e-5)
    flat = 0.001 + 0.099 * 0.5 * (1 + np.cos(np.pi * 0.3))
    for name in ("encoder/cls", "other/kernel"):  # They follow the common schedule.
        np.testing.assert_allclose(moved[name], flat, rtol=1e-5)
    np.testing.assert_allclose(metrics["lr/layer_00"], want, rtol=1e-5)
    assert metrics["freeze/layers"] == 0


def test_frozen_leaves_have_no_state_and_are_counted():
    made, params = _make(t_0=0.5)
    frozen = made.frozen(80)
    live = {k: v for k, v in params.items() if k not in frozen}
    assert 0 < len(live) < len(params)
    opt = optimizer.drop(made.init(params), frozen)
    _, opt, metrics = made.update(live, opt, live, 80)
    assert set(opt.mu) == set(live)
    assert metrics["freeze/layers"] == 3
    assert "lr/layer_00" not in metrics and "lr/layer_03" in metrics


def test_flat_rates_freeze_all_the_same():
    made, params = _make(layerwise_lr=False, t_0=0.5)
    assert made.frozen_from["encoder/patch_embed/kernel"] == 10 + 12 + 1
    grads = {k: jnp.ones((2, 2)) for k in params}
    new, _, _ = made.update(grads, made.init(params), params, 15)
    moved = {float((params[k] - new[k]).mean()) for k in params}
    assert max(moved) - min(moved) < 1e-7


def test_the_warm_up_may_lead_to_every_layers_own_rate():
    made, _ = _make(t_0=0.8, warmup_to_layer_lr=True)
    before, after = (float(made._rate(t, 0, 1.0)) for t in (9, 10))
    np.testing.assert_allclose(before / after, 0.9, rtol=1e-4)
    jump, _ = _make(t_0=0.8)
    before, after = (float(jump._rate(t, 0, 1.0)) for t in (9, 10))
    np.testing.assert_allclose(before / after, 0.9 * 0.8**3, rtol=1e-4)


def test_t_0_of_one_freezes_nothing():
    made, _ = _make(t_0=1.0)
    assert made.frozen_from == {}


@pytest.mark.parametrize("t_0", [0.0, -0.5, 1.2])
def test_t_0_out_of_range_is_one_clear_line(t_0):
    problems = config.Problems()
    config.section(freezeout.FreezeOut, {"t_0": t_0}, "freeze", problems)
    assert problems == [f"freeze.t_0={t_0}: in (0, 1]"]


def test_freezing_everything_is_refused():
    params = {k: jnp.ones((2, 2)) for k in NAMES}
    spec = optimizer.Optim(**ADAMW, freeze=((".*block_2.*|head.*|other.*", 0.9),))
    with pytest.raises(errors.UsageError, match="freeze every parameter before step"):
        optimizer.make(
            spec,
            params,
            total_steps=110,
            steps_per_epoch=10,
            batch_size=1,
            freeze=freezeout.FreezeOut(schedule="cubic", layers=LAYERS),
        )


def test_a_method_without_a_table_needs_one():
    with pytest.raises(errors.UsageError, match="give freeze.layers"):
        optimizer.make(
            optimizer.Optim(**ADAMW),
            {"x": jnp.ones(2)},
            total_steps=110,
            steps_per_epoch=10,
            batch_size=1,
            freeze=freezeout.FreezeOut(schedule="cubic"),
        )


def test_layers_of_another_depth_are_refused_with_names():
    with pytest.raises(errors.UsageError, match="rules that never win"):
        _make(layers=freezeout.vit_layers(5, "encoder/"))


def _with_own_table(spec, *changes):
    """Return what `build.build` makes of a config with FreezeOut over 100 steps."""
    freeze = ("freeze.schedule=linear", "freeze.t_0=0.5", "steps=100")
    freeze += ("optim.warmup_epochs=0.0",)
    path = runs.ROOT / "configs" / spec
    c = experiment.load(str(path), [*freeze, *changes])
    return build.build(experiment.read(c))


@pytest.mark.parametrize(
    "spec, first, last",
    [
        ("hjepa.py:smoke", "encoder/patch_embed", "encoder/block_1"),
        ("localmim.py:smoke", "encoder/patch_embed", "encoder/block_6"),
        ("latent_mim.py:smoke", "encoder/patch_embed", "encoder/block_0"),
        ("dino.py:smoke", "encoder/patch_embed", "encoder/block_3"),
        ("mae.py:smoke", "encoder/patch_embed", "encoder/block_3"),
        ("distill.py:smoke", "encoder/patch_embed", "encoder/block_2"),
        ("simclr_hvit.py:smoke", "encoder/patch_embed", "encoder/block_1"),
        ("finetune_vit.py:smoke", "backbone/patch_embed", "backbone/block_1"),
        ("finetune_hvit.py:infrared", "backbone/patch_embed", "backbone/spectral/norm"),
        ("parts.py:smoke", "stage_1/backbone/patch_embed", "stage_2/backbone/block_0"),
    ],
)
def test_every_method_has_a_table_that_fits_its_parameters(spec, first, last):
    parts = _with_own_table(spec)
    made = parts.optimizer
    assert made.frozen(50) == frozenset()
    early = {k for k in made.layers if made.layers[k] == 0}
    assert made.frozen(51) == early and any(k.startswith(first) for k in early)
    never = set(made.layers) - made.frozen(99)
    assert any(k.startswith(last) for k in never)
    assert made.plan.last == {made.layers[k] for k in never if last in k}.pop()


def test_the_methods_of_that_test_are_all_there_are():
    mark = test_every_method_has_a_table_that_fits_its_parameters.pytestmark[0]
    files = {spec.split(":")[0] for spec, *_ in mark.args[1]}
    folder = runs.ROOT / "configs"
    named = {experiment.load(str(folder / f)).method for f in files}
    assert named == set(table.METHODS)


PARTS = {
    "single_stage": ("stage_1", 1),
    "baseline": ("stage_2", 1),
    "given_mask": ("stage_2", 1),
    "resnet": ("stage_1", 4),
    "convnext": ("stage_1", 4),
}


@pytest.mark.parametrize("kind", PARTS)
def test_every_kind_of_part_discovery_has_a_table(kind):
    stage, depth = PARTS[kind]
    m = test_parts.method(**{**test_parts.KINDS[kind], "size": 48})
    shapes = {"image": jax.ShapeDtypeStruct((1, 48, 48, 3), "uint8")}
    params, _ = jax.eval_shape(m.init, jax.random.key(0), shapes)
    made = optimizer.make(
        optimizer.Optim(**ADAMW | dict(warmup_epochs=0.0)),
        params,
        total_steps=100,
        steps_per_epoch=10,
        batch_size=1,
        freeze=freezeout.FreezeOut(
            schedule="linear", t_0=0.5, layers=m.freeze_layers()
        ),
    )
    assert made.plan.last == depth and -1 not in made.layers.values()
    by_layer = [{k for k in made.layers if made.layers[k] == i} for i in range(5)]
    assert made.frozen(51) == by_layer[0]
    assert all(k.startswith(f"{stage}/backbone/") for k in made.frozen(99))
    assert made.frozen(99) == set().union(*by_layer[:depth])


def test_a_stage_that_is_frozen_from_the_start_stays_so_while_the_other_freezes():
    rules = recipe.groups(scratch=10.0)
    parts = _with_own_table(
        "parts.py:smoke", "model.depth=2", f"optim.freeze={rules['freeze']!r}"
    )
    made = parts.optimizer
    body = re.compile("stage_1/backbone/(patch_embed|block_|norm)")
    first = {k for k in made.layers if body.match(k)}
    assert made.frozen(0) == made.frozen(50) == first
    stem = {"stage_2/backbone/patch_embed/kernel", "stage_2/backbone/patch_embed/bias"}
    assert made.frozen(51) == first | stem
    block = {k for k in made.layers if made.layers[k] == 1}
    assert "stage_1/backbone/cls" in block  # Not of the optimizer's own rules.
    assert made.frozen(99) == first | stem | block


def test_a_vit_without_tokens_of_its_own_has_a_table():
    bare = vit.ViT(8, 2, 2, 4, 16, cls=False, positions="sincos")
    params = jax.eval_shape(bare.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    names = tree.flat(params["params"])
    found = tree.match(names, bare.freeze_layers(), what="layers")
    assert set(found.values()) == {0, 1, 2}
