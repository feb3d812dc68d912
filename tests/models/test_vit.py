"""The vision transformer: masking, sizes, switches, names, numbers of parameters."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config, models, tree
from vitssl.models import layers, patches, vit
from vitssl.ops import accelerator
from vitssl.run import devices

SIZE = dict(width=16, depth=2, heads=2, patch=4, image_size=16)
EVERYTHING = dict(layerscale=0.5, rope=True, registers=2, qk_norm=True)


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _net(**fields):
    return vit.ViT(**SIZE | fields)


def _init(net, channels=3):
    """Variables with every leaf random, so that no symmetry hides a mistake."""
    image = jnp.zeros((1, net.image_size, net.image_size, channels))
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    leaves = tree.flat(like)
    draws = {
        name: 0.3 * _draw(i, *leaf.shape) + ("scale" in name)
        for i, (name, leaf) in enumerate(leaves.items())
    }
    return {"params": tree.nest(draws)}


@functools.partial(jax.jit, static_argnums=0)
def _run(net, variables, image, masks):
    return net.apply(variables, image, **masks)[0]


def _some(seed, share, *shape):
    return np.random.default_rng(seed).random(shape) < share


@pytest.mark.parametrize("fields", [{}, EVERYTHING, dict(cls=False)])
def test_a_padded_batch_equals_every_sample_alone_without_its_hidden_tokens(fields):
    net = _net(**fields)
    variables, image = _init(net), _draw(0, 3, 16, 16, 3)
    mask = np.zeros((3, 16), bool)
    mask[0, [1, 2, 5, 11]] = mask[1, [15]] = mask[2, [0, 3, 4, 9, 10, 14]] = True
    keep, count = patches.pack(mask, 9)
    got = _run(net, variables, image, dict(keep=keep, count=count))
    assert got.shape == (3, net.prefix + 9, 16)
    for i in range(3):
        alone = np.flatnonzero(mask[i])[None]
        want = _run(net, variables, image[i : i + 1], dict(keep=alone))
        np.testing.assert_allclose(
            got[i, : net.prefix + len(alone[0])], want[0], atol=1e-5
        )


def test_keeping_every_patch_is_keeping_none_out():
    net = _net(**EVERYTHING)
    variables, image = _init(net), _draw(0, 2, 16, 16, 3)
    want = _run(net, variables, image, {})
    order = np.stack([np.arange(16), np.random.default_rng(0).permutation(16)])
    got = np.asarray(_run(net, variables, image, dict(keep=order)))
    p = net.prefix
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, :p], want[1, :p], atol=1e-5)
    np.testing.assert_allclose(got[1, p:], want[1, p:][order[1]], atol=1e-5)


def test_hidden_and_padded_patches_have_no_influence():
    net = _net(**EVERYTHING)
    variables, image = _init(net), _draw(0, 2, 16, 16, 3)
    mask = _some(1, 0.4, 2, 16)
    keep, count = patches.pack(mask, 12)

    def visible(image):
        y, _ = net.apply(variables, image, keep=keep, count=count)
        seen = patches.valid(count + net.prefix, y.shape[1])
        return jnp.where(seen[..., None], y, 0.0)

    slope = jax.grad(lambda x: (visible(x) * _draw(2, 2, 15, 16)).sum())(image)
    slope = np.abs(patches.patchify(slope, 4)).sum(-1)  # [B, N]
    np.testing.assert_array_equal(slope > 0, mask)


def test_zeroed_patches_stay_in_the_sequence_without_content():
    net = _net()
    variables, image = _init(net), _draw(0, 2, 16, 16, 3)
    hide = _some(1, 0.5, 2, 16)
    got = _run(net, variables, image, dict(hide=hide))
    assert got.shape == (2, 17, 16)
    noise = np.where(hide[..., None], 9.0, 0.0) * _draw(2, 2, 16, 48)
    cells = "b (h w) (p q c) -> b (h p) (w q) c"
    other = image + einops.rearrange(noise, cells, h=4, w=4, p=4, q=4, c=3)
    same = _run(net, variables, other, dict(hide=hide))
    np.testing.assert_allclose(same, got, atol=1e-5)
    # Zeroing is not dropping: hidden tokens are attended to.
    keep, count = patches.pack(~hide, 16)
    dropped = _run(net, variables, image, dict(keep=keep, count=count))
    assert np.abs(dropped[:, 0] - got[:, 0]).max() > 1e-2


def test_masks_that_exclude_each_other_are_refused():
    net = _net()
    variables, image = _init(net), _draw(0, 1, 16, 16, 3)
    keep = jnp.arange(3)[None]
    with pytest.raises(ValueError, match="not both"):
        net.apply(variables, image, keep=keep, hide=jnp.zeros((1, 16), bool))
    with pytest.raises(ValueError, match="give keep"):
        net.apply(variables, image, count=jnp.array([3]))


@pytest.mark.parametrize("channels", [1, 3, 4, 12])
def test_any_number_of_channels_counts(channels):
    net = _net(depth=1)
    variables, image = _init(net, channels), _draw(0, 1, 16, 16, channels)
    want = _run(net, variables, image, {})
    assert variables["params"]["patch_embed"]["kernel"].shape == (4, 4, channels, 16)
    for c in range(channels):
        other = image.copy()
        other[..., c] += 1.0
        assert np.abs(_run(net, variables, other, {}) - want).max() > 1e-3


def test_the_patch_embedding_is_the_convolution_its_kernel_says():
    net = vit.PatchEmbed(6, 4)
    x = _draw(0, 2, 8, 12, 3)
    params = {"kernel": _draw(1, 4, 4, 3, 6), "bias": _draw(2, 6)}
    want = jax.lax.conv_general_dilated(
        x, params["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = net.apply({"params": params}, x)
    want = want.reshape(2, 6, 6) + params["bias"]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_rectangles_and_other_sizes_use_the_resampled_table():
    net = _net(rope=True)
    variables, image = _init(net), _draw(0, 2, 8, 24, 3)
    tokens, out = net.apply(variables, image)
    assert tokens.shape == (2, 13, 16) and out["grid"] == (2, 6)
    table = net.apply(variables, (2, 6), method="position_table")
    assert table.shape == (12, 16)
    # Rotated grids are other grids: rows and columns are told apart.
    turned, _ = net.apply(variables, image.transpose(0, 2, 1, 3))
    assert np.abs(turned[:, 0] - tokens[:, 0]).max() > 1e-3
    own = net.apply(variables, (4, 4), method="position_table")
    np.testing.assert_array_equal(own, variables["params"]["pos_embed"][0, 1:])


def test_an_image_the_patch_does_not_divide_is_refused():
    net = _net()
    with pytest.raises(ValueError, match="patch=4 does not divide"):
        net.apply(_init(net), _draw(0, 1, 16, 18, 3))


def test_remat_recomputes_and_changes_neither_values_nor_names():
    image, results = _draw(0, 2, 16, 16, 3), {}
    for remat in (False, True):
        net = _net(remat=remat, drop_path=0.5, **EVERYTHING)
        variables = _init(net)

        def loss(params, net=net):
            rngs = {"drop_path": jax.random.key(0)}
            y, _ = net.apply({"params": params}, image, train=True, rngs=rngs)
            return (y * _draw(1, *y.shape)).sum()

        step = jax.value_and_grad(loss)
        text = str(jax.make_jaxpr(step)(variables["params"]))
        assert ("remat" in text or "checkpoint[" in text) == remat
        results[remat] = jax.jit(step)(variables["params"])
    plain, again = (tree.flat(results[r][1]) for r in (False, True))
    np.testing.assert_allclose(results[True][0], results[False][0], rtol=1e-5)
    assert plain.keys() == again.keys()
    for name in plain:
        np.testing.assert_allclose(again[name], plain[name], atol=1e-4, err_msg=name)


def test_the_names_of_the_parameters():
    net = _net(depth=1, **EVERYTHING)
    block = {f"norm{i}/{p}" for i in (1, 2) for p in ("scale", "bias")}
    block |= {f"attn/{i}_norm/{p}" for i in "qk" for p in ("scale", "bias")}
    layer = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    block |= {f"{i}/{p}" for i in layer for p in ("kernel", "bias")} | {"ls1", "ls2"}
    want = {f"block_0/{name}" for name in block} | {"cls", "registers", "pos_embed"}
    want |= {"patch_embed/kernel", "patch_embed/bias", "norm/scale", "norm/bias"}
    params = tree.flat(_init(net)["params"])
    assert params.keys() == want
    assert params["pos_embed"].shape == (1, 17, 16)
    bare = tree.flat(_init(_net(cls=False))["params"])
    assert bare["pos_embed"].shape == (1, 16, 16) and "cls" not in bare


def test_the_initial_values():
    net = vit.ViT(width=64, depth=1, heads=2, patch=8, image_size=64, layerscale=1e-5)
    params = tree.flat(net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"])
    kernel = np.asarray(params["patch_embed/kernel"])
    bound = (8 * 8 * 3) ** -0.5
    assert np.abs(kernel).max() <= bound and abs(kernel.std() - bound / 3**0.5) < 1e-3
    assert 0.5 * bound < np.abs(params["patch_embed/bias"]).max() <= bound
    assert abs(params["pos_embed"].std() - 0.02) < 1e-3
    assert 1e-7 < params["cls"].std() < 1e-5
    assert abs(params["block_0/attn/qkv/kernel"].std() - 0.02) < 1e-3
    assert (params["block_0/ls2"] == np.float32(1e-5)).all()
    for name, leaf in params.items():
        if name.endswith("/bias") and "patch" not in name:
            assert not leaf.any(), name
        if name.endswith("/scale"):
            assert (leaf == 1).all(), name


# Encoder parameters of the published variants (patch 16, 224 pixels, no head).
@pytest.mark.parametrize(
    "width, depth, heads, want",
    [
        (192, 12, 3, 5_524_416),
        (384, 12, 6, 21_665_664),
        (768, 12, 12, 85_798_656),
        (1024, 24, 16, 303_301_632),
    ],
)
def test_published_variants_have_their_number_of_parameters(width, depth, heads, want):
    net = vit.ViT(width=width, depth=depth, heads=heads, patch=16, image_size=224)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == want


@pytest.mark.parametrize("fields", [{}, EVERYTHING, dict(cls=False, rope=True)])
def test_every_leaf_gets_a_gradient(fields):
    net = _net(**fields)
    image = _draw(0, 2, 16, 16, 3)

    @jax.jit
    @jax.grad
    def slope(params):
        y, _ = net.apply({"params": params}, image)
        return (y * _draw(1, *y.shape)).sum()

    for name, leaf in tree.flat(slope(_init(net)["params"])).items():
        assert np.abs(leaf).max() > 1e-4, name


def test_the_forms_for_a_cpu_change_neither_values_nor_gradients(monkeypatch):
    net = _net(**EVERYTHING)
    variables, image = _init(net), _draw(0, 2, 16, 16, 3)
    keep, count = patches.pack(_some(0, 0.5, 2, 16), 12)
    weight = _draw(1, 2, 15, 16)

    def loss(params):
        y, _ = net.apply({"params": params}, image, keep=keep, count=count)
        seen = patches.valid(count + 3, 15)
        return jnp.where(seen[..., None], y * weight, 0.0).sum()

    got = jax.jit(jax.value_and_grad(loss))(variables["params"])
    monkeypatch.setattr(accelerator, "on_cpu", lambda: False)
    want = jax.jit(jax.value_and_grad(lambda p: loss(p)))(variables["params"])
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    for (name, a), b in zip(
        tree.flat(got[1]).items(), tree.flat(want[1]).values(), strict=False
    ):
        np.testing.assert_allclose(a, b, atol=2e-4, err_msg=name)


def test_drop_paths_grow_linearly_with_depth_and_rest_in_evaluation():
    net = _net(depth=5, drop_path=0.4)
    variables, image = _init(net), _draw(0, 4, 16, 16, 3)
    rates = [block.drop_path for block in net.bind(variables).block]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4])
    run = jax.jit(
        lambda key: net.apply(variables, image, train=True, rngs={"drop_path": key})[0]
    )
    one, again, two = (run(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-2
    rest = _run(net, variables, image, {})
    np.testing.assert_array_equal(rest, _run(_net(depth=5), variables, image, {}))


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters():
    net, half = _net(**EVERYTHING), _net(dtype="bfloat16", **EVERYTHING)
    image = _draw(0, 2, 16, 16, 3)
    params = half.init(jax.random.key(0), image)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    variables = _init(net)
    want = np.asarray(_run(net, variables, image, {}))
    got = _run(half, variables, image, {})
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - want)
    assert error.mean() < 0.01 * want.std() and error.max() < 0.1 * want.std()


def test_sown_attention_sums_to_one_and_reproduces_the_output():
    net = _net(**EVERYTHING)
    variables, image = _init(net), _draw(0, 2, 16, 16, 3)
    keep, count = patches.pack(_some(0, 0.5, 2, 16), 10)
    masks = dict(keep=keep, count=count)
    (tokens, _), sown = net.apply(variables, image, **masks, mutable=["intermediates"])
    want = _run(net, variables, image, masks)
    for i, n in enumerate(np.asarray(count) + net.prefix):
        np.testing.assert_allclose(tokens[i, :n], want[i, :n], atol=1e-5)
    assert sown["intermediates"].keys() == {"block_0", "block_1"}
    for block in sown["intermediates"].values():
        (attention,) = block["attn"]["attention"]
        assert attention.shape == (2, 2, 13, 13)
        np.testing.assert_allclose(attention.sum(-1), 1.0, atol=1e-5)
        for i, n in enumerate(np.asarray(count) + net.prefix):
            assert not attention[i, :, :, n:].any()


def test_the_blocks_come_out_before_the_last_norm():
    net = _net(depth=3)
    variables, image = _init(net), _draw(0, 2, 16, 16, 3)
    tokens, out = net.apply(variables, image)
    assert len(out["blocks"]) == 3
    last = layers.LayerNorm(net.norm_eps).apply(
        {"params": variables["params"]["norm"]}, out["blocks"][-1]
    )
    np.testing.assert_allclose(tokens, last, atol=1e-6)
    assert np.abs(out["blocks"][0] - out["blocks"][1]).max() > 0.1


def test_a_batch_over_several_devices_gives_the_same_tokens_and_gradients():
    mesh = devices.mesh(devices.Mesh(), 8)
    net = _net(depth=1)
    params, image = _init(net)["params"], _draw(0, 8, 16, 16, 3)

    @jax.jit
    @jax.value_and_grad
    def step(params, image):
        y, _ = net.apply({"params": params}, image)
        return jnp.sin(y).sum()

    want = step(params, image)
    split = jax.device_put(image, devices.batch_sharding(mesh))
    whole = jax.device_put(params, devices.replicated(mesh))
    got = step(whole, split)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(width=0), "width=0: 1 or more"),
        (dict(heads=3), "heads=3: must divide width=16; nearest that do: 2, 4"),
        (dict(image_size=18), "image_size=18: must be a multiple of patch=4.* 16 and"),
        (dict(image_size=0), "image_size=0: 1 or more"),
        (dict(rope=True, heads=8), "rope=True: .* divisible by 4, it is 2"),
        (dict(drop_path=1.0), r"drop_path=1.0: in \[0, 1\)"),
        (dict(layerscale=-1e-5), "layerscale=-1e-05: 0 or more"),
        (dict(registers=-1), "registers=-1: 0 or more"),
        (dict(mlp_ratio=0.0), "mlp_ratio=0.0: above 0"),
        (dict(norm_eps=-1.0), "norm_eps=-1.0: above 0"),
    ],
)
def test_a_section_names_the_field_and_the_way_out(fields, said):
    problems = config.Problems()
    config.section(vit.ViT, SIZE | fields, "", problems)
    (line,) = problems
    with pytest.raises(ValueError, match=f"^{said}"):
        raise ValueError(line)


def test_check_has_nothing_to_say_about_a_sound_model():
    assert not list(_net(**EVERYTHING, drop_path=0.1).check())


def test_a_backbone_is_what_methods_ask_for():
    assert isinstance(_net(), models.Backbone)
    assert not isinstance(layers.Block(2, 8), models.Backbone)
