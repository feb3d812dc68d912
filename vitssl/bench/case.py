"""What a benchmark of a step measures: the trainer's own step on random data."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import config, errors, sizes, tree
from vitssl.methods import base
from vitssl.optim import optimizer as optim
from vitssl.run import build, devices, experiment, notes, step

DTYPES = ("float32", "bfloat16")


class Bare(base.Method):
    """A method that has nothing but a step."""

    training_size = transform = features = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to measure.

    Attributes:
        batch: arrays, or shapes if it is only compiled.
        analytic: FLOPs of an image by formula; 0 if there is none.
        parts: of the run whose step it is, `build.Parts`; None for a step alone.
    """

    name: str
    method: base.Method
    optimizer: optim.Optimizer
    batch: dict
    dtype: str = "float32"
    accumulate: int = 1
    seed: int = 0
    analytic: float = 0.0
    mesh: devices.Mesh = devices.Mesh()
    parts: Any = None

    @property
    def rows(self) -> int:
        """Return the images of a step."""
        return len(next(iter(self.batch.values())))

    @property
    def shapes(self) -> dict:
        """Return the shapes of a batch."""
        return shapes(self.batch)

    @functools.cached_property
    def compiled(self) -> step.Compiled:
        """Return the step of the trainer, compiled as the trainer does."""
        spec = self.mesh
        mesh = devices.mesh(spec, self.rows, self.accumulate)
        key = jax.eval_shape(lambda: jax.random.key(0))

        def abstract(phase):
            return step.abstract(
                self.method.init, self.optimizer, key, self.shapes, phase
            )

        function = step.make(self.method, self.optimizer, self.accumulate, mesh)
        return step.Compiled(function, abstract, mesh, spec)

    def phase(self, at: int = 0) -> step.Phase:
        """Return the phase of step `at`."""
        return step.phase_at(self.method, self.optimizer, at)

    def compile(self, at: int = 0):
        """Return step `at` compiled for its shapes alone, and what is known of it."""
        start = time.perf_counter()
        executable = self.compiled.get(self.phase(at), self.shapes)
        spent, count = time.perf_counter() - start, jax.device_count()
        # XLA counts the body of the loop over micro-batches once.
        flop = (executable.cost_analysis() or {}).get("flops", 0.0) * count
        memory = executable.memory_analysis()
        return executable, {
            "name": self.name,
            "batch": self.rows,
            "dtype": self.dtype,
            "device": jax.devices()[0].device_kind,
            "devices": count,
            "compile_seconds": spent,
            "xla_gflop_per_image": flop * self.accumulate / self.rows / 1e9,
            "analytic_gflop_per_image": self.analytic / 1e9,
            "xla_gbyte": (executable.cost_analysis() or {}).get("bytes accessed", 0.0)
            / 1e9,
            "compiled_peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
            # A CPU's own peak leaves the temporary buffers out.
            "needed_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            "versions": notes.versions(),
        }

    def prepare(self, at: int = 0) -> "Ready":
        """Return step `at`, compiled, with its state and batch on the devices."""
        executable, figures = self.compile(at)
        return Ready(self, at, executable, figures)


class Ready:
    """A compiled step on the same batch: each call does one and waits for it.

    Attributes:
        figures: what is known of it.
        metrics: of the last step.
    """

    def __init__(self, case: Case, at: int, executable, figures: dict):
        def fresh(rng):
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), case.shapes)
            phase = case.phase(at)
            return step.init(case.method.init, case.optimizer, rng, zeros, phase)

        sharding = case.compiled.state_sharding(case.phase(at))
        make = jax.jit(fresh, out_shardings=sharding)
        self._state = make(jax.random.key(case.seed))
        mesh = devices.mesh(case.mesh, case.rows, case.accumulate)
        self._batch = devices.put(case.batch, devices.batch_sharding(mesh))
        self._executable, self.figures, self.metrics = executable, figures, {}

    @property
    def params(self):
        """Return the parameters, until the next step."""
        return self._state.params

    def __call__(self) -> None:
        """Do one step."""
        self._state, self.metrics = self._executable(self._state, self._batch)
        jax.block_until_ready(self.metrics)


def shapes(batch) -> Any:
    """Return a tree of arrays as one of shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def adamw(method, batch) -> optim.Optimizer:
    """Return the trainer's AdamW with its usual settings, for a batch or its shapes."""
    spec = optim.Optim(
        name="adamw",
        lr=1e-4,
        schedule="cosine",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=0.05,
        clip_norm=0.0,
    )
    params, _ = jax.eval_shape(method.init, jax.random.key(0), shapes(batch))
    return optim.make(spec, params, total_steps=100, steps_per_epoch=10, batch_size=1)


def words(parser, argv):
    """Return (flags, overrides): --config.KEY=VALUE is an override, the rest flags."""
    mine = [word for word in argv if not word.startswith("--config.")]
    given = [word for word in argv if word.startswith("--config.")]
    return parser.parse_args(mine), [w.removeprefix("--config.") for w in given]


def of_config(spec: str, overrides=(), batch: int = 0, seed: int = 0) -> Case:
    """Return the step of a config; its data are replaced by random ones.

    Args:
        batch: images of a step; 0 = the config's.
    """
    c = experiment.load(spec, overrides)
    if "study" in c:
        raise errors.UsageError(f"bench: {spec} is a study; name one recipe")
    height, width = sizes.pair(experiment.read(c).training_size)
    c.batch_size = batch or c.batch_size
    c.data.update(source="fake", root="", split="train")
    c.data.options = {
        "count": c.batch_size,
        "height": height,
        "width": width,
        "channels": c.data.channels,
    }
    parts = build.build(experiment.read(c))
    settings = parts.experiment.settings
    return Case(
        config.name_of(spec),
        parts.method,
        parts.optimizer,
        parts.stream(0).load(0),
        settings.precision,
        settings.accumulate,
        seed,
        parts=parts,
    )


def random_images(batch_size: int, image: int, seed: int) -> dict:
    """Return a batch of random uint8 RGB images and labels below ten."""
    rng, shape = np.random.default_rng(seed), (batch_size, image, image, 3)
    images = rng.integers(0, 255, shape).astype(np.uint8)
    return {"image": images, "label": rng.integers(0, 10, batch_size).astype(np.int32)}


def moments(case: Case, at: int) -> int:
    """Return the bytes of optimizer state in step `at`."""
    return tree.count_bytes(case.compiled.abstract(case.phase(at)).opt)
