"""The forward pass of H-JEPA with multi-crop: targets, contexts, predictions, losses.

Axes: B images, C crops of one kind (G global or L local), K passes (one per level of
masks in use), S slots of visible tokens, M slots of targets, N patches, D width, H
levels. Crops of one resolution and their passes are stacked on the batch axis, so
there is one encoder call per resolution and token count.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import einops
import flax.struct
import jax
import jax.numpy as jnp

from vitssl.losses import regression
from vitssl.methods.hjepa import combined, predictor
from vitssl.methods.hjepa.levels import Members
from vitssl.methods.hjepa.networks import Networks
from vitssl.methods.hjepa.slots import Slots
from vitssl.models import patches


class Masked(NamedTuple):
    """Crops of one kind that have targets.

    Attributes:
        image: [B, C, H, W, channels] normalised.
        visible: [B, C, K, N] bool, what the context encoder may see.
        wanted: [B, C, K, N] bool, what is to be predicted.
        slots: static lengths.
        role: predictor.GLOBAL or predictor.LOCAL.
    """

    image: jax.Array
    visible: jax.Array
    wanted: jax.Array
    slots: Slots
    role: int


class Plan(NamedTuple):
    """Static settings of the pass.

    Attributes:
        strategy: see `methods.hjepa.masks.Masks`.
        mode: "drop" or "zero", see `hjepa_sections.Masking`.
        patch: side of a patch in pixels.
        one_by_one: see `predict_and_compare`.
        views: predict pooled targets from free local crops.
        options: of `regression.level_loss`.
    """

    strategy: str
    mode: str
    patch: int
    one_by_one: bool
    views: bool
    options: Mapping


class Context(flax.struct.PyTreeNode):
    """What the context encoder says about some crops.

    Attributes:
        tokens: [B, C, K, S, D].
        count: [B, C, K] leading rows of S that are context; None = all.
        seen: [B, C, K, S] bool, rows of visible patches. With "zero" masking the rows
            of hidden patches are context too.
        cls: [B, C, K, D], or None.
        role: of these crops when they are extra context.
    """

    tokens: jax.Array
    count: jax.Array | None
    seen: jax.Array
    cls: jax.Array | None
    role: int = flax.struct.field(pytree_node=False)

    @property
    def pooled(self):
        """Mean over the visible patches in the finest pass: [B, C, D]."""
        pool = jax.vmap(combined.pool, 1, 1)
        return pool(self.tokens[:, :, 0], self.seen[:, :, 0])


class Targets(flax.struct.PyTreeNode):
    """What is to be predicted in some crops.

    Attributes:
        tokens: [B, C, N, D] of the target encoder.
        where: [B, C, K, M] raster indices.
        count: [B, C, K] valid leading entries of M.
        grid: (h, w).
    """

    tokens: jax.Array
    where: jax.Array
    count: jax.Array
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)


class Level(NamedTuple):
    """Features of one level of some crops: [B, C, n, D] twice, and [B, C, n] bool."""

    prediction: jax.Array
    target: jax.Array
    valid: jax.Array


class Result(NamedTuple):
    """What predicting some crops gives.

    Attributes:
        losses: [C, H] per crop and level, before weighting.
        cosine: [C, H] mean similarity of predictions and targets.
        levels: {k: Level}.
        crowded: [] share of context tokens that had no room in the predictor.
    """

    losses: jax.Array
    cosine: jax.Array
    levels: dict
    crowded: jax.Array


class Terms(NamedTuple):
    """Everything a loss is made of.

    Attributes:
        context, targets, near: of the global crops.
        far: Result of the local crops that have targets, or None.
        view: [] loss of the pooled predictions, or None.
    """

    context: Context
    targets: Targets
    near: Result
    far: Result | None
    view: jax.Array | None


def forward(net: Networks, near: Masked, far: Masked | None, free, plan: Plan) -> Terms:
    """Run the step up to the losses, for every strategy.

    Args:
        net: networks.
        near: the global crops.
        far: local crops with targets; only `cross_crop_prediction` has them.
        free: [B, C, H, W, channels] local crops without targets, or None.
        plan: static settings.
    """
    context = encode_visible(net, near, plan.mode)
    targets = find_targets(net, near, plan.patch)
    passes = near.visible.shape[2]
    tokens = None if free is None else encode_all(net, free)  # [B, C, n, D]
    other = None if far is None else encode_visible(net, far, plan.mode)

    def extra(crops, *others):
        """Return the context that `crops` target crops get from other crops."""
        found = [extra_of(x, crops) for x in others if x is not None]
        if tokens is not None and plan.strategy != "global_only":
            found.append(extra_of_all(tokens, crops, passes))
        return found

    def run(context, targets, slots, *others):
        return predict_and_compare(
            net,
            context,
            targets,
            lambda crops: extra(crops, *others),
            slots,
            one_by_one=plan.one_by_one,
            **plan.options,
        )

    found = run(context, targets, near.slots, other)
    local = view = None
    if far is not None:
        local = run(other, find_targets(net, far, plan.patch), far.slots, context)
    if plan.views and tokens is not None:
        view = view_loss(net, tokens, targets.tokens, **plan.options)
    return Terms(context, targets, found, local, view)


def encode_visible(net: Networks, crops: Masked, mode) -> Context:
    """Encode crops of which only some patches may be seen.

    Args:
        net: networks.
        crops: with their visible patches.
        mode: "drop": hidden patches do not exist; "zero": their tokens are 0.
    """
    image, seen, room = crops.image, crops.visible, crops.slots.visible
    b, c, k, _ = seen.shape
    x = jnp.broadcast_to(image[:, :, None], (b, c, k, *image.shape[2:]))
    x, seen = (einops.rearrange(a, "b c k ... -> (b c k) ...") for a in (x, seen))
    if mode == "zero":
        count = None
        cls, tokens = net.encode(x, hide=~seen)
    else:
        keep, count = patches.pack(predictor.thin(seen, room), room)
        cls, tokens = net.encode(x, keep=keep, count=count)  # [B C K, S, D]
        seen = patches.valid(count, room)

    def split(a):
        if a is None:
            return None
        return einops.rearrange(a, "(b c k) ... -> b c k ...", b=b, c=c)

    return Context(*map(split, (tokens, count, seen, cls)), role=crops.role)


def encode_all(net: Networks, image):
    """Encode crops without hiding anything: [B, C, ...] -> [B, C, N, D]."""
    b = len(image)
    _, tokens = net.encode(einops.rearrange(image, "b c ... -> (b c) ..."))
    return einops.rearrange(tokens, "(b c) n d -> b c n d", b=b)


def find_targets(net: Networks, crops: Masked, patch) -> Targets:
    """Encode the target side of crops, one pass for all levels, and list the targets.

    Args:
        net: networks.
        crops: with what is to be predicted.
        patch: side of a patch in pixels.
    """
    b, room = len(crops.image), crops.slots.targets
    tokens = net.encode_target(einops.rearrange(crops.image, "b c ... -> (b c) ..."))
    tokens = einops.rearrange(tokens, "(b c) n d -> b c n d", b=b)
    where, count = patches.pack(predictor.thin(crops.wanted, room), room)
    grid = patches.grid(crops.image, patch)
    return Targets(tokens, where, count, grid=grid)


def extra_of(context: Context, crops) -> predictor.Extra:
    """Offer every context token of some crops to `crops` target crops, pass by pass.

    Returns:
        rows (b c' k) of C S tokens each.
    """
    s = context.tokens.shape[3]
    valid = None
    if context.count is not None:
        valid = patches.valid(context.count, s)
        valid = _to_every_crop(valid, crops, "b c k s -> b 1 k (c s)")
    tokens = _to_every_crop(context.tokens, crops, "b c k s d -> b 1 k (c s) d")
    return predictor.Extra(tokens, context.role, valid)


def extra_of_all(tokens, crops, passes) -> predictor.Extra:
    """Offer the tokens [B, C, n, D] of wholly visible local crops to target crops."""
    x = einops.repeat(tokens, "b c n d -> (b t k) (c n) d", t=crops, k=passes)
    return predictor.Extra(x, predictor.LOCAL)


def _to_every_crop(x, crops, pattern):
    x = einops.rearrange(x, pattern)
    x = jnp.broadcast_to(x, (len(x), crops, *x.shape[2:]))
    return einops.rearrange(x, "b c k ... -> (b c k) ...")


def predict(net: Networks, context: Context, targets: Targets, extra, slots: Slots):
    """Predict the targets of every crop and pass.

    Returns:
        ([B, C, K, M, D], [] share of context tokens that had no room).
    """
    b, c = context.tokens.shape[:2]

    def flat(a):
        return None if a is None else einops.rearrange(a, "b c k ... -> (b c k) ...")

    where = flat(targets.where)
    query = patches.take(net.positions(targets.grid)[None], where)  # [B C K, M, D]
    own, asked = flat(context.count), flat(targets.count)
    room = slots.sequence + sum(e.tokens.shape[1] for e in extra)
    guess = net.predict(
        flat(context.tokens),
        query,
        context_count=own,
        query_count=asked,
        extra=extra,
        slots=room,
    )
    offered = context.tokens.shape[3] if own is None else own
    for e in extra:
        offered += e.tokens.shape[1] if e.valid is None else e.valid.sum(-1)
    offered = jnp.broadcast_to(offered, asked.shape)
    surplus = jnp.maximum(0, asked + offered - room).sum()
    crowded = surplus / jnp.maximum(offered.sum(), 1)
    guess = einops.rearrange(guess, "(b c k) m d -> b c k m d", b=b, c=c)
    return guess, crowded


def compare(net: Networks, guess, targets: Targets, **options) -> tuple:
    """Bring predictions and targets to their levels and measure the distance.

    With one pass (K = 1) its targets serve every level; else pass k serves level k.

    Args:
        net: networks.
        guess: [B, C, K, M, D].
        targets: of the same crops.
        **options: of `regression.level_loss`.

    Returns:
        (losses [C, H], cosine [C, H], {level: Level}).
    """
    b, _, passes = guess.shape[:3]
    h = net.levels.levels
    truth = patches.take(targets.tokens[:, :, None], targets.where)  # [B, C, K, M, D]
    found = {}
    for k in range(passes):
        only = range(h) if passes == 1 else (k,)
        members = Members(
            einops.rearrange(targets.where[:, :, k], "b c m -> (b c) m"),
            einops.rearrange(targets.count[:, :, k], "b c -> (b c)"),
            targets.grid,
        )
        p, t = (
            net.project(
                einops.rearrange(x[:, :, k], "b c m d -> (b c) m d"),
                members,
                only,
                target=side,
            )
            for x, side in ((guess, False), (truth, True))
        )
        for level in only:
            parts = p[level][0], t[level][0], p[level][1]
            found[level] = Level(
                *(einops.rearrange(x, "(b c) ... -> b c ...", b=b) for x in parts)
            )

    def distance(level):
        return regression.level_loss(*level, detach=net.detach, **options)

    losses, cosine = (
        jnp.stack([jax.vmap(f, 1)(found[k]) for k in range(h)], -1)
        for f in (distance, _cosine)
    )
    return losses, cosine, found


def _cosine(level: Level):
    level = jax.lax.stop_gradient(level)
    p, t = regression.unit(level.prediction), regression.unit(level.target)
    return regression.masked_mean((p * t).sum(-1), level.valid)


def predict_and_compare(
    net: Networks, context, targets, extra, slots, *, one_by_one=False, **options
) -> Result:
    """`predict`, then `compare`, for all crops of a kind at once or crop by crop.

    Args:
        net: networks.
        context, targets: of the same crops.
        extra: function of the number of crops -> sequence of `predictor.Extra`.
        slots: static lengths.
        one_by_one: a scan over the crops whose activations are recomputed in the
            backward pass: memory of one crop instead of C.
        **options: of `regression.level_loss`.
    """
    if not one_by_one:
        crops = context.tokens.shape[1]
        guess, crowded = predict(net, context, targets, extra(crops), slots)
        return Result(*compare(net, guess, targets, **options), crowded)
    arrays = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (context, targets))
    shared = extra(1)

    @jax.checkpoint
    def one(rng, xs):
        some, wanted = jax.tree.map(lambda x: x[:, None], xs)
        alone = dataclasses.replace(net, rng=rng)
        guess, crowded = predict(alone, some, wanted, shared, slots)
        return Result(*compare(alone, guess, wanted, **options), crowded)

    def step(i, xs):
        rng = None if net.rng is None else jax.random.fold_in(net.rng, i)
        return i - 1, one(rng, xs)

    # Counted down from -1, apart from the keys of the other calls.
    _, found = jax.lax.scan(step, jnp.int32(-1), arrays)
    # [C, 1, H] and [C, B, 1, n, ...] -> [C, H] and [B, C, n, ...]
    return Result(
        found.losses[:, 0],
        found.cosine[:, 0],
        jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), found.levels),
        found.crowded.mean(),
    )


def view_loss(net: Networks, local, targets, **options):
    """Predict the pooled target of every global crop from every local crop alone.

    Args:
        net: networks.
        local: [B, L, n, D] all tokens of the local crops.
        targets: [B, G, N, D] target tokens of the global crops.
        **options: of `regression.level_loss`.

    Returns:
        [] mean over images and pairs (l, g) of the coarsest level's loss between the
        position-free prediction and the mean target token.
    """
    b, count = local.shape[:2]
    guess = net.predict(einops.rearrange(local, "b l n d -> (b l) n d"))
    guess = einops.rearrange(guess, "(b l) 1 d -> b l d", b=b)
    guess = net.coarse(guess)  # [B, L, D]
    truth = net.coarse(targets.astype(jnp.float32).mean(2), target=True)  # [B, G, D]
    shape = (b, count, truth.shape[1], truth.shape[-1])
    guess = jnp.broadcast_to(guess[:, :, None], shape)
    truth = jnp.broadcast_to(truth[:, None], shape)
    return regression.level_loss(guess, truth, detach=net.detach, **options)
