"""Fine-tuning and the linear probe: values, what trains, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config, tree
from vitssl.data.randaugment import OPERATIONS, RandAugment
from vitssl.errors import UsageError
from vitssl.evals import accuracy
from vitssl.methods import base
from vitssl.methods.classify import method, mix, objective, views
from vitssl.models import head, vit
from vitssl.optim import optimizer as optim
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}


def _method(batch_size=6, **own):
    return method.Classify(
        run=base.Run(
            total_steps=10,
            steps_per_epoch=5,
            batch_size=batch_size,
            classes=3,
            channels=1,
            mean=(0.5,),
            std=(0.5,),
            counts=(1, 2, 3),
        ),
        model=vit.ViT(16, 2, 2, 4, 8, drop_path=0.5, positions="learned_sincos"),
        augment=views.Augment(**dict(size=8) | own.pop("augment", {})),
        head=head.Head(**dict(init_std=0.5) | own.pop("head", {})),
        mix=mix.Mix(**own.pop("mix", {})),
        objective=objective.Objective(**own.pop("objective", {})),
        **own,
    )


@functools.cache
def _fresh(m):
    shapes = {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)}
    run = jax.jit(lambda: m.init(jax.random.key(0), shapes), compiler_options=QUICK)
    return run()


def _batch(m, seed=0):
    rng = np.random.default_rng(seed)
    n = m.run.batch_size
    return {
        "image": rng.integers(0, 256, (n, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 3, n).astype(np.int32),
    }


def _loss(m, frozen=frozenset(), rng=0):
    params, extra = _fresh(m)
    run = functools.partial(m.loss, phase=step.Phase(frozen, None))
    run = jax.jit(run, compiler_options=QUICK)
    return run(params, extra, _batch(m), jax.random.key(rng))


def test_the_loss_is_the_cross_entropy_of_smoothed_labels():
    m = _method(objective=dict(smoothing=0.1, balanced=True))
    params, extra = _fresh(m)
    batch = _batch(m)
    frozen = frozenset(f"backbone/{k}" for k in tree.flat(params["backbone"]))
    value, _ = _loss(m, frozen)  # A frozen backbone drops no paths.
    logits = jax.jit(m.logits, compiler_options=QUICK)(params, extra, batch["image"])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    target = np.eye(3)[batch["label"]] * 0.9 + 0.1 / 3
    weight = 6 / (3 * np.array([1.0, 2.0, 3.0]))
    rows = target * weight
    # PyTorch divides by the weights of the labels, not of the smoothed targets.
    total = weight[batch["label"]].sum()
    np.testing.assert_allclose(value, -(rows * log_p).sum() / total, rtol=1e-5)


def test_paths_are_dropped_only_while_the_backbone_trains():
    m = _method()
    frozen = frozenset(f"backbone/{k}" for k in tree.flat(_fresh(m)[0]["backbone"]))
    assert float(_loss(m, frozen, 0)[0]) == float(_loss(m, frozen, 1)[0])
    assert float(_loss(m, rng=0)[0]) != float(_loss(m, rng=1)[0])


def test_a_probe_moves_its_linear_layer_and_nothing_else():
    m = _method(head=dict(batchnorm=True))
    params, extra = _fresh(m)
    spec = optim.Optim(
        name="lars",
        lr=1.0,
        schedule="constant",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=0.0,
        clip_norm=0.0,
        freeze=(("backbone/.*|head/norm/.*", 0.0),),
    )
    optimizer = optim.make(
        spec, params, total_steps=10, steps_per_epoch=5, batch_size=6
    )
    phase = step.phase_at(m, optimizer, 0)
    state = step._state(0, params, extra, optimizer, jax.random.key(0), phase)
    assert set(jax.tree.leaves(jax.tree.map(jnp.shape, state.opt)))  # Of two leaves.
    one = jax.jit(step.make(m, optimizer), static_argnums=2, compiler_options=QUICK)
    new, _ = one(state, _batch(m), phase)
    before, after = tree.flat(params), tree.flat(new.params)
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert moved == {"head/kernel", "head/bias"}
    stats = new.extra["stats"]
    assert float(jnp.abs(stats["mean"]).max()) > 0


def test_batch_norm_keeps_the_unbiased_variance():
    x = np.random.default_rng(0).normal(2.0, 3.0, (5, 4)).astype(np.float32)
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    y, new = head.batch_norm(jnp.asarray(x), stats, True)
    np.testing.assert_allclose(np.asarray(y).std(0), 1.0, rtol=1e-4)
    np.testing.assert_allclose(new["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)


def test_the_average_is_scored_beside_the_parameters():
    m = _method(objective=dict(ema=0.5))
    params, extra = _fresh(m)
    other = jax.tree.map(lambda x: x + 1.0, params)
    moved = m.after(other, extra, 0)["ema"]
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b + 0.5, rtol=1e-5, atol=1e-5)
    rows = {
        "logits": np.eye(3)[[0, 1, 2, 2]],
        "ema_logits": np.eye(3)[[0, 1, 1, 1]],
        "label": np.array([0, 1, 2, -1]),
    }
    scores = m.scores(rows)  # The last row has no label.
    assert scores["top1"] == 1.0 and abs(scores["ema_top1"] - 2 / 3) < 1e-9
    assert scores["f1_macro"] == 1.0
    # Classes 0, 1, 2: F1 of 1, 2/3 and 0.
    assert abs(scores["ema_f1_macro"] - 5 / 9) < 1e-9


def test_mixing_pairs_the_batch_with_itself_reversed():
    image = jnp.arange(4.0).reshape(4, 1, 1, 1) * jnp.ones((4, 6, 6, 1))
    label = jnp.arange(4) % 3
    draw = jax.jit(mix.Mix(mixup=0.8, cutmix=1.0).__call__, compiler_options=QUICK)
    kinds = set()
    for i in range(12):
        x, share = draw(jax.random.key(i), image)
        target = mix.targets(label, 3, share, 0.0)
        np.testing.assert_allclose(target.sum(-1), 1.0, rtol=1e-5)
        # The mean of an image says how much of its partner it got.
        lam = 1 - (float(x[0].mean()) - 0.0) / 3.0
        one = np.asarray(target[0])
        want = lam * np.eye(3)[0] + (1 - lam) * np.eye(3)[int(label[3])]
        np.testing.assert_allclose(one, want, atol=1e-5)
        kinds.add(len(np.unique(np.asarray(x[0]).round(4))) > 1)
    assert kinds == {True, False}  # CutMix has two values, mixup one.


def test_erasing_fills_one_box_of_the_right_size():
    image = jnp.full((64, 32, 32, 1), 7.0)
    run = jax.jit(functools.partial(mix.erase, prob=0.5), compiler_options=QUICK)
    got = np.asarray(run(jax.random.key(0), image))
    gone = (got != 7.0)[..., 0]  # [B, H, W]
    share = gone.mean((1, 2))
    assert 0.3 < (share > 0).mean() < 0.7
    for mask in gone[share > 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert (mask == rows[:, None] & columns[None]).all()  # A full rectangle.
    assert share.max() < 0.36 and share[share > 0].min() > 0.015


def test_randaugment_reads_timms_string_and_every_operation_runs():
    made = RandAugment.parse("rand-m9-mstd0.5-inc1")
    assert made == RandAugment(9.0, 0.5, 2, 0.5)
    assert RandAugment.parse("") is None
    for text in ("auto-m9", "rand-m9", "rand-x3-inc1"):
        with pytest.raises(UsageError, match="like 'rand-m9-mstd0.5-inc1'"):
            RandAugment.parse(text)
    for channels in (1, 3):
        image = np.random.default_rng(0).integers(0, 256, (9, 7, channels), np.uint8)
        rng = np.random.default_rng(1)
        strong = RandAugment(10.0, 0.0, count=40, prob=1.0)
        got = strong(image, rng)
        assert got.shape == image.shape and got.dtype == np.uint8
    assert len(OPERATIONS) == 15


def test_randaugment_values():
    from PIL import Image

    picture = Image.fromarray(np.full((4, 4), 200, np.uint8))
    run = {k: np.asarray(f(picture, 0.5, 1, 0)) for k, f in OPERATIONS.items()}
    assert (run["invert"] == 55).all()
    assert (run["posterize"] == 192).all()  # 4 - 2 bits are kept.
    assert (run["solarize"] == 55).all()  # The threshold is 256 - 128.
    assert (run["solarize_add"] == 200).all()  # Only below 128.
    assert (run["brightness"] == 255).all()  # 1.45 times, clipped.
    bright = np.asarray(OPERATIONS["brightness"](picture, 0.5, -1, 0))
    assert (bright == int(200 * 0.55)).all()


@pytest.mark.parametrize(
    "own, text",
    [
        (dict(batch_size=5, mix=dict(mixup=0.8)), "an even number is needed"),
        (dict(augment=dict(size=10)), "must be a multiple of model.patch=4"),
    ],
)
def test_impossible_combinations_are_one_line(own, text):
    (line,) = _method(**own).check()
    assert text in line


def test_keys_out_of_range_are_named():
    problems = config.Problems()
    wrong = dict(size=(8, 0), severity="harsh", scale=(0.0, 1.0), randaugment="rand")
    config.section(views.Augment, wrong, "augment", problems)
    assert problems[0] == "augment.size=(8, 0): every value 1 or more"
    assert "'harsh': want one of" in problems[1] and "moderate" in problems[1]
    assert problems[2] == "augment.scale=(0.0, 1.0): every value in (0, 1]"
    lines = list(views.Augment(8, scale=(1.0, 0.5), randaugment="rand").check())
    assert lines[0] == "scale=(1.0, 0.5): smallest <= largest"
    assert "like 'rand-m9-mstd0.5-inc1'" in lines[1] and len(problems) == 3


def test_layers_of_the_backbone_freeze_and_the_head_never():
    m = _method()
    names = list(tree.flat(_fresh(m)[0]))
    found = tree.match(names, m.freeze_layers(), what="layers", default=-1)
    assert found["backbone/patch_embed/kernel"] == 0
    assert found["backbone/block_1/mlp/fc1/kernel"] == found["backbone/norm/scale"] == 2
    assert found["head/kernel"] == -1


def test_test_time_views_average_probabilities_not_logits():
    # The "network" looks at one corner: every view shows it another pixel.
    image = jnp.arange(8.0).reshape(2, 2, 2, 1)
    logits = lambda x: jnp.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], -1)  # noqa: E731
    for kind, seen in (("flip", (0, 1)), ("six", (0, 1, 2, 1, 3, 2))):
        got = method.Scoring(tta=kind).averaged(logits, image)
        corners = np.array([seen, [4 + k for k in seen]], float)
        p = 1 / (1 + np.exp(-2 * corners))
        want = np.stack([p.mean(1), 1 - p.mean(1)], -1)
        np.testing.assert_allclose(np.exp(got), want, rtol=1e-5)


def test_every_weight_and_view_is_scored_and_written():
    m = _method(
        objective=dict(ema=0.5), scoring=method.Scoring(tta="flip", calibration=True)
    )
    params, extra = _fresh(m)
    batch = _batch(m)
    rows = jax.jit(m.outputs, compiler_options=QUICK)(params, extra, batch)
    kinds = {"", "ema_", "tta_", "ema_tta_"}
    assert set(rows) == {f"{k}logits" for k in kinds}
    mirrored = jax.nn.softmax(m.logits(params, extra, batch["image"][:, :, ::-1]))
    both = (jax.nn.softmax(rows["logits"]) + mirrored) / 2
    np.testing.assert_allclose(np.exp(rows["tta_logits"]), both, rtol=1e-4)
    scores = m.scores({k: np.asarray(v) for k, v in rows.items()} | batch)
    wanted = ("f1_macro", "f1_weighted", "top1", "loss", "ece", "ece_scaled")
    assert all(f"{k}{name}" in scores for k in kinds for name in wanted)
    text = m.written({k: v for k, v in scores.items() if np.ndim(v) == 0})
    *table, note = text.splitlines()
    count = scores["images"]
    assert count == len(batch["label"]) and f"top1 of {count} images" in note
    assert accuracy.written(scores["ema_top1"], count) in table[4]
    assert [line.split()[1] for line in table[2:]] == [
        "parameters",
        "tta",
        "ema",
        "ema_tta",
    ]
    assert f"{scores['ema_tta_f1_macro']:.4f}" in text


@pytest.mark.parametrize("ema, tta", [(0.5, "flip"), (0.5, "none"), (0.0, "flip")])
def test_classes_are_named_by_the_best_that_is_scored(ema, tta):
    m = _method(objective=dict(ema=ema), scoring=method.Scoring(tta=tta))
    params, extra = _fresh(m)
    if ema:
        extra = extra | {"ema": jax.tree.map(lambda x: 0.5 * x, params)}
    batch = _batch(m)
    name = "_".join(["ema"] * (ema > 0) + ["tta"] * (tta == "flip"))
    found = m.class_logits(params, extra, batch["image"])
    rows = m.outputs(params, extra, batch)
    assert list(found) == [name]
    np.testing.assert_allclose(found[name], rows[f"{name}_logits"], rtol=1e-5)
    plain = _method().class_logits(params, {}, batch["image"])
    np.testing.assert_allclose(plain["parameters"], rows["logits"], rtol=1e-5)
    assert np.abs(plain["parameters"] - found[name]).max() > 0.01


def test_the_loss_of_mixed_images_is_that_of_both_labels():
    keys = dict(loss="combined", smoothing=0.1, class_weights=(0.5, 1.0, 2.0))
    m = _method(objective=keys, mix=dict(mixup=0.8))
    logits, label = jnp.arange(18.0).reshape(6, 3) % 5, _batch(m)["label"]
    got, shown = m._objective(logits, label, 0.3)
    a, b = (
        m.objective(logits, y, m.objective.weights(())) for y in (label, label[::-1])
    )
    np.testing.assert_allclose(got, 0.3 * a + 0.7 * b, rtol=1e-6)
    assert (np.asarray(shown) == label[::-1]).all()  # Of these they show most.
