"""The start-up print: versions, devices, data, sizes, parameters."""

import collections
import dataclasses
import importlib.metadata
import pathlib
import platform
import subprocess

import jax
from clu import parameter_overview

from vitssl import sizes, tree
from vitssl.optim import optimizer as optim
from vitssl.run import devices, histograms

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict:
    """Return the versions of what the numbers depend on; `commit` in a clone alone."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, "vitssl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if commit := _commit(pathlib.Path(__file__).parents[2]):
        found["commit"] = commit
    return found


def _commit(root) -> str:
    # Installed below somebody's own repository, git would name a commit of theirs.
    if not (root / ".git").exists():
        return ""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            cwd=root,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
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
    commit = f" ({v['commit']})" if "commit" in v else ""
    lines = [
        f"vitssl {v['vitssl']}{commit}  run {name}  method {s.method}",
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


@dataclasses.dataclass
class _Row:
    """A module in the table of parameters."""

    module: str
    parameters: str
    trains: str
    decays: str
    note: str


def parameter_table(params, optimizer: optim.Optimizer) -> list[str]:
    """Return lines: parameters per module, what trains, decays and freezes."""
    modules = collections.defaultdict(dict)
    for name, leaf in tree.flat(params).items():
        modules[histograms.module(name)][name] = leaf
    idle = optimizer.frozen(0)
    trained = tree.size({k: x for k, x in tree.flat(params).items() if k not in idle})
    order = sorted(modules, key=tree.natural)
    rows = [_row(name, modules[name], idle, optimizer) for name in order]
    noted = any(row.note for row in rows)
    columns = [f.name for f in dataclasses.fields(_Row) if f.name != "note" or noted]
    table = parameter_overview.make_table(rows, column_names=columns)
    return [
        f"  parameters {tree.size(params):,}, {trained:,} trained at the start",
        *(f"    {line}" for line in table.splitlines()),
    ]


def _row(name, leaves, idle, optimizer) -> _Row:
    """Return what is said of the leaves of a module."""
    count = tree.size(leaves)
    trains = tree.size({k: x for k, x in leaves.items() if k not in idle})
    decays = tree.size({k: x for k, x in leaves.items() if optimizer.wd_factor[k]})
    notes = [
        f"frozen {which} step {sorted({steps[k] for k in leaves if k in steps})}"
        for which, steps in (
            ("from", optimizer.frozen_from),
            ("until", optimizer.frozen_until),
        )
        if steps.keys() & leaves.keys()
    ]
    shares = _share(trains, count), _share(decays, count)
    return _Row(name, f"{count:>12,}", *shares, "  ".join(notes))


def _share(part, whole) -> str:
    return f"{100 * part / max(1, whole):.0f}%"
