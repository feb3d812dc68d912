"""The one door to what was trained before: a run, one of its checkpoints, an import.

past("runs/hjepa")                  a run's newest checkpoint, also runs/hjepa@last
past("runs/hjepa@best")             its best by `checkpoint.best`
past("runs/hjepa@1200")             also runs/hjepa/checkpoints/1200
past("weights")                     a file or folder that vitssl convert wrote
past("demo:localmim")               a small network that comes with the package
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from vitssl import config, disk, errors, tree
from vitssl.convert import backbone, demos
from vitssl.run import build, checkpoint, experiment, log, seals

AVERAGES = ("ema/", "average/")  # Where methods keep averages of all parameters.
BESIDE = ("target/", "stats/")  # What is no parameter, of what a file holds.
FORMS = "want WORKDIR, WORKDIR@best, @last or @STEP, or WORKDIR/checkpoints/STEP"


@dataclasses.dataclass(frozen=True)
class Past:
    """Weights on disk; nothing of them is read before it is asked for.

    Attributes:
        path: as it was given.
        directory: the `checkpoints` folder of a run; None of an import.
        step: of the checkpoint.
    """

    path: str
    directory: pathlib.Path | None = None
    step: int = 0

    @property
    def imported(self) -> bool:
        """Return whether these are weights of `vitssl convert`, not of a run."""
        return self.directory is None

    @property
    def _checkpoints(self) -> pathlib.Path:
        if self.directory is None:
            raise errors.CheckpointError(f"{self.path}: an import, not a run")
        return self.directory

    @property
    def workdir(self) -> pathlib.Path:
        """Return the workdir of the run."""
        return self._checkpoints.parent

    @property
    def name(self) -> str:
        """Return what to call the weights: "hjepa, step 1200"."""
        return f"{self.workdir.name}, step {self.step}"

    @functools.cached_property
    def experiment(self) -> experiment.Experiment:
        """Return the checked config of the run, or of an import of a whole method.

        Raises:
            CheckpointError: there is none that can be read.
        """
        if self.imported:
            about = self.weights.about
            if not about.config:
                why = [n for n in about.notes if n.startswith(backbone.NO_FEATURES)]
                way_out = (*why, "convert the original file again")[0]
                raise errors.CheckpointError(f"{self.path}: says no config; {way_out}")
            return experiment.read(config.from_json(json.dumps(about.config)))
        file = self.workdir / "config.json"
        of = "it says what the weights are of"
        if not file.exists():
            raise errors.CheckpointError(f"{file}: missing; {of}")
        try:
            return experiment.read(config.from_json(file.read_bytes()))
        except errors.UsageError as e:
            raise errors.CheckpointError(f"{file}: {e}") from e
        except (OSError, ValueError) as e:
            said = getattr(e, "strerror", "") or e
            raise errors.CheckpointError(
                f"{file}: damaged ({said}); {of}: the command of the run writes it anew"
            ) from e

    @functools.cached_property
    def meta(self) -> dict:
        """Return the json beside the state: classes, metrics, versions."""
        if self.imported:
            return {"classes": self.weights.about.classes}
        return checkpoint.read_meta(self.directory, self.step)

    @functools.cached_property
    def weights(self) -> backbone.Backbone:
        """Return what an import holds."""
        return backbone.read(self.path)

    def trees(self, *keys: str) -> dict:
        """Return {key: {name: numpy array}} of "params" and "extra"."""
        if self.imported:
            return _split(self.weights.leaves)
        import orbax.checkpoint as ocp

        state = self._checkpoints.resolve() / str(self.step) / "state"
        handler = ocp.PyTreeCheckpointHandler()
        with seals.reading(state), ocp.Checkpointer(handler) as reader:
            everything = seals.metadata(handler, state)
            stored = {key: everything[key] for key in keys if everything.get(key)}
            if not stored:
                return {key: {} for key in keys}
            one = ocp.RestoreArgs(restore_type=np.ndarray)
            want = jax.tree.map(lambda _: one, stored)
            restored = reader.restore(
                state,
                args=ocp.args.PyTreeRestore(
                    item=stored, restore_args=want, partial_restore=True
                ),
            )
        return {key: tree.flat(restored[key]) if key in stored else {} for key in keys}

    def params(self, part: str = "params") -> dict[str, np.ndarray]:
        """Return {name: array} of all parameters.

        Args:
            part: "params" as trained; "ema" their average; "target" the parameters with
                the averaged encoder in the encoder's place.

        Raises:
            UsageError: the run keeps no such part.
        """
        if self.imported:
            if part != "params":
                raise errors.UsageError(f"{self.path}: an import has no part {part!r}")
            leaves = dict(self.weights.leaves)
            return {k: v for k, v in leaves.items() if not k.startswith("stats/")}
        stored = self.trees("params", "extra")
        params, extra = stored["params"], stored["extra"]
        average = {k: v for p in AVERAGES for k, v in _under(extra, p).items()}
        target = {f"encoder/{k}": x for k, x in _under(extra, "target/").items()}
        target |= {f"levels/{k}": x for k, x in _under(extra, "target_levels/").items()}
        kept = {"params": params, "ema": average, "target": target}
        if not kept.get(part):
            has = ", ".join(name for name, leaves in kept.items() if leaves)
            raise errors.UsageError(f"{self.path}: no part {part!r}; the run has {has}")
        return params | kept[part]

    def statistics(self) -> dict[str, np.ndarray]:
        """Return {name: array} of the batch statistics that go with the parameters."""
        return _under(self.trees("extra")["extra"], "stats/")

    def state(self) -> tuple[build.Parts, Any]:
        """Return (`build.Parts`, state) to go on with; opens the run's data."""
        parts = build.build(self.experiment)
        target = build.restore_target(parts)(self.step)
        return parts, checkpoint.read(self.directory, self.step, target)[0]

    def network(self, part: str = "") -> backbone.Backbone:
        """Return what an import holds, or the encoder of a run.

        Raises:
            UsageError: there is no such part.
        """
        if not self.imported:
            return self.encoder(part)
        if part:
            raise errors.UsageError(f"{self.path}: an import has no part {part!r}")
        return self.weights

    def encoder(self, part: str = "") -> backbone.Backbone:
        """Return the encoder of a run.

        Of a method that is more than an encoder of `models.MODELS` (part discovery,
        latent masked modelling) all parameters come, under their own names.

        Args:
            part: "target" (the averaged encoder), "encoder" or "ema" (of a classifier);
                "" = the target where there is one, else the encoder, which is what the
                run's own evaluations use.

        Raises:
            UsageError: there is no such part.
        """
        checked, stored = self.experiment, self.trees("params", "extra")
        parts = _encoders(stored) if "model" in checked.config else {}
        if part and part not in parts:
            has = ", ".join(parts) or "none: it is exported whole"
            raise errors.UsageError(f"--part={part}: the run has {has}")
        about = backbone.About(
            model={},
            mean=checked.settings.data.mean,
            std=checked.settings.data.std,
            pool="mean",
            source=self.name,
            config=json.loads(config.to_json(checked.config)),
            metrics=_scores(self.workdir),
        )
        if not parts:
            classes = tuple(self.meta.get("classes", ()))
            about = dataclasses.replace(about, classes=classes)
            return backbone.Backbone(about, _whole(stored))
        chosen = part or next(iter(parts))
        leaves = {f"encoder/{name}": leaf for name, leaf in parts[chosen].items()}
        stats = _under(stored["extra"], "stats/encoder/")
        leaves |= {f"stats/encoder/{name}": leaf for name, leaf in stats.items()}
        model = {"name": "vit"} | checked.config.model.to_dict()
        about = dataclasses.replace(about, model=model)
        if checked.settings.method == "classify":
            trained = stored["extra"] if chosen == "ema" else stored["params"]
            prefix = "ema/head/" if chosen == "ema" else "head/"
            head = {f"head/{k}": x for k, x in _under(trained, prefix).items()}
            about, head = _classifier(about, head, checked.config, stored["extra"])
            leaves |= head
        return backbone.Backbone(about, leaves)


