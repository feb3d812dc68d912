"""The batches of a run: from pixels until an event of `freeze.store`, then from tokens.

What follows an event is a function of the seed, the step and the frozen weights alone.
The store's folder is named by a digest of these, so a killed run finds what it had
filled and nothing else; a shard that is missing is made again, to the bit.

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
    needs = [_bytes(parts, e) for e in events]
    most, where = max(needs), _folder(parts, workdir)
    have, key = spec.disk_gb * 1e9, f"freeze.store.disk_gb={spec.disk_gb:g}"
    if not have:
        there = next(p for p in (where, *where.parents) if p.exists())
        kept = sum(f.stat().st_size for f in where.rglob("*") if f.is_file())
        have, key = shutil.disk_usage(there).free + kept, f"{there}: the free space"
    if most > have:
        raise errors.UsageError(
            f"{key} is {have / 1e9:.3g} GB, the store needs {most / 1e9:.3g} GB "
            f"({spec.views} views); lower freeze.store.views, or set "
            "freeze.store.dtype or freeze.store.dir"
        )


def _bytes(parts, at) -> int:
    """Return the most bytes that the store of an event ever has on disk."""
    store = parts.store_of(at, "")
    views = _views(parts, at)
    whole = sum(store.size(s) for s in store.shards(views))
    return whole + store.size(0)  # One shard is there twice while it is extended.


def _folder(parts, workdir) -> pathlib.Path:
    return pathlib.Path(parts.optimizer.store.dir or pathlib.Path(workdir) / "store")


def _views(parts, at) -> set[int]:
    """Return the views that are still to be visited from step `at` on."""
    per, run = parts.run.steps_per_epoch, parts.optimizer.store.views
    last = (parts.run.total_steps - 1) // per
    return {e % run for e in range(at // per, min(last, at // per + run - 1) + 1)}


class Cost(NamedTuple):
    """What filling has done so far: batches, and XLA's FLOPs of one."""

    batches: int
    flops: float


class Feed:
    """An iterator of batches that has to be opened again where `over` says so."""

    def __init__(self, parts, workdir):
        """Open nothing yet."""
        self._parts, self._folder = parts, _folder(parts, workdir)
        self._stream, self._key = iter(()), None

    def _of(self, at):
        """Return what batches of one kind share."""
        phase = self._parts.phase(at)
        return (phase.boundary, phase.method) if phase.boundary else None

    def over(self, at: int) -> bool:
        """Return whether the batches of step `at` come from elsewhere."""
        return self._of(at) != self._key

    def open(self, at: int, params, beat: Callable) -> None:
        """Go on from step `at`, filling the store if it is not there.

        Args:
            params: of the state after `at` updates.
            beat: called with the `Cost` after every batch of a filling; it may raise.
        """
        self.close()
        self._key, store = self._of(at), None
        if self._key and self._parts.optimizer.store.on:
            store = _Filling(self._parts, self._folder, at, params, beat).store
        self._stream = self._parts.stream(at, store)

    def __next__(self):
        return next(self._stream)

    def close(self) -> None:
        """Stop threads and workers."""
        if hasattr(self._stream, "close"):
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


