"""The batches of a run: from pixels until an event of `freeze.store`, then from tokens.

What follows an event is a function of the seed, the step and the frozen weights alone.
Whoever made tokens left a mark of these, so a killed run finds what it had stored and
nothing else; tokens that are missing are made again, to the bit.

Nothing is run twice, and nothing beside training, to fill a store: the step that first
visits a view runs the frozen blocks, as it would without a store, and what they make is
kept (`freeze.store.fill=background`). What a step finds in the store is what it would
have made, by the same programs, so when the store is full leaves no trace in the run,
nor does a kill.

Tokens go through the frozen blocks in the pieces that the events cut, rounded to the
store's dtype in between, whether a piece starts from the store or from pixels: where
they come from leaves no trace either.
"""

import dataclasses
import hashlib
import logging
import pathlib
import shutil
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors, tree
from vitssl.data import pipeline, tokenstore
from vitssl.run import devices

logger = logging.getLogger(__name__)

_EVERY = 10.0  # Seconds between two lines of progress.


def check(parts, workdir) -> None:
    """Refuse a store that cannot be, before any time is spent.

    Raises:
        UsageError: the method keeps no tokens, or none ever freeze; several processes;
            more bytes than `freeze.store.disk_gb` or the disk has.
    """
    spec, total = parts.optimizer.store, parts.run.total_steps
    if not spec.views or not total:
        return
    events = [
        e for e in parts.optimizer.events if e < total and parts.phase(e).boundary
    ]
    if not events:
        raise errors.UsageError(
            f"freeze.store.views={spec.views}: no {spec.every} block(s) from the first "
            "on freeze within this run, or something before them trains (the class "
            "token: freeze.cls_token=True); set it to 0"
        )
    if not spec.on:
        return
    if jax.process_count() > 1:
        raise errors.UsageError(
            "freeze.store: written by one process; set freeze.store.tokens=computed"
        )
    most, where = room(parts, events), _folder(parts, workdir)
    have, key = spec.disk_gb * 1e9, f"freeze.store.disk_gb={spec.disk_gb:g}"
    if not have:
        there = next(p for p in (where, *where.parents) if p.exists())
        files = (f.stat() for f in where.rglob("*") if f.is_file())
        kept = sum(512 * f.st_blocks for f in files)  # What is not written takes none.
        have, key = shutil.disk_usage(there).free + kept, f"{there}: the free space"
    if most > have:
        raise errors.UsageError(
            f"{key} is {have / 1e9:.3g} GB, the store needs {most / 1e9:.3g} GB "
            f"({spec.views} views); lower freeze.store.views, or set "
            "freeze.store.dtype or freeze.store.dir"
        )


def room(parts, events) -> int:
    """Return the most bytes that the stores behind some events ever have on disk.

    Tokens of one shape take each other's place; of two shapes both are there.
    """
    needs = {}
    for event in events:
        found = tokens(parts, parts.shapes(event), event)
        store = _store(parts, found, "")
        bytes_ = store.size(len(_views(parts, event)))
        needs[store.shape] = max(bytes_, needs.get(store.shape, 0))
    each = list(needs.values())
    return max(map(sum, zip(each, each[1:], strict=False)), default=each[0])


def _folder(parts, workdir) -> pathlib.Path:
    return pathlib.Path(parts.optimizer.store.dir or pathlib.Path(workdir) / "store")


def _views(parts, at) -> set[int]:
    """Return the views that are still to be visited from step `at` on."""
    count = parts.optimizer.store.views
    first, last = (parts.place(t).epoch for t in (at, parts.run.total_steps - 1))
    return {e % count for e in range(first, min(last, first + count - 1) + 1)}


class Cost(NamedTuple):
    """What a filling has done so far: batches, and XLA's FLOPs of one."""

    batches: int
    flops: float


