"""The batches of a run: from pixels until an event of `freeze.store`, then from tokens.

What follows an event is a function of the seed, the step and the frozen weights alone.
Whoever made tokens left a mark of these, so a killed run finds what it had stored and
nothing else; tokens that are missing are made again, to the bit.

Nothing is run twice, and nothing beside training, to fill a store: the step that first
visits a view runs the frozen blocks, as it would without a store, and what they make is
kept (`freeze.store.fill=background`). What a step finds in the store is what it would
have made, by the same programs, so when the store is full leaves no trace in the run,
nor does a kill.
"""

import pathlib
import shutil
import threading
from collections.abc import Callable

# Here and not at the first batch: while it is imported, etils makes the imports of all
# threads lazy, which breaks those of a checkpoint that is being written.
import grain  # noqa: F401
import jax

from vitssl import errors
from vitssl.run import prefix


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
        # What is not written takes no blocks.
        kept = sum(512 * getattr(f, "st_blocks", f.st_size // 512) for f in files)
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
        found = prefix.tokens(parts, parts.shapes(event), event)
        store = prefix.store_of(parts, found, "")
        bytes_ = store.size(len(prefix.views(parts, event)))
        needs[store.shape] = max(bytes_, needs.get(store.shape, 0))
    each = list(needs.values())
    return max(map(sum, zip(each, each[1:], strict=False)), default=each[0])


def _folder(parts, workdir) -> pathlib.Path:
    return pathlib.Path(parts.optimizer.store.dir or pathlib.Path(workdir) / "store")


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
            self._prefix = prefix.Prefix(self._parts, at, programs)
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
                    made = prefix.Programs(parts, at, programs)
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
