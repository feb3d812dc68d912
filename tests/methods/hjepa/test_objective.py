"""The section `objective`: every type of loss on features made up for the purpose."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.hjepa import tiny
from vitssl import tree
from vitssl.losses import contrastive, regression, sigreg, vicreg
from vitssl.methods.hjepa import forward, objective, predictor

B, G, D = 4, 2, 6
KEY = jax.random.key(3)
TYPES = typing.get_args(objective.Objective.__annotations__["type"])


def _objective(**fields):
    given = dict(type="mse", normalize=False, weights=(1.0, 0.5), slices=32)
    return objective.Objective(**given | fields)


def _features(crops=G):
    """A context and a result of two levels, with some rows that do not count."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    seen = jnp.asarray(rng.random((B, crops, 2, 5)) < 0.7)
    context = forward.Context(
        tokens=normal(B, crops, 2, 5, D),
        count=None,
        seen=seen,
        cls=normal(B, crops, 2, D),
        role=predictor.GLOBAL,
    )
    levels = {}
    for k, n in enumerate((7, 3)):
        valid = jnp.asarray(rng.random((B, crops, n)) < 0.8)
        levels[k] = forward.Level(normal(B, crops, n, D), normal(B, crops, n, D), valid)
    losses = jnp.abs(normal(crops, 2))
    return context, forward.Result(losses, losses, levels, jnp.zeros(()))


def test_a_crop_loss_is_the_weighted_sum_of_levels_averaged_over_crops():
    _, result = _features()
    want = (np.asarray(result.losses) @ (1.0, 0.5)).mean()
    np.testing.assert_allclose(_objective().crop_loss(result, KEY), want, rtol=1e-6)
    same = _objective(weights=(2.0,)).crop_loss(result, KEY)
    np.testing.assert_allclose(same, 2 * result.losses.sum(1).mean(), rtol=1e-6)


@pytest.mark.parametrize(
    "kind, want",
    [
        ("mse", "mse"),
        ("huber", "huber"),
        ("hjepa", "smoothl1"),
        ("combined", "smoothl1"),
        ("cjepa", "smoothl1"),
    ],
)
def test_a_type_names_its_distance_or_takes_the_one_given(kind, want):
    options = _objective(type=kind, huber_delta=0.3, normalize=True).options()
    assert options == dict(kind=want, normalize=True, delta=0.3)
    assert _objective(type="jepa", distance="mse").options()["kind"] == "mse"


def test_combined_adds_vicreg_of_the_mean_visible_tokens_of_two_crops():
    context, result = _features()
    views = [
        forward.pool(context.tokens[:, i, 0], context.seen[:, i, 0]) for i in (0, 1)
    ]
    np.testing.assert_allclose(context.pooled, jnp.stack(views, 1), rtol=1e-6)
    want, parts = vicreg.vicreg(*views, weights=(3.0, 2.0, 1.0), eps=1e-3)
    o = _objective(
        type="combined",
        vicreg=((3.0, 2.0, 1.0),),
        vicreg_eps=1e-3,
        vicreg_weight=(0.2,),
    )
    term, metrics, state = o.regularise(context, result, KEY, None)
    np.testing.assert_allclose(term, 0.2 * want, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["vicreg_invariance"], parts["invariance"], rtol=1e-5
    )
    assert state is None


def test_one_crop_has_no_invariance_term():
    context, result = _features(crops=1)
    o = _objective(type="combined", vicreg_weight=(1.0,))
    term, metrics, _ = o.regularise(context, result, KEY, None)
    variance, covariance = vicreg.variance_covariance(context.pooled[:, 0])
    np.testing.assert_allclose(term, 25 * variance + covariance, rtol=1e-5)
    assert metrics["vicreg_invariance"] == 0.0


def test_every_level_may_have_a_vicreg_of_its_own():
    context, result = _features()
    own = ((25.0, 20.0, 1.0), (5.0, 2.0, 3.0))
    o = _objective(type="hierarchical_combined", vicreg=own, vicreg_weight=(0.1, 0.4))
    term, _, _ = o.regularise(context, result, KEY, None)
    want = 0.0
    for k, weight in enumerate((0.1, 0.4)):
        level = result.levels[k]
        views = [
            forward.pool(level.prediction[:, i], level.valid[:, i]) for i in (0, 1)
        ]
        want += weight * vicreg.vicreg(*views, weights=own[k])[0]
    np.testing.assert_allclose(term, want, rtol=1e-5)


