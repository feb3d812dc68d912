"""Part models: faithful to their mask, pruned exactly, of the published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import dinov2
from vitssl import tree
from vitssl.methods.parts import heads, kinds, networks
from vitssl.models import patches, vit
from vitssl.run import devices

QUICK = {"xla_backend_optimization_level": 0}
SIDE, PATCH, CLASSES = 5, 4, 3


def _vit(**options):
    fields = dict(width=16, depth=2, heads=2, patch=PATCH, image_size=SIDE * PATCH)
    return vit.ViT(**fields | dict(registers=2, class_position=False) | options)


@functools.cache
def _masked(rooms=(0.3, 0.6, 1.0), dtype="float32"):
    net = networks.MaskedClassifier(_vit(dtype=dtype), CLASSES, rooms=rooms)
    args = _images(1), jnp.ones((1, SIDE, SIDE))
    # Weights of order one: attention that looks at single patches.
    params = jax.jit(net.init, compiler_options=QUICK)(jax.random.key(0), *args)
    return net, jax.tree.map(lambda x: 8.0 * x if x.ndim == 2 else x, params)


def _images(b, seed=0):
    size = SIDE * PATCH
    return jax.random.normal(jax.random.key(seed), (b, size, size, 3))


def _masks(rng, b, share):
    return (rng.random((b, SIDE, SIDE)) < share).astype(np.float32)


def _hide(image, mask, noise):
    """The image with other pixels wherever the mask is 0."""
    pixels = np.kron(mask, np.ones((PATCH, PATCH)))[..., None]
    return np.where(pixels > 0, np.asarray(image), noise)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK)
def _logits(net, params, image, mask, masking):
    return net.apply(params, image, mask, masking=masking)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masking", ["hard", "straight_through"])
def test_masked_out_pixels_do_not_change_one_bit_of_the_logits(masking, dtype):
    net, params = _masked(dtype=dtype)
    rng = np.random.default_rng(0)
    for trial in range(6):
        # From nothing seen to all but a few patches, so every room is used.
        mask = _masks(rng, 3, share=trial / 6)
        image = _images(3, trial)
        scale = 10.0 ** rng.integers(-2, 6)
        noise = rng.normal(scale=scale, size=image.shape).astype(np.float32)
        other = jnp.asarray(_hide(image, mask, noise))
        assert (np.asarray(other) != np.asarray(image)).any()
        a, b = (
            _logits(net, params, x, jnp.asarray(mask), masking) for x in (image, other)
        )
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_faithful_on_several_devices_as_well():
    net, params = _masked()
    rng = np.random.default_rng(1)
    mask, image = _masks(rng, 4, 0.5), _images(4)
    noise = rng.normal(scale=100.0, size=image.shape)
    rows = devices.batch_sharding(devices.mesh(devices.Mesh(), 4))
    put = lambda x: jax.device_put(jnp.asarray(x, jnp.float32), rows)  # noqa: E731
    seen = _logits(net, params, put(image), put(mask), "hard")
    hidden = _logits(net, params, put(_hide(image, mask, noise)), put(mask), "hard")
    np.testing.assert_array_equal(seen, hidden)
    alone = _logits(net, params, image, jnp.asarray(mask), "hard")
    np.testing.assert_allclose(seen, alone, atol=1e-5)


def test_pixels_that_are_seen_do_change_the_logits():
    net, params = _masked()
    mask = _masks(np.random.default_rng(2), 2, 0.5)
    other = _hide(_images(2), 1 - mask, 0.0)
    a, b = (_logits(net, params, x, mask, "hard") for x in (_images(2), other))
    assert (np.abs(np.asarray(a) - b).max(-1) > 1e-3).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_pruning_is_exact_in_every_room(share):
    net, params = _masked()
    whole, _ = _masked(rooms=(1.0,))
    mask = jnp.asarray(_masks(np.random.default_rng(3), 3, share))
    pruned = _logits(net, params, _images(3), mask, "hard")
    kept = _logits(whole, params, _images(3), mask, "hard")
    masked = _logits(whole, params, _images(3), mask, "straight_through")
    np.testing.assert_allclose(pruned, kept, atol=1e-5)
    np.testing.assert_allclose(pruned, masked, atol=1e-5)


def test_a_room_is_as_large_as_the_fullest_mask_needs():
    """A fuller image widens the room for all, never drops a patch."""
    net, params = _masked()
    few, many = np.zeros((1, SIDE, SIDE)), np.ones((1, SIDE, SIDE))
    few[0, 2, 2] = 1
    both = jnp.asarray(np.concatenate([few, many]), jnp.float32)
    out = _logits(net, params, _images(2), both, "hard")
    for i, mask in enumerate((few, many)):
        alone = _logits(net, params, _images(2)[i : i + 1], jnp.asarray(mask), "hard")
        np.testing.assert_allclose(out[i : i + 1], alone, atol=1e-5)


def _two_stage(masking, k=3):
    head = heads.PartHead(parts=k, classes=CLASSES, part_dropout=0.3)
    first = networks.PartNet(_vit(), head)
    second = networks.MaskedClassifier(_vit(), CLASSES)
    return networks.TwoStage(first, second, masking)


@pytest.mark.parametrize(
    "masking, reaches", [("hard", False), ("straight_through", True), ("soft", True)]
)
def test_whether_the_second_stage_teaches_the_first(masking, reaches):
    net = _two_stage(masking)
    image = _images(2)
    params = jax.jit(net.init, compiler_options=QUICK)(jax.random.key(1), image)
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim == 2 else x, params)

    def loss(p):
        return net.apply(p, image).logits.var()

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)["params"]
    flat = tree.flat(grads)
    assert all(np.isfinite(g).all() for g in flat.values())
    assert any(np.any(g) for k, g in flat.items() if k.startswith("stage_2"))
    used = [k for k, g in flat.items() if k.startswith("stage_1") and np.any(g)]
    assert bool(used) == reaches


def test_the_gradient_of_a_key_weight_is_that_of_the_weighted_softmax():
    """Against numbers: a_ij = m_j e^s_ij / sum_j m_j e^s_ij, at m = 0 too."""
    from vitssl.models import layers

    rng = jax.random.split(jax.random.key(5), 3)
    q, k, v = (jax.random.normal(r, (1, 4, 1, 2)) for r in rng)
    weight = jnp.array([[1.0, 0.0, 1.0, 1.0]])
    loss = lambda w: layers.weighted_attention(q, k, v, w)[0].sum()  # noqa: E731
    got = jax.grad(loss)(weight)
    step = 1e-3
    for j in range(4):
        up = loss(weight.at[0, j].add(step))
        down = loss(weight.at[0, j].add(-step)) if j != 1 else loss(weight)
        slope = (up - down) / (step if j == 1 else 2 * step)
        np.testing.assert_allclose(got[0, j], slope, rtol=0.02, atol=2e-3)


def test_removed_parts_are_gone_and_no_map_becomes_infinite():
    net = _two_stage("soft")
    image = _images(2)
    params = jax.jit(net.init, compiler_options=QUICK)(jax.random.key(1), image)
    noisy = kinds.Parts(3, eval_noise=True)
    noise = noisy.draws(jax.random.key(2), (2, SIDE, SIDE), train=False)
    out = net.apply(params, image, noise, removed=(1,))
    assert np.isfinite(out.found.maps).all()
    owner = np.asarray(out.found.maps[..., :-1].argmax(-1))
    assert (np.asarray(out.mask)[owner == 1] == 0).all()
    assert (np.asarray(out.mask)[owner != 1] > 0).all()


PUBLISHED = {  # image size, K, C: parameters of both stages.
    (518, 8, 200): 173_493_504,
    (518, 4, 2): 173_180_160,
    (518, 8, 2): 173_189_376,
    (224, 2, 2): 171_465_984,
    (224, 1, 2): 171_463_680,
    (224, 1, 1000): 172_996_608,
}


def _count(net, size):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return tree.size(jax.eval_shape(net.init, jax.random.key(0), image)["params"])


def _full(backbone, k, classes):
    first = networks.PartNet(backbone, heads.PartHead(parts=k, classes=classes))
    second = networks.MaskedClassifier(backbone.clone(), classes)
    return networks.TwoStage(first, second)


@pytest.mark.parametrize("size, k, classes", PUBLISHED)
def test_published_two_stage_models_have_their_number_of_parameters(size, k, classes):
    net = _full(dinov2.reg4("base", size), k, classes)
    assert _count(net, size) == PUBLISHED[size, k, classes]


def test_rad_dino_has_its_number_of_parameters():
    assert _count(_full(dinov2.plain("base"), 8, 2), 518) == 173_184_768
    assert _count(dinov2.plain("base"), 518) == 86_579_712


@pytest.mark.parametrize(
    "size, want", [("small", 22_057_344), ("base", 86_582_016), ("large", 304_370_688)]
)
def test_dinov2_with_registers_has_its_number_of_parameters(size, want):
    assert _count(dinov2.reg4(size), 518) == want


def test_the_patch_must_divide_the_image():
    net = _two_stage("hard")
    with pytest.raises(ValueError, match="patch=4 does not divide"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 18, 20, 3)))


def test_keys_cannot_be_weighed_and_dropped_at_once():
    keep, weight = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 25))
    with pytest.raises(ValueError, match="keep .* or weight"):
        jax.eval_shape(
            lambda: _vit().init(jax.random.key(0), _images(1), keep=keep, weight=weight)
        )


def test_grid_of_a_part_net_is_that_of_its_backbone():
    net = _two_stage("hard").stage_1
    found = jax.eval_shape(
        lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, 12, 20, 3)))
    )[0]
    assert found.maps.shape == (2, *patches.grid(jnp.zeros((12, 20, 3)), PATCH), 4)
