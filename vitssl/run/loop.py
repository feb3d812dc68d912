"""The one loop of every method.

Order of one round, which makes a resumed run the same run: step, read the metrics of
the step before, evaluate the new state, save it. The data of step i depend on the
seed and i alone, and so do its random numbers; nothing else has to be restored.
"""

import contextlib
import json
import logging
import os
import pathlib
import time

import jax

from vitssl import config, disk, errors, progress
from vitssl.data import orders
from vitssl.run import (
    agreement,
    beginning,
    build,
    checkpoint,
    devices,
    ending,
    evaluation,
    feed,
    guard,
    log,
    memory,
    notes,
    phases,
    record,
    step,
)

logger = logging.getLogger(__name__)


def run(
    experiment,
    workdir,
    *,
    name: str,
    force_unlock: bool = False,
    reseal: bool = False,
) -> dict:
    """Train until the end, or go on where a killed run of this workdir stopped.

    Args:
        experiment: from `experiment.read`.
        workdir: directory of the run.
        name: of the run, for people.
        force_unlock: ignore the lock of another run.
        reseal: take checkpoints that lost their seal, if they can be read.

    Returns:
        Metrics of the final evaluation.

    Raises:
        VitsslError: see `errors`; each has its exit code.
    """
    workdir = pathlib.Path(os.path.abspath(workdir))
    s = experiment.settings
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk.faults(workdir))
        held = None
        if devices.is_main():
            held = stack.enter_context(guard.lock(workdir, force_unlock))
            guard.writable(workdir)
        signals = stack.enter_context(guard.Signals())
        watchdog = stack.enter_context(guard.Watchdog(workdir, s.log.stall_seconds))
        stack.enter_context(ending.last_words(workdir, held))
        watchdog.beat("opening the data")
        parts = build.build(experiment)
        evaluation.check(s, parts.method, parts.source)
        agreement.bright(s.data, parts.source)
        feed.check(parts, workdir)
        watchdog.beat("making or restoring the state")
        per_epoch = parts.run.steps_per_epoch
        saves = stack.enter_context(
            checkpoint.Checkpoints(workdir, s.checkpoint, per_epoch, reseal)
        )
        stack.enter_context(memory.refusals(parts))
        state, meta, skipped = beginning.first_state(parts, saves, workdir, name)
        writers = None
        if devices.is_main():
            plain = json.loads(config.to_json(experiment.config))
            at = int(state.step) if meta else None
            writers = log.Writers(workdir, s.log, at, plain, name)
            stack.callback(writers.close)
        stack.callback(parts.compiled.close)
        stack.enter_context(devices.company(workdir))
        logger.info("%s", notes.start(parts, state.params, name, workdir))
        loop = _Loop(parts, workdir, held, saves, signals, watchdog, writers, meta)
        if not parts.run.total_steps and skipped:
            loop.evaluate.leave_out(state, skipped)
        state = loop.go(state)
        return loop.finish(state, name)


