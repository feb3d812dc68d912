"""The blocks that train no more: programs that run them, and what is kept of it.

Tokens go through the frozen blocks in the pieces that the events cut, rounded to the
store's dtype in between, whether a piece starts from the store or from pixels: where
they come from leaves no trace.
"""

import dataclasses
import hashlib
import logging
import pathlib
import shutil
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import tree
from vitssl.data import pipeline, tokenstore
from vitssl.run import devices

logger = logging.getLogger(__name__)

_EVERY = 10.0  # Seconds between two lines of progress.


class Cost(NamedTuple):
    """What a filling has done so far: batches, and XLA's FLOPs of one."""

    batches: int
    flops: float


def views(parts, at) -> set[int]:
    """Return the views that are still to be visited from step `at` on."""
    count = parts.optimizer.store.views
    first, last = (parts.place(t).epoch for t in (at, parts.run.total_steps - 1))
    return {e % count for e in range(first, min(last, first + count - 1) + 1)}


def pieces(parts, at: int) -> list:
    """Return the phases whose events cut the prefix of step `at`, the first one first.

    They go back as long as the prefix only grew and the method's own phase was this.
    """
    now = parts.phase(at)
    found = [now]
    for event in reversed([e for e in parts.optimizer.events if e <= at]):
        before = parts.phase(event)
        if before.method != now.method or not 0 < before.boundary <= found[0].boundary:
            break
        if before.boundary == found[0].boundary:
            found[0] = before  # Later ones froze what is not in the prefix.
        else:
            found.insert(0, before)
    return found


class Programs:
    """What runs the pieces of the prefix of step `at`, compiled for its batches.

    Attributes:
        pieces: see `pieces`.
        shapes: of the tokens after each piece.
        prints: params -> uint32 [leaves, 2] that depend on every bit of `names`.
        each: (program (params, batch) -> tokens after a piece, its FLOPs); the first
            takes pixels, the others batch["tokens"].
        names: of the frozen leaves.
    """

    def __init__(self, parts, at, known):
        self.pieces = pieces(parts, at)
        phase = parts.phase(at)
        self._rows = devices.batch_sharding(parts.mesh)
        state = parts.compiled.abstract(phase)
        places = parts.compiled.state_sharding(phase).params
        params = jax.tree.map(_placed, state.params, places)
        pixels = {
            k: _placed(v, self._rows)
            for k, v in parts.shapes(at).items()
            if k not in ("index", "tokens")
        }
        self.shapes, self.each, given, first = [], [], pixels, 0
        for piece in self.pieces:
            own = _Piece(parts, piece, first)
            found = jax.eval_shape(own, params, given)
            key = first, piece.boundary, piece.method, found.shape
            if key not in known:
                made = jax.jit(own, out_shardings=self._rows)
                made = made.lower(params, given).compile()
                flops = (made.cost_analysis() or {}).get("flops", 0.0)
                known[key] = made, flops * jax.device_count()
            self.each.append(known[key])
            self.shapes.append(found)
            given, first = {"tokens": _placed(found, self._rows)}, piece.boundary
            if parts.optimizer.store.on:
                self._merge(found)  # Compiled now, for later.
        self.names = sorted(self.pieces[-1].frozen)
        self.prints = jax.jit(self._prints).lower(params).compile()

    def _merge(self, like):
        zeros = jnp.zeros(like.shape, like.dtype, device=self._rows)
        self.merged(zeros, np.zeros(like.shape, like.dtype), np.zeros(len(zeros), bool))

    def merged(self, made, stored, there):
        """Return tokens [B, T, D]: those that are `there` [B], else those `made`."""
        return _where(*devices.put((there, stored), self._rows), made)

    def _prints(self, params):
        leaves = tree.flat(params)
        return jnp.stack([_fingerprint(leaves[name]) for name in self.names])


class _Piece:
    """(params, batch) -> tokens [B, T, D] after a piece, in the store's dtype."""

    def __init__(self, parts, piece, first):
        self._parts, self._piece, self._first = parts, piece, first

    def __call__(self, params, batch):
        piece, dtype = self._piece, self._parts.optimizer.store.dtype
        made = self._parts.method.frozen_tokens(
            params, batch, piece, self._first, piece.boundary
        )
        return made if dtype == "auto" else made.astype(dtype)


def _placed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@jax.jit
def _where(there, stored, made):
    return jnp.where(there[:, None, None], stored, made)


