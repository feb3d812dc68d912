"""The one training step of every method, and its compiled variants (phases).

The gradient is taken with respect to the trainable leaves alone; frozen leaves enter
the loss as constants, so JAX never traces a backward pass through a frozen prefix.
Which leaves are frozen is static: each distinct set is a phase, and each phase one
compiled step, built in the background before it is needed.
"""

import functools
import threading
import time
from collections.abc import Hashable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from vitssl import errors, tree
from vitssl.ops import across
from vitssl.optim import optimizer as optim
from vitssl.run import devices, gradcache, histograms


class State(flax.struct.PyTreeNode):
    """Everything a run needs to go on.

    Attributes:
        step: int32 [], updates done so far.
        params: nested parameters, trained and frozen.
        extra: what a method keeps beside them (EMA target, batch statistics).
        opt: optimizer state of the trainable leaves.
        rng: the run's key; step i uses fold_in(rng, i).
    """

    step: jax.Array
    params: Any
    extra: Any
    opt: Any
    rng: jax.Array


class Metrics(flax.struct.PyTreeNode):
    """Metrics of a step: `[name]`, `dict(metrics)`.

    The scalars are one array: copying sixteen to the host takes as long as some steps.

    Attributes:
        scalars: float32 [K].
        arrays: those that are none, by name.
        names: of the scalars.
    """

    scalars: jax.Array
    arrays: dict[str, jax.Array]
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, metrics: dict) -> "Metrics":
        """Pack what a step of `make` returns."""
        names = tuple(k for k, v in metrics.items() if not jnp.ndim(v))
        arrays = {k: v for k, v in metrics.items() if k not in names}
        return cls(jnp.stack([metrics[k] for k in names]), arrays, names)

    def keys(self):
        """Return all names."""
        return (*self.names, *self.arrays)

    def __getitem__(self, name):
        if name in self.arrays:
            return self.arrays[name]
        return self.scalars[self.names.index(name)]


class Phase(NamedTuple):
    """The static part of a step: hashable, one compilation each.

    Attributes:
        frozen: names of the leaves that do not train.
        method: what `Method.phase` says.
        boundary: blocks that `freeze.store` stands for; 0 without.
    """

    frozen: frozenset[str]
    method: Hashable
    boundary: int = 0


def phase_at(method, optimizer: optim.Optimizer, step: int) -> Phase:
    """Return the phase of step `step`."""
    phase = Phase(optimizer.frozen(step), method.phase(step))
    if not optimizer.store.views:
        return phase
    known, every = optimizer.boundaries, optimizer.store.every
    if phase not in known:
        live = optimizer.lr_factor.keys() - phase.frozen
        known[phase] = method.boundary(live, phase) // every * every
    return phase._replace(boundary=known[phase])


def init(method_init, optimizer: optim.Optimizer, rng, batch, phase: Phase) -> State:
    """Return a fresh state; call it inside one jit (an EMA target must not alias).

    Args:
        method_init: the method's `init`; jitted, it is traced once for all uses.
    """
    run, weights = jax.random.split(rng)
    params, extra = method_init(weights, batch)
    return _state(0, params, extra, optimizer, run, phase)


def abstract(method_init, optimizer, rng, batch, phase: Phase) -> State:
    """Return the shapes of a state in `phase`, computing nothing."""
    return jax.eval_shape(
        lambda r, b: init(method_init, optimizer, r, b, phase), rng, batch
    )


def _state(step, params, extra, optimizer, rng, phase):
    trainable, _ = tree.split(params, phase.frozen)
    opt = optimizer.init(trainable)
    return State(jnp.int32(step), params, extra, opt, rng)


def enter(state: State, phase: Phase, optimizer: optim.Optimizer) -> State:
    """Return the state for `phase`.

    Moments of leaves that froze are dropped, leaves that are released get fresh ones.
    """
    trainable, _ = tree.split(state.params, phase.frozen)
    opt = optim.drop(state.opt, phase.frozen)
    return state.replace(opt=optimizer.release(opt, trainable))


