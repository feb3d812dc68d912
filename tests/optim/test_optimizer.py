"""Optimizers against optax and torch formulas, rules, schedules, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import toy
from vitssl import config, errors, tree
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim
from vitssl.run import experiment

PARAMS = {"a/kernel": jnp.ones((4, 3)) * 0.5, "a/bias": jnp.arange(3.0)}
GRADS = {"a/kernel": jnp.linspace(-1, 1, 12).reshape(4, 3), "a/bias": jnp.ones(3)}
VALUES = dict(
    name="adamw",
    lr=0.01,
    schedule="constant",
    warmup_epochs=0.0,
    min_lr=0.0,
    wd=0.1,
    clip_norm=0.0,
)


def _make(total_steps=10, steps_per_epoch=2, batch_size=64, **changes):
    return optim.make(
        optim.Optim(**{**VALUES, **changes}),
        tree.nest(PARAMS),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
    )


def _run(optimizer, steps=3):
    params, opt = PARAMS, optimizer.init(PARAMS)
    for i in range(steps):
        params, opt, _ = optimizer.update(GRADS, opt, params, i)
    return params


def test_adamw_is_optax_adamw():
    reference = optax.adamw(0.01, weight_decay=0.1)
    params, opt = PARAMS, reference.init(PARAMS)
    for _ in range(3):
        updates, opt = reference.update(GRADS, opt, params)
        params = optax.apply_updates(params, updates)
    got = _run(_make())
    for k, want in params.items():
        np.testing.assert_allclose(got[k], want, rtol=1e-6)


def _torch(name, steps=3):
    """Adam and SGD as torch writes them, in float64."""
    out = {}
    for k, p in PARAMS.items():
        p, g0 = np.asarray(p, np.float64), np.asarray(GRADS[k], np.float64)
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t in range(1, steps + 1):
            g = g0 + 0.1 * p
            if name == "sgd":
                m = 0.9 * m + g
                p = p - 0.01 * m
            elif name == "adam":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
                p = p - 0.01 * hat[0] / (np.sqrt(hat[1]) + 1e-8)
            else:
                if p.ndim > 1:
                    g = g * 0.001 * np.linalg.norm(p) / np.linalg.norm(g)
                m = 0.9 * m + g
                p = p - 0.01 * m
        out[k] = p
    return out


def _timm(name, steps=3):
    """NAdam of torch (timm's nadam) and timm's Lamb without clipping, in float64."""
    out = {}
    for k, p in PARAMS.items():
        p, g0 = np.asarray(p, np.float64), np.asarray(GRADS[k], np.float64)
        m, v, product = np.zeros_like(p), np.zeros_like(p), 1.0
        decay = 0.0 if k.endswith("bias") else 0.1
        for t in range(1, steps + 1):
            g = g0 + decay * p if name == "nadam" else g0
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            root = np.sqrt(v / (1 - 0.999**t)) + 1e-8
            if name == "nadam":
                now, after = (0.9 * (1 - 0.5 * 0.96 ** (0.004 * s)) for s in (t, t + 1))
                product *= now
                p = p - 0.01 * (1 - now) / (1 - product) * g / root
                p = p - 0.01 * after / (1 - product * after) * m / root
            else:
                u = m / (1 - 0.9**t) / root + decay * p
                if decay:
                    u = u * np.linalg.norm(p) / np.linalg.norm(u)
                p = p - 0.01 * u
        out[k] = p
    return out


@pytest.mark.parametrize("name", ["nadam", "lamb"])
def test_nadam_and_lamb_are_those_of_timm(name):
    optimizer = _make(name=name, wd_rules=((".*/bias", 0.0), (".*", 1.0)))
    for steps in (1, 3):
        for k, want in _timm(name, steps).items():
            np.testing.assert_allclose(_run(optimizer, steps)[k], want, rtol=2e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "lars"])
def test_coupled_optimizers_are_those_of_torch(name):
    got = _run(_make(name=name))
    for k, want in _torch(name).items():
        np.testing.assert_allclose(got[k], want, rtol=2e-5)


def test_factors_scale_rate_and_decay_of_their_leaves_alone():
    rules = ((".*/bias", 0.5), (".*", 1.0))
    plain, half = _run(_make(wd=0.0), 1), _run(_make(wd=0.0, lr_rules=rules), 1)
    np.testing.assert_array_equal(plain["a/kernel"], half["a/kernel"])
    moved = PARAMS["a/bias"] - plain["a/bias"]
    np.testing.assert_allclose(PARAMS["a/bias"] - half["a/bias"], moved / 2, rtol=1e-4)
    no_decay = _run(_make(wd_rules=((".*/bias", 0.0), (".*", 1.0))), 1)
    np.testing.assert_array_equal(no_decay["a/bias"], plain["a/bias"])
    assert (no_decay["a/kernel"] != plain["a/kernel"]).all()


def test_clipping_limits_the_norm_and_reports_the_one_before():
    optimizer = _make(name="sgd", momentum=0.0, wd=0.0, clip_norm=0.5, lr=1.0)
    new, _, seen = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, 0)
    norm = float(optax.tree.norm(GRADS))
    assert float(seen["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    moved = {k: PARAMS[k] - new[k] for k in PARAMS}
    assert float(optax.tree.norm(moved)) == pytest.approx(0.5, rel=1e-4)


def test_schedule_at_named_steps():
    optimizer = _make(
        schedule="cosine", warmup_epochs=1.0, start_lr=0.002, min_lr=0.001
    )
    want = [0.002, 0.006, 0.01, 0.0055, 0.001]
    got = [float(optimizer.lr(i)) for i in (0, 1, 2, 6, 10)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_rate_is_scaled_by_the_global_batch():
    assert _make(lr_batch=256, batch_size=64).peak == pytest.approx(0.0025)
    assert _make().peak == 0.01


def test_weight_decay_follows_its_cosine():
    optimizer = _make(wd=0.04, wd_end=0.4, wd_schedule="cosine")
    np.testing.assert_allclose(
        [float(optimizer.wd(i)) for i in (0, 5, 10)], [0.04, 0.22, 0.4], rtol=1e-5
    )


def test_freezing_is_a_function_of_the_step():
    optimizer = _make(freeze=((".*/bias", 0.5),))
    assert [optimizer.frozen(i) for i in (0, 4)] == [frozenset()] * 2
    assert [optimizer.frozen(i) for i in (5, 9)] == [frozenset({"a/bias"})] * 2
    assert _make(lr_rules=((".*/bias", 0.0), (".*", 1.0))).frozen(0) == {"a/bias"}


def test_drop_keeps_moments_and_counts_of_the_rest():
    optimizer = _make()
    opt = optimizer.init(PARAMS)
    _, opt, _ = optimizer.update(GRADS, opt, PARAMS, 0)
    less = optim.drop(opt, frozenset({"a/bias"}))
    assert set(less.mu) == set(less.nu) == {"a/kernel"}
    assert int(less.count) == 1 and (less.mu["a/kernel"] == opt.mu["a/kernel"]).all()


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(wd_rules=((".*/bias", 0.0),)), "no rule matches: a/kernel"),
        (dict(lr_rules=((".*", 1.0), ("b/.*", 0.0))), r"never win: \['b/\.\*'\]"),
        (dict(lr_rules=(("(", 1.0),)), "not a regular expression"),
        (dict(lr_rules=((".*", 0.0),)), "every parameter is frozen"),
        (dict(freeze=(("encodr/.*", 0.5),)), "rules that never win"),
        (dict(warmup_epochs=5.0), "leaves nothing of a run of 10 steps"),
    ],
)
def test_rules_that_do_not_fit_are_named(changes, says):
    with pytest.raises(errors.UsageError, match=says):
        _make(**changes)


def test_layer_decay_grows_towards_the_head():
    method = toy.make(depth=3)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), toy.batch())
    freeze = freezeout.FreezeOut(layers=method.model.freeze_layers("model/"))
    spec = _made_spec(layer_decay=0.5)
    length = dict(total_steps=10, steps_per_epoch=2, batch_size=64)
    factor = optim.make(spec, params, **length, freeze=freeze).lr_factor
    assert factor["model/pos_embed"] == factor["model/patch_embed/kernel"] == 0.5**4
    assert factor["model/block_0/norm1/scale"] == 0.5**3
    assert factor["model/block_2/mlp/fc1/kernel"] == 0.5
    assert factor["model/norm/bias"] == factor["head/kernel"] == 1.0


def _factors(spec, *overrides):
    """Return {name: factor of the rate} of a config's method."""
    checked = experiment.read(experiment.load(spec, overrides))
    method = checked.method(checked.run(classes=7))
    side = checked.training_size
    batch = {
        key: jax.ShapeDtypeStruct((2, *views, side, side, checked.run().channels), "u1")
        for key, views in (("image", ()), ("global", (2,)))
    }
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
    freeze = freezeout.FreezeOut(layers=method.freeze_layers())
    length = dict(total_steps=1000, steps_per_epoch=10, batch_size=64)
    spec = checked.settings.optim
    return optim.make(spec, params, **length, freeze=freeze).lr_factor


def test_layer_decay_of_a_vit_b_is_the_published_one():
    spec = "configs/finetune_vit.py:ft_vitb_from1600"
    got = _factors(spec, "optim.warmup_epochs=0.0")
    for name, factor in got.items():
        # As MAE's util/lr_decay.py numbers the layers of timm's ViT.
        layer = 13
        if "block_" in name:
            layer = int(name.split("block_")[1].split("/")[0]) + 1
        elif name.split("/")[1] in ("cls", "pos_embed", "patch_embed"):
            layer = 0
        assert factor == 0.65 ** (13 - layer), name
    assert got["backbone/pos_embed"] == pytest.approx(0.0037, rel=0.01)
    assert got["backbone/norm/scale"] == got["head/kernel"] == 1.0


def test_layer_decay_of_an_hvit_counts_blocks_through_the_stages():
    rules = "(('head/.*', 2.0), ('.*', 1.0))"
    got = _factors(
        "configs/finetune_hvit.py",
        "optim.warmup_epochs=0.0",
        "optim.layer_decay=0.5",
        f"optim.lr_rules={rules}",
    )
    # Stages of 1, 2 and 1 blocks: merge_0 follows block 0, merge_1 block 2.
    layers = {"patch_embed": 0, "patch_norm": 0, "pos_embed": 0, "norm": 5}
    layers |= {f"block_{i}": i + 1 for i in range(4)} | {"merge_0": 1, "merge_1": 3}
    for name, factor in got.items():
        net, module = name.split("/")[:2]
        want = 0.5 ** (5 - layers[module]) if net == "backbone" else 2.0
        assert factor == want, name


def test_layer_decay_without_a_table_says_what_to_give():
    with pytest.raises(errors.UsageError, match="optim.layer_decay=0.5: this method"):
        _make(layer_decay=0.5)
    assert _make(layer_decay=1.0).lr_factor == _make().lr_factor
    assert _faults(layer_decay=1.5) == ["optim.layer_decay=1.5: in [0, 1]"]


def test_the_rate_follows_the_root_of_the_batch():
    made = _make(lr=1e-6, lr_batch=16, lr_batch_power=0.5, batch_size=64)
    np.testing.assert_allclose(made.peak, 2e-6)
    # The published figure of 128 images a step.
    made = _make(lr=1e-6, lr_batch=16, lr_batch_power=0.5, batch_size=128)
    np.testing.assert_allclose(made.peak, 2.828427e-6, rtol=1e-6)


def test_a_normalised_decay_shrinks_with_the_length_of_the_run():
    # CUB: floor(5994 / 128) steps of an epoch, 90 epochs.
    made = _make(wd=0.05, wd_normalised=True, total_steps=46 * 90)
    np.testing.assert_allclose(made.wd(0), 7.7709e-4, rtol=1e-4)


def test_a_rate_by_the_epoch_is_constant_inside_it():
    made = _make(per_epoch=True, schedule="cosine", total_steps=8, steps_per_epoch=2)
    rates = [float(made.lr(s)) for s in range(8)]
    assert rates[0::2] == rates[1::2]
    want = [0.01 * (1 + np.cos(np.pi * e / 4)) / 2 for e in range(4)]
    np.testing.assert_allclose(rates[::2], want, rtol=1e-6)


def test_stairs():
    made = _make(schedule="stairs", stair_epochs=2.0, gamma=0.5, steps_per_epoch=3)
    rates = [float(made.lr(s)) / 0.01 for s in (0, 5, 6, 11, 12)]
    np.testing.assert_allclose(rates, [1, 1, 0.5, 0.5, 0.25])
    (line,) = _faults(schedule="stairs")
    assert line.startswith("optim.stair_epochs=0.0: schedule=stairs needs")


def test_stairs_count_from_the_end_of_the_warm_up():
    spec = dict(schedule="stairs", stair_epochs=7.0, gamma=0.5, warmup_epochs=2.0)
    steps = dict(steps_per_epoch=3, total_steps=60)
    epochs = (0, 1, 2, 7, 8, 9, 15, 16)
    made = _make(**spec, **steps)
    rates = [float(made.lr(3 * e)) / 0.01 for e in epochs]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 1, 0.5, 0.5, 0.25])
    # Unless the schedule does not wait for the warm-up.
    made = _make(**spec, **steps, warmup_over=True)
    rates = [float(made.lr(3 * e)) / 0.01 for e in epochs]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0.5, 0.5, 0.25, 0.25])


