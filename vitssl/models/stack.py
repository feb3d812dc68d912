"""Blocks that a sequence passes one after the other, or as one loop.

Written out, a program has every block anew, and is compiled in a time that grows with
their number. In a loop (`model.scan`) equal blocks are compiled once. Parameters stay
those of the single blocks, `block_0`, `block_1`, ..., wherever they are seen: they are
put together on the way into the loop, which copies them, and their gradients on the way
out, once a step.

What is trained and what is frozen never shares a loop, or the backward pass would go
through both.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from vitssl.models import layers


def run(blocks, x, *args, train=False, scan=False):
    """Return the outputs [B, T, D] of every block.

    Values are those of a loop or of none to rounding, and what is dropped is the same
    but for `dropout`, whose draws differ.

    Args:
        blocks: bound modules with the fields and arguments of `layers.Block`.
        x: [B, T, D] what the first one gets.
        *args: other arguments of each, which follow x.
        train: whether paths are dropped; args say so to the blocks.
        scan: run equal neighbours as a loop. Without effect where parameters are
            initialised or attention maps are sown.
    """
    outputs = []
    # There, what a block leaves behind in its scope is wanted.
    scan = scan and blocks and _known(blocks[0])
    for same in _neighbours(blocks) if scan else [[block] for block in blocks]:
        if len(same) == 1:
            outputs.append(same[0](x, *args))
        else:
            outputs += _loop(same, x, args, train)
        x = outputs[-1]
    return outputs


def _known(block) -> bool:
    sown = block.is_mutable_collection("intermediates")
    return not sown and "params" in block.variables


def _neighbours(blocks):
    """Return the blocks as lists of neighbours that one program can stand for."""
    live = iter(differentiated([jax.tree.leaves(_params(b)) for b in blocks]))

    def kind(block):
        leaves, structure = jax.tree.flatten(_params(block))
        shapes = [(x.shape, x.dtype) for x in leaves]
        return _fields(block), structure, shapes, next(live)

    kinds = [kind(block) for block in blocks]
    runs = itertools.groupby(range(len(blocks)), key=kinds.__getitem__)
    return [[blocks[i] for i in run] for _, run in runs]


def _params(block):
    return block.variables["params"]


def _fields(block):
    """Return the block without its place and its rate."""
    return block.clone(parent=None, name=None, drop_path=0.0)


def differentiated(trees) -> list[list[bool]]:
    """Return of every leaf whether the trace under way differentiates it.

    False inside of `jax.jit` or `jax.checkpoint`, which are differentiated later.
    """
    leaves, structure = jax.tree.flatten(trees)
    found = [False] * len(leaves)

    @jax.custom_vjp
    def look(*leaves):
        return jnp.zeros(())

    def forward(*leaves):
        found[:] = [leaf.perturbed for leaf in leaves]
        return jnp.zeros(()), None

    look.defvjp(forward, lambda _, g: (None,) * len(leaves), symbolic_zeros=True)
    look(*leaves)
    return jax.tree.unflatten(structure, found)


def _loop(blocks, x, args, train):
    """Return the outputs of equal blocks."""
    one = _fields(blocks[0])
    x = x.astype(jnp.promote_types(x.dtype, one.dtype))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_params, blocks))
    gains, keys = None, {}
    if train and any(block.drop_path for block in blocks):
        gains = jnp.stack([_gains(block, len(x)) for block in blocks])
    if train and blocks[0].has_rng("dropout"):
        keys["dropout"] = jnp.stack([b.make_rng("dropout") for b in blocks])

    def body(x, own):
        params, gain, keys = own
        y = one.apply({"params": params}, x, *args, gain=gain, rngs=keys)
        return y, y

    last, each = jax.lax.scan(body, x, (params, gains, keys))
    return [*(each[i] for i in range(len(blocks) - 1)), last]


def _gains(block, batch):
    """Return what `layers.DropPath` of the block scales both branches by [2, B, 1, 1].

    Drawn where a block draws them itself.
    """
    if not block.drop_path:
        return np.ones((2, batch, 1, 1), np.float32)
    place = block.scope.push("drop")
    keys = [place.make_rng("drop_path") for _ in range(2)]
    return jnp.stack([layers.path_gain(k, batch, 3, block.drop_path) for k in keys])