def past(path: disk.AnyPath) -> Past:
    """Return what is at `path`; see the module for its forms.

    Raises:
        CheckpointError: nothing there that is complete, or no such step.
    """
    path = demos.found(path)
    if backbone.is_backbone(path):
        return Past(str(path))
    text = str(path)
    head, at, which = text.rpartition("@")
    if not at or pathlib.Path(text).exists():
        head, which = text, "last"
    folder = pathlib.Path(head)
    if folder.name.isdigit() and (folder / seals.MANIFEST).exists():
        return _checked(text, folder.parent, int(folder.name))
    directory = folder / "checkpoints"
    steps = seals.sealed(directory)
    if not steps and seals.unsealed(directory):
        raise errors.CheckpointError(f"{path}: {seals.without(directory)}")
    if not steps:
        raise errors.CheckpointError(f"{path}: no complete checkpoint; {FORMS}")
    if which == "last":
        return _checked(text, directory, steps[-1])
    if which == "best":
        return _checked(text, directory, best_step(directory, steps))
    if not which.isdigit() or int(which) not in steps:
        there = ", ".join(map(str, steps))
        raise errors.CheckpointError(f"{path}: no such step; there is {there}; {FORMS}")
    return _checked(text, directory, int(which))


def _checked(text, directory, step) -> Past:
    """Return a checkpoint, once it is sure that this version can read it."""
    seals.check_format(directory / str(step))
    return Past(text, directory, step)


