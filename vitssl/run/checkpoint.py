"""Checkpoints: orbax underneath, closed, verified, never half loaded.

WORKDIR/checkpoints/<step>/ holds the state and its seal, see `seals`. A step without
one (the process died) or with a file that does not match it (the disk lied) is never
loaded: the newest good one is.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import threading
from typing import Annotated

import jax

from vitssl import disk, errors, ranges, tree
from vitssl.run import devices, seals

logger = logging.getLogger(__name__)
# Entries of `extra` that methods kept before the trainer told them the step.
RETIRED = ("step",)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Config section `checkpoint`.

    Attributes:
        every_epochs: a checkpoint each so many epochs (fractions allowed), and at the
            end.
        keep_last: how many of the newest to keep (at least 2, so that a damaged
            newest one has a predecessor).
        keep_every_epochs: keep one each so many epochs for ever; 0.0 is off.
        keep_best: how many of the best by `best` to keep; 0 is off.
        best: metric of the online evaluation; higher is better, unless its name has
            "loss" in it.
        patience: the run ends after so many online evaluations in a row without a
            better `best`; 0 is off.
        min_delta: better is by more than this (for `patience`).
        failures: after so many failed saves in a row the run ends with exit code 4.
    """

    every_epochs: ranges.Positive
    keep_last: Annotated[int, ranges.Range(2)] = 2
    keep_every_epochs: ranges.NotNegative = 0.0
    keep_best: ranges.OrNone = 0
    best: str = "knn/top1"
    patience: ranges.OrNone = 0
    min_delta: ranges.NotNegative = 0.0
    failures: ranges.Count = 3

    @property
    def sign(self) -> float:
        """Return -1 where `best` is a loss, else 1."""
        return -1.0 if "loss" in self.best else 1.0


class Best:
    """The best online evaluation so far, and how many came since (early stopping).

    Args:
        spec: the config section.
        state: from `state` of an earlier part of the run.
    """

    def __init__(self, spec: Checkpoint, state: dict):
        self._spec = spec
        self._mark, self._since = state.get("best"), state.get("since", 0)
        self.value, self.step = state.get("value"), state.get("step")

    def look(self, step: int, scores: dict) -> bool:
        """Take note of the evaluation after `step` updates; return if it is the best.

        That of the untrained network does not count for the patience.
        """
        value = scores.get(self._spec.best)
        if value is None:
            return False
        sign = self._spec.sign
        best = self.value is None or sign * (value - self.value) >= 0
        if best:
            self.value, self.step = value, step
        if step:
            gain = None if self._mark is None else sign * (value - self._mark)
            better = gain is None or gain > self._spec.min_delta
            self._mark = value if better else self._mark
            self._since = 0 if better else self._since + 1
        return best

    @property
    def over(self) -> bool:
        """Return whether the run should end."""
        return 0 < self._spec.patience <= self._since

    def state(self) -> dict:
        """Return what a resumed run needs."""
        own = {"best": self._mark, "since": self._since}
        return own | {"value": self.value, "step": self.step}


class _Overheard:
    """A future of orbax; `note` calls what it waits for."""

    def __init__(self, future, note):
        self._future, self._note = future, note

    def result(self, timeout=None):
        return self._note(self._future.result, timeout=timeout)


