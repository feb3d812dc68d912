"""The hierarchical ViT: sizes, grids, streams, what trains, what masks hide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import whole_hvit
from vitssl import config, models, tree
from vitssl.models import hvit, layers, pyramid
from vitssl.optim import freezeout

QUICK = {"xla_backend_optimization_level": 0}
SIZE = dict(width=8, depths=(1, 2, 1), heads=(1, 2, 2), patch=4, image_size=16)
BOTH = dict(spectral_channels=2, spectral_width=4, dfca_heads=4)
SHALLOW = dict(depths=(1, 1), heads=(1, 2))
KEYS = dict(dropout=jax.random.key(1), drop_path=jax.random.key(2))


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _net(**fields):
    return hvit.HViT(**SIZE | fields)


def _random(like):
    """Every leaf random, so that no symmetry hides a mistake."""
    leaves = tree.flat(like)
    draws = {
        name: 0.3 * _draw(i, *leaf.shape) + ("scale" in name)
        for i, (name, leaf) in enumerate(leaves.items())
    }
    return {"params": tree.nest(draws)}


@functools.cache
def _variables(net, channels=3, **options):
    backbone = getattr(net, "backbone", net)
    size = backbone.table_size
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    return _random(jax.eval_shape(net.init, jax.random.key(0), image)["params"])


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _compiled(net, method, variables, image, spectral):
    more = {} if spectral is None else {"spectral": spectral}
    return net.apply(variables, image, method=method, **more)


def _run(net, variables, image, spectral=None, method=None):
    return _compiled(net, method, variables, image, spectral)


SIZES = {  # The original's; "small" is its default.
    "tiny": ((2, 2, 4, 2), (2, 4, 8, 16), 16, 256),
    "small": ((2, 2, 6, 2), (3, 6, 12, 24), 16, 256),
    "base": ((2, 2, 18, 2), (4, 8, 16, 32), 16, 256),
    "xl": ((3, 6, 24, 3), (6, 12, 24, 48), 14, 448),
}
MEASURED = {
    "tiny": 10_723_399,
    "small": 27_596_647,
    "base": 86_813_831,
    "xl": 273_615_751,
}


def _published(size, **options):
    depths, heads, patch, image_size = SIZES[size]
    return hvit.HViT(32 * heads[0], depths, heads, patch, image_size, **options)


def _count(width, depths, patch, image, classes):
    """The sum over the parts, from the paper's shapes."""
    widths = [width * 2**s for s in range(len(depths))]
    blocks = sum(n * (12 * d * d + 13 * d) for n, d in zip(depths, widths, strict=True))
    merging = sum(8 * d * d + 8 * d for d in widths[:-1])
    embedding = 3 * patch**2 * width + 3 * width + (image // patch) ** 2 * width
    last = widths[-1]
    return blocks + merging + embedding + 4 * last + last * classes + classes


@pytest.mark.parametrize("size", MEASURED)
def test_published_sizes_have_the_parameters_measured(size):
    net = whole_hvit.HViTModel(_published(size), 7)
    b = net.backbone
    image = jax.ShapeDtypeStruct((1, b.image_size, b.image_size, 3), jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    assert tree.size(like) == MEASURED[size]
    assert _count(b.width, b.depths, b.patch, b.image_size, 7) == MEASURED[size]
    assert {d // n for d, n in zip(b.widths, b.heads, strict=True)} == {32}
    assert not list(b.check())


@pytest.mark.parametrize(
    "fusion, count", [("dfca", 62_299_591), ("concat", 56_391_367)]
)
def test_a_spectral_stream_has_the_parameters_measured(fusion, count):
    backbone = _published("small", spectral_channels=4, fusion=fusion)
    net = whole_hvit.HViTModel(backbone, 7)
    image = jax.ShapeDtypeStruct((1, 256, 256, 7), jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    assert tree.size(like) == count
    if fusion == "dfca":
        assert tree.size(like["backbone"]["dfca"]) == 7_088_640
    assert not list(backbone.check())


@pytest.mark.parametrize("grid", [(4, 4), (3, 4), (4, 5), (5, 3), (1, 1)])
def test_merging_is_the_loop_over_groups_of_a_padded_grid(grid):
    h, w = grid
    x = _draw(0, 2, h * w, 3)
    net = pyramid.PatchMerging(1e-5)
    like = jax.eval_shape(lambda r: net.init(r, x, grid), jax.random.key(0))
    variables = _random(like["params"])
    got, new = net.apply(variables, x, grid)
    p = variables["params"]
    assert new == ((h + 1) // 2, (w + 1) // 2)
    assert got.shape == (2, new[0] * new[1], 6)
    for b in range(2):
        for i in range(new[0]):
            for j in range(new[1]):
                group = []
                for r, c in ((0, 0), (1, 0), (0, 1), (1, 1)):
                    y, z = 2 * i + r, 2 * j + c
                    inside = y < h and z < w
                    group.append(x[b, y * w + z] if inside else np.zeros(3))
                row = np.concatenate(group).astype(np.float64)
                row = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
                row = row * p["norm"]["scale"] + p["norm"]["bias"]
                want = row @ p["reduction"]["kernel"]
                np.testing.assert_allclose(got[b, i * new[1] + j], want, atol=1e-5)


@pytest.mark.parametrize("size", [(28, 28), (12, 20), (20, 12), (4, 4)])
def test_images_of_any_size_have_a_map_per_stage(size):
    net = _net()
    out = _run(net, _variables(net), _draw(0, 2, *size, 3))
    h, w = size[0] // 4, size[1] // 4
    for s, maps in enumerate(out["stages"]):
        assert maps.shape == (2, h, w, 8 * 2**s)
        h, w = -(-h // 2), -(-w // 2)
    last = out["stages"][-1]
    assert out["tokens"].shape == (2, last.shape[1] * last.shape[2], 32)
    np.testing.assert_allclose(out["pooled"], out["tokens"].mean(1), atol=1e-6)
    assert np.isfinite(out["pooled"]).all()


def test_rows_are_rows_and_columns_are_columns():
    """Wide images are not tall ones: both have the same number of patches."""
    net = _net(image_size=8, image_width=16)
    variables = _variables(net)
    table = variables["params"]["pos_embed"]
    ask = functools.partial(net.apply, variables, method="position_table")
    np.testing.assert_array_equal(ask((2, 4)), table)
    tall = np.asarray(ask((4, 2))).reshape(4, 2, 8)
    # A ramp along the rows stays one along the rows, whatever the grid.
    ramp = np.broadcast_to(np.arange(2.0)[:, None, None], (2, 4, 8)).reshape(
        table.shape
    )
    variables = {"params": {**variables["params"], "pos_embed": jnp.asarray(ramp)}}
    ramp = np.asarray(net.apply(variables, (4, 2), method="position_table"))
    ramp = ramp.reshape(4, 2, 8)
    assert (np.diff(ramp, axis=0) > 0).all() and not np.diff(ramp, axis=1).any()
    assert tall.shape == ramp.shape


def test_pixels_that_fill_no_patch_are_left_out():
    net = _net(**SHALLOW)
    image = _draw(0, 1, 19, 18, 3)
    got, want = (
        _run(net, _variables(net), x)["tokens"] for x in (image, image[:, :16, :16])
    )
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="3x16 px holds no patch of 4"):
        net.apply(_variables(net), image[:, :3, :16])


def test_attention_reaches_everywhere_from_the_first_stage_on():
    net = _net()
    image = jnp.asarray(_draw(0, 1, 16, 16, 3))

    def corner(image):
        return net.apply(_variables(net), image)["stages"][0][0, 0, 0].sum()

    slope = jax.jit(jax.grad(corner), compiler_options=QUICK)(image)
    assert np.abs(slope[0, 12:, 12:]).max() > 1e-4


@functools.cache
def _model():
    backbone = _net(**SHALLOW, **BOTH)
    return whole_hvit.HViTModel(backbone, 3, consistency=True, projector=(5, 6), mae=7)


def test_the_gradient_reaches_every_leaf_of_both_streams_and_all_heads():
    net = _model()
    # Squares of the last stage have 8 px: four to an image of 16.
    params, image = _variables(net, 5)["params"], _draw(0, 2, 16, 16, 5)
    mask = np.zeros((2, 4), bool)
    mask[:, [0, 3]] = True
    heads = ("logits", "logits_rgb", "logits_spectral", "projection")

    def loss(params):
        out = net.apply({"params": params}, image, mask=mask)
        names = (*heads, "pixels", "spectral_pixels")
        return sum((out[n] * _draw(9, *out[n].shape)).sum() for n in names)

    grad = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
    still = [k for k, g in tree.flat(grad).items() if not np.abs(g).max() > 0]
    assert not still


def test_remat_changes_no_number_and_what_is_dropped_changes_all():
    drop = dict(drop_path=0.2, dropout=0.2, map_dropout=0.2)
    net, image = _net(**SHALLOW, **drop), _draw(0, 2, 16, 16, 3)
    again = net.clone(remat=True)
    params = _variables(net)["params"]
    names = list(tree.flat(_variables(again)["params"]))
    assert names == list(tree.flat(params))

    def grad(net):
        def loss(params):
            out = net.apply({"params": params}, image, train=True, rngs=KEYS)
            return (out["tokens"] * _draw(9, *out["tokens"].shape)).sum(), out

        run = jax.value_and_grad(loss, has_aux=True)
        return jax.jit(run, compiler_options=QUICK)

    (value, out), plain = grad(net)(params)
    (value_2, _), other = grad(again)(params)
    plan = str(grad(again).trace(params).jaxpr)
    assert "checkpoint" in plan or "remat" in plan
    np.testing.assert_allclose(value_2, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3),
        plain,
        other,
    )
    quiet = _run(net, {"params": params}, image)["tokens"]
    assert np.abs(out["tokens"] - quiet).max() > 1e-2


def test_drop_path_keeps_the_mean_and_drops_the_share_it_says():
    rng = np.random.default_rng(0)
    n, rate = 20_000, 0.3
    y = jnp.ones((n, 1)) * layers.gain_of(rng.random((n, 1)), rate)
    y = np.asarray(y)[:, 0]
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / 0.7], rtol=1e-6)
    assert abs((y == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
    assert abs(y.mean() - 1) < 5 * y.std() / np.sqrt(n)
    drop = layers.DropPath(rate)
    z = drop.apply({}, jnp.ones((n, 1)), True, rngs=KEYS)
    assert abs(float(z.mean()) - 1) < 5 * y.std() / np.sqrt(n)


def test_rates_of_drop_path_rise_through_all_stages_in_one_line():
    net = _net(depths=(2, 2, 6, 2), heads=(1, 2, 2, 2), drop_path=0.11)
    np.testing.assert_allclose(net.rates, 0.01 * np.arange(12), atol=1e-7)
    assert net.stage_of_blocks == (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)


def test_a_spectral_image_comes_apart_or_as_further_channels():
    net = _net(**SHALLOW, **BOTH)
    variables, image = _variables(net, 5), _draw(0, 2, 16, 16, 5)
    joined = _run(net, variables, image)
    apart = _run(net, variables, image[..., :3], spectral=image[..., 3:])
    np.testing.assert_array_equal(joined["tokens"], apart["tokens"])
    # The spectral image may have another size.
    small = _run(net, variables, image[..., :3], spectral=image[:, :8, :8, 3:])
    assert small["tokens"].shape == joined["tokens"].shape
    assert small["spectral"].shape == (2, 1, 8)
    # Without it the model is the RGB one.
    alone = _run(net, variables, image[..., :3])
    rgb = _net(**SHALLOW)
    same = {k: variables["params"][k] for k in _variables(rgb)["params"]}
    np.testing.assert_array_equal(
        alone["tokens"], _run(rgb, {"params": same}, image[..., :3])["tokens"]
    )
    assert np.abs(alone["tokens"] - joined["tokens"]).max() > 0.1
    for wrong in (image[..., :4], image[..., :1]):
        with pytest.raises(ValueError, match="rgb_channels=3 and spectral_channels=2"):
            net.apply(variables, wrong)
    with pytest.raises(ValueError, match="needs spectral_channels"):
        rgb.apply({"params": same}, image[..., :3], spectral=image[..., 3:])


def test_dfca_works_in_the_width_of_either_stream():
    image = _draw(0, 2, 16, 16, 5)
    for stream, width, dense in (("rgb", 16, "spectral"), ("spectral", 8, "rgb")):
        net = _net(**SHALLOW, **BOTH, dfca_width=stream)
        names = set(_variables(net, 5)["params"])
        assert net.fused_width == width and f"{dense}_to_dfca" in names
        assert f"{stream}_to_dfca" not in names
        assert _run(net, _variables(net, 5), image)["pooled"].shape == (2, width)


def test_concatenation_needs_one_grid():
    net = _net(**SHALLOW, spectral_channels=2, fusion="concat")
    variables, image = _variables(net, 5), _draw(0, 2, 16, 16, 5)
    joined = _run(net, variables, image)
    p = variables["params"]["concat"]
    both = np.concatenate([joined["rgb"], joined["spectral"]], axis=-1)
    want = both @ p["kernel"] + p["bias"]
    np.testing.assert_allclose(joined["tokens"], want, atol=1e-4)
    other = _run(net, variables, image[..., :3], spectral=image[:, :8, :8, 3:])
    assert other["spectral"].shape != other["rgb"].shape
    np.testing.assert_array_equal(other["tokens"], other["rgb"])


def test_the_disease_mask_cannot_direct_attention():
    net = hvit.DFCA(heads=2)
    rgb, spectral = _draw(0, 2, 5, 8), _draw(1, 2, 3, 8)
    like = jax.eval_shape(lambda r: net.init(r, rgb, spectral), jax.random.key(0))
    params = _random(like["params"])["params"]
    maps, out = [], []
    for mask in (0.0, 3.0):
        params = {**params, "disease_mask": mask * _draw(2, 1, 1, 8)}
        y, sown = net.apply(
            {"params": params}, rgb, spectral, mutable=["intermediates"]
        )
        maps.append(sown["intermediates"]["attn"]["attention"][0])
        out.append(y)
    assert maps[0].shape == (2, 2, 5, 3)
    np.testing.assert_allclose(*maps, atol=1e-6)
    assert np.abs(out[0] - out[1]).max() > 0.1


def test_hidden_squares_have_no_influence_and_are_of_the_last_stages_size():
    net = _model()
    variables, image = _variables(net, 5), jnp.asarray(_draw(0, 2, 16, 16, 5))
    assert net.square == 8
    mask = np.zeros((2, 4), bool)
    mask[:, 1] = True  # Top right.

    def seen(image):
        return net.apply(variables, image, mask=mask)["pixels"].sum()

    slope = np.abs(jax.jit(jax.grad(seen), compiler_options=QUICK)(image)).sum((0, -1))
    assert not slope[:8, 8:].any()
    assert (slope[8:] > 0).all() and (slope[:8, :8] > 0).all()
    with pytest.raises(ValueError, match="squares of 8 px, which do not fill"):
        net.apply(variables, image[:, :12], mask=mask)
    whole = net.clone(mae_hides=False)
    with pytest.raises(ValueError, match="only for depths of one stage"):
        whole.init(jax.random.key(0), image)


def test_squares_hold_their_pixels_channel_by_channel():
    image = _draw(0, 2, 4, 6, 3)
    squares = np.asarray(whole_hvit.square_pixels(image, 2))
    assert squares.shape == (2, 6, 12)
    # Square 4 is the second of the second row: rows 2, 3 and columns 2, 3.
    want = [image[1, y, x, c] for c in range(3) for y in (2, 3) for x in (2, 3)]
    np.testing.assert_array_equal(squares[1, 4], want)


def test_features_and_pooled_are_what_the_forward_pass_says():
    net = _net(**SHALLOW)
    variables, image = _variables(net), _draw(0, 2, 16, 12, 3)
    out = _run(net, variables, image)
    found = _run(net, variables, image, method="features")
    assert set(found) == {"tokens", *net.poolings}
    np.testing.assert_allclose(found["mean"], out["pooled"], atol=1e-6)
    gap = out["stages"][-1].mean((1, 2))
    np.testing.assert_allclose(found["gap"], gap, atol=1e-6)
    with pytest.raises(ValueError, match="how='cls'"):
        net.apply(variables, image, how="cls", method="pooled")


def test_half_precision_computes_near_the_full_one_and_keeps_float32_parameters():
    net, image = _net(**SHALLOW), _draw(0, 2, 16, 16, 3)
    half = _net(**SHALLOW, dtype="bfloat16")
    full = _run(net, _variables(net), image)["pooled"]
    got = _run(half, _variables(half), image)
    assert got["tokens"].dtype == jnp.bfloat16 and got["pooled"].dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(_variables(half))} == {np.dtype("float32")}
    np.testing.assert_allclose(got["pooled"], full, atol=0.1)


def test_layers_freeze_from_the_input_on_and_nothing_is_left_without_a_rule():
    net = _net(**BOTH)
    rules = net.freeze_layers()
    names = list(tree.flat(_variables(net, 5)["params"]))
    index = tree.match(names, rules, what="freeze.layers", default=freezeout.NEVER)
    for stream in ("", "spectral/"):
        first = {f"{stream}patch_embed/kernel", f"{stream}patch_norm/scale"}
        assert {index[k] for k in first} == {0}
        assert index[f"{stream}pos_embed"] == 1
        for block, want in ((0, 1), (1, 2), (2, 3), (3, 4)):
            assert index[f"{stream}block_{block}/attn/qkv/kernel"] == want
        # With the block before them: the last one of their stage.
        assert index[f"{stream}merge_0/reduction/kernel"] == 1
        assert index[f"{stream}merge_1/norm/scale"] == 3
        assert index[f"{stream}norm/scale"] == 4
    never = {k.split("/")[0] for k, i in index.items() if i == freezeout.NEVER}
    assert never == {"dfca", "spectral_to_dfca"}


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(depths=()), "depths=()"),
        (dict(heads=(1, 2)), "one number per stage"),
        (dict(heads=(1, 3, 4)), "3 does not divide the width 16 of stage 1"),
        (dict(image_size=3), "image_size=3: at least one patch=4"),
        (dict(drop_path=1.0), "drop_path=1.0"),
        (dict(mlp_ratio=0.0), "mlp_ratio=0.0"),
        (dict(BOTH, dfca_heads=5), "dfca_heads=5: does not divide 32"),
        (dict(BOTH, fusion="concat"), "spectral_width=4 must be width=8"),
        (dict(BOTH, spectral_width=5, heads=(2, 2, 2)), "spectral_width=5: heads"),
        (dict(spectral_channels=-1), "spectral_channels=-1"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(fields, words):
    problems = config.Problems()
    config.section(hvit.HViT, SIZE | fields, "", problems)
    assert any(words in line for line in problems), problems


def test_it_is_what_methods_ask_of_a_backbone():
    assert isinstance(_net(), models.Backbone)
