"""FreezeOut for any method: events, rates, and what the options mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import errors
from vitssl.optim import freezeout, optimizer

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
    (line,) = freezeout.FreezeOut(schedule="cubic", t_0=t_0).check()
    assert line.startswith(f"t_0={t_0}: a share of the run")


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


def test_every_method_has_a_table_that_fits_its_parameters():
    from tests.methods.classify import test_method
    from tests.methods.hjepa import tiny
    from tests.methods.localmim import test_method as test_localmim

    jepa = tiny.method()
    shapes = jax.eval_shape(lambda: tiny.batch(jepa))
    for method, params in (
        (jepa, jax.eval_shape(jepa.init, jax.random.key(0), shapes)[0]),
        (test_method._method(), test_method._fresh(test_method._method())[0]),
        (test_localmim._method(), test_localmim._fresh(test_localmim._method())[0]),
    ):
        made = optimizer.make(
            optimizer.Optim(**ADAMW),
            params,
            total_steps=100,
            steps_per_epoch=10,
            batch_size=1,
            freeze=freezeout.FreezeOut(
                schedule="linear", t_0=0.5, layers=method.freeze_layers()
            ),
        )
        assert made.plan.last == method.model.depth
        first = made.frozen(99)
        assert any("patch_embed" in k for k in first), type(method)
        last = f"block_{method.model.depth - 1}/"
        assert not any(last in k and "decoder" not in k for k in first)
