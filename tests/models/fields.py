"""A tiny field of every kind of modality, and a tiny system for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitssl.data import modalities, states
from vitssl.methods.latent_mim import hybrid, network

OPTICAL = modalities.Modality("optical", (("a", "b"), ("c",)), time=True)
HEIGHT = modalities.Modality("height", (("z",),))
WEATHER = modalities.Modality("weather", (("rain", "sun"),), space=False, time=True)
PLACE = modalities.Modality("place", (("lat", "lon"),), space=False)
ALL = (OPTICAL, HEIGHT, WEATHER, PLACE)
PIXELS, TIMES, BATCH = 8, 2, 2


def batch(mods=ALL, p=4, seed=0, pixels=PIXELS, missing=True):
    """Random values and token masks at p; a half is ONLINE, a half DECODER."""
    rng = np.random.default_rng(seed)
    dates = rng.integers(0, 12, (BATCH, TIMES, 3))
    found = {"timestamps": jnp.asarray(dates, jnp.int32)}
    for m in mods:
        x = rng.normal(size=(BATCH, *m.shape(pixels, TIMES)))
        found[m.name] = jnp.asarray(x, jnp.float32)
        shape = (BATCH, *m.tokens(pixels // p, TIMES))
        mask = rng.choice([states.ONLINE, states.DECODER], shape)
        flat = mask.reshape(BATCH, -1)
        flat[:, -1] = states.MISSING if missing else states.DECODER
        flat[:, 0] = states.ONLINE
        found[m.mask_key] = jnp.asarray(mask, jnp.int32)
    return found


def system(mods=ALL, p=4, q=2, width=16, encoder=None, **own):
    """A system of one block each."""
    given = dict(depth=1, heads=2, mlp_ratio=1.0)
    more = dict(base=4, drop_path=0.0) | (encoder or {})
    return hybrid.HybridMIM(
        network.Encoder(mods, width, **given, **more),
        network.Predictor(mods, width, width, **given),
        p,
        q,
        **own,
    )


@functools.cache
def _shapes(module, p):
    fields = batch(module.modalities, p)
    rngs = {"params": jax.random.key(0), "tokens": jax.random.key(0)}
    return jax.eval_shape(module.init, rngs, fields)["params"]


def params(module, seed=0):
    """Random parameters, drawn by numpy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32),
        _shapes(module, module.p),
    )
