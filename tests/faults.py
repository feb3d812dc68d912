"""Runs vitssl.main in this process with one fault injected.

    python -m tests.faults FAULT[=NUMBER] -- <arguments of vitssl.main>

The faults are real where they can be: SIGKILL and SIGTERM are signals to this
process. Only what a test cannot have (a full disk, a NaN in uint8 data) is patched.
"""

import contextlib
import errno
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp


def kill_after_step(n):
    """SIGKILL as soon as step n is dispatched."""
    from vitssl.run import log

    push = log.Metrics.push

    def wrapped(self, step, *args):
        push(self, step, *args)
        if step == n:
            os.kill(os.getpid(), signal.SIGKILL)

    log.Metrics.push = wrapped


def kill_in_save(n):
    """SIGKILL while the n-th checkpoint is on disk but not sealed."""
    from vitssl.run import seals

    write, count = seals.write, [0]

    def wrapped(path):
        count[0] += 1
        if count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path)

    seals.write = wrapped


def kill_in_write(n):
    """SIGKILL while orbax still writes the n-th checkpoint."""
    import orbax.checkpoint as ocp

    save, count = ocp.CheckpointManager.save, [0]

    def wrapped(self, *args, **kwargs):
        count[0] += 1
        result = save(self, *args, **kwargs)
        if count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    ocp.CheckpointManager.save = wrapped


def kill_in_fill(n):
    """SIGKILL while the n-th batch of a `freeze.store` is half written."""
    from vitssl.data import tokenstore

    write, count = tokenstore.Store.write, [0]

    def wrapped(self, places, rows):
        count[0] += 1
        if count[0] == n:
            half = len(places) // 2
            write(self, places[:half], rows[:half])

            def tear(self, view, at, row):
                file = self._file(view)
                file.seek(at)
                file.write(row[:-7])
                os.kill(os.getpid(), signal.SIGKILL)

            tokenstore.Store._put = tear
            places, rows = places[half:], rows[half:]
        write(self, places, rows)

    tokenstore.Store.write = wrapped


def kill_in_read(n):
    """SIGKILL when the n-th batch is read from a `freeze.store`."""
    from vitssl.data import tokenstore

    read, count = tokenstore.Store.read, [0]

    def wrapped(self, places):
        count[0] += 1
        if count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, places)

    tokenstore.Store.read = wrapped


def term_after_step(n):
    """SIGTERM after step n, as a scheduler sends it."""
    from vitssl.run import log

    push = log.Metrics.push

    def wrapped(self, step, *args):
        push(self, step, *args)
        if step == n:
            os.kill(os.getpid(), signal.SIGTERM)

    log.Metrics.push = wrapped


def slow_steps(n):
    """Every step takes n milliseconds more."""
    from vitssl.run import log

    push = log.Metrics.push

    def wrapped(self, *args):
        time.sleep(n / 1000)
        push(self, *args)

    log.Metrics.push = wrapped


def term_while_compiling(_):
    """SIGTERM while the first step compiles."""
    from vitssl.run import step

    program = step.Compiled.program

    def wrapped(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return program(self, *args)

    step.Compiled.program = wrapped


def term_in_final(_):
    """SIGTERM when the final evaluation begins, which then takes a minute."""
    from vitssl.run import evaluation

    def final(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    evaluation.Evaluation.final = final


def full_disk_at_save(n):
    """The n-th save fails with ENOSPC; 0: every save does."""
    import orbax.checkpoint as ocp

    save, count = ocp.CheckpointManager.save, [0]

    def wrapped(self, *args, **kwargs):
        count[0] += 1
        if n in (0, count[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, *args, **kwargs)

    ocp.CheckpointManager.save = wrapped


def full_disk_in_thread(n):
    """The n-th save fails with ENOSPC in the thread of orbax that finishes it."""
    import orbax.checkpoint as ocp

    finalize, count = ocp.CompositeCheckpointHandler.finalize, [0]

    def wrapped(self, *args, **kwargs):
        count[0] += 1
        if count[0] == n:
            raise OSError(errno.ENOSPC, "No space left on device")
        return finalize(self, *args, **kwargs)

    ocp.CompositeCheckpointHandler.finalize = wrapped


def small_files_after_step(n):
    """After step n the system refuses this process files of more than 4 kB."""
    import resource

    from vitssl.run import log

    push = log.Metrics.push
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def wrapped(self, step, *args):
        push(self, step, *args)
        if step == n:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    log.Metrics.push = wrapped


def nan_at_step(n):
    """The loss of step n is NaN."""
    _nan(lambda step: step == n)


def nan_from_step(n):
    """The loss of step n and of all later ones is NaN."""
    _nan(lambda step: step >= n)


def _nan(when):
    from vitssl.run import step

    make = step.make

    class Poisoned:
        """A method whose loss is NaN at some steps."""

        def __init__(self, method):
            self.method = method

        def __getattr__(self, key):
            return getattr(self.method, key)

        def loss(self, *args, **kwargs):
            value, rest = self.method.loss(*args, **kwargs)
            return jnp.where(when(self.step), jnp.nan, value), rest

    def wrapped(method, *args, **kwargs):
        method = Poisoned(method)
        inner = make(method, *args, **kwargs)

        def step_(state, batch, phase):
            method.step = state.step
            return inner(state, batch, phase)

        return step_

    step.make = wrapped


def slow_data(n):
    """The batch of the n-th step never comes."""
    from vitssl.data import loader

    take, count = loader.Loader.__next__, [0]

    def wrapped(self):
        count[0] += 1
        if count[0] == n:
            time.sleep(3600)
        return take(self)

    loader.Loader.__next__ = wrapped


def stuck_step(n):
    """The n-th step never ends on the device."""
    from vitssl.run import step

    make = step.make

    def wrapped(*args, **kwargs):
        inner = make(*args, **kwargs)

        def step_(state, batch, phase):
            state, metrics = inner(state, batch, phase)
            turns = jnp.where(state.step == n, jnp.uint32(2), jnp.uint32(0))
            turns = jax.lax.while_loop(lambda i: i > 1, lambda i: i + 2 - 2, turns)
            return state, metrics | {"turns": turns.astype(jnp.float32)}

        return step_

    step.make = wrapped


def out_of_memory(_):
    """The device refuses the step."""
    from vitssl.run import step

    def refuse(self, *args):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes."
        )

    step.Compiled.program = refuse


def broken_evaluation(_):
    """Every online evaluation raises."""
    from vitssl.run import evaluation

    def broken(self, state):
        raise RuntimeError("an evaluator has a bug")

    evaluation.Evaluation.online = broken


def slow_lazy_imports(n):
    """What makes imports lazy, those of all threads, does so for n more seconds."""
    from etils import epy

    lazy = epy.lazy_imports

    @contextlib.contextmanager
    def wrapped(**kwargs):
        with lazy(**kwargs):
            yield
            time.sleep(n)

    epy.lazy_imports = wrapped


def none(_):
    """Nothing at all."""


if __name__ == "__main__":
    cut = sys.argv.index("--")
    for word in sys.argv[1:cut]:
        name, _, number = word.partition("=")
        globals()[name](int(number or 0))
    from vitssl import main

    sys.exit(main.main(sys.argv[cut + 1 :]))
