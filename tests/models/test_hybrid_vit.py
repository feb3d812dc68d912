"""ViTs with another patch size inside and a finer grid outside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import dinov2
from vitssl.models import hybrid_vit, posemb, upsample, vit

QUICK = {"xla_backend_optimization_level": 0}


def _vit(**own):
    given = dict(width=8, depth=1, heads=2, patch=4, image_size=16, mlp_ratio=1.0)
    return vit.ViT(**given | own)


def _params(system, seed=0):
    """Random parameters, drawn by numpy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    like = jax.eval_shape(system.init, jax.random.key(0), image)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), like
    )


def _image(side=16, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, side, side, 3)), jnp.float32)


def _run(system, params, image):
    return jax.jit(system.apply, compiler_options=QUICK)(params, image)


@pytest.mark.parametrize("registers", [0, 2])
def test_at_equal_patches_it_is_the_vit_bit_by_bit(registers):
    net = _vit(registers=registers, class_position=not registers)
    system = hybrid_vit.HybridViT(net, 4, 4)
    params, image = _params(system), _image()
    assert set(params) == {"vit"} and system.network is net
    assert system.fitted(params["vit"]) is params["vit"]
    plain = jax.jit(lambda p, x: net.apply({"params": p}, x)[0], compiler_options=QUICK)
    want, found = plain(params["vit"], image), _run(system, params, image)
    np.testing.assert_array_equal(found.prefix, want[:, : net.prefix])
    flat = found.features_q.reshape(2, 16, 8)
    np.testing.assert_array_equal(flat, want[:, net.prefix :])
    np.testing.assert_array_equal(found.tokens_p, found.features_q)


def test_prefix_tokens_are_apart_and_patches_are_upsampled():
    system = hybrid_vit.HybridViT(_vit(registers=3, class_position=False), 4, 1)
    params, image = _params(system), _image()
    found = _run(system, params, image)
    assert found.prefix.shape == (2, 4, 8) and found.tokens_p.shape == (2, 4, 4, 8)
    want = upsample.upsample(found.tokens_p[:, :, :, None, None], None, 4)[
        :, :, :, 0, 0
    ]
    np.testing.assert_allclose(found.features_q, want, atol=1e-6)


def test_another_patch_keeps_the_parameters_and_the_scale_of_positions():
    net = _vit(positions="sincos", cls=False)
    for anchor, first in (("corner", 0.0), ("center", 0.5)):
        system = hybrid_vit.HybridViT(net, 8, 2, anchor=anchor)
        assert system.network.spacing == (2.0, first)
        table = system.network.apply({"params": {}}, (2, 2), method="position_table")
        want = posemb.sincos((4, 4), 8).reshape(4, 4, 8)
        if anchor == "corner":  # Of every second patch of the base.
            np.testing.assert_allclose(
                table.reshape(2, 2, 8), want[::2, ::2], atol=1e-6
            )
    params, image = _params(system), _image()
    assert params["vit"]["patch_embed"]["kernel"].shape == (4, 4, 3, 8)
    assert system.fitted(params["vit"])["patch_embed"]["kernel"].shape[:2] == (8, 8)
    assert _run(system, params, image).features_q.shape == (2, 8, 8, 8)


def test_rotary_positions_are_in_units_of_the_base():
    near = posemb.rope_angles((4, 4), 8, 100.0).reshape(4, 4, -1)
    far = posemb.rope_angles((2, 2), 8, 100.0, spacing=(2.0, 0.0)).reshape(2, 2, -1)
    np.testing.assert_allclose(far, near[::2, ::2], rtol=1e-6)
    unit = [posemb.rope_angles((2, 2), 8, 100.0, True, s) for s in ((1, 0), (2.0, 0.5))]
    np.testing.assert_array_equal(*unit)


def test_shifting_is_the_network_on_shifted_images():
    system = hybrid_vit.HybridViT(_vit(), 4, 2, "shift")
    params, image = _params(system), _image()
    found = _run(system, params, image)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    plain = dataclasses.replace(system, q=4)
    for a in range(2):
        for b in range(2):
            window = padded[:, 2 * a : 2 * a + 16, 2 * b : 2 * b + 16]
            want = _run(plain, params, jnp.asarray(window))
            np.testing.assert_allclose(
                found.features_q[:, a::2, b::2], want.tokens_p, atol=1e-5
            )


def test_skip_adds_detail_from_inside_a_patch_alone():
    system = hybrid_vit.HybridViT(_vit(), 4, 2, "skip")
    params, image = _params(system), _image()
    assert params["up"]["skip"]["image_0"]["kernel"].shape == (2 * 2 * 3, 8)
    found = _run(system, params, image).features_q
    shuffled = hybrid_vit.HybridViT(_vit(), 4, 2, "pixel_shuffle")
    init = jax.jit(shuffled.init, compiler_options=QUICK)
    copies = _run(shuffled, init(jax.random.key(0), image), image)
    blocks = np.asarray(copies.features_q).reshape(2, 4, 2, 4, 2, 8)
    np.testing.assert_allclose(
        blocks, np.broadcast_to(blocks[:, :, :1, :, :1], blocks.shape), atol=1e-6
    )
    assert np.asarray(found).reshape(2, 4, 2, 4, 2, 8).std((2, 4)).max() > 0.1


def test_dinov2_goes_in_as_it_is():
    net = dinov2.reg4("small", 28)
    system = hybrid_vit.HybridViT(net, 14, 7)
    image = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    like = jax.eval_shape(system.init, jax.random.key(0), image)
    found = jax.eval_shape(system.apply, like, image)
    assert found.prefix.shape == (1, 5, 384)
    assert found.features_q.shape == (1, 4, 4, 384)


def test_impossible_patches_are_told():
    with pytest.raises(ValueError, match="q=3: must divide .* p=4: one of 1, 2, 4"):
        _params(hybrid_vit.HybridViT(_vit(), 4, 3))
    with pytest.raises(ValueError, match="patch=8 does not divide an image of 20x20"):
        system = hybrid_vit.HybridViT(_vit(), 8, 4)
        jax.eval_shape(system.apply, _params(system), _image(20))
