"""What `log.histograms` adds to a step: gradients and parameters, module by module."""

import jax
import jax.numpy as jnp
import optax

BINS = 64


def module(name: str) -> str:
    """Return the module of a leaf: "encoder/block_0/attn/..." is "encoder/block_0"."""
    parts = name.split("/")
    return "/".join(parts[: min(2, len(parts) - 1)]) or name


def metrics(grads: dict, params: dict, due) -> dict:
    """Return norms "<kind>_norm/<module>" [] and histograms "<kind>/<module>".

    Kinds are "grad" and "param". A histogram is [2 + BINS]: the lowest and the highest
    value, and how many are in each of BINS equal parts between them.

    Args:
        grads, params: {name: leaf}.
        due: bool [], whether the histograms are computed; else they are zeros.
    """
    groups = {}
    for kind, leaves in (("grad", grads), ("param", params)):
        for name, leaf in leaves.items():
            groups.setdefault((kind, module(name)), []).append(leaf)
    norms = {f"{k}_norm/{name}": optax.tree.norm(x) for (k, name), x in groups.items()}
    leaves = {f"{kind}/{name}": x for (kind, name), x in groups.items()}

    def counted(leaves):
        return {name: _histogram(x) for name, x in leaves.items()}

    def nothing(leaves):
        return {name: jnp.zeros(2 + BINS) for name in leaves}

    return norms | jax.lax.cond(due, counted, nothing, leaves)


def _histogram(leaves):
    """Return [low, high, counts ...] of all values of some leaves."""
    low = jnp.stack([x.min() for x in leaves]).min()
    high = jnp.stack([x.max() for x in leaves]).max()
    high = jnp.where(high > low, high, low + 1)  # A bias begins as one value.
    counts = jnp.zeros(BINS)
    for x in leaves:
        place = (x - low) / (high - low) * BINS
        place = jnp.clip(place.astype(jnp.int32), 0, BINS - 1)
        counts = counts.at[place].add(1.0)
    return jnp.concatenate([jnp.stack([low, high]), counts])
