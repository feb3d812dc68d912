"""Time a whole training step (forward, backward, optimizer) on synthetic batches.

    python -m vitssl.bench step --config=configs/hjepa.py [--config.KEY=VALUE ...]
    python -m vitssl.bench step --vit=b16 --image=224 --batch=256 --dtype=bfloat16

Prints one JSON line: median, first and last decile of the step time in ms, images per
second and device, compile seconds, XLA's and the formula's FLOPs, MFU where the
device's peak is known, bytes of memory, versions. Needs neither grain nor a data set.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import config, devices, errors, methods, optim, report, step
from vitssl.bench import flops, plain


def run(argv: list[str]) -> dict:
    """Parse the options, measure, return the figures."""
    own, overrides = [], []
    for word in argv:
        if word.startswith("--config."):
            overrides.append(word.removeprefix("--config."))
        else:
            own.append(word)
    parser = argparse.ArgumentParser("vitssl.bench step", description=__doc__)
    parser.add_argument("--config", default="")
    parser.add_argument("--vit", default="", help="ti16, s16, b16, l16")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--batch", type=int, default=0, help="0: the config's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--phase_step", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(own)
    if bool(o.config) == bool(o.vit):
        raise errors.UsageError("bench step: give --config=FILE or --vit=NAME")
    case = _of_config(o, overrides) if o.config else _of_vit(o)
    return measure(**case, o=o)


def _of_vit(o) -> dict:
    """Return what to measure for a plain ViT."""
    batch = o.batch or 8
    run = methods.Run(100, 10, batch, 1000, 3, (0.5,) * 3, (0.5,) * 3, o.dtype)
    net = plain.named(o.vit, o.image, dtype=o.dtype, remat=o.remat)
    method, shapes = plain.Plain(run, net), plain.shapes(batch, o.image)
    tokens = (o.image // net.patch) ** 2
    forward = flops.vit(
        tokens + net.prefix,
        tokens,
        width=net.width,
        depth=net.depth,
        patch=net.patch,
        channels=3,
    )
    return {
        "name": f"vit {o.vit} {o.image}",
        "method": method,
        "optimizer": _adamw(method, shapes),
        "batch": random_batch(shapes, o.seed),
        "accumulate": 1,
        "analytic": 3 * forward,
    }


def _adamw(method, shapes):
    spec = optim.Optim(
        name="adamw",
        lr=1e-4,
        schedule="cosine",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=0.05,
        clip_norm=0.0,
    )
    params, _ = jax.eval_shape(method.init, jax.random.key(0), shapes)
    return optim.make(spec, params, total_steps=100, steps_per_epoch=10, batch_size=1)


def _of_config(o, overrides) -> dict:
    """Return what to measure for a config; its data are replaced by random ones."""
    from vitssl import experiment, train

    c = experiment.load(o.config, overrides)
    if "study" in c:
        raise errors.UsageError(f"bench step: {o.config} is a study; name one recipe")
    c.data.source, c.data.root = "fake", ""
    size = c.multicrop.global_crop_size if "multicrop" in c else c.evals.image_size
    c.data.options = {
        "count": max(c.batch_size, o.batch),
        "height": size,
        "width": size,
        "channels": c.data.channels,
    }
    c.data.split = "train"
    if o.batch:
        c.batch_size = o.batch
    parts = train.build(experiment.read(c))
    batch = parts.stream(o.phase_step).load(o.phase_step)
    return {
        "name": config.name_of(o.config),
        "method": parts.method,
        "optimizer": parts.optimizer,
        "batch": batch,
        "accumulate": parts.experiment.settings.accumulate,
        "analytic": 0.0,
    }


def random_batch(shapes, seed: int) -> dict:
    """Return random uint8 images and labels of these shapes."""
    rng = np.random.default_rng(seed)
    return {
        k: rng.integers(0, 255 if s.dtype == np.uint8 else 10, s.shape).astype(s.dtype)
        for k, s in shapes.items()
    }


def measure(*, name, method, optimizer, batch, accumulate, analytic, o) -> dict:
    """Compile and time the step; return the figures."""
    mesh_spec = devices.Mesh()
    rows = len(next(iter(batch.values())))
    mesh = devices.mesh(mesh_spec, rows, accumulate)
    phase = step.phase_at(method, optimizer, o.phase_step)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def abstract(phase):
        return step.abstract(method, optimizer, key, shapes, phase)

    function = step.make(method, optimizer, accumulate, mesh)
    compiled = step.Compiled(function, abstract, mesh, mesh_spec)
    start = time.perf_counter()
    executable = compiled.compile(phase, shapes)
    compile_seconds = time.perf_counter() - start

    def fresh(rng):
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return step.init(method, optimizer, rng, zeros, phase)

    sharding = compiled.state_sharding(phase)
    state = jax.jit(fresh, out_shardings=sharding)(jax.random.key(o.seed))
    batch = devices.put(batch, devices.batch_sharding(mesh))
    times = _time(executable, state, batch, o.warmup, o.steps)
    count = jax.device_count()
    median = float(np.median(times))
    xla = (executable.cost_analysis() or {}).get("flops", 0.0) * count * accumulate
    peak = devices.peak_flops(method.run.dtype) * count
    memory = executable.memory_analysis()
    found = jax.local_devices()[0].memory_stats() or {}
    return {
        "bench": "step",
        "name": name,
        "batch": rows,
        "dtype": method.run.dtype,
        "device": jax.devices()[0].device_kind,
        "devices": count,
        "ms_per_step": 1e3 * median,
        "ms_p10_p90": [1e3 * float(q) for q in np.quantile(times, (0.1, 0.9))],
        "images_per_second_per_device": rows / median / count,
        "compile_seconds": compile_seconds,
        "xla_gflop_per_image": xla / rows / 1e9,
        "analytic_gflop_per_image": analytic / 1e9,
        "tflops": (analytic * rows or xla) / median / 1e12,
        "mfu_percent": 100 * (analytic * rows or xla) / median / peak if peak else None,
        "peak_bytes": found.get("peak_bytes_in_use")
        or getattr(memory, "peak_memory_in_bytes", None),
        "versions": report.versions(),
    }


def _time(executable, state, batch, warmup: int, steps: int) -> list[float]:
    """Return seconds of each step, the device drained after every one."""
    for _ in range(warmup):
        state, metrics = executable(state, batch)
    jax.block_until_ready(metrics)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = executable(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return times