def _made_spec(**changes):
    return optim.Optim(**{**VALUES, **changes})


def _faults(**changes):
    """Return what is wrong with a config section."""
    problems = config.Problems()
    config.section(optim.Optim, VALUES | changes, "optim", problems)
    return problems


def test_floors_are_scaled_or_absolute():
    both = dict(schedule="cosine", min_lr=1e-4, start_lr=1e-5, warmup_epochs=1.0)
    for floors, factor in (("scaled", 10.0), ("absolute", 1.0)):
        made = _make(floors=floors, **both)
        np.testing.assert_allclose(made.lr(10, 10.0), factor * 1e-4, rtol=1e-5)
        np.testing.assert_allclose(made.lr(0, 10.0), factor * 1e-5, rtol=1e-5)
    np.testing.assert_allclose(made.lr(2, 10.0), 0.1, rtol=1e-5)


def test_a_warm_up_may_cover_the_beginning_of_the_schedule():
    made = _make(schedule="cosine", warmup_epochs=2.0, warmup_over=True)
    np.testing.assert_allclose(made.lr(2), 0.005, rtol=1e-6)
    np.testing.assert_allclose(made.lr(5), 0.005, rtol=1e-5)  # Half of the cosine.


def test_onecycle_rises_falls_and_cycles_beta1():
    cycle = dict(schedule="onecycle", cycle_rise=0.3, cycle_div=10.0)
    made = _make(20, cycle_final_div=100.0, cycle_b1=(0.85, 0.95), **cycle)
    steps = np.arange(20)
    rate, b1 = np.asarray(made.lr(steps)), np.asarray(made.b1(steps))
    # The peak is at step 0.3 * 20 - 1, and no warm-up comes before.
    assert int(np.argmax(rate)) == int(np.argmin(b1)) == 5
    want = {0: 1e-3, 5: 1e-2, 19: 1e-5}
    for at, value in want.items():
        np.testing.assert_allclose(rate[at], value, rtol=1e-5)
    np.testing.assert_allclose(b1[[0, 5, 19]], [0.95, 0.85, 0.95], rtol=1e-6)
    half = 1e-5 + (1e-2 - 1e-5) * 0.5 * (1 + np.cos(np.pi * 7 / 14))
    np.testing.assert_allclose(rate[12], half, rtol=1e-5)
    (line,) = _faults(**cycle | dict(warmup_epochs=1.0))
    assert "rises by itself" in line
    (line,) = _faults(cycle_b1=(0.85, 0.95))
    assert "needs schedule=onecycle" in line
    (line,) = _faults(**cycle, cycle_b1=(0.95, 0.85))
    assert line.endswith("cycle_b1=(0.95, 0.85): (), or (lowest, highest)")


