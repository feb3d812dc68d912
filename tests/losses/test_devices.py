"""A loss on a batch split over four devices is the loss on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.losses import contrastive, regression, sigreg, vicreg
from vitssl.run import devices

ALONG = sigreg.directions(jax.random.key(0), 8, 6)
VALID = np.random.default_rng(1).random((8, 4)) < 0.7
LOSSES = {
    "regression": lambda a, b: regression.level_loss(
        a, b, jnp.asarray(VALID), kind="smoothl1", normalize=True, detach=False
    ),
    "vicreg": lambda a, b: vicreg.vicreg(a, b, jnp.asarray(VALID))[0],
    "halves": lambda a, b: vicreg.vicreg(*vicreg.halves(a))[0],
    "nt_xent": lambda a, b: contrastive.nt_xent(a[:, 0], b[:, 0], temperature=0.1)[0],
    "infonce": lambda a, b: contrastive.infonce(a[:, 0], b[:, 0], temperature=0.1)[0],
    **{
        kind: lambda a, b, kind=kind: sigreg.two_views(a, b, along=ALONG, kind=kind)[0]
        for kind in sigreg.TESTS
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_four_devices_give_the_loss_and_gradient_of_one(name):
    assert jax.device_count() == 4
    split = devices.batch_sharding(devices.mesh(devices.Mesh(), 4))
    a, b = np.random.default_rng(0).normal(size=(2, 8, 4, 6)).astype(np.float32)
    step = jax.jit(jax.value_and_grad(LOSSES[name], argnums=(0, 1)))
    want, slopes = jax.device_get(step(a, b))
    got, split_slopes = jax.device_get(
        step(*(jax.device_put(z, split) for z in (a, b)))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for x, y in zip(split_slopes, slopes, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
