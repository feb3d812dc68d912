"""The exact gradient of a loss that compares samples, a micro-batch at a time.

Such a loss is no mean over micro-batches, but of each sample it needs the embedding
alone. All micro-batches are embedded without a gradient; the loss of all rows together
gives the slope at every row; then each micro-batch is embedded again, with a gradient,
which that slope multiplies: the chain rule. It costs one more forward pass and, beside
a micro-batch, the memory of the rows.

Source: Gao et al. 2021, arXiv:2101.06983 (GradCache), section 3.
"""

import jax
import jax.numpy as jnp


def value_and_grad(embed, compare, params, parts, keys, join):
    """Return ((loss [], aux), gradient by params), as of the batch in one piece.

    Args:
        embed: (params, micro-batch, key) -> a tree of rows [B / k, ...]; numbers that
            are not floating (masks, counts) have no slope. It is called twice and has
            to return the same: what it draws, it draws by the key.
        compare: (params, rows [B, ...] of the whole batch) -> (loss [], aux).
        parts, keys: micro-batches [k, B / k, ...] and their keys [k].
        join: [k, B / k, ...] -> [B, ...], rows in the order of the batch.
    """
    rows = jax.lax.map(lambda part: embed(params, *part), (parts, keys))
    whole = jax.value_and_grad(
        lambda params, rows: compare(params, join(rows)),
        argnums=(0, 1),
        has_aux=True,
        allow_int=True,
    )
    found, (grads, slopes) = whole(params, rows)
    slopes = jax.tree.map(lambda s: None if s.dtype == jax.dtypes.float0 else s, slopes)

    def back(total, xs):
        slope, *part = xs
        more = jax.grad(lambda params: _product(slope, embed(params, *part)))(params)
        return jax.tree.map(jnp.add, total, more), None

    grads, _ = jax.lax.scan(back, grads, (slopes, parts, keys))
    return found, grads


def _product(slope, rows):
    """Return the sum of rows times slopes [], whose gradient is that of the loss."""
    each = jax.tree.map(
        lambda s, x: 0.0 if s is None else (s * x).sum(),
        slope,
        rows,
        is_leaf=lambda s: s is None,
    )
    return sum(jax.tree.leaves(each)) + jnp.float32(0)