class Checkpoints:
    """The checkpoints of one workdir; use as a context manager.

    Args:
        workdir: directory of the run.
        spec: the config section.
        steps_per_epoch: to turn epochs into steps.
        reseal: take steps that lost their seal, if they can be read.

    Raises:
        CheckpointError: what is there is of another version, or has no seal.
    """

    def __init__(
        self, workdir, spec: Checkpoint, steps_per_epoch: int, reseal: bool = False
    ):
        # Orbax fails late, in a thread, on a relative path.
        self.directory = pathlib.Path(os.path.abspath(workdir)) / "checkpoints"
        self.spec = spec
        self.every = max(1, round(spec.every_epochs * steps_per_epoch))
        # 0.3 s of import, and a config is checked without.
        from orbax.checkpoint import checkpoint_managers as policies

        keep = [policies.LatestN(spec.keep_last)]
        if spec.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda m: m["best"], reverse=False, n=spec.keep_best
                )
            )
        if spec.keep_every_epochs:
            every = max(1, round(spec.keep_every_epochs * steps_per_epoch))
            keep.append(policies.EveryNSteps(every))
        self._keep = policies.AnyPreservationPolicy(keep)
        self._finishing, self._failed, self._in_a_row = None, None, 0
        self._reason = None  # Of the last failure.
        if reseal and devices.is_main():
            seals.reseal(self.directory)
        devices.meet("reseal")
        seals.check(self.directory)
        if devices.is_main() and self.directory.is_dir():
            seals.tidy(self.directory)
        self._manager = self._opened()

    def _opened(self):  # -> orbax.checkpoint.CheckpointManager
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self.directory.mkdir(parents=True, exist_ok=True)
        handlers = None
        if jax.process_count() > 1:
            handlers = {"state": self._overheard(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(
            self.directory,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                save_decision_policy=policies.FixedIntervalPolicy(1),
            ),
        )

    def _overheard(self):
        """Return orbax's handler of the state, which notes at once what fails here.

        Its manager hears of that, but waits for the other processes before it tells,
        and they wait for this one.
        """
        import orbax.checkpoint as ocp

        handler = ocp.StandardCheckpointHandler()
        begin, finalize = handler.async_save, handler.finalize

        async def async_save(*args, **kwargs):
            return [_Overheard(f, self._note) for f in await begin(*args, **kwargs)]

        handler.async_save = async_save
        handler.finalize = lambda *args: self._note(finalize, *args)
        return handler

    def _note(self, call, *args, **kwargs):
        """Call it; a failure is noted and raised."""
        try:
            return call(*args, **kwargs)
        except BaseException as e:
            self._failed = e
            raise

    def __enter__(self):
        """Return self."""
        return self

    def __exit__(self, kind, value, traceback):
        """Finish a save under way, then close; errors of both are raised."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` updates."""
        return step % self.every == 0

    def save(self, step: int, state, meta: dict, metrics: dict) -> None:
        """Start saving `state` after `step` updates; returns before it is on disk.

        A failed save (a full disk, say) is reported, and retried at the next one.

        Raises:
            CheckpointError: `spec.failures` saves in a row failed; of several
                processes: one did.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._at = step
        found = metrics.get(self.spec.best)
        best = float("-inf") if found is None else self.spec.sign * float(found)
        meta = {"format": seals.FORMAT, "step": step, "metrics": dict(metrics), **meta}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics={"best": best},
                force=True,
            )
        except Exception as e:  # noqa: BLE001 - whatever the file system raises.
            self._failed = e
            self._judge()
            return
        self._finishing = threading.Thread(
            target=self._finish, args=(step,), name="checkpoint", daemon=True
        )
        self._finishing.start()

    def seal(self, step: int, state, meta: dict, metrics: dict) -> None:
        """Save `state` and return once it is sealed on disk; a failure is tried again.

        Raises:
            CheckpointError: it is not; why, and what to do.
        """
        for _ in range(2):
            self.save(step, state, meta, metrics)
            self.wait()
            # The process that writes the seal is the one to look for it.
            if not devices.is_main() or step in self.steps():
                return
        raise errors.CheckpointError(
            f"{self.directory}: the state after step {step} could not be saved: "
            f"{self._reason}; free space and run the same command again"
        ) from self._reason

    def wait(self) -> None:
        """Block until the save under way is on disk and verified."""
        if self._finishing is not None:
            while self._finishing.is_alive():
                self._finishing.join(1.0)
                self.alone()
            self._finishing = None
            self._judge()

    def _judge(self):
        """Count failures in a row; the run goes on until there are too many."""
        if self._failed is None:
            self._in_a_row = 0
            return
        self.alone()
        self._in_a_row += 1
        logger.warning("checkpoint of step %d failed: %s", self._at, self._failed)
        self._reason = self._failed
        self.reopen()
        if self._in_a_row >= self.spec.failures:
            raise errors.CheckpointError(
                f"{self.directory}: {self._in_a_row} saves in a row failed, the last "
                f"with: {self._failed}; free space or set another --workdir"
            ) from self._failed
        self._failed = None

    def alone(self) -> None:
        """End a job of several processes in which a save of this one has failed.

        The others wait for its part, and would until a watchdog ends them.

        Raises:
            CheckpointError: why it failed.
        """
        if self._failed is not None and jax.process_count() > 1:
            raise errors.CheckpointError(
                f"{self.directory}: process {jax.process_index()} could not save the "
                f"state after step {self._at}: {self._failed}; free space and run the "
                "same command again"
            ) from self._failed

    def reopen(self) -> None:
        """Begin anew after a save that failed, or in a folder that is empty again."""
        # Orbax raises an error of its thread again: at the next save, and at the end.
        with contextlib.suppress(Exception):
            self._manager.close()
        # What the save of this process left has no use, and holds room.
        if devices.is_main() and self.directory.is_dir():
            for path in self.directory.glob(f"{self._at}*"):
                if seals.is_unfinished(path):
                    seals.discard(path)
        self._manager = self._opened()

    def _finish(self, step):
        try:
            self._manager.wait_until_finished()
            if devices.is_main():
                seals.write(self.directory / str(step))
        except Exception as e:  # noqa: BLE001 - judged by the loop's thread.
            self._failed = self._failed or e

    def steps(self) -> list[int]:
        """Return the steps that are complete on disk, oldest first."""
        return seals.sealed(self.directory)

    def restore(self, target_of):
        """Return (state, meta) of the newest checkpoint that is undamaged, or None.

        Args:
            target_of: step -> State of jax.ShapeDtypeStruct with shardings.

        Raises:
            CheckpointError: no checkpoint is good, or its leaves are not the model's.
        """
        damaged = []
        for step in reversed(self.steps()):
            fault = seals.damage(self.directory / str(step))
            if fault:
                logger.warning(
                    "checkpoint %d is damaged (%s); trying older", step, fault
                )
                damaged.append(f"{step}: {fault}")
                continue
            state, meta = read(self.directory, step, target_of(step))
            for bad in self.steps() if devices.is_main() else ():
                if bad > step:  # Its number must be free for the run to save again.
                    new = disk.aside(self.directory / str(bad), "damaged")
                    logger.warning("the damaged checkpoint %d is kept as %s", bad, new)
            devices.meet("restored")
            self._manager.reload()
            return state, meta
        if damaged:
            raise errors.CheckpointError(
                f"{self.directory}: no checkpoint is intact: {'; '.join(damaged)}; "
                "give another --workdir, or move the folder away to start anew"
            )
        return None


def read(directory, step: int, target):
    """Return (state, meta) of one checkpoint.

    Args:
        directory: the `checkpoints` folder.
        step: which.
        target: tree of jax.ShapeDtypeStruct, with shardings for jax arrays.

    Raises:
        CheckpointError: names the leaves that differ, with both shapes.
    """
    import orbax.checkpoint as ocp

    path = pathlib.Path(os.path.abspath(directory)) / str(step)
    handler = ocp.StandardCheckpointHandler()
    with seals.reading(path), ocp.Checkpointer(handler) as reader:
        stored = seals.metadata(handler, path / "state")
        retired = {k: target.step for k in RETIRED if k in (stored.get("extra") or {})}
        whole = target.replace(extra=target.extra | retired)
        _compare(path, stored, whole)
        state = reader.restore(path / "state", args=ocp.args.StandardRestore(whole))
        state = state.replace(extra={k: state.extra[k] for k in target.extra})
    return state, read_meta(directory, step)


def read_meta(directory, step: int) -> dict:
    """Return the json beside the state of one checkpoint; {} where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    path = pathlib.Path(os.path.abspath(directory)) / str(step) / "meta"
    if not path.is_dir():
        return {}
    handler = ocp.JsonCheckpointHandler()
    with seals.reading(path), ocp.Checkpointer(handler) as reader:
        return reader.restore(path)


def _compare(path, stored, target, most=8):
    """Raise CheckpointError if stored leaves are not the target's, naming them."""
    have, want = _shapes(stored), _shapes(target)
    lines = []
    # Parameters first: moments and averages of them differ in the same way.
    every = sorted(set(have) | set(want), key=tree.natural)
    order = sorted(every, key=lambda name: name[:7] != "params/")
    for name in order:
        if name not in have:
            lines.append(f"{name}: not in the checkpoint, model has {want[name]}")
        elif name not in want:
            lines.append(f"{name}: {have[name]} in the checkpoint, not in the model")
        elif have[name] != want[name]:
            lines.append(f"{name}: {have[name]} in the checkpoint, model {want[name]}")
    if lines:
        more = f"\n  and {len(lines) - most} more" if len(lines) > most else ""
        raise errors.CheckpointError(
            f"{path} is of another model or optimizer:\n  "
            + "\n  ".join(lines[:most])
            + more
            + "\n  give another --workdir, or the config it was made with"
        )


def _shapes(tree) -> dict:
    """Return {path: shape}; paths are the same for objects and for stored dicts."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = []
        for p in path:
            part = getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))
            parts.append(str(part))
        shape = tuple(getattr(leaf, "shape", ()))
        if _is_key(leaf):  # Stored as the two integers of its data.
            shape = (*shape, 2)
        found["/".join(parts)] = shape
    return found


def _is_key(leaf) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
