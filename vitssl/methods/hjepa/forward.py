"""The forward pass of H-JEPA with multi-crop: targets, contexts, predictions, losses.

Two halves: `forward` sees each image by itself, `measure` all images of a batch.

Axes: B images, C crops of one kind (G global or L local), K passes (one per level of
masks in use; of the predictor, one per block if each is asked alone), S slots of
visible tokens, M slots of targets, N patches, D width, H levels. Crops of one
resolution and their passes are stacked on the batch axis, so there is one encoder call
per resolution and token count.
"""

import dataclasses
from typing import NamedTuple

import einops
import flax.struct
import jax
import jax.numpy as jnp

from vitssl.losses import regression
from vitssl.methods.hjepa import invariance, predictor
from vitssl.methods.hjepa.apply import Networks
from vitssl.methods.hjepa.levels import Members
from vitssl.methods.hjepa.masks import Masking
from vitssl.methods.hjepa.slots import Slots
from vitssl.models import patches
from vitssl.ops import accelerator


def pool(tokens, valid=None):  # [B, N, D], [B, N] bool -> [B, D] float32
    """Mean over the valid tokens of each image; zeros where there is none."""
    tokens = tokens.astype(jnp.float32)
    if valid is None:
        return tokens.mean(1)
    keep = valid.astype(jnp.float32)[..., None]  # [B, N, 1]
    total = jnp.where(keep > 0, keep * tokens, 0.0).sum(1)  # [B, D]
    return total / jnp.where(keep.any(1), keep.sum(1), 1.0)


class Masked(NamedTuple):
    """Crops of one kind that have targets."""

    image: jax.Array  # [B, C, H, W, channels] normalised.
    visible: jax.Array  # [B, C, K, N] bool, what the context encoder may see.
    wanted: jax.Array  # [B, C, K, N] bool, what is to be predicted.
    slots: Slots
    role: int  # predictor.GLOBAL or predictor.LOCAL.


class Context(flax.struct.PyTreeNode):
    """What the context encoder says about some crops.

    Attributes:
        count: [B, C, K] leading rows of S that are context; None = all.
        seen: [B, C, K, S] bool, rows of visible patches. With "zero" masking the rows
            of hidden patches are context too.
        role: of these crops when they are extra context.
        grid: (h, w) of these crops, in patches.
        where: [B, C, K, S] raster indices of the rows; None = all N in order.
    """

    tokens: jax.Array  # [B, C, K, S, D]
    count: jax.Array | None
    seen: jax.Array
    cls: jax.Array | None  # [B, C, K, D]
    role: int = flax.struct.field(pytree_node=False)
    where: jax.Array | None = None
    grid: tuple[int, int] = flax.struct.field(pytree_node=False, default=(0, 0))

    @property
    def pooled(self):  # -> [B, C, D]
        """Mean over the visible patches in the finest pass."""
        return jax.vmap(pool, 1, 1)(self.tokens[:, :, 0], self.seen[:, :, 0])


class Targets(flax.struct.PyTreeNode):
    """What is to be predicted in some crops."""

    tokens: jax.Array  # [B, C, N, D] of the target encoder.
    where: jax.Array  # [B, C, K, M] raster indices.
    count: jax.Array  # [B, C, K] valid leading entries of M.
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)


class Guess(NamedTuple):
    """What the predictor makes of some crops."""

    tokens: jax.Array  # [B, C, K, M, D]
    offered: jax.Array  # [B, C, K] context tokens there were,
    surplus: jax.Array  # [B, C, K] and how many of them had no room.


class Crops(NamedTuple):
    """Some crops and what the predictor makes of them."""

    visible: jax.Array  # [B, C, K, N] bool, as in `Masked`.
    wanted: jax.Array  # [B, C, K, N] bool
    targets: Targets
    guess: Guess


class Rows(NamedTuple):
    """What the networks make of each image by itself."""

    context: Context  # Of the global crops, as the next one.
    near: Crops
    far: Crops | None  # The local crops that have targets.
    view: jax.Array | None  # [B, V, D] of `invariance.rows`.


class Level(NamedTuple):
    """Features of one level of some crops."""

    prediction: jax.Array  # [B, C, n, D]
    target: jax.Array  # [B, C, n, D]
    valid: jax.Array  # [B, C, n] bool


class Result(NamedTuple):
    """What predicting some crops gives."""

    losses: jax.Array  # [C, H] per crop and level, before weighting.
    cosine: jax.Array  # [C, H] mean similarity of predictions and targets.
    levels: dict  # {k: Level}
    crowded: jax.Array  # [] share of context tokens without room in the predictor.


class Terms(NamedTuple):
    """Everything a loss is made of."""

    context: Context  # Of the global crops, as the next two.
    targets: Targets
    near: Result
    far: Result | None  # Of the local crops that have targets.
    view: jax.Array | None  # [] loss of the crops' agreement.
    more: dict  # {metric: []} of it.


