"""What is done otherwise on TPUs: its numbers here, and what it is lowered to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vitssl.bench import hlo
from vitssl.models import layers, patches, vit
from vitssl.ops import across, tpu


def _draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _mesh(count):
    axes = dict(axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])
    return jax.make_mesh((count, 1), ("data", "fsdp"), **axes)


@pytest.mark.parametrize(
    "queries, keys, length", [(197, 197, None), (130, 180, (9, 180))]
)
def test_the_kernel_of_attention_has_the_numbers_of_the_formula(queries, keys, length):
    q, *kv = (_draw(i, 2, n, 1, 8) for i, n in enumerate((queries, keys, keys)))
    length = None if length is None else jnp.asarray(length)

    def by(attention):
        def loss(*qkv):
            y = attention(*qkv, length)
            return jnp.square(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, *kv)

    with across.over(_mesh(1)):
        (_, found), slopes = by(lambda *qkv: tpu.attention(*qkv, interpret=True))
    (_, want), ours = by(lambda *qkv: layers.softmax_attention(*qkv)[0])
    np.testing.assert_allclose(found, want, atol=2e-6)
    for g, h in zip(slopes, ours, strict=True):
        np.testing.assert_allclose(g, h, atol=1e-5 * np.abs(h).max())


def test_a_strided_convolution_is_the_product_with_patches():
    image, kernel = _draw(0, 3, 12, 8, 2), _draw(1, 4, 4, 2, 5)

    def convolved(image, kernel):
        return (tpu.embed(image, kernel) ** 3).sum()

    def product(image, kernel):
        flat = patches.patchify(image, 4) @ kernel.reshape(-1, 5)
        return (flat**3).sum()

    found, want = (
        jax.value_and_grad(f, (0, 1))(image, kernel) for f in (convolved, product)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    half = jax.grad(convolved, 1)(image.astype(jnp.bfloat16), kernel)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, want[1][1], atol=0.02 * np.abs(half).max())


@pytest.mark.parametrize("devices", (1, 4))
def test_a_step_for_a_tpu_has_no_map_of_attention_and_cuts_no_patches(devices):
    net = vit.ViT(64, 2, 2, 16, 224, dtype="bfloat16")
    mesh = _mesh(devices)
    split, whole = (NamedSharding(mesh, PartitionSpec(x)) for x in ("data", None))
    image = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]

    def loss(params, image):
        with across.over(mesh):
            y, _ = net.apply({"params": params}, image)
        return y.astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss), in_shardings=(whole, split))
    with hlo.traced_for("tpu"):
        low = step.trace(like, image).lower(lowering_platforms=("tpu",))
    counts, text = hlo.count(low.compiler_ir("stablehlo")), low.as_text()
    assert (counts.forward, counts.backward, counts.maps) == (2, 2, 0)
    assert not re.search(r"x(197x197|256x256)xf32", text)
    assert "x14x16x14x16x3x" not in text and "stablehlo.convolution" in text
    # Padded to 256 rows and keys: two products, and five for the gradients.
    of_device = 7 * 2 * 4 / devices * 2 * 256 * 256 * 32
    assert counts.fused == 2 * of_device


def test_the_kernel_is_taken_where_its_blocks_are_filled(monkeypatch):
    def takes(rows, keys, channels=64):
        q, k = (jnp.zeros((4, n, 1, channels), jnp.bfloat16) for n in (rows, keys))
        return tpu.takes(q, k)

    assert not takes(197, 197)  # Of a CPU.
    with hlo.traced_for("tpu"):
        assert not takes(197, 197)  # How four devices share it is not known.
        with across.over(_mesh(4)):
            assert takes(197, 197) and takes(181, 181) and takes(1374, 1374)
            assert takes(128, 128, 256) and not takes(128, 128, 192)
            assert not any(takes(n, n) for n in (1, 37, 63))
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        assert takes(197, 197)
