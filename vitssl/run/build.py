"""From a checked config to the objects of a run; nothing is computed here yet."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors, tree
from vitssl.data import orders, pipeline
from vitssl.data.sources import layout
from vitssl.methods import base, growing
from vitssl.optim import optimizer as optim
from vitssl.run import devices, experiment, prefix, step


@dataclasses.dataclass
class Parts:
    """The objects of a run, built once, before the first step.

    Attributes:
        experiment: the checked config.
        source: training images.
        method, optimizer: see their modules.
        init: the method's, which is traced once.
        run: length and sizes.
        mesh: devices.
        compiled: the step, one executable per phase.
        abstract: shapes of the state at a step.
    """

    experiment: experiment.Experiment
    source: layout.Source
    method: base.Method
    init: Callable
    optimizer: optim.Optimizer
    run: base.Run
    mesh: jax.sharding.Mesh
    compiled: step.Compiled

    def phase(self, at: int) -> step.Phase:
        """Return the phase of step `at`."""
        return step.phase_at(self.method, self.optimizer, at)

    def stream(self, start: int):
        """Return the batches of this process from step `start` on.

        Until an event of `freeze.store`, behind which views come again.
        """
        settings, remembered = self.experiment.settings, None
        if self.phase(start).boundary:
            own = self.optimizer.store.views, self.run.total_steps
            remembered = pipeline.Remembered(*own)
        own = remembered, self.optimizer.grown
        return _stream(self.source, self.method, settings, start, *own)

    def place(self, at: int) -> orders.Place:
        """Return where step `at` is in the data."""
        sizes = ((0, self.experiment.settings.batch_size), *self.optimizer.grown)
        return orders.place(len(self.source), sizes, at)

    def shapes(self, at: int):
        """Return the shapes of the global batch of step `at`, reading one image."""
        found = _shapes(self.stream(at), at)
        if self.phase(at).boundary:
            found["tokens"] = prefix.tokens(self, found, at)
        return found

    def rng(self):
        """Return the key of the whole run."""
        return jax.random.key(self.experiment.settings.seed)

    def fresh(self):
        """Return a new state, made on the devices by one compiled function.

        What the method reads from files (`Method.given`) takes its place in it.
        """
        state, given = self._make(self.rng()), self.method.given()
        if not given:
            return state
        places = self.compiled.state_sharding(self.phase(0)).extra
        placed = jax.device_put(given, {key: places[key] for key in given})
        return state.replace(extra=state.extra | placed)

    @functools.cached_property
    def _make(self):
        """The function that makes a state of a key, compiled once per run."""
        first = self.phase(0)
        shapes = self.shapes(0)

        def make(rng):
            # Only the shapes of a batch matter; XLA drops the zeros.
            batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return step.init(self.init, self.optimizer, rng, batch, first)

        return jax.jit(make, out_shardings=self.compiled.state_sharding(first))


def _stream(source, method, settings, start: int, remembered=None, grown=()):
    """Return this process's batches from step `start` on."""
    return pipeline.train(
        source,
        method.transform(),
        batch_size=settings.batch_size,
        seed=settings.seed,
        start_step=start,
        threads=settings.data.threads,
        workers=settings.data.workers,
        process=(jax.process_index(), jax.process_count()),
        on_bad_image=settings.data.on_bad_image,
        bad_share=settings.data.bad_share,
        sampling=settings.data.sampling,
        remembered=remembered,
        grown=grown,
    )


def _shapes(stream, at: int):
    """Return the shapes of the global batch of step `at`, reading one image."""
    spec = stream.spec(at)
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in spec.items()}


