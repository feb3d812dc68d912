"""Levels: pooling of sets of patches, projections, the feature pyramid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import tree
from vitssl.methods.hjepa import levels

D = 8
GRID = (5, 6)  # Not square, not a multiple of 2 or 4.


def _sets(seed, counts, grid=GRID, slots=12):
    """Members of random sets, and random rows [B, slots, D] with rubbish as padding."""
    rng = np.random.default_rng(seed)
    n = grid[0] * grid[1]
    where = np.stack(
        [
            np.concatenate([np.sort(rng.permutation(n)[:c]), np.zeros(slots - c, int)])
            for c in counts
        ]
    )
    x = rng.normal(size=(len(counts), slots, D)).astype(np.float32)
    for row, c in zip(x, counts, strict=True):
        row[c:] = 1e3
    members = levels.Members(
        jnp.asarray(where, jnp.int32), jnp.asarray(counts, jnp.int32), grid
    )
    return x, members


def _cells_by_loops(x, where, count, grid, level):
    groups = {}
    for i in range(count):
        y, z = divmod(int(where[i]), grid[1])
        groups.setdefault((y >> level, z >> level), []).append(x[i])
    return [np.mean(groups[key], 0) for key in sorted(groups)]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_spatial_pooling_averages_the_members_of_each_cell(level):
    counts = (12, 0, 5, 1)
    x, members = _sets(0, counts)
    got, valid = levels.pool(x, members, level, "spatial")
    for b, count in enumerate(counts):
        want = _cells_by_loops(x[b], members.where[b], count, GRID, level)
        np.testing.assert_array_equal(valid[b].sum(), len(want))
        if want:
            np.testing.assert_allclose(got[b][valid[b]], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_sequence_pooling_averages_complete_runs_of_the_list(level):
    counts = (12, 0, 7, 3)
    x, members = _sets(1, counts)
    got, valid = levels.pool(x, members, level, "sequence")
    for b, count in enumerate(counts):
        size = 2**level
        runs = [x[b, i : i + size] for i in range(0, count - size + 1, size)]
        assert valid[b].sum() == len(runs) == count // size
        if runs:
            want = np.mean(runs, 1)
            np.testing.assert_allclose(got[b, : len(runs)], want, rtol=1e-5)


def test_cells_round_up_at_the_border():
    assert [levels.cells((14, 14), k) for k in range(4)] == [
        (14, 14),
        (7, 7),
        (4, 4),
        (2, 2),
    ]
    whole = levels.everything(1, (14, 14))
    _, valid = levels.pool(jnp.ones((1, 196, 1)), whole, 2, "spatial")
    assert valid.shape == (1, 16) and valid.all()


@pytest.mark.parametrize("pooling", ["spatial", "sequence"])
@pytest.mark.parametrize("fpn", ["", "add", "concat"])
def test_a_batch_of_sets_equals_each_set_alone(pooling, fpn):
    counts = (12, 3, 6, 1)
    x, members = _sets(2, counts)
    net = levels.Levels(D, 3, pooling=pooling, fpn=fpn, fpn_width=6)
    params = _init(net)
    together = net.apply(params, x, members)
    for b, count in enumerate(counts):
        one = levels.Members(
            members.where[b : b + 1, :count], jnp.array([count]), members.grid
        )
        alone = net.apply(params, x[b : b + 1, :count], one)
        for k in range(3):
            got, valid = (y[b] for y in together[k])
            want, there = (y[0] for y in alone[k])
            assert valid.sum() == there.sum()
            np.testing.assert_allclose(got[valid], want[there], atol=1e-5)


def _init(net):
    row = jnp.zeros((1, 2 ** (net.levels - 1), net.width))
    return net.init(jax.random.key(0), row, levels.everything(1, (1, row.shape[1])))


def test_without_pyramid_a_level_is_the_pooled_projection():
    x, members = _sets(3, (10, 4))
    net = levels.Levels(D, 2)
    params = _init(net)
    out = net.apply(params, x, members)
    p = params["params"]["proj_1"]
    y = x @ p["dense"]["kernel"] + p["dense"]["bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    want, valid = levels.pool(y, members, 1, "spatial")
    np.testing.assert_allclose(out[1][0], want, atol=2e-5)
    np.testing.assert_array_equal(out[1][1], valid)


def test_spatial_unpooling_gives_each_cell_its_parent():
    x, members = _sets(4, (9, 2))
    for level in (0, 1):
        h, w = levels.cells(GRID, level + 1)
        above = jnp.arange(2 * h * w, dtype=jnp.float32).reshape(2, h * w, 1)
        got, _ = levels.unpool(above, members, level, "spatial")
        if level == 0:
            where = np.asarray(members.where)
        else:
            rows, columns = levels.cells(GRID, 1)
            where = np.broadcast_to(np.arange(rows * columns), (2, rows * columns))
        width = levels.cells(GRID, level)[1]
        parent = (where // width // 2) * w + where % width // 2
        want = np.take_along_axis(np.asarray(above)[..., 0], parent, 1)
        np.testing.assert_array_equal(got[..., 0], want)


def test_sequence_unpooling_is_linear_interpolation_of_the_members_only():
    counts = (12, 5, 1)
    _, members = _sets(5, counts)
    above = np.random.default_rng(0).normal(size=(3, 6, 2)).astype(np.float32)
    got, there = levels.unpool(above, members, 0, "sequence")
    for b, count in enumerate(counts):
        coarse = count // 2
        assert there[b, :count].all() == (coarse > 0)
        if coarse:
            at = (np.arange(count) + 0.5) * coarse / count - 0.5
            for d in range(2):
                want = np.interp(at, np.arange(coarse), above[b, :coarse, d])
                np.testing.assert_allclose(got[b, :count, d], want, atol=1e-5)


def test_batch_norm_counts_valid_rows_only_and_keeps_torchs_averages():
    x, members = _sets(6, (9, 3))
    net = levels.BatchNorm()
    state = net.init(jax.random.key(0), x)
    y, moved = net.apply(state, x, members.valid, True, mutable=["batch_stats"])
    rows = np.concatenate([x[0, :9], x[1, :3]]).astype(np.float64)
    want = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    got = np.concatenate([y[0, :9], y[1, :3]])
    np.testing.assert_allclose(got, want, atol=1e-5)
    stats = moved["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * rows.mean(0), atol=1e-6)
    variance = 0.9 + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(stats["var"], variance, rtol=1e-5)
    # In evaluation the running averages normalise, and stay.
    y = net.apply({**state, "batch_stats": stats}, x)
    want = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_leaves_the_running_averages_alone():
    x, members = _sets(7, (0, 0))
    net = levels.BatchNorm()
    state = net.init(jax.random.key(0), x)
    y, moved = net.apply(state, x, members.valid, True, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(moved["batch_stats"]["mean"], np.zeros(D))
    np.testing.assert_array_equal(moved["batch_stats"]["var"], np.ones(D))


@pytest.mark.parametrize("pooling", ["spatial", "sequence"])
@pytest.mark.parametrize("fpn", ["", "concat"])
def test_gradients_are_finite_where_a_set_is_empty(pooling, fpn):
    x, members = _sets(8, (0, 1))
    net = levels.Levels(D, 3, pooling=pooling, fpn=fpn)
    params = _init(net)

    def total(params, x):
        out = net.apply(params, x, members)
        return sum(jnp.where(v[..., None], y, 0.0).sum() for y, v in out.values())

    grads = jax.grad(total, (0, 1))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("fpn", ["", "add"])
def test_coarse_is_the_last_level_of_a_vector(fpn):
    net = levels.Levels(D, 3, fpn=fpn, fpn_width=6)
    params = _init(net)
    x = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    got = net.apply(params, x, method="coarse")
    # One patch is its own coarsest cell, and nothing is above the coarsest level.
    out = net.apply(params, x[:, None], levels.everything(2, (1, 1)), only=(2,))
    np.testing.assert_allclose(got, out[2][0][:, 0], atol=1e-6)


def test_number_of_parameters_of_the_published_sizes():
    for width, plain, add, concat in (
        (192, 112_320, 187_200, 335_808),
        (768, 1_776_384, 2_960_640, 5_324_544),
    ):
        sizes = []
        for fpn in ("", "add", "concat"):
            net = levels.Levels(width, 3, fpn=fpn)
            row = jax.ShapeDtypeStruct((1, 4, width), jnp.float32)
            shapes = jax.eval_shape(
                net.init, jax.random.key(0), row, levels.everything(1, (1, 4))
            )
            sizes.append(tree.size(shapes))
        assert sizes == [plain, plain + add, plain + concat]
