"""The loss around a solution, on a plane through it spanned by two random directions.

Source: Li et al. 2018, arXiv:1712.09913 (there with directions scaled per filter).
"""

import jax
import numpy as np

from vitssl.pictures import panels


def directions(params, seed):
    """Return two trees like `params`: random, every tensor of Euclidean length 1."""
    rng = np.random.default_rng(seed)

    def draw(tensor):
        direction = rng.standard_normal(np.shape(tensor), np.float32)
        return direction / np.linalg.norm(direction)

    return jax.tree.map(draw, params), jax.tree.map(draw, params)


def plane(loss, params, *, points=21, span=1.0, seed=0):
    """Return (offsets [points], losses [points, points]) around `params`.

    losses[i, j] is loss(params + offsets[i] first + offsets[j] second).

    Args:
        loss: params -> scalar; jitted, and a mean over a few fixed batches.
        points: per direction; with an odd number one of them is `params` itself.
        span: offsets run from -span to span.
    """
    first, second = directions(params, seed)
    offsets = np.linspace(-span, span, points)
    losses = np.empty((points, points))
    for i, a in enumerate(offsets):
        for j, b in enumerate(offsets):
            moved = jax.tree.map(
                lambda p, u, v, a=a, b=b: p + np.float32(a) * u + np.float32(b) * v,
                params,
                first,
                second,
            )
            losses[i, j] = loss(moved)
    return offsets, losses


@panels.picture
def landscape(offsets, losses):
    """Draw the `plane` as a map with contours, and both lines through the middle.

    Non-finite losses stay white.
    """
    figure, axes = panels.charts(2, "Loss around the solution", size=(3.6, 3.0))
    values = np.ma.masked_invalid(losses.T)  # The first direction to the right.
    drawn = axes[0].contourf(offsets, offsets, values, 24, cmap="viridis")
    axes[0].contour(offsets, offsets, values, 24, colors="white", linewidths=0.3)
    axes[0].plot(0, 0, "x", color="white", markersize=7, markeredgewidth=2)
    axes[0].set(xlabel="first direction", ylabel="second direction", aspect="equal")
    axes[0].grid(False)
    figure.colorbar(drawn, ax=axes[0], label="loss")
    middle = int(np.abs(offsets).argmin())
    axes[1].plot(offsets, losses[:, middle], label="first direction")
    axes[1].plot(offsets, losses[middle], label="second direction")
    axes[1].set(xlabel="distance", ylabel="loss")
    axes[1].legend()
    return figure