def _fingerprint(leaf):  # -> uint32 [2]
    """Return two sums over all bits of a leaf, alike however it is sharded."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).ravel()
    where = jnp.arange(bits.size, dtype=jnp.uint32)
    found = []
    for odd in (0x9E3779B1, 0x85EBCA77):  # Primes that xxHash multiplies by.
        x = (bits ^ (where * jnp.uint32(odd))) * jnp.uint32(0xC2B2AE3D)
        x = (x ^ (x >> 15)) * jnp.uint32(odd)
        found.append((x ^ (x >> 13)).sum(dtype=jnp.uint32))
    return jnp.stack(found)


class Prefix:
    """The tokens behind the frozen blocks of a phase: stored, or made and stored.

    Attributes:
        stores: behind every piece; none where nothing is stored.
        flops: of what was made of the last batch.
    """

    def __init__(self, parts, at, programs):
        self._parts, self._at, self._programs = parts, at, programs
        self._rows = devices.batch_sharding(parts.mesh)
        self.stores, self._pending, self.flops = [], None, 0.0

    def open(self, folder, params):
        """Open the stores in a folder, of what these parameters make."""
        parts, at, programs = self._parts, self._at, self._programs
        about, marks = self._marks(params)
        for shape, mark in zip(programs.shapes, marks, strict=True):
            root = folder / f"{about}-{shape.shape[1]}x{shape.shape[2]}"
            self.stores.append(store_of(parts, shape, str(root), mark))
        keep = [store.root for store in self.stores[-2:]]
        # A folder that the user named may be that of other runs too.
        mine = f"{about}-*" if parts.optimizer.store.dir else "*-*x*"
        for stale in folder.glob(mine):
            if str(stale) not in keep:
                shutil.rmtree(stale, ignore_errors=True)
        for root in keep:
            pathlib.Path(root).mkdir(parents=True, exist_ok=True)
        self._kept = [s.root in keep for s in self.stores]
        logger.info(
            "freeze.store: from step %d on the tokens behind %d blocks, up to %.3g GB "
            "in %s",
            at,
            programs.pieces[-1].boundary,
            self.store.size(len(views(parts, at))) / 1e9,
            self.store.root,
        )

    @property
    def store(self) -> tokenstore.Store:
        """Return the store of this phase; the others are of the pieces before."""
        return self.stores[-1]

    def _marks(self, params):
        """Return (name of all stores, mark of each piece): of all they depend on."""
        parts, s = self._parts, self._parts.experiment.settings
        spec = dataclasses.replace(s.freeze.store, dir="", disk_gb=0.0, fill="pass")
        data = dataclasses.replace(s.data, threads=-1, workers=-1)
        method, programs = parts.method, self._programs
        about = (s.seed, s.batch_size, data, spec, programs.pieces[0].method)
        about = repr((*about, method.transform(), method.run.dtype, len(parts.source)))
        h, marks = hashlib.sha256(about.encode()), []
        name = h.hexdigest()[:16]
        prints = np.asarray(programs.prints(params))
        prints = dict(zip(programs.names, prints, strict=True))
        for piece in programs.pieces:
            for leaf in sorted(piece.frozen & prints.keys()):
                h.update(leaf.encode() + prints[leaf].tobytes())
            h.update(str(piece.boundary).encode())
            marks.append(int.from_bytes(h.digest()[:4], "little"))
        return name, marks

    def completed(self, params, batch, places) -> dict:
        """Return a batch with the tokens of its rows, whose places are [B], or None."""
        if not self.stores:
            batch = self._placed(batch)
            return batch | {"tokens": self._made(params, batch, {}, np.zeros(1, int))}
        tokens, deep = self._found(places)
        fresh = deep < len(self.stores)
        if not fresh.any():
            return batch | {"tokens": tokens[len(self.stores)]}
        if deep.min() == 0:
            batch = self._placed(batch)
        made = self._made(params, batch, tokens, deep)
        self._keep(places[fresh], made, fresh)
        return batch | {"tokens": made}

    def _placed(self, batch):
        """Return a batch with all but its indices on the devices."""
        host = {k: batch[k] for k in ("index",) if k in batch}
        own = {k: batch[k] for k in batch.keys() - host}
        return devices.put(own, self._rows) | host

    def _found(self, places):
        """Return ({k: stored tokens [B, T, D] after k pieces}, the k of each row)."""
        tokens, deep = {}, np.zeros(len(places), int)
        for k in range(len(self.stores), 0, -1):
            left = np.flatnonzero(deep == 0)
            if not len(left) or not self._kept[k - 1]:
                break
            rows, there = self.stores[k - 1].read(places[left])
            if len(left) < len(places):
                whole = np.zeros((len(places), *rows.shape[1:]), rows.dtype)
                whole[left] = rows
                rows = whole
            tokens[k] = rows
            deep[left[there]] = k
        return tokens, deep

    def _made(self, params, batch, tokens, deep):
        """Return tokens [B, T, D] after the last piece, each from what there is."""
        first, made = deep.min(), None
        top = len(self._programs.each)
        for k in range(first, top):
            if k == first > 0:
                made = devices.put(tokens[k], self._rows)
            elif k and (deep == k).any():
                made = self._programs.merged(made, tokens[k], deep == k)
            program, flops = self._programs.each[k]
            self.flops = flops if k == first else self.flops + flops
            own = {n: v for n, v in batch.items() if n not in ("index", "tokens")}
            made = program(params, {"tokens": made} if k else own)
        if (deep == top).any():
            made = self._programs.merged(made, tokens[top], deep == top)
        return made

    def _keep(self, places, made, which):
        """Write rows `which` of `made` soon: when the device has made them."""
        self.settle()
        self._pending = places, made, which

    def settle(self) -> None:
        """Write what was made of the batch before."""
        if self._pending is not None:
            (places, made, which), self._pending = self._pending, None
            self.store.write(places, np.asarray(made)[which])

    def fill(self, params, beat) -> None:
        """Make all that is missing and will be visited, while training waits."""
        n, size = len(self._parts.source), self._parts.place(self._at).size
        wanted = np.concatenate(
            [v * n + np.arange(n) for v in sorted(views(self._parts, self._at))]
        )
        wanted = wanted[~self.store.marked(wanted)]
        before = np.zeros(len(wanted), bool)
        if len(self.stores) > 1:
            before = self.stores[-2].marked(wanted)
        progress = _Progress(len(wanted), beat)
        damaged = [wanted[:0]]
        # What was stored behind fewer blocks needs no pixels, unless it is damaged.
        for places in _batches(wanted[before], size):
            tokens, deep = self._found(places)
            damaged.append(places[deep == 0])
            if kept := np.count_nonzero(deep):
                # Whole batches: the last row of a short one again and again.
                which = np.flatnonzero(deep)[np.minimum(np.arange(size), kept - 1)]
                tokens = {k: v[which] for k, v in tokens.items()}
                made = self._made(params, {}, tokens, deep[which])
                self._keep(places[which[:kept]], made, np.arange(kept))
                progress(kept, self.flops)
        rest = np.concatenate([wanted[~before], *damaged])
        if len(rest):
            with self._loader(rest, size) as loader:
                for places in _batches(rest, size):
                    which = np.minimum(np.arange(size), len(places) - 1)
                    self.completed(params, next(loader), places[which])
                    progress(len(places), self.flops)
        self.settle()
        self.flops = 0.0

    def _loader(self, places, size):
        s = self._parts.experiment.settings
        return pipeline.fill(
            self._parts.source,
            self._parts.method.transform(),
            places,
            batch_size=size,
            seed=s.seed,
            on_bad_image=s.data.on_bad_image,
            bad_share=s.data.bad_share,
            threads=s.data.threads,
            workers=s.data.workers,
        )

    def close(self):
        """Close the files; what the last batch made is made again when it is needed."""
        for store in self.stores:
            store.close()


def _batches(places, size):
    """Yield `places` [n], so many at a time."""
    for first in range(0, len(places), size):
        yield places[first : first + size]


class _Progress:
    """Says how far a filling is, every ten seconds and at its end."""

    def __init__(self, total, beat):
        self._total, self._beat = total, beat
        self._started = self._said = time.perf_counter()
        self._done = self._batches = 0

    def __call__(self, views, flops):
        self._batches, self._done = self._batches + 1, self._done + views
        self._beat(Cost(self._batches, flops))
        now, last = time.perf_counter(), self._done >= self._total
        if not last and now - self._said < _EVERY:
            return
        self._said, spent = now, now - self._started
        left = spent / self._done * (self._total - self._done)
        logger.info(
            "  store %d/%d views, %.0f a second, %s",
            self._done,
            self._total,
            self._done / max(spent, 1e-9),
            f"{spent:.1f} s" if last else f"{left:.0f} s left",
        )


def tokens(parts, shapes, at: int) -> jax.ShapeDtypeStruct:
    """Return the shape [B, T, D] of the stored tokens of a step, and their dtype."""
    phase = parts.phase(at)
    state = parts.compiled.abstract(phase)
    return jax.eval_shape(_Piece(parts, phase, 0), state.params, shapes)


def store_of(parts, found, root: str, mark: int = 0) -> tokenstore.Store:
    """Return the store that tokens of a shape [B, T, D] go to, filled or not."""
    shape, dtype = tuple(found.shape[1:]), np.dtype(found.dtype)
    return tokenstore.Store(root, len(parts.source), shape, dtype, mark)
