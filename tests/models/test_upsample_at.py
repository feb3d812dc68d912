"""Some fine tokens alone are the same as among all of them."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.data import modalities
from vitssl.models import upsample

KINDS = (modalities.find("sentinel2_l2a"),)
P, Q, SIDE, TIMES, D = 4, 2, 3, 2, 4


def made(seed=0):
    rng = np.random.default_rng(seed)
    fields, coarse, mask, index = {}, {}, {}, {}
    for kind in KINDS:
        shape = kind.tokens(SIDE, TIMES)
        fine = kind.tokens(SIDE * P // Q, TIMES)
        x = rng.normal(size=(2, *kind.shape(SIDE * P, TIMES))).astype(np.float32)
        fields[kind.name] = jnp.asarray(x)
        z = rng.normal(size=(2, *shape, D)).astype(np.float32)
        coarse[kind.name] = jnp.asarray(z)
        mask[kind.name] = jnp.asarray(rng.integers(0, 3, (2, *shape)))
        n = int(np.prod(fine))
        index[kind.name] = jnp.asarray(
            rng.permuted(np.tile(np.arange(n), (2, 1)), axis=1)
        )
    return fields, coarse, mask, index


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "pixel_shuffle", "skip"])
def test_asked_for_tokens_are_those_of_the_whole_grid(mode):
    fields, coarse, mask, index = made()
    up = upsample.Upsampler(KINDS, P, Q, mode)
    first = jax.jit(up.init)(jax.random.key(0), coarse, mask, fields)
    own = jax.eval_shape(up.init, jax.random.key(0), coarse, mask, fields, index)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, first)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), first)

    @jax.jit
    def both(params):
        args = (params, coarse, mask, fields)
        return up.apply(*args), up.apply(*args, index)

    (whole, states), some = both(params)
    for kind in KINDS:
        name = kind.name
        flat = einops.rearrange(whole[name], "b h w t s d -> b (h w t s) d")
        want = jnp.take_along_axis(flat, index[name][..., None], axis=1)
        seen = einops.rearrange(states[name], "b h w t s -> b (h w t s)") == 0
        seen = jnp.take_along_axis(seen, index[name], axis=1)
        assert 0 < seen.mean() < 1
        np.testing.assert_allclose(some[name][seen], want[seen], rtol=1e-5, atol=1e-5)


def test_no_gradient_comes_from_tokens_that_are_not_seen():
    fields, coarse, mask, index = made(1)

    def total(z):
        up = upsample.Upsampler(KINDS, P, Q)
        found = up.apply({}, z, mask, fields, index)
        return sum(jnp.square(x).sum() for x in found.values())

    poisoned = {
        k: jnp.where((mask[k] == 0)[..., None], v, jnp.nan) for k, v in coarse.items()
    }
    for name, grad in jax.jit(jax.grad(total))(poisoned).items():
        seen = mask[name] == 0
        assert jnp.isfinite(grad[seen]).all() and (grad[seen] != 0).any()
        assert (grad[~seen] == 0).all()
