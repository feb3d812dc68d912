"""Directions of a step that optax does not have: LARS's and LAMB's, and NAdam's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def trust(coefficient):
    """LARS's layer-wise trust ratio for weights; vectors pass (MAE util/lars.py)."""

    def one(g, p):
        if p.ndim < 2:
            return g
        return g * ratio(p, g, coefficient)

    return optax.stateless(lambda u, p: jax.tree.map(one, u, p))


def ratio(p, g, coefficient):
    """Return coefficient |p| / |g|, or 1 where either is 0, []."""
    gn, pn = jnp.linalg.norm(g.ravel()), jnp.linalg.norm(p.ravel())
    return jnp.where((gn > 0) & (pn > 0), coefficient * pn / gn, 1.0)


class NadamState(NamedTuple):
    """Adam's moments, and the product of the momenta of all updates so far."""

    count: jax.Array
    product: jax.Array
    mu: dict
    nu: dict


def nadam(b1, b2, eps, mu_dtype):
    """Adam with Nesterov's momentum, which grows to b1 (torch.optim.NAdam).

    Source: Dozat 2016, "Incorporating Nesterov momentum into Adam"; optax's has no
    growing momentum.
    """

    def init(params):
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype), params)
        nu = jax.tree.map(jnp.zeros_like, params)
        return NadamState(jnp.zeros([], jnp.int32), jnp.ones([]), mu, nu)

    def momentum(t):
        return b1 * (1 - 0.5 * 0.96 ** (0.004 * t))

    def update(grads, state, params=None):
        del params
        t = state.count + 1
        now, after = momentum(t), momentum(t + 1)
        product = state.product * now
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)

        def one(g, m, v):
            ahead = (1 - now) / (1 - product) * g + after / (1 - product * after) * m
            return ahead / (jnp.sqrt(v / (1 - b2**t)) + eps)

        move = jax.tree.map(one, grads, mu, nu)
        mu = jax.tree.map(lambda m: m.astype(mu_dtype), mu)
        return move, NadamState(t, product, mu, nu)

    return optax.GradientTransformation(init, update)