def make(
    method,
    optimizer: optim.Optimizer,
    accumulate: int = 1,
    mesh=None,
    histograms_every: int = 0,
    gradients: str = "float32",
):
    """Return step(state, batch, phase) -> (state, metrics), pure, not jitted.

    A step whose loss or gradient is not finite changes nothing but the step count and
    reports metrics["nonfinite"] = 1.

    Args:
        method: see `base.Method`.
        optimizer: see `optim.Optimizer`.
        accumulate: the batch is split into this many micro-batches whose gradients
            are averaged; of a loss that mixes samples they are those of the whole
            batch, see `gradcache`.
        mesh: devices of the run; None for one device.
        histograms_every: so many steps have one with histograms; 0 adds nothing.
        gradients: dtype that those of kernels are summed in, see `devices.Mesh`.

    Raises:
        UsageError: accumulation with a method that cannot see its batch in parts.
    """
    if accumulate > 1 and not method.divisible:
        raise errors.UsageError(
            f"accumulate={accumulate}: this loss compares the samples of a batch, so "
            "averaging over parts of it would be another loss; set accumulate=1"
        )

    def step(state: State, batch, phase: Phase):
        rng = jax.random.fold_in(state.rng, state.step)
        trainable, frozen = tree.split(state.params, phase.frozen)

        def loss(trainable, extra, batch, rng):
            params = tree.merge(_rounded(trainable, gradients), frozen)
            return method.loss(params, extra, batch, rng, step=state.step, phase=phase)

        grad = jax.value_and_grad(loss, has_aux=True)
        if accumulate == 1:
            (value, (extra, metrics)), grads = grad(trainable, state.extra, batch, rng)
        elif method.couples_batch:
            parts = _microbatches(batch, accumulate, mesh)
            (value, (extra, metrics)), grads = _together(
                method, state, phase, parts, rng, mesh, gradients
            )
        else:
            parts = _microbatches(batch, accumulate, mesh)
            value, extra, metrics, grads = _accumulate(
                grad, trainable, state.extra, parts, rng
            )
        new, opt, of_update = optimizer.update(grads, state.opt, trainable, state.step)
        finite = jnp.isfinite(value) & jnp.isfinite(of_update["grad_norm"])
        new, opt, extra = jax.tree.map(
            lambda a, b: jax.lax.select(finite, a, b),
            (new, opt, extra),
            (trainable, state.opt, state.extra),
        )
        params = tree.merge(new, frozen)
        after = method.after(params, extra, state.step)
        extra = jax.tree.map(lambda a, b: jax.lax.select(finite, a, b), after, extra)
        metrics = {"loss": value, **metrics, **of_update}
        metrics["nonfinite"] = 1.0 - finite
        if histograms_every:
            due = (state.step + 1) % histograms_every == 0
            metrics |= histograms.metrics(grads, new, due)
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
        return State(state.step + 1, params, extra, opt, state.rng), metrics

    return step


def _rounded(trainable, dtype):
    """Return the leaves with kernels in `dtype`, which their gradients then have."""
    return {
        name: x.astype(dtype) if name.endswith("kernel") else x
        for name, x in trainable.items()
    }


def _microbatches(batch, k, mesh):
    """[B, ...] -> [k, B/k, ...]; row r goes to part r % k, so it keeps its device."""

    def one(x):
        x = x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        spec = jax.sharding.PartitionSpec(None, ("data", "fsdp"))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(one, batch)


def _whole(rows, mesh):
    """[k, B/k, ...] -> [B, ...]: undo `_microbatches`; rows keep their device."""

    def one(x):
        x = x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, devices.batch_sharding(mesh))

    return jax.tree.map(one, rows)


def _together(method, state, phase, parts, rng, mesh, gradients):
    """Return ((loss, (extra, metrics)), gradients) of `base.Embedding`, exactly."""
    trainable, frozen = tree.split(state.params, phase.frozen)
    own = dict(step=state.step, phase=phase)

    def embed(trainable, part, key):
        params = tree.merge(_rounded(trainable, gradients), frozen)
        return method.embed(params, state.extra, part, key, **own)

    def compare(trainable, rows):
        params = tree.merge(_rounded(trainable, gradients), frozen)
        return method.compare(params, state.extra, rows, rng, **own)

    count = jax.tree.leaves(parts)[0].shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
    join = functools.partial(_whole, mesh=mesh)
    return gradcache.value_and_grad(embed, compare, trainable, parts, keys, join)


