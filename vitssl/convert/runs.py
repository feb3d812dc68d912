"""The backbone of a run of ours, out of its newest checkpoint."""

import json
import pathlib

import numpy as np

from vitssl import config, errors, experiment, init
from vitssl.convert import backbone


def read(path, part: str = "") -> backbone.Backbone:
    """Return the encoder that a workdir, or one checkpoint of it, holds.

    Args:
        path: WORKDIR or WORKDIR/checkpoints/STEP.
        part: "target" (the averaged encoder) or "encoder"; "" = the target where
            there is one, which is what the run's own evaluations use.

    Raises:
        CheckpointError: no config, no checkpoint, or a method without an encoder of
            the kinds of `models.MODELS`.
        UsageError: there is no such part.
    """
    checked, step_dir = open_run(path)
    stored = init.read_trees(path, ("params", "extra"))
    parts = {
        "target": _under(stored["extra"], "target/"),
        "encoder": _under(stored["params"], "encoder/"),
    }
    parts = {name: leaves for name, leaves in parts.items() if leaves}
    model = checked.config.get("model")
    if not parts or model is None:
        raise errors.CheckpointError(
            f"{path}: method {checked.settings.method} keeps no encoder to export"
        )
    if part and part not in parts:
        raise errors.UsageError(f"--part={part}: the run has {', '.join(parts)}")
    leaves = parts[part or next(iter(parts))]
    data = checked.settings.data
    model = model.to_dict()
    about = backbone.About(
        model={"name": "vit"} | model,
        mean=data.mean,
        std=data.std,
        pool="mean",
        source=f"{step_dir.parent.parent.name}, step {step_dir.name}",
        config=json.loads(config.to_json(checked.config)),
        metrics=_scores(step_dir.parent.parent),
    )
    return backbone.Backbone(
        about, {f"encoder/{name}": leaf for name, leaf in leaves.items()}
    )


def open_run(path) -> tuple[experiment.Experiment, pathlib.Path]:
    """Return (the checked config of a run, directory of one checkpoint).

    Raises:
        CheckpointError: no complete checkpoint, or no config beside them.
    """
    directory, step = init.locate(path)
    file = directory.parent / "config.json"
    if not file.is_file():
        raise errors.CheckpointError(
            f"{file}: missing; it says what the weights are of"
        )
    checked = experiment.read(config.from_json(file.read_text()))
    return checked, directory / str(step)


def _under(leaves, prefix) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): leaf
        for name, leaf in leaves.items()
        if name.startswith(prefix)
    }


def _scores(workdir) -> dict:
    """Return the last top-1 accuracies in metrics.jsonl, baselines included."""
    file, found = workdir / "metrics.jsonl", {}
    if not file.is_file():
        return found
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # A line that a killed run did not finish.
            continue
        for key, value in row.items():
            if key.endswith("/top1"):
                found[key] = round(value, 4)
    return found
