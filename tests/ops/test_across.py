"""Parameters that are split over devices: what crosses, in which dtype."""

import re

import jax
import numpy as np
import pytest

from vitssl.bench import case, hlo, plain
from vitssl.methods import base
from vitssl.models import layers, vit
from vitssl.ops import across
from vitssl.run import devices

ROWS, SIDE = 24, 8  # 24 x 5 tokens, a number that no parameter has.


def _program(scan=False, fsdp=4, dtype="bfloat16"):
    """Return the step of a ViT of two blocks, and its shapes."""
    facts = base.Run(100, 10, ROWS, 8, 3, (0.5,) * 3, (0.5,) * 3, dtype)
    net = vit.ViT(16, 2, 2, 4, SIDE, scan=scan, dtype=dtype)
    method = plain.Plain(facts, net)
    batch = {
        "image": jax.ShapeDtypeStruct((ROWS, SIDE, SIDE, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((ROWS,), np.int32),
    }
    mesh = devices.Mesh(fsdp=fsdp, fsdp_min_size=100)
    own = case.Case("", method, case.adamw(method, batch), batch, dtype, mesh=mesh)
    phase = own.phase()
    return own.compiled.program(phase).lower(own.compiled.abstract(phase), batch)


@pytest.mark.parametrize("dtype, word", [("bfloat16", "bf16"), ("float32", "f32")])
def test_split_weights_cross_in_the_dtype_of_their_products(dtype, word):
    text = _program(dtype=dtype).as_text()
    found = re.findall(r"sdy.sharding_constraint .*x(\w+)>", text)
    # Of the patches, and four of each block: forward; of each block's: backward.
    assert found.count(word) == len(found) >= 1 + 2 * 4
    assert "sharding_constraint" not in _program(fsdp=1).as_text()


def test_a_loop_over_blocks_gathers_weights_and_no_activations():
    text = _program(scan=True).compile().as_text()
    loops = [x for x in text.splitlines() if "while/body" in x and "all-gather(" in x]
    shapes = [re.search(r"= \w+\[([\d,]*)\]", x)[1] for x in loops]
    assert set(shapes) == {"16,48", "16,16", "16,64", "64,16"}


@pytest.mark.parametrize("batch, split", [(8, 4), (6, 0)])
def test_what_a_kernel_of_attention_gets_is_split_by_images(batch, split):
    q, k = (jax.ShapeDtypeStruct((batch, n, 2, 16), "bfloat16") for n in (5, 7))
    mesh = devices.mesh(devices.Mesh(), 8)

    def cross(q, k, v):
        with across.over(mesh):
            return layers.attend(q, k, v)

    with hlo.traced_for("cuda"):
        low = jax.jit(cross).trace(q, k, k).lower(lowering_platforms=("cuda",))
    found = re.findall(r"sdy.sharding_constraint .*", low.as_text())
    # Queries, keys, values and what comes out.
    assert sum('<@mesh, [{"data", "fsdp"}, {}, {}, {}]>' in x for x in found) == split
    assert len(found) == split


def test_one_device_has_nothing_to_gather():
    x = np.ones((2, 3), np.float32)
    with across.over(None):
        assert "constraint" not in str(jax.make_jaxpr(across.whole)(x))
    np.testing.assert_array_equal(jax.grad(lambda x: across.whole(x).sum())(x), x)