def test_what_is_thawed_starts_like_a_fresh_optimizer():
    made = _make(10, 2, thaw=(("a/kernel", 2.0),), wd=0.0)
    assert [sorted(made.frozen(i)) for i in (0, 3, 4)] == [["a/kernel"]] * 2 + [[]]
    params, opt = dict(PARAMS), made.init({"a/bias": PARAMS["a/bias"]})
    for i in range(6):
        live = {k: v for k, v in params.items() if k not in made.frozen(i)}
        opt = made.release(opt, live)
        grads = {k: GRADS[k] for k in live}
        moved, opt, _ = made.update(grads, opt, live, i)
        params |= moved
    # A constant rate: two steps of a fresh Adam, its bias corrected from one on.
    fresh = _make(wd=0.0)
    want = _run(fresh, 2)
    np.testing.assert_allclose(params["a/kernel"], want["a/kernel"], rtol=1e-6)
    other = _run(fresh, 6)
    np.testing.assert_allclose(params["a/bias"], other["a/bias"], rtol=1e-6)
    # Going on from a stored state releases nothing anew.
    again = made.release(opt, params)
    assert again[1].mu["a/kernel"] is opt[1].mu["a/kernel"]


def test_a_thaw_that_leaves_nothing_or_comes_too_late_is_an_error():
    with pytest.raises(errors.UsageError, match="nothing is left to train before"):
        _make(thaw=((".*", 1.0),))
    with pytest.raises(errors.UsageError, match="releases leaves at step 10 of a run"):
        _make(10, 2, thaw=(("a/bias", 5.0),))
    (line,) = _faults(thaw=(("x", -1.0),))
    assert line.startswith("optim.thaw=(('x', -1.0),): ") and "0 or more" in line