def best_step(directory: disk.AnyPath, steps: Iterable[int]) -> int:
    """Return the step with the best `checkpoint.best`; the newest of equal ones.

    Raises:
        CheckpointError: no checkpoint has a score.
    """
    key = Past("", pathlib.Path(directory)).experiment.settings.checkpoint
    found = {}
    for step in steps:
        scores = checkpoint.read_meta(directory, step).get("metrics", {})
        if key.best in scores:
            found[step] = key.sign * scores[key.best]
    if not found:
        raise errors.CheckpointError(
            f"{directory}: no checkpoint has a score {key.best!r} (checkpoint.best); "
            "use @last"
        )
    return max(found, key=lambda step: (found[step], step))


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
    """Return all parameters; averaged ones, of a target, statistics, if there are."""
    average = _under(stored["extra"], "average/")
    beside = {k: x for k, x in stored["extra"].items() if k.startswith(BESIDE)}
    return stored["params"] | average | beside


def _split(leaves) -> dict:
    """Return {"params", "extra"} of the leaves of `_whole`."""
    found: dict[str, dict] = {"params": {}, "extra": {}}
    for name, leaf in leaves.items():
        found["extra" if name.startswith(BESIDE) else "params"][name] = leaf
    return found


def _classifier(about, head, settings, extra):
    """Return (about, head) of a classifier: no head where other codes have none alike.

    A linear layer after the encoder's norm is one; HViT's has a norm of its own. Of
    head.blocks the last head is taken, if it is the one that names the classes.
    """
    head = {k: x for k, x in head.items() if not k.startswith("head/block_")}
    average = settings.head.get("predict") == "average"
    pool, hvit = settings.head.pool, about.model["name"] == "hvit"
    about = dataclasses.replace(about, pool="cls" if pool == "cls" else "mean")
    plain = ("mean_norm",) if hvit else ("cls", "mean")
    if "stats/mean" not in extra and pool in plain and not average:
        return about, head
    why = "batch normalisation" if "stats/mean" in extra else f"head.pool={pool}"
    why = "head.predict=average" if average else why
    note = f"the classifier is left out: {why} has no place in other layouts"
    return dataclasses.replace(about, notes=(note,)), {}


def _under(leaves, prefix) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): leaf
        for name, leaf in leaves.items()
        if name.startswith(prefix)
    }


def _scores(workdir) -> dict:
    """Return the last accuracies in metrics.jsonl, baselines included."""
    found = {}
    for _, row in log.lines(workdir / "metrics.jsonl"):
        for key, value in row.items():
            if key.endswith(("/top1", "/map")) and isinstance(value, int | float):
                found[key] = round(value, 4)
    return found