class _Filling:
    """Fills the store of a step from what is there: its shards, older ones, pixels."""

    def __init__(self, parts, folder, at, params, beat):
        self._parts, self._params, self._beat = parts, params, beat
        self._pieces = pieces(parts, at)
        self._size = parts.experiment.settings.batch_size
        self._sharding = devices.batch_sharding(parts.mesh)
        self._programs = {}
        names = self._names()
        self.store = parts.store_of(at, str(folder / names[-1]))
        folder.mkdir(parents=True, exist_ok=True)
        pathlib.Path(self.store.root).mkdir(exist_ok=True)
        old = None
        if len(names) > 1 and (folder / names[-2]).is_dir():
            old = dataclasses.replace(self.store, root=str(folder / names[-2]))
        wanted = self.store.shards(_views(parts, at))
        # What belongs to no step from here on makes room first.
        for stale in folder.glob("b*-*"):
            if stale.name not in names[-2:]:
                shutil.rmtree(stale, ignore_errors=True)
        self._fill([s for s in wanted if not self.store.has(s)], old)
        if old:
            shutil.rmtree(old.root, ignore_errors=True)

    def _names(self) -> list[str]:
        """Return the names of the folders of every piece: of all they depend on."""
        parts, s = self._parts, self._parts.experiment.settings
        spec = dataclasses.replace(s.freeze.store, dir="", disk_gb=0.0)
        leaves, data = tree.flat(self._params), dataclasses.replace(s.data, threads=-1)
        method = parts.method
        about = (s.seed, s.batch_size, data, spec, self._pieces[0].method)
        about = repr((*about, method.transform(), method.run.dtype, len(parts.source)))
        h, found = hashlib.sha256(about.encode()), []
        for phase in self._pieces:
            own = {k: leaves[k] for k in sorted(phase.frozen)}
            for name, leaf in jax.device_get(own).items():
                h.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
            found.append(f"b{phase.boundary}-{h.hexdigest()[:16]}")
        return found

    def _fill(self, missing, old):
        if not missing:
            return
        extend = [s for s in missing if old and old.has(s)]
        fresh = [s for s in missing if s not in extend]
        boundary = self._pieces[-1].boundary
        logger.info(
            "freeze.store: the tokens after %d blocks, %d views, %.3g GB in %s",
            boundary,
            sum(len(self.store.span(s)) for s in missing),
            sum(self.store.size(s) for s in missing) / 1e9,
            self.store.root,
        )
        self._started = self._said = time.perf_counter()
        self._todo, self._done = len(missing), 0
        self._batches = 0
        for shard in extend:
            self._write(shard, self._stored(old, shard), self._pieces[-1:])
            old.path(shard).unlink()
        if fresh:
            with self._loader(fresh) as loader:
                for shard in fresh:
                    self._write(shard, loader, self._pieces)

    def _loader(self, shards):
        s = self._parts.experiment.settings
        return pipeline.fill(
            self._parts.source,
            self._parts.method.transform(),
            self.store,
            shards,
            batch_size=self._size,
            seed=s.seed,
            on_bad_image=s.data.on_bad_image,
            bad_share=s.data.bad_share,
            threads=s.data.threads,
            workers=s.data.workers,
        )

    def _stored(self, old, shard):
        """Yield the batches of a shard of the store before, the last one filled up."""
        rows = old.read(shard)
        for first in range(0, len(rows), self._size):
            part = rows[first : first + self._size]
            more = np.repeat(part[:1], self._size - len(part), axis=0)
            yield {"tokens": np.concatenate([part, more])}

    def _write(self, shard, batches, which):
        count, made = len(self.store.span(shard)), []
        for _ in range(-(-count // self._size)):
            made.append(self._through(next(batches), which))
            if len(made) > 1:  # The device works while the next batch is read.
                made[-2] = np.asarray(made[-2])
        rows = np.concatenate([np.asarray(m) for m in made])[:count]
        # A last shard is whole batches to the loader, some of them empty.
        if isinstance(batches, pipeline.Loader):
            for _ in range(self.store.rows // self._size - len(made)):
                next(batches)
        self.store.write(shard, rows)
        self._done += 1
        self._say()

    def _through(self, batch, which):
        """Return the tokens [B, T, D] of a batch after the last piece."""
        batch = devices.put(batch, self._sharding)
        first, flops = 0, 0.0
        if which[0] != self._pieces[0]:
            first = self._pieces[-2].boundary
        for phase in which:
            program = self._program(phase, first, batch)
            tokens = program(self._params, batch)
            flops += (program.cost_analysis() or {}).get("flops", 0.0)
            batch, first = batch | {"tokens": tokens}, phase.boundary
        self._batches += 1
        self._beat(Cost(self._batches, flops * jax.device_count()))
        return tokens

    def _program(self, phase, first, batch):
        key = phase.boundary, first
        if key not in self._programs:
            method, dtype = self._parts.method, self.store.dtype

            def run(params, batch):
                tokens = method.frozen_tokens(
                    params, batch, phase, first, phase.boundary
                )
                return tokens.astype(dtype)

            self._programs[key] = jax.jit(run).lower(self._params, batch).compile()
        return self._programs[key]

    def _say(self):
        now = time.perf_counter()
        last = self._done == self._todo
        if not last and now - self._said < _EVERY:
            return
        self._said, spent = now, now - self._started
        logger.info(
            "  store %d/%d files, %.0f views/s, %s",
            self._done,
            self._todo,
            self._batches * self._size / spent,
            f"{spent:.1f} s"
            if last
            else f"{spent / self._done * (self._todo - self._done):.0f} s left",
        )


def tokens(parts, shapes, at: int) -> jax.ShapeDtypeStruct:
    """Return the shape [B, T, D] of the stored tokens of a step, and their dtype."""
    phase, spec = parts.phase(at), parts.optimizer.store
    state = parts.compiled.abstract(phase)
    found = jax.eval_shape(
        lambda params, batch: parts.method.frozen_tokens(
            params, batch, phase, 0, phase.boundary
        ),
        state.params,
        shapes,
    )
    dtype = found.dtype if spec.dtype == "auto" else jnp.dtype(spec.dtype)
    return jax.ShapeDtypeStruct(found.shape, dtype)


def store_of(parts, found, root: str) -> tokenstore.Store:
    """Return the store that tokens of a shape [B, T, D] go to, filled or not."""
    spec, (size, *shape) = parts.optimizer.store, found.shape
    row = int(np.prod(shape)) * found.dtype.itemsize
    rows = max(1, int(spec.shard_mb * 1e6) // (row * size)) * size
    count = len(parts.source)
    return tokenstore.Store(
        root, count, spec.views, rows, tuple(shape), np.dtype(found.dtype)
    )