def test_the_originals_placements_pair_halves_of_the_batch():
    context, result = _features()
    tokens = jnp.concatenate(
        [context.cls[:, 0, 0][:, None], context.tokens[:, 0, 0]], 1
    )
    o = _objective(type="combined", views="batch_halves")
    term, _, _ = o.regularise(context, result, KEY, None)
    want, _ = vicreg.vicreg(tokens[:2], tokens[2:])
    np.testing.assert_allclose(term, 0.1 * want, rtol=1e-5)

    o = _objective(type="combined", views="last_level", vicreg_on_targets=True)
    term, _, _ = o.regularise(context, result, KEY, None)
    p, t, v = (x[:, 0] for x in result.levels[1])
    np.testing.assert_allclose(term, 0.1 * vicreg.vicreg(t, p, v, v)[0], rtol=1e-5)

    o = _objective(type="hierarchical_combined", views="levels")
    term, _, _ = o.regularise(context, result, KEY, None)
    want = 0.0
    for level in result.levels.values():
        p, v = level.prediction[:, 0], level.valid[:, 0]
        want += 0.1 * vicreg.vicreg(p[:2], p[2:], v[:2], v[2:])[0]
    np.testing.assert_allclose(term, want, rtol=1e-5)


def test_adaptive_weights_move_towards_the_small_terms():
    context, result = _features()
    o = _objective(type="combined", vicreg_adaptive=True)
    start = jnp.array([25.0, 25.0, 1.0])
    term, metrics, state = o.regularise(context, result, KEY, start)
    names = ("invariance", "variance", "covariance")
    terms = np.array([metrics[f"vicreg_{n}"] for n in names])
    goal = (1 - terms / (terms.sum() + 1e-4)) * (30, 30, 2)
    np.testing.assert_allclose(state, 0.99 * start + 0.01 * goal, rtol=1e-5)
    np.testing.assert_allclose(term, 0.1 * terms @ np.asarray(start), rtol=1e-5)


