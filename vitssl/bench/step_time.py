"""Time a whole training step (forward, backward, optimizer) on synthetic batches.

    python -m vitssl.bench step --config=configs/hjepa.py [--config.KEY=VALUE ...]
    python -m vitssl.bench step --vit=b16 --image=224 --batch=256 --dtype=bfloat16

One JSON line: median and deciles of the step time in ms, images per second and device,
compile seconds, XLA's and the formula's FLOPs, MFU where the device's peak is known,
bytes of memory, versions. Needs neither grain nor a data set. Two steps are compared in
one process, in turns (ABAB), because machines are noisy:

    --versus=KEY=VALUE[;KEY=VALUE]   the same config with these overrides
    --torch=eager | compile          the same ViT in PyTorch (extra `[torch]`)
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import config, errors, sizes
from vitssl.bench import flops, plain
from vitssl.methods import base
from vitssl.optim import optimizer as optim
from vitssl.run import devices, notes, step


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
    parser.add_argument("--versus", default="")
    parser.add_argument("--torch", default="", choices=("", "eager", "compile"))
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(own)
    if bool(o.config) == bool(o.vit):
        raise errors.UsageError("bench step: give --config=FILE or --vit=NAME")
    case = _of_config(o, overrides) if o.config else _of_vit(o)
    if o.versus and not o.config or o.torch and not o.vit:
        raise errors.UsageError("bench step: --versus needs --config, --torch --vit")
    ours, figures = prepare(**case, seed=o.seed)
    if not (o.versus or o.torch):
        times = _times(ours, o.warmup, o.steps)
        return figures | _speed(figures, times)
    if o.versus:
        other = _of_config(o, [*overrides, *o.versus.split(";")])
        theirs, facts = prepare(**other, seed=o.seed)
    else:
        theirs, facts = _rival(o, case), {"batch": figures["batch"], "devices": 1}
    seconds = {"ours": [], "theirs": []}
    for turn in range(o.turns):
        for key, one in (("ours", ours), ("theirs", theirs)):
            seconds[key] += _times(one, 0 if turn else o.warmup, o.steps)
    medians = [
        [float(np.median(part)) for part in np.array_split(seconds[key], o.turns)]
        for key in ("ours", "theirs")
    ]
    ratios = [b / a for a, b in zip(*medians, strict=True)]
    return figures | {
        **_speed(figures, seconds["ours"]),
        "versus": o.versus or f"torch {o.torch}",
        "theirs": facts | _speed(facts, seconds["theirs"]),
        "speed_ratio": float(np.median(ratios)),
        "speed_ratio_each_turn": ratios,
    }


def _rival(o, case):
    from vitssl.bench import rival

    net = case["method"].model
    return rival.step(
        width=net.width,
        depth=net.depth,
        heads=net.heads,
        patch=net.patch,
        image=o.image,
        classes=case["method"].run.classes,
        batch=case["batch"],
        dtype=o.dtype,
        compiled=o.torch == "compile",
    )


def _of_vit(o) -> dict:
    """Return what to measure for a plain ViT."""
    batch = o.batch or 8
    run = base.Run(100, 10, batch, 1000, 3, (0.5,) * 3, (0.5,) * 3, o.dtype)
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
    from vitssl.run import build, experiment

    c = experiment.load(o.config, overrides)
    if "study" in c:
        raise errors.UsageError(f"bench step: {o.config} is a study; name one recipe")
    height, width = sizes.pair(experiment.read(c).training_size)
    c.data.source, c.data.root = "fake", ""
    c.data.options = {
        "count": max(c.batch_size, o.batch),
        "height": height,
        "width": width,
        "channels": c.data.channels,
    }
    c.data.split = "train"
    if o.batch:
        c.batch_size = o.batch
    parts = build.build(experiment.read(c))
    batch = parts.stream(0).load(0)
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


def prepare(*, name, method, optimizer, batch, accumulate, analytic, seed, at=0):
    """Compile step `at` and put its state and batch on the devices.

    Returns:
        a function that does one step and waits for it, and the figures known so far.
    """
    mesh_spec = devices.Mesh()
    rows = len(next(iter(batch.values())))
    mesh = devices.mesh(mesh_spec, rows, accumulate)
    phase = step.phase_at(method, optimizer, at)
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
    state = [jax.jit(fresh, out_shardings=sharding)(jax.random.key(seed))]
    batch = devices.put(batch, devices.batch_sharding(mesh))

    def one():
        state[0], metrics = executable(state[0], batch)
        jax.block_until_ready(metrics)

    count = jax.device_count()
    xla = (executable.cost_analysis() or {}).get("flops", 0.0) * count * accumulate
    memory = executable.memory_analysis()
    return one, {
        "bench": "step",
        "name": name,
        "batch": rows,
        "dtype": method.run.dtype,
        "device": jax.devices()[0].device_kind,
        "devices": count,
        "compile_seconds": compile_seconds,
        "xla_gflop_per_image": xla / rows / 1e9,
        "analytic_gflop_per_image": analytic / 1e9,
        "compiled_peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
        "versions": notes.versions(),
    }


def _speed(figures: dict, times: list[float]) -> dict:
    """Return what follows from the seconds of the steps."""
    median, rows, count = float(np.median(times)), figures["batch"], figures["devices"]
    found = {
        "ms_per_step": 1e3 * median,
        "ms_p10_p90": [1e3 * float(q) for q in np.quantile(times, (0.1, 0.9))],
        "images_per_second_per_device": rows / median / count,
    }
    if "xla_gflop_per_image" in figures:
        flop = figures["analytic_gflop_per_image"] or figures["xla_gflop_per_image"]
        rate = 1e9 * flop * rows / median
        peak = devices.peak_flops(figures["dtype"]) * count
        stats = jax.local_devices()[0].memory_stats() or {}
        found["tflops"] = rate / 1e12
        found["mfu_percent"] = 100 * rate / peak if peak else None
        found["peak_bytes"] = stats.get("peak_bytes_in_use")
    return found


def _times(one, warmup: int, steps: int) -> list[float]:
    """Return the seconds of each step, after some that do not count."""
    for _ in range(warmup):
        one()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        one()
        times.append(time.perf_counter() - start)
    return times
