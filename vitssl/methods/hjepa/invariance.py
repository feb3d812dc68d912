"""What the crops of an image say of each other: the view term of `global_only`.

Either every crop predicts the pooled target of every (other) global crop; or all crops
shall have one projection, and the projections shall be Gaussian (LeJEPA); or all crops
shall be sorted as the targets of the global ones are (DINO).

A pooled target is the mean of many tokens; most of it is the same for every image, and
a constant explains that. `target=centred` takes it away.

Axes: B images, V crops (global ones first), G global and L local crops, N patches, S
visible patches, D width, P outputs of the projector.
"""

import dataclasses
from typing import Literal

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl.losses import assignment, regression, sigreg
from vitssl.models import layers, patches
from vitssl.ops import accelerator

Target = Literal["plain", "centred", "lejepa", "dino"]
ALIKE = ("lejepa", "dino")  # They compare pooled features, not predictions.
Pairs = Literal["local", "all"]


@dataclasses.dataclass(frozen=True)
class View:
    """The view term, of the keys `view_*` of section `objective`."""

    target: Target = "plain"
    pairs: Pairs = "local"
    sigreg: float = 0.05
    temperatures: tuple[float, float] = (0.1, 0.04)
    slices: int = 1024


class Projector(nn.Module):
    """Two layers; what is between them is standardised over the batch.

    There are no running statistics: nothing but the loss sees projections.

    Source: arXiv:2511.08544, section 6 (a small MLP with batch normalisation).
    """

    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x):  # [B, V, D] -> [B, V, P] float32
        x = layers.dense(self.hidden, "float32", "fc0")(x)
        return layers.dense(self.outputs, "float32", "fc1")(nn.relu(standardise(x)))


def standardise(x):  # [B, V, D] -> [B, V, D] float32
    """Give each feature mean 0 and variance 1 over all crops of the batch."""
    return jax.nn.standardize(x.astype(jnp.float32), axis=(0, 1), epsilon=1e-5)


def rows(net, context, free, grid, view: View):
    """Return what each crop says of its image, [B, V, D], or None for nothing.

    Args:
        net: `apply.Networks`.
        context: `forward.Context` of the global crops.
        free: [B, L, N, D] tokens of the local crops, or None.
        grid: (h, w) of the local crops, in patches.
        view: what is compared.
    """
    if view.target in ALIKE:
        found = [context.pooled]
        if free is not None:
            found.append(free.astype(jnp.float32).mean(2))
        return jnp.concatenate(found, 1)
    found = []
    if view.pairs == "all" and context.tokens.shape[1] > 1:
        found.append(_from_global(net, context))
    if free is not None:
        place = net.positions(grid)[None]
        found.append(_predict(net, free, place))
    return jnp.concatenate(found, 1) if found else None


def _from_global(net, context):
    """Return predictions [B, G, D] from what is visible in the finest pass."""
    finest = jax.tree.map(lambda x: x[:, :, 0], context)
    table = net.positions(context.grid)[None]
    place = table
    if finest.where is not None:
        place = patches.take(table, einops.rearrange(finest.where, "b g s -> (b g) s"))
    return _predict(net, finest.tokens, place, finest.count)


def _predict(net, tokens, place, count=None):
    """Return the position-free prediction of each crop's tokens, [B, V, D]."""
    flat = einops.rearrange(tokens, "b v n d -> (b v) n d")
    count = None if count is None else count.reshape(-1)
    guess = net.predict(flat, place=place, context_count=count)
    return einops.rearrange(guess, "(b v) 1 d -> b v d", b=len(tokens))


