"""Part discovery as a method: what trains, what is random, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config, errors, ranges, tree
from vitssl.data import sources
from vitssl.methods import base, table
from vitssl.methods.parts import kinds, measures, objective, views
from vitssl.methods.parts import method as parts
from vitssl.models import convnext, resnet, vit
from vitssl.optim import optimizer
from vitssl.run import devices

QUICK = {"xla_backend_optimization_level": 0}
VIT = vit.ViT(16, 1, 2, 8, 32, registers=1, class_position=False, mlp_ratio=1.0)
RESNET = resnet.ResNet((1, 1, 1, 1), (4, 4, 8, 8), 8, "basic", 16)
CONVNEXT = convnext.ConvNeXt((1, 1, 1, 1), (4, 4, 8, 8), 1.0)
KEY = jax.random.key(3)


def method(model=VIT, *, size=32, run=None, **sections):
    given = dict(
        parts=kinds.Parts(**dict(count=3) | sections.pop("parts", {})),
        augment=views.Augment(**dict(size=size) | sections.pop("augment", {})),
        objective=objective.Objective(
            **dict(presence_group=0) | sections.pop("objective", {})
        ),
    )
    run = run or base.Run(10, 2, 4, 4, 3, (0.5,) * 3, (0.25,) * 3)
    return parts.PartDiscovery(run=run, model=model, **given | sections)


@functools.cache
def batch(size=32, masked=False, evaluation=False, count=4):
    source = sources.open("birds", "", "test", size=40, count=8)
    spec = views.Augment(size)
    view = views.Training(spec, masked)
    if evaluation:
        view = views.Evaluation(spec, size)
    rows = [view(source[i], np.random.default_rng(i)) for i in range(count)]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def init(m, image):
    return m.init(jax.random.key(0), {"image": image})


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def grad(m, params, extra, given, rng):
    return jax.value_and_grad(m.loss, has_aux=True)(params, extra, given, rng)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def outputs(m, params, extra, given):
    return m.outputs(params, extra, given)


KINDS = {
    "two_stage": dict(parts=dict(masks="soft")),
    "single_stage": dict(parts=dict(kind="single_stage")),
    "resnet": dict(model=RESNET, size=48, parts=dict(kind="single_stage")),
    "convnext": dict(model=CONVNEXT, size=48, parts=dict(kind="single_stage")),
    "baseline": dict(parts=dict(kind="baseline", pooling="gap_cls")),
    "late_mask": dict(parts=dict(kind="baseline", pooling="late_mask")),
    "given_mask": dict(parts=dict(kind="given_mask")),
}


def test_it_is_in_the_table_and_keeps_the_contract():
    m = method()
    assert isinstance(m, table.METHODS["parts"])
    for name in ("transform", "init", "loss", "after", "phase", "features", "check"):
        assert callable(getattr(m, name)) and hasattr(base.Method, name)
    assert list(m.check()) == []
    assert hash(m) == hash(dataclasses.replace(m))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] * (k == "convnext")) for k in KINDS],
)
def test_every_leaf_learns_in_every_kind_and_the_outputs_can_be_scored(kind):
    options = dict(KINDS[kind])
    model, size = options.pop("model", VIT), options.get("size", 32)
    m = method(model, **options)
    assert list(m.check()) == []
    given = batch(size, masked="mask" in kind)
    params, extra = init(m, given["image"])
    (loss, (new, metrics)), grads = grad(m, params, extra, given, KEY)
    assert np.isfinite(loss) and all(np.isfinite(v) for v in metrics.values())
    flat = tree.flat(grads)
    assert all(np.isfinite(g).all() for g in flat.values())
    # A class token that nothing reads, in single-stage models, does not learn.
    still = {k for k, g in flat.items() if not np.any(g)}
    assert not still, still
    assert ("stats" in new) == (kind == "resnet")
    if kind == "resnet":
        moved = jax.tree.map(lambda a, b: np.any(a != b), new["stats"], extra["stats"])
        assert any(jax.tree.leaves(moved))
    rows = outputs(m, params, extra, batch(size, evaluation=True))
    rows = {k: np.asarray(v) for k, v in rows.items()}
    rows |= {"label": given["label"], "index": given["index"]}
    found = m.scores(rows)
    assert {"top1", "worst_group", "swap_same", "bg_gap"} <= set(found)
    assert ("nmi" in found) == (
        kind in ("two_stage", "single_stage", "resnet", "convnext")
    )
    features = jax.eval_shape(m.features, params, extra, given["image"])
    assert features["tokens"].ndim == 3 and features["pooled"].ndim == 2


def test_hard_masks_train_the_first_stage_through_its_own_losses_alone():
    weights = {
        f.name: 0.0
        for f in dataclasses.fields(objective.Objective)
        if f.type is ranges.NotNegative and f.name != "presence_beta"
    }
    m = method(objective=weights | dict(stage_2=1.0))
    given = batch()
    params, extra = init(m, given["image"])
    _, grads = grad(m, params, extra, given, KEY)
    moved = {k.split("/")[0] for k, g in tree.flat(grads).items() if np.any(g)}
    assert moved == {"stage_2"}


def test_evaluation_is_deterministic_unless_noise_is_asked_for():
    given = batch(evaluation=True)
    m, noisy = method(), method(parts=dict(eval_noise=True))
    params, extra = init(m, given["image"])

    def maps(of, seed):
        rng = jax.random.key(seed)
        return of.predict(params, extra, given["image"], rng=rng).found.maps

    np.testing.assert_array_equal(maps(m, 0), maps(m, 1))
    assert np.abs(maps(noisy, 0) - maps(noisy, 1)).max() > 0.01
    out = m.predict(params, extra, given["image"])
    owner = np.asarray(out.found.maps.argmax(-1))
    np.testing.assert_array_equal(np.asarray(out.mask) > 0, owner != 3)


def test_draws_are_independent_and_dropout_is_for_training():
    m = method(parts=dict(dropout=0.5, mask_dropout=0.5))
    image = batch()["image"]
    train, test = (m.draws(KEY, image, train=t) for t in (True, False))
    assert train.maps.shape == train.mask.shape == (4, 4, 4, 4)
    assert np.abs(train.maps - train.mask).min() > 0
    assert np.any(train.keep_mask != train.keep_features)
    assert all(x is None for x in test)
    quiet = method(parts=dict(gumbel=False)).draws(KEY, image, train=True)
    assert quiet.maps is None and quiet.mask is not None


def test_the_average_follows_the_weights_and_is_what_is_evaluated():
    m = method(average=parts.Average(0.9, warmup=False))
    given = batch(evaluation=True)
    params, extra = init(m, given["image"])
    other = jax.tree.map(lambda x: x + 1.0, params)
    extra = m.after(other, extra, 0)
    want = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, params, other)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), extra["average"], want
    )
    rows = outputs(m, other, extra, given)
    plain = outputs(method(), want, {}, given)
    np.testing.assert_allclose(rows["logits"], plain["logits"], rtol=1e-4, atol=1e-5)
    named = jax.jit(m.class_logits)(other, extra, given["image"])
    np.testing.assert_allclose(named["average"], rows["logits"], rtol=1e-5, atol=1e-6)


def test_classes_are_not_named_without_the_masks_that_a_kind_needs():
    m = method(parts=dict(kind="baseline", pooling="late_mask"))
    with pytest.raises(errors.UsageError, match="late_mask: classifies by the masks"):
        m.class_logits({}, {}, batch()["image"])


def test_a_network_without_parts_shows_its_attention():
    m = method(parts=dict(kind="baseline"))
    image = batch()["image"]
    params, extra = init(m, image)
    found = m.pictures(params, extra, {}, image)
    assert found["grid"] == (4, 4) and found["attention"].shape == (4, 1, 2, 18, 18)
    np.testing.assert_allclose(found["attention"].sum(-1), 1.0, rtol=1e-5)


def test_leaving_a_part_out_is_removing_it():
    given = batch(evaluation=True)
    m = method(measures=measures.Measures(leave_one_out=True))
    params, extra = init(m, given["image"])
    rows = outputs(m, params, extra, given)
    removed = method(parts=dict(removed=(1,)))
    again = outputs(removed, params, extra, given)
    np.testing.assert_allclose(rows["logits_without"][:, 1], again["logits"], atol=1e-5)


def test_one_and_four_devices_give_one_loss():
    m = method()
    given = batch()
    params, extra = init(m, given["image"])
    rows = devices.batch_sharding(devices.mesh(devices.Mesh(), 4))
    value = jax.jit(m.loss, compiler_options=QUICK)
    alone = value(params, extra, given, KEY)[0]
    spread = value(params, extra, jax.device_put(given, rows), KEY)[0]
    np.testing.assert_allclose(alone, spread, rtol=1e-5)


def test_accumulation_is_refused_where_the_batch_is_one():
    assert method().couples_batch  # presence over the whole batch
    assert not method(objective=dict(presence_group=2)).couples_batch
    assert method(RESNET, parts=dict(kind="single_stage")).couples_batch
    assert not method(parts=dict(kind="baseline")).couples_batch
    assert method(parts=dict(kind="baseline", pooling="aim")).couples_batch


@pytest.mark.parametrize(
    "batch, parts_, group, near",
    [(48, 2, 16, 8), (48, 3, 16, 0), (16, 1, 16, 0), (8, 1, 16, 0), (16, 4, 16, 4)],
)
def test_a_micro_batch_must_split_into_groups(batch, parts_, group, near):
    run = base.Run(10, 2, batch, 4, 3, (0.5,) * 3, (0.25,) * 3, accumulate=parts_)
    lines = list(method(run=run, objective=dict(presence_group=group)).check())
    want = (
        f"objective.presence_group={group}: does not divide a micro-batch of "
        f"{batch // parts_} (batch_size={batch}, accumulate={parts_}); {near} does"
    )
    assert lines == [want] * bool(near)
    unused = method(run=run, objective=dict(presence_group=group, presence=0.0))
    assert list(unused.check()) == []


SECTIONS = [
    (kinds.Parts, dict(count=0), "count=0: 1 or more"),
    (kinds.Parts, dict(count=3, temperature=0.0), "temperature=0.0: above 0"),
    (kinds.Parts, dict(count=3, dropout=1.0), "dropout=1.0: in [0, 1)"),
    (kinds.Parts, dict(count=3, rooms=(0.5,)), "rooms=(0.5,): rising fractions"),
    (kinds.Parts, dict(count=3, removed=(3,)), "removed=(3,): [3]: parts are 0 to 2"),
    (kinds.Parts, dict(count=3, thresholds=(0.1,)), "thresholds has 1 numbers for"),
    (objective.Objective, dict(entropy=-1.0), "entropy=-1.0: 0 or more"),
    (objective.Objective, dict(smoothing=1.0), "smoothing=1.0: in [0, 1)"),
    (parts.Average, dict(decay=1.0), "decay=1.0: in [0, 1)"),
    (measures.Measures, dict(thresholds=(0.0,)), "every value in (0, 1)"),
    (measures.Measures, dict(challenge=2), "challenge=2: needs measures.backgrounds"),
    (measures.Measures, dict(mapping="no/file"), "mapping='no/file': there is no such"),
]


@pytest.mark.parametrize("cls, values, message", SECTIONS)
def test_what_a_section_cannot_be_is_said_in_one_line(cls, values, message):
    problems = config.Problems()
    config.section(cls, values, "", problems)
    assert len(problems) == 1 and message in problems[0]


MISTAKES = [
    (dict(augment=dict(size=30)), "augment.size=30: must be a multiple of model.patch"),
    (dict(objective=dict(presence_group=3)), "presence_group=3: does not divide"),
    (dict(model=RESNET), "parts.kind=two_stage: convolutional models"),
    (dict(parts=dict(kind="baseline", pooling="ep")), "pooling=ep: 32 must divide"),
    (dict(parts=dict(kind="baseline", pooling="aim")), "pooling=aim: 12 must divide"),
    (dict(model=dataclasses.replace(VIT, cls=False)), "model.cls=False"),
]


@pytest.mark.parametrize("sections, message", MISTAKES)
def test_what_cannot_be_is_said_in_one_line(sections, message):
    lines = list(method(**sections).check())
    assert any(message in line for line in lines), lines


def test_frozen_stages_stay_bit_equal_and_the_rest_moves():
    from configs import parts as recipes
    from vitssl.run import step

    m = method(parts=dict(masks="soft"))
    given = batch()
    params, extra = init(m, given["image"])
    rules = recipes.groups(freeze_second_stage=True, scratch=10.0)
    spec = optimizer.Optim(
        "adamw", 1e-3, "constant", 0.0, 0.0, wd=0.5, clip_norm=2.0, **rules
    )
    made = optimizer.make(spec, params, total_steps=9, steps_per_epoch=3, batch_size=4)
    phase = step.phase_at(m, made, 0)
    run = jax.jit(step.make(m, made), static_argnums=2, compiler_options=QUICK)
    trained, _ = tree.split(params, phase.frozen)
    state = step.State(jnp.int32(0), params, extra, made.init(trained), KEY)
    for _ in range(2):
        state, _ = run(state, given, phase)
    old, new = tree.flat(params), tree.flat(state.params)
    moved = {k for k in old if np.any(np.asarray(old[k]) != new[k])}
    assert moved == set(old) - phase.frozen
    assert "stage_1/backbone/cls" in moved
    assert "stage_2/backbone/block_0/mlp/fc1/kernel" in phase.frozen