def _accumulate(grad, trainable, extra, parts, rng):
    """Average loss, metrics and gradients over the leading axis of `parts`."""
    count = jax.tree.leaves(parts)[0].shape[0]
    grad = jax.jit(grad, inline=True)  # Traced once, for the shapes and for the loop.

    def body(carry, xs):
        extra, total = carry
        i, part = xs
        (value, (extra, metrics)), grads = grad(
            trainable, extra, part, jax.random.fold_in(rng, i)
        )
        total = jax.tree.map(
            # A metric may be a Python number.
            lambda t, x: t + jnp.asarray(x, jnp.float32) / count,
            total,
            (value, metrics, grads),
        )
        return (extra, total), None

    first = jax.tree.map(lambda x: x[0], parts)
    (value, (_, metrics)), grads = jax.eval_shape(grad, trainable, extra, first, rng)
    zero = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.float32), (value, metrics, grads)
    )
    (extra, (value, metrics, grads)), _ = jax.lax.scan(
        body, (extra, zero), (jnp.arange(count), parts)
    )
    return value, extra, metrics, grads


class Compiled:
    """The compiled steps of a run, one per phase; the next one is built ahead.

    Args:
        step: from `make`.
        abstract_state: Phase -> shapes of the state in that phase.
        mesh: devices of the run.
        fsdp: the `mesh` section.
    """

    def __init__(self, step, abstract_state, mesh, fsdp: devices.Mesh):
        self._step, self.abstract = step, functools.cache(abstract_state)
        self._mesh, self._fsdp = mesh, fsdp
        self._done, self._pending = {}, {}
        self.seconds = 0.0  # Spent waiting for a compilation.

    def state_sharding(self, phase: Phase):
        """Return the sharding of the state in `phase`."""
        shapes = self.abstract(phase)
        return devices.state_sharding(self._mesh, self._fsdp, shapes)

    def get(self, phase: Phase, batch):
        """Return the executable of `phase`, compiling it now if it is not there.

        Args:
            phase: static part of the step.
            batch: the arrays, or the shapes, of a global batch of that phase.
        """
        start = time.perf_counter()
        if phase in self._pending:
            thread, failure = self._pending.pop(phase)
            thread.join()
            if failure:
                raise failure[0]
        if phase not in self._done:
            program = self.program(phase)
            made = program.lower(self.abstract(phase), _shapes(batch)).compile()
            self._done[phase] = made
            self.seconds += time.perf_counter() - start
        elif time.perf_counter() - start > 0.01:
            self.seconds += time.perf_counter() - start
        return self._done[phase]

    def finished(self, phase: Phase):
        """Return the executable of `phase` if it is compiled, or None."""
        return self._done.get(phase)

    def prepare(self, phase: Phase, batch) -> None:
        """Compile `phase` in a background thread, unless that is done or under way."""
        if phase in self._done or phase in self._pending:
            return
        failure = []

        def work():
            try:
                program = self.program(phase)
                made = program.lower(self.abstract(phase), _shapes(batch)).compile()
                self._done[phase] = made
            except Exception as e:  # noqa: BLE001 - raised by `get` in the loop.
                failure.append(e)

        thread = threading.Thread(target=work, name="compile-ahead", daemon=True)
        self._pending[phase] = (thread, failure)
        thread.start()

    def __contains__(self, phase: Phase) -> bool:
        """Return whether `phase` is compiled or being compiled."""
        return phase in self._done or phase in self._pending

    def close(self) -> None:
        """Wait for compilations under way (a daemon thread would die in XLA)."""
        for thread, _ in self._pending.values():
            thread.join()

    def program(self, phase: Phase):
        """Return the jitted step of `phase`, not traced yet."""
        sharding = self.state_sharding(phase)
        rows = devices.batch_sharding(self._mesh)

        def step(state, batch):
            with across.over(self._mesh):
                state, metrics = self._step(state, batch, phase)
            return state, Metrics.of(metrics)

        return jax.jit(
            step,
            in_shardings=(sharding, rows),
            out_shardings=(sharding, devices.replicated(self._mesh)),
            donate_argnums=0,
            compiler_options=devices.compiler_options(self._fsdp),
        )


def _shapes(batch):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