@pytest.mark.parametrize("kind", ["hjepa_sigreg", "sigreg_combined"])
def test_sigreg_is_the_mean_of_both_views_on_the_same_directions(kind):
    context, result = _features()
    o = _objective(type=kind, sigreg_weight=0.7)
    term, metrics, _ = o.regularise(context, result, KEY, None)
    a, b = (sigreg.sigreg(context.pooled[:, i], KEY, slices=32) for i in (0, 1))
    np.testing.assert_allclose(term, 0.7 * (a + b) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["sigreg"], (a + b) / 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cjepa", "contrastive_jepa"])
def test_the_contrast_is_between_class_tokens_of_the_context_encoder(kind):
    context, result = _features()
    o = _objective(type=kind, contrastive_weight=0.3, temperature=0.2)
    term, metrics, _ = o.regularise(context, result, KEY, None)
    cls = context.cls[:, :, 0]
    want, parts = contrastive.nt_xent(cls[:, 0], cls[:, 1], temperature=0.2)
    np.testing.assert_allclose(term, 0.3 * want, rtol=1e-5)
    np.testing.assert_allclose(metrics["contrastive_accuracy"], parts["accuracy"])


def test_alone_they_replace_the_distance_between_predictions_and_targets():
    _, result = _features()

    def both(level):
        join = lambda x: x.reshape(B, -1, *x.shape[3:])  # noqa: E731
        return join(level.target), join(level.prediction), join(level.valid)

    want = dict.fromkeys(("vicreg", "sigreg", "hybrid"), 0.0)
    for weight, level in zip((1.0, 0.5), result.levels.values(), strict=True):
        a, b, v = both(level)
        first = vicreg.vicreg(a, b, v, v)[0]
        second = sigreg.two_views(a, b, KEY, v, v, slices=32)[0]
        want["vicreg"] += weight * first
        want["sigreg"] += weight * second
        want["hybrid"] += weight * (0.6 * first + 0.4 * second)
    for kind, value in want.items():
        o = _objective(type=kind, vicreg_weight=(0.6,), sigreg_weight=0.4)
        np.testing.assert_allclose(o.crop_loss(result, KEY), value, rtol=1e-5)
        term, metrics, _ = o.regularise(*_features(), KEY, None)
        assert term == 0.0 and metrics == {}


def test_only_plain_losses_are_means_over_images():
    plain = {t for t in TYPES if not _objective(type=t).couples_batch}
    assert plain == {"mse", "smoothl1", "huber", "hjepa", "jepa"}
    seen = {t for t in TYPES if _objective(type=t).sees_sigreg}
    assert seen == {"hjepa_sigreg", "sigreg_combined", "sigreg", "hybrid"}


# One of each kind.
KINDS = (
    "huber",
    "hjepa",
    "combined",
    "hierarchical_combined",
    "hjepa_sigreg",
    "cjepa",
    "vicreg",
    "sigreg",
    "hybrid",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_goes_through_the_whole_step(kind):
    m = tiny.method(
        masking=dict(strategy="global_only", levels="finest"),
        objective=dict(type=kind, weights=(1.0,), view_weight=0.0),
    )
    assert list(m.check()) == list(m.objective.check()) == []
    batch = tiny.batch(m)
    params, extra = jax.eval_shape(lambda: m.init(KEY, batch))
    value = jax.value_and_grad(m.loss, has_aux=True)
    (loss, (after, metrics)), _ = jax.eval_shape(value, params, extra, batch, KEY)
    assert loss.shape == () and jax.tree.structure(after) == jax.tree.structure(extra)
    assert all(v.shape == () for v in metrics.values())
    named = {
        "loss_h0",
        "loss_h1",
        "loss_unweighted",
        "cosine_h0",
        "cosine_h1",
        "mask_ratio",
        "momentum",
        "online_std",
        "online_rank",
        "target_std",
        "target_rank",
        "dropped_context",
        "dropped_targets",
    }
    assert named <= set(metrics)


@pytest.mark.parametrize("kind", ["combined", "hybrid", "cjepa"])
def test_types_with_statistics_have_finite_gradients(kind):
    m = tiny.method(
        masking=dict(strategy="global_only", levels="finest"),
        objective=dict(
            type=kind,
            weights=(1.0,),
            view_weight=0.0,
            vicreg_adaptive=kind == "combined",
        ),
    )
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    (_, (after, _)), grads = tiny.grad(m, params, extra, batch, tiny.KEY)
    leaves = tree.flat(grads)
    assert all(np.isfinite(g).all() and np.any(g) for g in leaves.values())
    if kind == "combined":
        assert np.any(after["vicreg"] != extra["vicreg"])


def test_fixed_directions_make_the_loss_a_function_of_the_batch():
    sections = dict(masking=dict(strategy="global_only", levels="finest"))
    values = {}
    for fixed in (False, True):
        own = dict(
            type="hjepa_sigreg", weights=(1.0,), view_weight=0.0, fixed_slices=fixed
        )
        m = tiny.method(objective=own, **sections)
        batch, (params, extra) = tiny.batch(m), tiny.init(m)
        values[fixed] = {
            float(tiny.loss(m, params, extra, batch, jax.random.key(i))[0])
            for i in range(3)
        }
    assert len(values[True]) == 1 and len(values[False]) == 3


def test_the_distance_of_a_step_is_the_one_of_the_type():
    m = tiny.method(
        masking=dict(strategy="global_only", levels="finest"),
        objective=dict(type="huber", huber_delta=0.2, weights=(1.0,), view_weight=0.0),
    )
    batch, (params, extra) = tiny.batch(m), tiny.init(m)
    terms = tiny.terms(m, params, extra, batch)
    for g in range(2):
        level = jax.tree.map(lambda x, g=g: x[:, g], terms.near.levels[1])
        want = regression.level_loss(*level, kind="huber", delta=0.2)
        np.testing.assert_allclose(terms.near.losses[g, 1], want, rtol=1e-5)