def _growing(**changes):
    """A run of ten steps, in which leaves freeze before steps 4 and 6."""
    freeze = freezeout.FreezeOut(grow_batch=changes.pop("sizes"))
    spec = dict(
        name="adamw", lr=1.0, schedule="constant", warmup_epochs=0.0, min_lr=0.0, wd=0.0
    )
    rules = (("a/.*", 0.4), ("b/.*", 0.6))
    spec = optim.Optim(**spec, clip_norm=0.0, freeze=rules, **changes)
    params = {k: {"kernel": jnp.ones(2)} for k in "abc"}
    own = dict(total_steps=10, steps_per_epoch=5, batch_size=64)
    return optim.make(spec, params, **own, freeze=freeze)


@pytest.mark.parametrize(
    "changes, rates",
    [
        ({}, (1.0, 1.0, 1.0)),  # The rate does not follow.
        ({"lr_batch": 64}, (1.0, 1.5, 2.0)),
        ({"lr_batch": 16, "lr_batch_power": 0.5}, (2.0, 6**0.5, 8**0.5)),
    ],
)
def test_a_batch_grows_at_events_and_the_rate_follows_by_its_rule(changes, rates):
    made = _growing(sizes=(96, 128), **changes)
    assert made.grown == ((4, 96), (6, 128))
    found = [[float(made.lr(t)) for t in span] for span in ((0, 3), (4, 5), (6, 9))]
    np.testing.assert_allclose(found, [[r, r] for r in rates], rtol=1e-6)
    assert _growing(sizes=(96,)).grown == ((4, 96), (6, 96))
    assert _growing(sizes=()).grown == ()


def test_more_sizes_than_events_are_refused():
    with pytest.raises(errors.UsageError, match="3 sizes for 2 events"):
        _growing(sizes=(80, 96, 128))