def build(experiment) -> Parts:
    """Open the data and build everything a run needs; nothing is computed yet.

    Raises:
        UsageError, DataError: what cannot work, before any time is spent.
    """
    experiment = experiment.on(jax.device_count())
    s = experiment.settings
    mesh = devices.mesh(s.mesh, s.batch_size, s.accumulate)
    source = s.data.open(s.data.split, s.seed)
    per_epoch = pipeline.steps_per_epoch(source, s.batch_size)
    total = s.steps or round(s.epochs * per_epoch)
    if s.epochs or s.steps:
        total = max(1, total)
    if total >= 2**31:  # Steps are counted in int32.
        raise errors.UsageError(f"epochs={s.epochs:g}: {total:.3g} steps, want < 2^31")
    classes, counts = len(source.classes), layout.counts(source)
    counts = () if counts is None or not classes else tuple(counts.tolist())
    _check_labels(experiment, source, counts)
    run = experiment.run(
        total_steps=total, steps_per_epoch=per_epoch, classes=classes, counts=counts
    )
    method = experiment.method(run)
    _check_several(method, source)
    _check_pictures(method, source, s)
    shapes = _shapes(_stream(source, method, s, 0), 0)
    init = jax.jit(method.init)
    params, _ = jax.eval_shape(init, jax.random.key(0), shapes)
    freeze = s.freeze
    if not freeze.layers:
        freeze = dataclasses.replace(freeze, layers=method.freeze_layers())
    waits = growing.blocks(tree.flat(params), freeze.grow_depth)
    optimizer = optim.make(
        s.optim,
        params,
        total_steps=total,
        steps_per_epoch=per_epoch,
        batch_size=s.batch_size,
        freeze=freeze,
        waits=waits,
    )

    for _, size in optimizer.grown:
        _check_grown(size, len(source), jax.device_count() * s.accumulate)

    def abstract(phase):
        key = jax.eval_shape(lambda: jax.random.key(0))
        return step.abstract(init, optimizer, key, shapes, phase)

    every = s.log.every_steps if s.log.histograms else 0
    function = step.make(method, optimizer, s.accumulate, mesh, every, s.mesh.gradients)
    compiled = step.Compiled(function, abstract, mesh, s.mesh)
    return Parts(experiment, source, method, init, optimizer, run, mesh, compiled)


def _check_grown(size, images, unit) -> None:
    """Refuse a batch of `freeze.grow_batch` that cannot be.

    Raises:
        UsageError: more images than there are, or no multiple of what splits over the
            devices and micro-batches.
    """
    key = f"freeze.grow_batch: {size}"
    if size > images:
        raise errors.UsageError(f"{key} is more than the {images} training images")
    if size % unit:
        near = [n for n in (size // unit * unit, -(-size // unit) * unit) if n]
        raise errors.UsageError(
            f"{key} does not split over {unit} devices x micro-batches; nearest that "
            f"do: {', '.join(map(str, near))}"
        )


def anyhow(checked) -> tuple[Parts, str]:
    """Return `build` and ""; for data that are not here, with noise, and what is said.

    Raises:
        UsageError, DataError: it does not work with noise either.
    """
    try:
        return build(checked), ""
    except errors.DataError as e:
        said = f"data: {e}\n  noise takes its place here"
        return build(experiment.with_noise(checked)), said


def _check_labels(experiment, source, counts) -> None:
    """Refuse data that cannot teach a classifier.

    Raises:
        DataError: fewer than two classes; no images, or of one class only, with labels;
            images without.
    """
    if not experiment.kind.labelled:
        return
    classes = len(source.classes)
    seen = np.count_nonzero(counts) if counts else classes
    s = experiment.settings
    if seen < 2:
        raise errors.DataError(
            f"data.split={s.data.split!r}: {source.name} has images of {seen} of "
            f"{classes} classes with labels; method={s.method} needs 2 or more"
        )
    several = getattr(source, "several", None) is not None
    bare = len(source) - sum(counts) if counts and not several else 0
    if bare:
        raise errors.DataError(
            f"data.split={s.data.split!r}: {bare} of {len(source)} images of "
            f"{source.name} have no label (-1); method={s.method} learns from labels"
        )


def _check_pictures(method, source, settings) -> None:
    """Refuse samples of sensors for a method of pictures.

    Raises:
        UsageError: which two keys do not fit.
    """
    with contextlib.suppress(errors.DataError):  # It is named where it is read.
        if not method.reads and "image" not in source[0]:
            raise errors.UsageError(
                f"data.source={settings.data.source}: samples of sensors, without an "
                f"image; method={settings.method} wants images, method=latent_mim "
                "reads such samples (configs/latent_mim.py)"
            )


def _check_several(method, source) -> None:
    """Refuse a classifier of one label for images of several, and the reverse.

    Raises:
        UsageError: which key decides.
    """
    several = getattr(source, "several", None) is not None
    if not method.labelled or method.several == several:
        return
    have = "several labels, or none" if several else "one label"
    raise errors.UsageError(
        f"images of {source.name} have {have} each; this method learns "
        f"{'several' if method.several else 'one'}: "
        + (
            "objective.loss=binary of method=classify learns several "
            "(finetune_vit:folder_multilabel)"
            if several
            else "set objective.loss=cross_entropy"
        )
    )


def restore_target(parts: Parts):
    """Return step -> abstract state with shardings, in the phase of that step."""

    def target(at):
        # The state after `at` updates is that of the phase of the last one made.
        phase = parts.phase(max(0, at - 1))
        abstract = parts.compiled.abstract(phase)
        sharding = parts.compiled.state_sharding(phase)
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            sharding,
        )

    return target
