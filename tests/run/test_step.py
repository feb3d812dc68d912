"""The step: freezing, accumulation, non-finite steps, devices, compiling ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from vitssl import errors, tree
from vitssl.run import devices, step

BLOCKS = "model/block_{}/.*"


def _start(method, optimizer, at=0):
    phase = step.phase_at(method, optimizer, at)
    make = lambda rng: step.init(method.init, optimizer, rng, toy.batch(), phase)  # noqa: E731
    return jax.jit(make)(jax.random.key(0)), phase


def _run(method, optimizer, steps=3, accumulate=1, batches=None):
    state, phase = _start(method, optimizer)
    fn = jax.jit(step.make(method, optimizer, accumulate), static_argnums=2)
    seen = []
    for i in range(steps):
        batch = batches[i] if batches else toy.batch(i)
        state, metrics = fn(state, batch, phase)
        seen.append({k: float(v) for k, v in metrics.items()})
    return state, seen


def test_histograms_are_of_the_gradients_and_of_the_new_parameters():
    method = toy.make()
    # A plain step, so that it tells the gradient.
    plain = dict(name="sgd", lr=0.1, momentum=0.0, wd=0.0, clip_norm=0.0)
    flat = dict(schedule="constant", warmup_epochs=0.0)
    optimizer = toy.optimizer(method, **plain, **flat)
    before, phase = _start(method, optimizer)
    fn = jax.jit(step.make(method, optimizer, histograms_every=2), static_argnums=2)
    middle, first = fn(before, toy.batch(), phase)
    after, second = fn(middle, toy.batch(), phase)
    names = {k.partition("/")[2] for k in second if k.startswith("grad/")}
    assert {"head", "model/block_0", "model/block_1", "model"} <= names
    for k in names:
        assert not np.any(first[f"grad/{k}"]) and not np.any(first[f"param/{k}"])
    old, new = (tree.flat(s.params) for s in (middle, after))
    mine = [k for k in new if k.startswith("model/block_1/")]
    join = lambda of: np.concatenate([np.ravel(of[k]) for k in mine])  # noqa: E731
    grads = join({k: (old[k] - new[k]) / 0.1 for k in mine})
    for kind, values in (("grad", grads), ("param", join(new))):
        low, high, *counts = np.asarray(second[f"{kind}/model/block_1"])
        norm = second[f"{kind}_norm/model/block_1"]
        np.testing.assert_allclose(norm, np.linalg.norm(values), rtol=1e-3)
        np.testing.assert_allclose((low, high), (values.min(), values.max()), 1e-3)
        assert sum(counts) == values.size
        want, _ = np.histogram(values, 64, (low, high))
        # The gradient is read off the step, so a value may change its bin.
        assert np.abs(np.array(counts) - want).sum() <= 0.02 * values.size
    assert not [k for k in _run(method, optimizer, steps=1)[1][0] if "/" in k]


def _first(*blocks):
    """lr_rules that freeze the embeddings and these blocks."""
    frozen = [("model/(cls|pos_embed|patch_embed/.*)", 0.0)]
    frozen += [(BLOCKS.format(i), 0.0) for i in blocks]
    return (*frozen, (".*", 1.0))


def test_frozen_leaves_stay_bit_equal_and_all_others_move():
    method = toy.make(drop_path=0.2)
    optimizer = toy.optimizer(method, lr_rules=_first(0))
    before, phase = _start(method, optimizer)
    after, _ = _run(method, optimizer)
    old, new = tree.flat(before.params), tree.flat(after.params)
    still = {k for k in old if (np.asarray(old[k]) == np.asarray(new[k])).all()}
    assert still == phase.frozen
    assert any("block_0/" in k for k in still) and "model/cls" in still
    assert not any("block_1/" in k or "head" in k for k in still)


def test_optimizer_state_exists_for_trainable_leaves_only():
    method = toy.make()
    optimizer = toy.optimizer(method, lr_rules=_first(0, 1))
    state, phase = _start(method, optimizer)
    trainable, _ = tree.split(state.params, phase.frozen)
    moments = tree.count_bytes((state.opt.mu, state.opt.nu))
    assert moments == 2 * tree.count_bytes(trainable)


def _flops(method, lr_rules):
    optimizer = toy.optimizer(method, lr_rules=lr_rules)
    state, phase = _start(method, optimizer)
    fn = jax.jit(step.make(method, optimizer), static_argnums=2)
    return fn.lower(state, toy.batch(), phase).compile().cost_analysis()["flops"]


def test_the_backward_pass_of_a_frozen_prefix_does_not_exist():
    method = toy.make(depth=6, width=64)
    everything = ((".*", 1.0),)
    whole = _flops(method, everything)
    # One block's forward pass costs f; training it 3 f; frozen in a prefix f.
    first3 = _flops(method, _first(0, 1, 2))
    first5 = _flops(method, _first(0, 1, 2, 3, 4))
    assert first3 / whole == pytest.approx((3 * 3 + 3) / 18, abs=0.04)
    assert first5 / whole == pytest.approx((3 + 5) / 18, abs=0.04)
    # A frozen block above a training one is still crossed by the gradient: 2 f.
    hole = tuple((BLOCKS.format(i), 0.0) for i in (2, 3)) + everything
    assert _flops(method, hole) / whole == pytest.approx(16 / 18, abs=0.04)


def test_gradient_norm_sees_trainable_leaves_only():
    method = toy.make()
    _, all_ = _run(method, toy.optimizer(method), steps=1)
    _, head = _run(
        method, toy.optimizer(method, lr_rules=(("model/.*", 0.0), (".*", 1.0))), 1
    )
    assert head[0]["loss"] == pytest.approx(all_[0]["loss"], rel=1e-6)
    assert head[0]["grad_norm"] < all_[0]["grad_norm"]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_full_batch(parts):
    method = toy.make()
    optimizer = toy.optimizer(method)
    whole, a = _run(method, optimizer)
    split, b = _run(method, optimizer, accumulate=parts)
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, rtol=2e-4, atol=2e-6),
        whole.params,
        split.params,
    )
    fn = step.make(method, optimizer, parts)
    state, phase = _start(method, optimizer)
    text = str(jax.make_jaxpr(fn, static_argnums=2)(state, toy.batch(), phase))
    assert f"length={parts}" in text, "the batch was not split"


def test_a_batch_in_parts_is_traced_once(monkeypatch):
    method = toy.make()
    traced, loss = [], type(method).loss
    spy = lambda *a, **k: (traced.append(1), loss(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(type(method), "loss", spy)
    _run(method, toy.optimizer(method), steps=1, accumulate=4)
    assert len(traced) == 1


def test_accumulation_is_refused_for_a_loss_that_couples_the_batch():
    method = toy.make()
    object.__setattr__(method, "couples_batch", True)
    with pytest.raises(errors.UsageError, match="accumulate=2.*set accumulate=1"):
        step.make(method, toy.optimizer(method), 2)


def test_a_non_finite_step_changes_nothing_but_the_count():
    method = toy.make()
    optimizer = toy.optimizer(method)
    bad = toy.batch(1)
    bad["label"][3] = -1
    good, _ = _run(method, optimizer, steps=1)
    after, seen = _run(method, optimizer, 2, batches=[toy.batch(0), bad])
    assert [m["nonfinite"] for m in seen] == [0.0, 1.0]
    assert int(after.step) == 2
    same = jax.tree.map(
        lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
        (good.params, good.extra, good.opt),
        (after.params, after.extra, after.opt),
    )
    assert all(jax.tree.leaves(same))


def test_training_goes_on_after_a_non_finite_step():
    method = toy.make()
    bad = toy.batch(1)
    bad["label"][:] = -1
    batches = [toy.batch(0), bad, toy.batch(2)]
    _, seen = _run(method, toy.optimizer(method), 3, batches=batches)
    assert seen[2]["nonfinite"] == 0.0 and np.isfinite(seen[2]["loss"])


def test_ema_follows_the_updated_parameters():
    method = toy.make()
    optimizer = toy.optimizer(method)
    before, _ = _start(method, optimizer)
    after, _ = _run(method, optimizer, steps=1)
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before.params, after.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        after.extra["ema"],
        expected,
    )


def _losses_on(count, fsdp, steps=5):
    method = toy.make(drop_path=0.3)
    optimizer = toy.optimizer(method)
    spec = devices.Mesh(fsdp=fsdp, fsdp_min_size=1)
    mesh = jax.make_mesh(
        (count // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:count],
    )
    key = jax.eval_shape(lambda: jax.random.key(0))

    def abstract(phase):
        return step.abstract(method.init, optimizer, key, toy.batch(), phase)

    phase = step.phase_at(method, optimizer, 0)
    compiled = step.Compiled(step.make(method, optimizer), abstract, mesh, spec)
    sharding = compiled.state_sharding(phase)
    make = lambda rng: step.init(method.init, optimizer, rng, toy.batch(), phase)  # noqa: E731
    state = jax.jit(make, out_shardings=sharding)(jax.random.key(0))
    losses = []
    for i in range(steps):
        batch = devices.put(toy.batch(i), devices.batch_sharding(mesh))
        state, metrics = compiled.get(phase, batch)(state, batch)
        losses.append(float(metrics["loss"]))
    kernel = state.params["model"]["block_0"]["mlp"]["fc1"]["kernel"]
    return losses, kernel.addressable_shards[0].data.size / kernel.size


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_four_devices_train_like_one(fsdp):
    alone, _ = _losses_on(1, 1)
    four, share = _losses_on(4, fsdp)
    np.testing.assert_allclose(four, alone, rtol=1e-5)
    assert share == 1 / fsdp, "parameters are not split as asked"


def test_moments_of_leaves_that_froze_are_dropped_and_the_others_kept():
    method = toy.make()
    optimizer = toy.optimizer(method, freeze=(("model/block_0/.*", 0.5),))
    state, phase = _start(method, optimizer)
    fn = jax.jit(step.make(method, optimizer), static_argnums=2)
    state, _ = fn(state, toy.batch(), phase)
    later = step.phase_at(method, optimizer, 10)
    assert step.phase_at(method, optimizer, 9) == phase != later
    entered = step.enter(state, later, optimizer)
    assert set(state.opt.mu) - set(entered.opt.mu) == set(later.frozen)
    assert all((entered.opt.mu[k] == state.opt.mu[k]).all() for k in entered.opt.mu)
    frozen = tree.flat(state.params)["model/block_0/mlp/fc1/kernel"]
    after, _ = fn(entered, toy.batch(1), later)
    kept = tree.flat(after.params)["model/block_0/mlp/fc1/kernel"]
    assert (np.asarray(frozen) == np.asarray(kept)).all()


def _compiler(method, optimizer):
    mesh = devices.mesh(devices.Mesh(), 8)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def abstract(phase):
        return step.abstract(method.init, optimizer, key, toy.batch(), phase)

    function = step.make(method, optimizer, mesh=mesh)
    return step.Compiled(function, abstract, mesh, devices.Mesh()), mesh


def test_metrics_of_a_compiled_step_are_one_array_and_have_their_names():
    given = {"loss": jnp.float32(2), "h": jnp.arange(3.0), "nonfinite": jnp.float32(1)}
    packed = jax.device_get(jax.jit(step.Metrics.of)(given))
    assert [x.shape for x in jax.tree.leaves(packed)] == [(2,), (3,)]
    assert dict(packed).keys() == given.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(packed[name], value)
    method = toy.make()
    optimizer = toy.optimizer(method)
    compiled, mesh = _compiler(method, optimizer)
    state, phase = _start(method, optimizer)
    _, want = step.make(method, optimizer)(state, toy.batch(), phase)
    batch = devices.put(toy.batch(), devices.batch_sharding(mesh))
    state = jax.device_put(state, compiled.state_sharding(phase))
    _, found = compiled.get(phase, batch)(state, batch)
    assert len(jax.tree.leaves(found)) == 1 and set(found.keys()) == set(want)
    np.testing.assert_allclose(found["grad_norm"], want["grad_norm"], rtol=1e-5)


def test_a_phase_prepared_ahead_is_not_compiled_again():
    method = toy.make()
    optimizer = toy.optimizer(method, freeze=(("model/block_0/.*", 0.5),))
    compiled, mesh = _compiler(method, optimizer)
    calls = []
    original = compiled.program
    compiled.program = lambda *a: calls.append(a[0]) or original(*a)
    first, second = (step.phase_at(method, optimizer, i) for i in (0, 10))
    compiled.get(first, toy.batch())
    compiled.prepare(second, toy.batch())
    compiled.prepare(second, toy.batch())
    compiled.get(second, toy.batch())
    compiled.get(second, toy.batch())
    assert calls == [first, second]
    compiled.close()


def test_an_error_while_compiling_ahead_is_raised_where_the_phase_is_used():
    method = toy.make()
    optimizer = toy.optimizer(method)
    compiled, _ = _compiler(method, optimizer)
    phase = step.phase_at(method, optimizer, 0)
    wrong = {**toy.batch(), "image": np.zeros((8, 17, 17, 1), np.uint8)}
    compiled.prepare(phase, wrong)
    with pytest.raises(ValueError, match="17"):
        compiled.get(phase, toy.batch())


def test_the_state_is_donated():
    method = toy.make()
    optimizer = toy.optimizer(method)
    compiled, mesh = _compiler(method, optimizer)
    phase = step.phase_at(method, optimizer, 0)
    state, _ = _start(method, optimizer)
    state = jax.device_put(state, compiled.state_sharding(phase))
    batch = devices.put(toy.batch(), devices.batch_sharding(mesh))
    compiled.get(phase, batch)(state, batch)
    assert state.params["head"]["kernel"].is_deleted()


def test_remat_changes_the_program_and_not_the_numbers():
    texts, losses = [], []
    for remat in (False, True):
        method = toy.make(remat=remat)
        optimizer = toy.optimizer(method)
        state, phase = _start(method, optimizer)
        fn = step.make(method, optimizer)
        texts.append(
            str(jax.make_jaxpr(fn, static_argnums=2)(state, toy.batch(), phase))
        )
        losses.append([m["loss"] for m in _run(method, optimizer)[1]])
    assert "remat" in texts[1] and "remat" not in texts[0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    method = toy.make(dtype="bfloat16")
    state, seen = _run(method, toy.optimizer(method))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, exact = _run(toy.make(), toy.optimizer(toy.make()))
    assert seen[2]["loss"] == pytest.approx(exact[2]["loss"], rel=0.02)
    assert seen[2]["loss"] != exact[2]["loss"]


def test_kernels_are_rounded_only_where_their_gradients_shall_be():
    method = toy.make()
    optimizer = toy.optimizer(method)
    state, phase = _start(method, optimizer)
    seen = []

    class Watched(type(method)):
        def loss(self, params, *args, **kwargs):
            leaves = tree.flat(params)
            seen.append({leaves[k].dtype.name for k in leaves if k.endswith("kernel")})
            others = (leaves[k].dtype for k in leaves if not k.endswith("kernel"))
            assert set(others) == {jnp.dtype("float32")}
            return super().loss(params, *args, **kwargs)

    watched = Watched(**vars(method))
    for dtype in ("float32", "bfloat16"):
        fn = step.make(watched, optimizer, gradients=dtype)
        new, _ = jax.eval_shape(lambda s, b, fn=fn: fn(s, b, phase), state, toy.batch())
        assert tree.flat(new.params).keys() == tree.flat(state.params).keys()
        assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}
    assert seen == [{"float32"}, {"bfloat16"}]


def test_what_is_combined_is_asked_of_gpus_alone(monkeypatch):
    spec = devices.Mesh(combine=32)
    assert devices.compiler_options(spec) == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.compiler_options(devices.Mesh()) == {}
    options = devices.compiler_options(spec)
    assert options["xla_gpu_all_reduce_combine_threshold_bytes"] == 2**25
    # Names that XLA does not know it refuses, on any device.
    jax.jit(lambda x: x + 1, compiler_options=options)(jnp.zeros(3))
