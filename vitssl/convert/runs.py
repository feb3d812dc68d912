"""The weights of a run of ours, out of its newest checkpoint."""

import dataclasses
import json
import pathlib

import numpy as np

from vitssl import config, errors
from vitssl.convert import backbone
from vitssl.run import experiment, warmstart


def read(path, part: str = "") -> backbone.Backbone:
    """Return the encoder that a workdir, or one checkpoint of it, holds.

    Of a method that is more than an encoder of `models.MODELS` (part discovery, latent
    masked modelling) all parameters come, under their own names; see `wholes`.

    Args:
        path: WORKDIR or WORKDIR/checkpoints/STEP.
        part: "target" (the averaged encoder), "encoder" or "ema" (of a classifier);
            "" = the target where there is one, else the encoder, which is what the
            run's own evaluations use.

    Raises:
        CheckpointError: no config, no checkpoint.
        UsageError: there is no such part.
    """
    checked, step_dir = open_run(path)
    stored = warmstart.read_trees(path, ("params", "extra"))
    parts = _encoders(stored) if "model" in checked.config else {}
    if part and part not in parts:
        has = ", ".join(parts) or "none: it is exported whole"
        raise errors.UsageError(f"--part={part}: the run has {has}")
    data = checked.settings.data
    about = backbone.About(
        model={},
        mean=data.mean,
        std=data.std,
        pool="mean",
        source=f"{step_dir.parent.parent.name}, step {step_dir.name}",
        config=json.loads(config.to_json(checked.config)),
        metrics=_scores(step_dir.parent.parent),
    )
    if not parts:
        return backbone.Backbone(about, _whole(stored))
    chosen = part or next(iter(parts))
    leaves = {f"encoder/{name}": leaf for name, leaf in parts[chosen].items()}
    model = {"name": "vit"} | checked.config.model.to_dict()
    about = dataclasses.replace(about, model=model)
    if checked.settings.method == "classify":
        trained = stored["extra"] if chosen == "ema" else stored["params"]
        prefix = "ema/head/" if chosen == "ema" else "head/"
        head = {f"head/{k}": x for k, x in _under(trained, prefix).items()}
        about, head = _classifier(about, head, checked.config, stored["extra"])
        leaves |= head
    return backbone.Backbone(about, leaves)


def _encoders(stored) -> dict:
    """Return {part: leaves of an encoder}, what evaluations use first."""
    parts = {
        "target": _under(stored["extra"], "target/"),
        "encoder": _under(stored["params"], "encoder/")
        or _under(stored["params"], "backbone/"),
        "ema": _under(stored["extra"], "ema/backbone/"),
    }
    return {name: leaves for name, leaves in parts.items() if leaves}


def _whole(stored) -> dict:
    """Return all parameters; averaged ones, and those of a target, where there are."""
    average = _under(stored["extra"], "average/")
    target = {k: x for k, x in stored["extra"].items() if k.startswith("target/")}
    return stored["params"] | average | target


def _classifier(about, head, settings, extra):
    """Return (about, head) of a classifier: no head where other codes have none alike.

    A linear layer after the encoder's norm is one; HViT's has a norm of its own.
    """
    pool, hvit = settings.head.pool, about.model["name"] == "hvit"
    about = dataclasses.replace(about, pool="cls" if pool == "cls" else "mean")
    if "stats/mean" not in extra and pool in (
        ("mean_norm",) if hvit else ("cls", "mean")
    ):
        return about, head
    why = "batch normalisation" if "stats/mean" in extra else f"head.pool={pool}"
    note = f"the classifier is left out: {why} has no place in other layouts"
    return dataclasses.replace(about, notes=(note,)), {}


def open_run(path) -> tuple[experiment.Experiment, pathlib.Path]:
    """Return (the checked config of a run, directory of one checkpoint).

    Raises:
        CheckpointError: no complete checkpoint, or no config beside them.
    """
    directory, step = warmstart.locate(path)
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