def forward(
    net: Networks,
    near: Masked,
    far: Masked | None,
    free,
    masking: Masking,
    view: invariance.View | None = None,
) -> Rows:
    """Run the step up to what the levels compare, for every strategy.

    Args:
        net: networks.
        near: the global crops.
        far: local crops with targets; only `cross_crop_prediction` has them.
        free: [B, C, H, W, channels] local crops without targets, or None.
        masking: section `masking`.
        view: what crops say of each other; None for nothing.
    """
    context = encode_visible(net, near, masking.mode)
    targets = find_targets(net, near)
    passes = near.visible.shape[2]
    tokens = None
    if free is not None:
        _, tokens = net.encode(_merge(free))
        tokens = _crops(tokens, len(free))  # [B, C, n, D]
    other = None if far is None else encode_visible(net, far, masking.mode)

    def run(crops, context, targets, other):
        def extra(crops):
            """Return the context that `crops` target crops get from other crops."""
            found = [] if other is None else [extra_of(other, crops)]
            if tokens is not None and masking.strategy != "global_only":
                x = einops.repeat(
                    tokens, "b c n d -> (b t k) (c n) d", t=crops, k=passes
                )
                found.append(predictor.Extra(x, predictor.LOCAL))
            return found

        how = one_by_one if masking.accumulate_crops else together
        guess = how(net, context, targets, extra, crops.slots)
        return Crops(crops.visible, crops.wanted, targets, guess)

    found = run(near, context, targets, other)
    local = said = None
    if far is not None:
        local = run(far, other, find_targets(net, far), context)
    if view is not None:
        grid = None if free is None else patches.grid(free, net.encoder.patch)
        said = invariance.rows(net, context, tokens, grid, view)
    return Rows(context, found, local, said)


def measure(
    net: Networks, rows: Rows, view: invariance.View | None = None, key=None, **options
) -> Terms:
    """Bring rows to their levels and compare them.

    Args:
        net, rows: see `forward`.
        view: as `forward` had it.
        key: of random directions.
        **options: of `regression.level_loss`.
    """
    near = compare(net, rows.near, **options)
    far, loss, more, truth = None, None, {}, rows.near.targets.tokens
    if rows.far is not None:
        far = compare(net, rows.far, **options)
    if rows.view is not None and view.target == "lejepa":
        loss, more = invariance.lejepa(net, rows.view, truth.shape[1], view, key)
    elif rows.view is not None and view.target == "dino":
        loss, more = invariance.sorted_alike(net, rows.view, truth, view)
    elif rows.view is not None:
        loss, more = invariance.predicted(net, rows.view, truth, view, **options)
    return Terms(rows.context, rows.near.targets, near, far, loss, more)


def _merge(x):
    return einops.rearrange(x, "b c ... -> (b c) ...")


def _crops(x, b):
    return einops.rearrange(x, "(b c) ... -> b c ...", b=b)


def encode_visible(net: Networks, crops: Masked, mode) -> Context:
    """Encode crops of which only some patches may be seen.

    In `mode` "drop" hidden patches do not exist, in "zero" their tokens are 0.
    """
    image, seen, room = crops.image, crops.visible, crops.slots.visible
    b, c, k, _ = seen.shape
    x = jnp.broadcast_to(image[:, :, None], (b, c, k, *image.shape[2:]))
    x, seen = (einops.rearrange(a, "b c k ... -> (b c k) ...") for a in (x, seen))
    if mode == "zero":
        keep = count = None
        cls, tokens = net.encode(x, hide=~seen)
    else:
        keep, count = patches.pack(predictor.thin(seen, room), room)
        cls, tokens = net.encode(x, keep=keep, count=count)  # [B C K, S, D]
        seen = patches.valid(count, room)

    def split(a):
        if a is None:
            return None
        return einops.rearrange(a, "(b c k) ... -> b c k ...", b=b, c=c)

    rows = map(split, (tokens, count, seen, cls))
    grid = patches.grid(crops.image, net.encoder.patch)
    return Context(*rows, role=crops.role, where=split(keep), grid=grid)


def find_targets(net: Networks, crops: Masked) -> Targets:
    """Encode the target side of crops, one pass for all levels; list the targets."""
    room = crops.slots.targets
    tokens = _crops(net.encode_target(_merge(crops.image)), len(crops.image))
    where, count = patches.pack(predictor.thin(crops.wanted, room), room)
    return Targets(
        tokens, where, count, grid=patches.grid(crops.image, net.encoder.patch)
    )


def extra_of(context: Context, crops) -> predictor.Extra:
    """Offer every context token of some crops to `crops` target crops, pass by pass.

    Returns:
        rows (b c' k) of C S tokens each.
    """

    def to_every_crop(x, pattern):
        x = einops.rearrange(x, pattern)
        x = jnp.broadcast_to(x, (len(x), crops, *x.shape[2:]))
        return einops.rearrange(x, "b c k ... -> (b c k) ...")

    valid = None
    if context.count is not None:
        valid = patches.valid(context.count, context.tokens.shape[3])
        valid = to_every_crop(valid, "b c k s -> b 1 k (c s)")
    tokens = to_every_crop(context.tokens, "b c k s d -> b 1 k (c s) d")
    return predictor.Extra(tokens, context.role, valid)