def predicted(net, guess, targets, view: View, **options):
    """Compare the pooled target of every global crop with what other crops predict.

    Args:
        net: `apply.Networks`.
        guess: [B, V, D] of `rows`.
        targets: [B, G, N, D] target tokens of the global crops.
        view: what is compared.
        **options: of `regression.level_loss`.

    Returns:
        loss: [] mean over images and pairs of the coarsest level's loss between the
            prediction and the mean target token.
        metrics: "r2_view", see `r2`.
    """
    truth = targets.astype(jnp.float32).mean(2)
    truth = net.project(truth, target=True, method="coarse")  # [B, G, D]
    if view.target == "centred":
        truth = standardise(truth)
    guess = net.project(guess, method="coarse")  # [B, V, D]
    b, v, g, d = *guess.shape[:2], *truth.shape[1:]
    guess = jnp.broadcast_to(guess[:, :, None], (b, v, g, d))
    truth = jnp.broadcast_to(truth[:, None], (b, v, g, d))
    among = view.pairs == "all" and g > 1  # Then the first crops are the targets' own.
    other = ~jnp.eye(v, g, dtype=bool) if among else jnp.ones((v, g), bool)
    valid = jnp.broadcast_to(other, (b, v, g))
    loss = regression.level_loss(guess, truth, valid, detach=net.detach, **options)
    return loss, {"r2_view": r2(guess, truth, valid, options.get("normalize", False))}


def lejepa(net, pooled, count: int, view: View, key):
    """Return (loss [], metrics) of LeJEPA on pooled features.

    (1 - l) mean |z_v - mean_g z_g|^2 + l SIGReg, the latter averaged over crops.

    Args:
        net: `apply.Networks`.
        pooled: [B, V, D] of `rows`.
        count: G, how many of the crops are global.
        view: l is `view.sigreg`.
        key: of the random directions, which all crops share.

    Source: arXiv:2511.08544, Eq. 8 and section 5.
    """
    z = net.project_views(pooled)  # [B, V, P]
    middle = z[:, :count].mean(1, keepdims=True)
    invariance = jnp.square(z - middle).mean()
    along = sigreg.directions(key, view.slices, z.shape[-1])
    gaussian = jax.vmap(lambda x: sigreg.sigreg(x, along=along), 1)(z).mean()
    loss = (1 - view.sigreg) * invariance + view.sigreg * gaussian
    return loss, {"view_invariance": invariance, "view_sigreg": gaussian}


def sorted_alike(net, pooled, targets, view: View):
    """Return (loss [], metrics) of DINO on pooled features.

    A head sorts the pooled features of each crop into outputs that mean nothing
    beforehand; every other crop shall have the scores of a global crop's target, which
    Sinkhorn-Knopp shares out evenly in the batch. The head is not averaged.

    Args:
        net: `apply.Networks`.
        pooled: [B, V, D] of `rows`.
        targets: [B, G, N, D] target tokens of the global crops.
        view: what is compared.

    Source: arXiv:2104.14294, Eq. 3; Sinkhorn-Knopp as in arXiv:2304.07193.
    """
    student, heat = view.temperatures
    right = net.project_views(targets.astype(jnp.float32).mean(2))  # [B, G, K]
    target = jax.lax.stop_gradient(assignment.sinkhorn(right, heat))
    loss = assignment.views(target, net.project_views(pooled), student)
    return loss, {f"view_{k}": v for k, v in assignment.entropies(target).items()}


def r2(prediction, target, valid, normalize=False, place=None, places=1):
    """Share of the targets' variance that predictions explain, [], without gradient.

    1 is perfect, 0 what the mean of all targets would reach. A cosine is near 1 as soon
    as targets have much in common; this is not.

    Args:
        prediction, target: [..., D].
        valid: [...] bool.
        normalize: bring both to length one first, as the loss does.
        place: int [...] below `places`: the variance is about the mean of each place,
            so that where something lies explains nothing, and only content does.
    """
    p, t = (x.astype(jnp.float32) for x in (prediction, target))
    p, t = jax.lax.stop_gradient((p, t))
    if normalize:
        p, t = regression.unit(p), regression.unit(t)
    keep = valid.reshape(-1, 1)
    p, t = (jnp.where(keep, x.reshape(-1, x.shape[-1]), 0.0) for x in (p, t))
    place = jnp.zeros(len(t), int) if place is None else place.reshape(-1)
    own = jax.nn.one_hot(place, places) * keep  # [R, places]
    fine = accelerator.precision()
    mean = jnp.matmul(own.T, t, precision=fine)  # [places, D]
    mean = mean / jnp.maximum(own.sum(0), 1.0)[:, None]
    whole = jnp.square(t - jnp.matmul(own, mean, precision=fine)).sum()
    return 1 - jnp.square(p - t).sum() / jnp.maximum(whole, 1e-12)