class Feed:
    """The batches of a run; it has to be opened again where `over` says so.

    Attributes:
        made: FLOPs of the frozen blocks of the last batch; 0.0 if it was stored.
    """

    def __init__(self, parts, workdir):
        """Open nothing yet."""
        self._parts, self._folder = parts, _folder(parts, workdir)
        self._stream = self._key = self._prefix = self._ahead = self._first = None
        self._at, self.made, self._programs = 0, 0.0, {}

    def _of(self, at):
        """Return what batches of one kind share."""
        phase = self._parts.phase(at)
        if not phase.boundary:
            return None
        return phase.boundary, phase.method, self._parts.place(at).size

    def over(self, at: int) -> bool:
        """Return whether the batches of step `at` come from elsewhere."""
        return self._of(at) != self._key

    def prepare(self, at: int, soon: int) -> None:
        """Begin to open, in the background, what comes next after step `at`.

        Nothing is done unless that is up to step `soon`.
        """
        if self._ahead is None and self.over(soon):
            event = next(t for t in range(at, soon + 1) if self.over(t))
            self._ahead = _Ahead(self._parts, event, self._programs)

    def settled(self) -> None:
        """Wait until what `prepare` began is ready."""
        if self._ahead is not None:
            self._ahead.wait()

    def open(self, at: int, params, beat: Callable) -> None:
        """Go on from step `at`.

        Args:
            params: of the state after `at` updates.
            beat: called with the `Cost` after every batch of a filling that training
                waits for (`freeze.store.fill=pass`); it may raise.
        """
        ahead, self._ahead = self._ahead, None
        self.close()
        if ahead is None or ahead.at != at:
            if ahead is not None:
                ahead.close()
            ahead = _Ahead(self._parts, at, self._programs)
        self._key, self._at = self._of(at), at
        self._stream, self._first, programs = ahead.get()
        if programs is not None:
            spec = self._parts.optimizer.store
            self._prefix = _Prefix(self._parts, at, programs)
            if spec.on:
                self._prefix.open(self._folder, params)
            if spec.on and spec.fill == "pass":
                self._prefix.fill(params, beat)

    def take(self, params) -> dict:
        """Return the batch of the next step, as numpy or on the devices.

        Args:
            params: of the state so far, which may be under way.
        """
        if self._prefix is not None:
            self._prefix.settle()
        batch, self._first = self._first, None
        if batch is None:
            batch = next(self._stream)
        self.made = 0.0
        if self._prefix is not None:
            places = self._stream.remembers(self._at) if self._prefix.stores else None
            batch = self._prefix.completed(params, batch, places)
            self.made, self._prefix.flops = self._prefix.flops, 0.0
        self._at += 1
        return batch

    def close(self) -> None:
        """Stop threads and workers."""
        if self._ahead is not None:
            self._ahead.close()
        if self._prefix is not None:
            self._prefix.close()
        if self._stream is not None:
            self._stream.close()
        self._stream = self._prefix = self._ahead = None


class _Ahead:
    """The stream from a step on, its first batch and programs, made in a thread."""

    def __init__(self, parts, at, programs):
        self.at, self._stream, self._failure = at, parts.stream(at), []
        self._found = None

        def work():
            try:
                first, made = next(self._stream), None
                if parts.phase(at).boundary:
                    made = _Programs(parts, at, programs)
                self._found = self._stream, first, made
            except BaseException as e:  # noqa: BLE001 - raised by `get` in the loop.
                self._failure.append(e)

        self._thread = threading.Thread(target=work, name="open-ahead", daemon=True)
        self._thread.start()

    def wait(self):
        """Return when it is made."""
        self._thread.join()

    def get(self):
        """Return (stream, batch of its first step, programs or None)."""
        self.wait()
        if self._failure:
            self._stream.close()
            raise self._failure[0]
        return self._found

    def close(self):
        """Wait for what is under way (a daemon thread would die in XLA), stop it."""
        self.wait()
        self._stream.close()


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


class _Programs:
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


class _Prefix:
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
            self.stores.append(_store(parts, shape, str(root), mark))
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
            self.store.size(len(_views(parts, at))) / 1e9,
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
            [v * n + np.arange(n) for v in sorted(_views(self._parts, self._at))]
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


def _store(parts, found, root: str, mark: int = 0) -> tokenstore.Store:
    """Return the store that tokens of a shape [B, T, D] go to, filled or not."""
    shape, dtype = tuple(found.shape[1:]), np.dtype(found.dtype)
    return tokenstore.Store(root, len(parts.source), shape, dtype, mark)