def predict(
    net: Networks, context: Context, targets: Targets, extra, slots: Slots
) -> Guess:
    """Predict the targets of every crop and pass."""
    b, c = context.tokens.shape[:2]
    asks = targets.where.shape[2]

    def flat(a):
        if a is None:
            return None
        # One context serves all target blocks.
        a = jnp.broadcast_to(a, (b, c, asks, *a.shape[3:]))
        return einops.rearrange(a, "b c k ... -> (b c k) ...")

    where, table = flat(targets.where), net.positions(targets.grid)[None]
    query = places(table[0], where)  # [B C K, M, D]
    if context.where is not None:
        table = places(table[0], flat(context.where))  # [B C K, S, D]
    own, asked = flat(context.count), flat(targets.count)
    room = slots.sequence + sum(e.tokens.shape[1] for e in extra)
    guess = net.predict(
        flat(context.tokens),
        query,
        place=table,
        context_count=own,
        query_count=asked,
        extra=extra,
        slots=room,
    )
    offered = context.tokens.shape[3] if own is None else own
    for e in extra:
        offered += e.tokens.shape[1] if e.valid is None else e.valid.sum(-1)
    offered = jnp.broadcast_to(offered, asked.shape)
    surplus = jnp.maximum(0, asked + offered - room)
    rows = (guess, offered, surplus)
    return Guess(
        *(einops.rearrange(x, "(b c k) ... -> b c k ...", b=b, c=c) for x in rows)
    )


def places(table, where):  # [N, D], int [R, M] -> [R, M, D]
    """Return rows of a table of positions; a product, since many ask for each row.

    The gradient of a gather would add them up one after the other.
    """
    one = jax.nn.one_hot(where, len(table), dtype=table.dtype)
    return jnp.einsum("rmn,nd->rmd", one, table, precision=accelerator.precision())


def compare(net: Networks, crops: Crops, **options) -> Result:
    """Bring predictions and targets of crops to their levels, and measure.

    With one pass (K = 1) its targets serve every level; with one level all passes serve
    it; else pass k serves level k. Options are those of `regression.level_loss`.
    """
    guess, targets = crops.guess.tokens, crops.targets
    b, c, passes = guess.shape[:3]
    h = net.levels.levels

    def joined(x):
        return einops.rearrange(x, "(b c k) n ... -> b c (k n) ...", b=b, c=c)

    truth = patches.take(targets.tokens[:, :, None], targets.where)  # [B, C, K, M, D]
    if 1 in (passes, h):
        groups = [(slice(None), range(h))]
    else:
        groups = [(slice(k, k + 1), (k,)) for k in range(passes)]
    found = {}
    for which, only in groups:

        def flat(x, which=which):
            return einops.rearrange(x[:, :, which], "b c k ... -> (b c k) ...")

        members = Members(flat(targets.where), flat(targets.count), targets.grid)
        p, t = (
            net.project(flat(x), members, only=only, target=side)
            for x, side in ((guess, False), (truth, True))
        )
        for level in only:
            parts = p[level][0], t[level][0], p[level][1]
            found[level] = Level(*(joined(x) for x in parts))

    def distance(level):
        return regression.level_loss(*level, detach=net.detach, **options)

    losses, cosine = (
        jnp.stack([jax.vmap(f, 1)(found[k]) for k in range(h)], -1)
        for f in (distance, _cosine)
    )
    crowded = crops.guess.surplus.sum() / jnp.maximum(crops.guess.offered.sum(), 1)
    return Result(losses, cosine, found, crowded)


def _cosine(level: Level):
    level = jax.lax.stop_gradient(level)
    p, t = regression.unit(level.prediction), regression.unit(level.target)
    return regression.masked_mean((p * t).sum(-1), level.valid)


def together(net: Networks, context, targets, extra, slots) -> Guess:
    """Predict all crops of a kind at once.

    Args:
        net: networks.
        context, targets: of the same crops.
        extra: function of the number of crops -> sequence of `predictor.Extra`.
        slots: static lengths.
    """
    return predict(net, context, targets, extra(context.tokens.shape[1]), slots)


def one_by_one(net: Networks, context, targets, extra, slots) -> Guess:
    """Do as `together`, by a scan over the crops.

    Activations are recomputed in the backward pass: memory of one crop instead of C.
    """
    arrays = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (context, targets))
    shared = extra(1)

    @jax.checkpoint
    def one(rng, xs):
        some, wanted = jax.tree.map(lambda x: x[:, None], xs)
        alone = dataclasses.replace(net, rng=rng)
        return predict(alone, some, wanted, shared, slots)

    def step(i, xs):
        rng = None if net.rng is None else jax.random.fold_in(net.rng, i)
        return i - 1, one(rng, xs)

    # Counted down from -1, apart from the keys of the other calls.
    _, found = jax.lax.scan(step, jnp.int32(-1), arrays)
    return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), found)
