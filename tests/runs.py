"""Small real runs in processes of their own, and what to compare of them."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from vitssl import tree
from vitssl.run import opened, warmstart

ROOT = pathlib.Path(__file__).parents[1]

# 12 steps of a tiny H-JEPA on real digits; a checkpoint each 4 steps.
TINY = {
    "steps": 12,
    "batch_size": 16,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "model.drop_path": 0.1,
    "model.image_size": 16,
    "predictor.depth": 1,
    "predictor.heads": 2,
    "masking.num_hierarchies": 1,
    "masking.strategy": "global_only",
    "multicrop.num_local_crops": 0,
    "multicrop.global_crop_size": 16,
    "objective.weights": "(1.0,)",
    "objective.view_weight": 0.0,
    "log.every_steps": 3,
    "log.tensorboard": False,
    "checkpoint.every_epochs": 4 / 89,
    "evals.image_size": 16,
    "evals.every_epochs": 0,
    "evals.final": "()",
}


# The same of LocalMIM: two layers of three freeze after the fifth of eight steps, and
# the last one's MLP trains from the fourth on.
TINY_FREEZING = {
    "steps": 8,
    "batch_size": 16,
    "model.width": 16,
    "model.heads": 2,
    "model.depth": 3,
    "model.image_size": 16,
    "augment.size": 16,
    "stages.blocks": "(0, 2)",
    "stages.scales": "(2.0, 1.0)",
    "decoder.width": 16,
    "decoder.heads": 2,
    "optim.thaw": f"(('encoder/block_2/mlp/.*', {3 / 89}),)",
    "freeze.schedule": "linear",
    "freeze.t_0": 0.5,
    "freeze.layers": "(('(encoder/(patch_embed|block_0)|norm_0|decoder_0)/.*', 0), "
    "('encoder/block_2/.*', 1))",
    "log.every_steps": 2,
    "log.tensorboard": False,
    "checkpoint.every_epochs": 2 / 89,
    "evals.image_size": 16,
    "evals.every_epochs": 0,
    "evals.final": "()",
}


def arguments(workdir, *, name="hjepa", base=TINY, **changes):
    """Return the command line of a tiny run; keys with __ for dots."""
    values = base | {k.replace("__", "."): v for k, v in changes.items()}
    return [
        f"--config={ROOT / 'configs' / name}.py:smoke",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in values.items()),
    ]


def run(workdir, *faults, devices=1, env=None, timeout=400, **changes):
    """Run to the end; return the finished process with its output as text."""
    done = subprocess.run(
        command(workdir, *faults, **changes),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment(devices) | (env or {}),
    )
    done.said = done.stdout + done.stderr
    return done


def command(workdir, *faults, **changes):
    """Return the command of a run with faults injected."""
    fault = [sys.executable, "-m", "tests.faults", *faults, "--"]
    return fault + arguments(workdir, **changes)


def environment(devices=1):
    """Return the environment of a run on so many simulated devices."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def state(workdir, step=12):
    """Return {name: array} of everything in a checkpoint."""
    path = pathlib.Path(workdir) / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        # The devices that wrote it may have been those of several processes.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        args = jax.tree.map(
            lambda _: ocp.ArrayRestoreArgs(sharding=here),
            reader.metadata(path).item_metadata.tree,
        )
        found = tree.flat(_nested(reader.restore(path, restore_args=args)))
    found["rng"] = jax.random.key_data(found["rng"])
    return {k: np.asarray(v) for k, v in found.items() if v is not None}


def _nested(node):
    """Return nested dicts where there may be sequences (states of an optimizer)."""
    if isinstance(node, list | tuple):
        node = {str(i): value for i, value in enumerate(node)}
    if not isinstance(node, dict):
        return node
    return {key: _nested(value) for key, value in node.items()}


def digest(workdir, step=12):
    """Return a digest of every bit of a checkpoint's arrays."""
    h = hashlib.sha256()
    for name, array in sorted(state(workdir, step).items()):
        h.update(name.encode() + str(array.dtype).encode() + array.tobytes())
    return h.hexdigest()


def metrics(workdir):
    """Return the lines of metrics.jsonl without what depends on the clock."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines())
    free = ("time/", "compile/", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(free)} for line in lines]


def start(spec, params):
    """Return parameters as a run with this section `init` starts with."""
    return warmstart.load(spec, opened.past(spec.from_), params)[0]
