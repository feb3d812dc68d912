"""Counting what is in a lowered function: values that are known beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.bench import hlo
from vitssl.ops import accelerator


def _count(function, *shapes, dtype="float32"):
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return hlo.count(hlo.lowered(jax.jit(function), *args))


def test_products_are_told_apart_by_what_they_are_made_in():
    def all_four(x, y):
        x16 = x.astype(jnp.bfloat16)
        fine = jnp.matmul(x, y, precision=accelerator.precision())
        return x @ y, jnp.matmul(x, y, precision="highest"), fine, x16 @ x16.T

    found = _count(all_four, (4, 8), (8, 2))
    same = 2 * 4 * 8 * 2
    assert found.products == {
        "tf32": same,
        "f32": same,
        "f32 as 3 bf16": same,
        "bf16": 2 * 4 * 8 * 4,
    }
    assert found.flops == 3 * same + 256 and found.float32 == same / found.flops


def test_the_body_of_a_loop_counts_as_often_as_it_runs_and_a_function_per_call():
    inner = jax.jit(lambda x: x @ x)

    def loop(x):
        x, _ = jax.lax.scan(lambda x, _: (inner(inner(x)), None), x, length=7)
        return inner(x)

    assert _count(loop, (8, 8)).products == {"tf32": 15 * 2 * 8**3}


def test_convolutions_count_their_kernel_once_per_output():
    def f(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    found = _count(f, (3, 8, 8, 5), (2, 2, 5, 7))
    assert found.products == {"tf32": 2 * 3 * 4 * 4 * 7 * 2 * 2 * 5}


def test_attention_is_a_fused_call_or_products_with_an_axis_of_heads():
    def attention(implementation):
        def f(q, k):
            y = jax.nn.dot_product_attention(q, k, k, implementation=implementation)
            return y.astype(jnp.float32).sum()

        shapes = (2, 6, 3, 8), (2, 4, 3, 8)
        return _count(jax.grad(f), *shapes, dtype="bfloat16")

    fused, plain = attention("cudnn"), attention("xla")
    assert (fused.forward, fused.backward, fused.maps) == (1, 1, 0)
    assert fused.fused == 7 * 2 * 2 * 6 * 3 * 8 * 4 and not fused.products
    assert plain.forward == plain.fused == 0 and plain.maps > 2


def test_products_of_pictures_and_kernels_are_no_attention():
    found = _count(
        lambda x, y: jnp.einsum("bkqv,bkvc->bkqc", x, y), *[(2, 3, 4, 4)] * 2
    )
    assert found.maps == 0 and found.flops == 2 * 2 * 3 * 4**3


def test_the_largest_literal_is_found():
    table = np.arange(300.0, dtype=np.float32)
    assert _count(lambda x: x + table, (300,)).literal == 4 * 300
    assert _count(lambda x: x + jnp.ones(300), (300,)).literal == 0


def test_a_call_of_the_host_is_not_lowered():
    def f(x):
        jax.debug.print("{}", x[0])
        return x

    with pytest.raises(ValueError, match="platform"):
        _count(f, (3,))