class _Loop:
    """The state of the loop that is not the state of the model."""

    def __init__(self, parts, workdir, held, saves, signals, watchdog, writers, meta):
        self.parts, self.workdir, self.saves = parts, workdir, saves
        self.held, self.resumed = held, bool(meta)
        self.faults = list(meta.get("faults", ()))  # That did not end the run.
        self.signals, self.watchdog, self.writers = signals, watchdog, writers
        s = parts.experiment.settings
        self.evaluate = evaluation.Evaluation(
            s.evals, s.data, parts.method, parts.mesh, workdir=workdir, seed=s.seed
        )
        self.logged, self.told = {}, None  # The last line of metrics; for people.
        self.metrics = log.Metrics(parts.experiment.settings.log, meta.get("log", {}))
        self.scores = 0, {}  # The step of the last online evaluation, and its values.
        spec = parts.experiment.settings.checkpoint
        self.best = checkpoint.Best(spec, meta.get("patience", {}))
        self.phases = phases.Phases(meta.get("phases", ()))
        self.clock = None

    def go(self, state):
        """Run the steps that are left; return the last state."""
        parts, total = self.parts, self.parts.run.total_steps
        s = parts.experiment.settings
        sharding = devices.batch_sharding(parts.mesh)
        at = first = int(state.step)
        if at >= total:
            return state
        phase = parts.phase(at)
        state = self._entered(state, parts.phase(max(0, at - 1)), phase)
        self._first_compile(phase, at)
        self._enter(phase, at)
        if not self.resumed:
            # Fail now, not at the end of the first epoch.
            self._evaluate(state, at)
            self._save(state, at)
        self.told = progress.Progress("training", total, at, soon=10)
        with (
            contextlib.closing(feed.Feed(parts, self.workdir)) as stream,
            contextlib.closing(self.told),
        ):
            self._open(stream, state, at)
            self._enter(phase, at)
            self.clock.restart()
            batch, ids, waited = self._next(stream, sharding, state, at)
            while at < total and not self.best.over:
                if parts.phase(at) != phase:
                    before, phase = phase, parts.phase(at)
                    # Another shape of batch alone leaves the state as it is.
                    if phase.frozen != before.frozen:
                        state = self._entered(state, before, phase)
                    waiting = time.perf_counter()
                    if parts.compiled.finished(phase) is None:
                        logger.info("  compiling the steps from %d on", at + 1)
                    parts.compiled.get(phase, batch)
                    self._pause(waiting)
                    self._enter(phase, at)
                executable = parts.compiled.get(phase, batch)
                # A silent copy between host and device here would stall every step.
                with jax.transfer_guard("disallow"):
                    state, metrics = executable(state, batch)
                self.clock.step(waited)
                self.phases.step()
                self.watchdog.beat(f"step {at + 1}")
                with self._finite(state):
                    self.metrics.push(at, metrics, ids)
                at += 1
                event = at < total and stream.over(at)
                if at < total and not event:
                    batch, ids, waited = self._next(stream, sharding, state, at)
                    self._look_ahead(stream, at)
                self._profile(at - first)
                with self._finite(state):
                    # Training waits for the store: a kill must not cost more.
                    seal = event and s.freeze.store.fill == "pass"
                    self._after(state, at, s, seal=seal)
                if event and not self.best.over:
                    self._open(stream, state, at)
                    batch, ids, waited = self._next(stream, sharding, state, at)
                    self._look_ahead(stream, at)
        self.phases.leave()
        return state

    def finish(self, state, name) -> dict:
        """Evaluate the last state or the best, draw, say that the run is finished.

        Raises:
            Preempted: a signal came; the same command evaluates.
        """
        try:
            self.signals.saved()
            return self._finish(state, name)
        except errors.Preempted:
            self._status("preempted", int(state.step))
            raise

    def _finish(self, state, name) -> dict:
        parts, s, at = self.parts, self.parts.experiment.settings, int(state.step)
        self.watchdog.beat("final evaluation")
        if s.evals.final_of == "best":
            state = self._best_state(state)
        untrained = parts.fresh()
        values, text = self.evaluate.final(state, untrained)
        logger.info("%s", text)
        main = devices.is_main()
        if self.evaluate.arrays and main:
            self._fault(ending.scores(self.workdir, self.evaluate.arrays))
        if table := self.phases.table():
            logger.info("%s", table)
        self.write(at, values)
        said = ending.verdict_of(self.workdir, at, values) if main else None
        if self.phases.rows:
            values = values | self.phases.totals()
        if s.log.pictures and main:
            self._fault(ending.pictures(parts, state, untrained, self.workdir))
        if self.best.step is not None:
            logger.info("  best %s; load it as RUN@best", self._best_text())
        if said:
            logger.info("%s", said)
        self._status("finished", at, metrics=values, name=name)
        return values

    def _best_state(self, state):
        """Return the state of the best evaluation, if its checkpoint is kept."""
        self.saves.wait()
        if self.best.step not in self.saves.steps():
            logger.warning(
                "no checkpoint of the best evaluation: the last is evaluated"
            )
            return state
        logger.info("  the final evaluation is of the best, %s", self._best_text())
        target = build.restore_target(self.parts)(self.best.step)
        return checkpoint.read(self.saves.directory, self.best.step, target)[0]

    def _entered(self, state, before, phase):
        """Return the state for a phase, every leaf where its step expects it.

        `before`: the phase of the last step.
        """
        found = self.parts.method.enter(state.params, state.extra, before, phase)
        state = state.replace(params=found[0], extra=found[1])
        state = step.enter(state, phase, self.parts.optimizer)
        return jax.device_put(state, self.parts.compiled.state_sharding(phase))

    def _first_compile(self, phase, at):
        parts, s = self.parts, self.parts.experiment.settings
        self.watchdog.beat("compiling the first step")
        logger.info("  compiling (usually 10 to 60 s)")
        start = time.perf_counter()
        executable = parts.compiled.get(phase, parts.shapes(at))
        count = jax.device_count()
        flops = self._flops(executable)
        self.clock = log.Clock(
            parts.run.total_steps,
            s.batch_size,
            count,
            flops,
            devices.peak_flops(s.precision) * count,
        )
        logger.info(
            "  compiled  in %.1f s; %.3g GFLOP per image (XLA's count)",
            time.perf_counter() - start,
            flops / s.batch_size / 1e9,
        )

    def _enter(self, phase, at):
        """Begin the row of a phase; its step is compiled."""
        executable = self.parts.compiled.get(phase, self.parts.shapes(at))
        self.phases.enter(at, len(phase.frozen), self._flops(executable))
        self.clock.images_per_step = self.parts.place(at).size

    def _flops(self, executable) -> float:
        """Return XLA's count of a step, over all devices."""
        count = jax.device_count()
        flops = (executable.cost_analysis() or {}).get("flops", 0.0) * count
        # XLA counts the body of a loop once.
        return flops * self.parts.experiment.settings.accumulate

    @contextlib.contextmanager
    def _finite(self, state):
        """Seal the last finite state, wherever non-finite steps end the run.

        Such steps change nothing but the count of steps, so it is the present one.
        """
        try:
            yield
        except errors.NonFiniteError:
            with contextlib.suppress(errors.NonFiniteError):
                self.metrics.drain()
            self.metrics.in_a_row = 0  # A run that goes on has its own chances.
            self._save(state, int(state.step), seal=True)
            raise

    def _look_ahead(self, stream, at):
        """Start compiling a phase that will be needed soon, and opening its batches."""
        parts = self.parts
        soon = at + max(20, min(parts.run.steps_per_epoch, 500))
        if soon >= parts.run.total_steps:
            soon = parts.run.total_steps - 1
        phase = parts.phase(soon)
        if phase not in parts.compiled:
            parts.compiled.prepare(phase, parts.shapes(soon))
        stream.prepare(at, soon)

    def _open(self, stream, state, at):
        """Open the batches from step `at` on; filling a store is a row of its own."""
        start, frozen = time.perf_counter(), len(self.parts.phase(at).frozen)

        def beat(cost):
            self.watchdog.beat(f"filling the store after step {at}")
            if cost.batches == 1:
                self.phases.enter(at, frozen, cost.flops)
            self.phases.step()
            if stop := self.signals.stop(at):
                self._status("preempted", at)
                raise errors.Preempted(f"{stop}: saved after step {at}; run it again")

        stream.open(at, state.params, beat)
        self.clock.pause(time.perf_counter() - start)

    def _next(self, stream, sharding, state, at):
        """Return (batch on the devices, sample ids, seconds waited for the data)."""
        start = time.perf_counter()
        batch = stream.take(state.params)
        waited = time.perf_counter() - start
        if stream.made:
            self.phases.beside(at, len(self.parts.phase(at).frozen), stream.made)
        return devices.put(batch, sharding), batch.get("index"), waited

    def _after(self, state, at, s, seal=False):
        """Log, evaluate, save, stop: whatever is due after `at` updates.

        `seal`: a save is, and nothing goes on until it is on disk.
        """
        total = self.parts.run.total_steps
        self._look_after_workdir(at)
        self.saves.alone()
        last = at == total
        if at % s.log.every_steps == 0 or last:
            self.metrics.drain()
            self._log(at)
        if devices.is_main():
            self.told.update(at, lambda: self._line(at))
        best = False
        # The end has its own evaluation, but it may be the best of these.
        if self.evaluate.due(at, self.parts.run) and (
            not last or s.checkpoint.keep_best
        ):
            best = self._evaluate(state, at)
            if self.best.over:
                logger.info(
                    "  no better %s for %d evaluations: the run ends after step %d",
                    s.checkpoint.best,
                    s.checkpoint.patience,
                    at,
                )
                last = True
        stop = self.signals.stop(at)
        best = best and s.checkpoint.keep_best
        if self.saves.due(at) or last or stop or best or seal:
            # What ends the process says "saved", and that is a promise.
            self._save(state, at, seal=bool(last or stop or seal))
        if stop and not last:
            if devices.is_main():
                self._status("preempted", at)
            raise errors.Preempted(f"{stop}: saved after step {at}; run it again")

    def _look_after_workdir(self, at):
        """Go on in a new workdir where somebody has removed it during the run.

        Raises:
            UsageError: another run has it by now.
            CheckpointError: several processes would have to begin anew together.
        """
        if self.held is None or not self.held.lost:
            return
        if jax.process_count() > 1:
            raise errors.CheckpointError(f"{self.workdir}: removed during the run")
        self.held.take()
        if (self.workdir / "config.json").exists():
            return  # The lock alone was removed.
        self._fault(f"the workdir was removed before step {at}; it was made anew")
        record.write(self.workdir, self.parts.experiment.config)
        self.saves.reopen()

    def _fault(self, text):
        """Note what went wrong, but is no reason to end the run, for status.json."""
        if text:
            logger.warning("%s", text)
            self.faults.append(text)

    def _status(self, state, at, **values):
        """Write status.json, with the best evaluation so far, and faults."""
        total, best = self.parts.run.total_steps, self.best
        values["steps_per_epoch"] = self.parts.run.steps_per_epoch
        if best.step is not None:
            metric = self.parts.experiment.settings.checkpoint.best
            values["best"] = {"metric": metric, "value": best.value, "step": best.step}
        if self.faults:
            values["faults"] = self.faults
        log.write_status(
            self.workdir, state=state, step=at, total_steps=total, **values
        )

    def _log(self, at):
        times = self.clock.read(at)
        values = {**self.metrics.means(), **times}
        values["freeze/leaves"] = len(self.parts.phase(at - 1).frozen)
        values["compile/seconds"] = self.parts.compiled.seconds
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            values["memory/peak_bytes"] = stats["peak_bytes_in_use"]
        self.write(at, values)
        if self.writers is not None:
            self.writers.histograms(at, self.metrics.histograms)
        self.logged = values
        if devices.is_main():
            eta = times["time/eta_seconds"]
            self._status("training", at, eta_seconds=eta, metrics=values)

    def _line(self, at) -> str:
        """Return the line of progress, of what was measured since the last metrics."""
        means = self.metrics.so_far() if self.metrics.count else {}
        values = self.logged | means | self.clock.figures(at)
        return log.progress(at, self.parts.run.total_steps, values)

    def _evaluate(self, state, at) -> bool:
        """Evaluate online; return whether this is the best by `checkpoint.best`."""
        self.watchdog.beat(f"evaluation after step {at}")
        self.metrics.drain()
        start = time.perf_counter()
        try:
            values = self.evaluate.online(state)
        except errors.VitsslError:
            raise
        except Exception as e:  # A bug in an evaluator must not cost the training.
            logger.exception("the evaluation after step %d failed", at)
            self._fault(
                f"the evaluation after step {at} failed: {ending.first_line(e)}"
            )
            values = {}
        scores = {k: v for k, v in values.items() if isinstance(v, float)}
        self.scores = at, scores
        best = self.best.look(at, scores)
        if values:
            self.write(at, values)
            star = f"  best {self._best_text()}" if best and at else ""
            logger.info("%s%s", self.evaluate.line(at, values), star)
        self._pause(start)
        return best

    def _best_text(self) -> str:
        spec, best = self.parts.experiment.settings.checkpoint, self.best
        return f"{spec.best} {best.value:.4g} after step {best.step}"

    def _save(self, state, at, seal=False):
        """Save the state in the background, or until it is sealed on disk."""
        self.watchdog.beat(f"checkpoint after step {at}")
        self.metrics.drain()
        start = time.perf_counter()
        source, settings = self.parts.source, self.parts.experiment.settings
        meta = {
            "log": self.metrics.state(),
            "patience": self.best.state(),
            "phases": self.phases.state(),
            "classes": list(source.classes),
            "faults": list(self.faults),
            "order": orders.name(len(source), settings.data.sampling),
            "versions": notes.versions(),
        }
        of, scores = self.scores
        save = self.saves.seal if seal else self.saves.save
        save(at, state, meta, scores if of == at else {})
        self._pause(start)

    def _pause(self, start):
        if self.clock is not None:
            self.clock.pause(time.perf_counter() - start)
            self.phases.pause(time.perf_counter() - start)

    def _profile(self, done):
        first, last = self.parts.experiment.settings.log.profile_steps
        if last and done == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        elif last and done == last:
            jax.profiler.stop_trace()

    def write(self, at, values):
        """Write one line of metrics, on the process that logs."""
        if self.writers is not None and values:
            self.writers.scalars(at, values)
