"""The predictor: packing, padding, roles, the query without a position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import tree
from vitssl.methods.hjepa import predictor

D = 16


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _init(net, extra=()):
    row = jnp.zeros((1, 1, D))
    return net.init(jax.random.key(0), row, row, extra=extra)


def _net(**fields):
    return predictor.Predictor(**dict(depth=2, heads=2, mlp_ratio=2.0) | fields)


def test_thin_keeps_everything_that_has_room():
    mask = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(predictor.thin(mask, 4), mask)
    np.testing.assert_array_equal(predictor.thin(mask, 9), mask)


@pytest.mark.parametrize("most", range(0, 13))
def test_thin_leaves_exactly_the_number_asked_for_evenly_spread(most):
    mask = np.zeros(40, bool)
    mask[3::3] = True  # 13 members.
    kept = np.asarray(predictor.thin(mask, most))
    assert kept.sum() == most and not (kept & ~mask).any()
    gaps = np.diff(np.flatnonzero(kept[mask]))
    if most > 1:
        assert gaps.max() - gaps.min() <= 1


def test_thin_takes_another_limit_for_every_set():
    mask = np.ones((3, 10), bool)
    kept = predictor.thin(mask, jnp.array([0, 4, 10]))
    np.testing.assert_array_equal(kept.sum(-1), [0, 4, 10])


def test_a_table_of_its_own_is_added_to_embedded_context_and_mask_tokens():
    """As if embedded context and positions had been given to a predictor without it."""
    net, plain = _net(positions="sincos", width=D), _net()
    context, query, place = _draw(0, 2, 5, D), _draw(1, 2, 3, D), _draw(2, 2, 5, D)
    params = net.init(jax.random.key(0), context, query, place=place)["params"]
    embed = params["embed"]
    given = context @ embed["kernel"] + embed["bias"] + place
    rest = {"params": {k: v for k, v in params.items() if k != "embed"}}
    want = plain.apply(rest, given, query)
    got = net.apply({"params": params}, context, query, place=place)
    np.testing.assert_allclose(got, want, atol=1e-5)
    narrow = _net(positions="sincos", width=8)
    found = narrow.init(
        jax.random.key(0), context, query[..., :8], place=place[..., :8]
    )
    assert found["params"]["mask_token"].shape == (1, 1, 8)


def test_every_sample_of_a_padded_batch_is_predicted_as_if_alone():
    net = _net(roles=True)
    params = _init(net)
    context, query, other = _draw(0, 3, 6, D), _draw(1, 3, 5, D), _draw(2, 3, 4, D)
    own, asked = np.array([6, 2, 4]), np.array([1, 5, 3])
    heard = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    together = net.apply(
        params,
        context,
        query,
        context_count=jnp.array(own),
        query_count=jnp.array(asked),
        extra=[predictor.Extra(other, predictor.GLOBAL, heard)],
    )
    for b in range(3):
        alone = net.apply(
            params,
            context[b : b + 1, : own[b]],
            query[b : b + 1, : asked[b]],
            extra=[predictor.Extra(other[b : b + 1, heard[b]], predictor.GLOBAL)],
        )
        np.testing.assert_allclose(together[b, : asked[b]], alone[0], atol=2e-6)


def test_padding_has_no_influence_whatever_it_holds():
    net = _net()
    params = _init(net)
    context, query = _draw(0, 2, 6, D), _draw(1, 2, 5, D)
    counts = dict(context_count=jnp.array([3, 6]), query_count=jnp.array([5, 2]))
    before = net.apply(params, context, query, **counts)
    context[0, 3:], query[1, 2:] = 1e6, -1e6
    after = net.apply(params, context, query, **counts)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1, :2], after[1, :2])


def test_order_of_context_is_free_and_order_of_queries_is_kept():
    net = _net()
    params = _init(net)
    context, query = _draw(0, 1, 6, D), _draw(1, 1, 5, D)
    plain = net.apply(params, context, query)
    turned = net.apply(params, context[:, ::-1], query[:, ::-1])
    np.testing.assert_allclose(turned[:, ::-1], plain, atol=2e-6)


def test_too_few_slots_thin_out_context_but_no_query():
    net = _net(depth=1)
    params = _init(net)
    context, query = _draw(0, 1, 6, D), _draw(1, 1, 4, D)
    tight = net.apply(params, context, query, slots=7)
    # Three of six context tokens stay: 2, 4, 6 counted from 1.
    by_hand = net.apply(params, context[:, 1::2], query)
    np.testing.assert_allclose(tight, by_hand, atol=2e-6)
    with pytest.raises(ValueError, match="slots=3 do not hold 4 queries"):
        net.apply(params, context, query, slots=3)


def test_a_role_is_a_vector_added_to_the_tokens_of_that_role():
    net = _net(roles=True)
    params = _init(net)
    context, query, other = _draw(0, 1, 3, D), _draw(1, 1, 2, D), _draw(2, 1, 4, D)
    for role in (predictor.GLOBAL, predictor.LOCAL):
        got = net.apply(params, context, query, extra=[predictor.Extra(other, role)])
        tokens = other + params["params"]["roles"][role]
        want = net.apply(params, np.concatenate([context, tokens], 1), query)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_query_without_a_position_is_its_own_vector():
    net = _net(pooled=True)
    params = _init(net)
    context = _draw(0, 2, 6, D)
    free = params["params"]["pooled_query"]
    want = net.apply(params, context, jnp.broadcast_to(free, (2, 1, D)))
    np.testing.assert_allclose(net.apply(params, context), want, atol=1e-6)


@pytest.mark.parametrize("roles", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_parameters_exist_only_where_the_fields_say_so(roles, pooled):
    names = tree.flat(_init(_net(roles=roles, pooled=pooled))["params"])
    assert ("roles" in names) == roles
    assert ("pooled_query" in names) == pooled
    net = _net()
    params = _init(net)
    context = _draw(0, 1, 3, D)
    with pytest.raises(ValueError, match="pooled=False"):
        net.apply(params, context)
    with pytest.raises(ValueError, match="roles=False"):
        net.apply(params, context, context, extra=[predictor.Extra(context, 0)])


def test_another_width_goes_through_a_linear_layer_and_back():
    net = _net(width=8)
    params = _init(net)
    assert params["params"]["embed"]["kernel"].shape == (D, 8)
    assert params["params"]["block_0"]["mlp"]["fc1"]["kernel"].shape == (8, 16)
    got = net.apply(params, _draw(0, 2, 6, D), _draw(1, 2, 5, D))
    assert got.shape == (2, 5, D) and np.isfinite(got).all()


def test_xavier_redraws_the_attention_matrices_and_nothing_else():
    params = _init(_net())["params"]
    fresh = predictor.xavier(jax.random.key(1), params)
    before, after = tree.flat(params), tree.flat(fresh)
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert changed == {f"block_{i}/attn/qkv/kernel" for i in range(2)}
    bound = np.sqrt(6 / (D + 3 * D))
    for k in changed:
        assert 0.9 * bound < np.abs(after[k]).max() <= bound
    first, second = (after[f"block_{i}/attn/qkv/kernel"] for i in range(2))
    assert not np.array_equal(first, second)


def test_size_of_the_published_predictors():
    for width, depth, heads, want in (
        (192, 4, 3, 1_817_280),
        (384, 6, 6, 10_796_160),
        (768, 6, 12, 43_120_896),
        (1024, 6, 16, 76_631_040),
    ):
        net = predictor.Predictor(depth=depth, heads=heads, pooled=True)
        row = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
        shapes = jax.eval_shape(net.init, jax.random.key(0), row, row)
        assert tree.size(shapes) == want
