"""The start-up print: versions, devices, data, sizes, parameters."""

import importlib.metadata
import platform
import subprocess

import jax

from vitssl import sizes, tree
from vitssl.optim import optimizer as optim
from vitssl.run import devices, histograms

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict:
    """Return the versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, "vitssl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _commit()
    return found


def _commit() -> str:
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            cwd=__file__.rpartition("/")[0],
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return text.strip()


def start(built, params, name, workdir) -> str:
    """Return the start-up text of a run, of its `build.Parts`."""
    s, run, optimizer = built.experiment.settings, built.run, built.optimizer
    v = versions()
    epochs = run.total_steps / run.steps_per_epoch
    per_device = s.batch_size // jax.device_count() // s.accumulate
    rate = f"lr {optimizer.peak:.3g}"
    if s.optim.lr_batch:
        power = s.optim.lr_batch_power
        power = "" if power == 1.0 else f" to the power {power:g}"
        rate += f" (= {s.optim.lr:g} x {s.batch_size} / {s.optim.lr_batch}{power})"
    parts = f" in {s.accumulate} parts" if s.accumulate > 1 else ""
    lines = [
        f"vitssl {v['vitssl']} ({v['commit']})  run {name}  method {s.method}",
        "  " + "  ".join(f"{k} {v[k]}" for k in ("python", "jax", "flax", "optax")),
        f"  devices   {devices.describe(built.mesh)}, {s.precision}",
        f"  workdir   {workdir}",
        f"  data      {built.source.name}: {len(built.source)} images, "
        f"{len(built.source.classes)} classes, {built.source.root or 'embedded'}",
        f"  batch     {s.batch_size} images{parts}, {per_device} per device at a time",
        f"  length    {run.total_steps} steps = {epochs:.4g} epochs of "
        f"{run.steps_per_epoch} steps",
        f"  {s.optim.name:<9} {rate}, warm-up {optimizer.warmup_steps} steps, "
        f"{s.optim.schedule} to {s.optim.min_lr:g}, "
        f"decay {float(optimizer.wd(0)):.4g}, "
        f"clip {s.optim.clip_norm or 'off'}",
    ]
    trained, shown = built.experiment.training_size, s.evals.image_size
    if trained != shown:
        lines.append(
            f"  sizes     trained at {sizes.written(trained)}, evaluated at "
            f"{sizes.written(shown)} (evals.image_size)"
        )
    return "\n".join([*lines, *parameter_table(params, optimizer)])


def parameter_table(params, optimizer: optim.Optimizer) -> list[str]:
    """Return lines: parameters per module, what trains, decays and freezes."""
    rows, at_first = {}, optimizer.frozen(0)
    for name, leaf in tree.flat(params).items():
        head = histograms.module(name)
        row = rows.setdefault(head, [0, 0, 0, set(), set()])
        first_frozen = optimizer.frozen_from.get(name)
        row[0] += leaf.size
        row[1] += leaf.size if name not in at_first else 0
        row[2] += leaf.size if optimizer.wd_factor[name] else 0
        if first_frozen is not None:
            row[3].add(first_frozen)
        if name in optimizer.frozen_until:
            row[4].add(optimizer.frozen_until[name])
    total = tree.size(params)
    trained = sum(r[1] for r in rows.values())
    lines = [f"  parameters {total:,}, {trained:,} trained at the start"]
    width = max(map(len, rows))
    for head, (count, trains, decays, frozen, until) in rows.items():
        note = f"frozen from step {sorted(frozen)}  " if frozen else ""
        note += f"frozen until step {sorted(until)}" if until else ""
        lines.append(
            f"    {head:<{width}} {count:>12,}  trains {_share(trains, count):>4}  "
            f"decays {_share(decays, count):>4}  {note}".rstrip()
        )
    return lines


def _share(part, whole) -> str:
    return f"{100 * part / max(1, whole):.0f}%"
