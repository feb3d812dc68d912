"""Growing depth: a run that begins with few blocks, and stacks trained ones on top.

Until its time comes a block is the identity (what its branches add is 0), is not run
in training, and does not train. Then it becomes a copy of a trained one, so that every
checkpoint is a network of the whole depth, and evaluations know nothing of it.

Sources: Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking", ICML
(the copy, twice the depth at a time); Yang et al. 2020, arXiv:2011.13635 (few blocks at
a time, those before them frozen: add optim.freeze).
"""

import dataclasses
import functools
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from vitssl import tree
from vitssl.models import vit

NETS = ("encoder", "backbone")  # What methods call the parameters of their network.
_ADDS = ("attn/proj", "mlp/fc2")  # What the branches of a block end with.


class Phase(NamedTuple):
    """The static part of a step: the method's own, and how many blocks there are."""

    method: Hashable
    depth: int


@dataclasses.dataclass(frozen=True)
class Growing:
    """A method whose network grows; all else is the method's own.

    Attributes:
        method: of the whole depth.
        stairs: ((share of the run, blocks from there on), ...).
    """

    method: Any
    stairs: tuple[tuple[float, int], ...]

    def __getattr__(self, name):
        if name.startswith("__") or name in ("method", "stairs"):
            raise AttributeError(name)
        return getattr(self.method, name)

    @functools.lru_cache(maxsize=16)  # noqa: B019 - a few depths of one run.
    def at(self, depth: int):
        """Return the method of a network of so many blocks."""
        return self.method.shallow(depth)

    def phase(self, step: int) -> Phase:
        """Return what is static at a step."""
        total = self.method.run.total_steps
        depth = [d for share, d in self.stairs if round(share * total) <= step][-1]
        return Phase(self.at(depth).phase(step), depth)

    def _own(self, phase):
        """Return the method of a phase, and the phase as it knows it."""
        return self.at(phase.method.depth), phase._replace(method=phase.method.method)

    def init(self, rng, batch):
        """Return (params, extra); blocks whose time has not come are the identity."""
        depth = self.phase(0).depth
        later = range(depth, self.method.model.depth)
        return _each(self.method.init(rng, batch), lambda net: _silent(net, later))

    def loss(self, params, extra, batch, rng, *, step=0, phase):
        """Return (loss [], (extra, metrics)) of the blocks that there are."""
        method, own = self._own(phase)
        value, (extra, metrics) = method.loss(
            params, extra, batch, rng, step=step, phase=own
        )
        return value, (extra, metrics | {"depth": float(phase.method.depth)})

    def embed(self, params, extra, batch, rng, *, step=0, phase):
        """Return rows, see `base.Embedding`."""
        method, own = self._own(phase)
        return method.embed(params, extra, batch, rng, step=step, phase=own)

    def compare(self, params, extra, rows, rng, *, step=0, phase):
        """Return (loss [], (extra, metrics)) of rows, see `base.Embedding`."""
        method, own = self._own(phase)
        return method.compare(params, extra, rows, rng, step=step, phase=own)

    def boundary(self, live, phase) -> int:
        """Return how many blocks are done, of those that there are."""
        method, own = self._own(phase)
        return min(phase.method.depth, method.boundary(live, own))

    def frozen_tokens(self, params, batch, phase, first, last):
        """Return tokens, see `base.Method`."""
        method, own = self._own(phase)
        return method.frozen_tokens(params, batch, own, first, last)

    def enter(self, params, extra, before, phase):
        """Return (params, extra) with the blocks of a phase, copies of trained ones."""
        old, new = before.method.depth, phase.method.depth
        if old == new:
            return params, extra
        return _each((params, extra), lambda net: _stacked(net, old, new))


def faults(method, stairs) -> Iterator[str]:
    """Yield why a method cannot grow by these stairs."""
    key, model = f"freeze.grow_depth={stairs}", getattr(method, "model", None)
    if not method.grows or not isinstance(model, vit.ViT):
        yield (
            f"{key}: grows a plain encoder (localmim, mae, classify, simclr with "
            "model.name=vit), no network that another one follows or joins; set ()"
        )
    elif stairs[-1][1] != model.depth:
        yield f"{key}: must end with model.depth={model.depth} blocks"


def blocks(names, stairs) -> dict[str, float]:
    """Return {name: share of the run from which on it trains} of blocks that wait."""
    found, before = {}, 0
    for share, depth in stairs:
        heads = tuple(f"{net}/block_{i}/" for net in NETS for i in range(before, depth))
        found |= {k: share for k in names if k.startswith(heads) and share}
        before = depth
    return found


def _each(trees, change):
    """Return trees (params, extra) with every network in them changed."""

    def walk(node):
        if not isinstance(node, dict):
            return node
        return {k: change(v) if k in NETS else walk(v) for k, v in node.items()}

    return tuple(walk(tree) for tree in trees)


def _silent(net, which):
    """Return a network with blocks that add nothing."""
    net = dict(net)
    for i in which:
        net[f"block_{i}"] = _without(net[f"block_{i}"], _ADDS)
    return net


def _without(node, paths):
    """Return nested dicts with 0 for all leaves under some paths."""
    for path in paths:
        head, _, rest = path.partition("/")
        inner = node[head]
        if rest:
            node = node | {head: _without(inner, (rest,))}
        else:
            node = node | {head: {k: jnp.zeros_like(v) for k, v in inner.items()}}
    return node


def _stacked(net, old: int, new: int):
    """Return a network whose blocks old .. new - 1 are copies of the last ones.

    Of so many as there are new ones, in their order; of all, again and again, where
    there are fewer.
    """
    net, count = dict(net), min(old, new - old)
    for i in range(old, new):
        source = old - count + (i - old) % count
        net[f"block_{i}"] = tree.copy(net[f"block_{source}"])  # No aliases: donated.
    return net
