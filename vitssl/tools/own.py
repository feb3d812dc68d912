"""`vitssl train DIR`: a folder of images, a recipe that fits this machine, a run.

    vitssl train DIR [--method=NAME] [--model=NAME] [--weights=WEIGHTS] [--size=N]
        [--epochs=N] [--steps=N] [--batch_size=N] [--labels=none] [--workdir=DIR]
        [--dry_run] [--config.KEY=VALUE ...]

DIR holds images at any depth, with or without class folders or train, val and test.
What is found there and what follows from it is printed first, as the long command that
does the same. The same command again goes on where a run stopped.

  --method      localmim (default), mae, hjepa, dino, simclr: without labels;
                distill: without labels, from a teacher (--weights);
                finetune, parts: with the labels of class folders
  --model       vit_mini, vit_ti, vit_s, vit_b, vit_l, a patch may follow (vit_s16); or
                hvit (simclr and finetune)
  --weights     a run's workdir, or what `vitssl convert import` wrote: where localmim,
                hjepa and finetune start from, or distill's teacher
  --size        side of the training images in pixels
  --labels      none: sub-folders are no classes; or a table of labels, *.csv, *.tsv or
                *.parquet (one that lies in DIR is found): a column of files and one of
                labels, several of them by "|", or one column of 0 and 1 for each
  --dry_run     look, plan and measure; no training
"""

import dataclasses
import math
import pathlib
import re
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections

from vitssl import config, disk, errors
from vitssl.data import decode, survey
from vitssl.data.sources import tables
from vitssl.models import MODELS
from vitssl.run import build, devices, experiment, log, loop, memory, opened
from vitssl.tools import notebook

# Method: (recipe, keys of the sides of its crops, the largest first).
_CROPS = ("multicrop.global_crop_size", "multicrop.local_crop_size")
METHODS = {
    "localmim": ("localmim:folder", ("augment.size",)),
    "mae": ("mae:folder", ("augment.size",)),
    "hjepa": ("hjepa:folder", _CROPS),
    "dino": ("dino:folder", _CROPS),
    "simclr": ("simclr_hvit:folder", ("augment.size",)),
    "distill": ("distill:folder", _CROPS),
    "finetune": ("finetune_vit:folder", ("augment.size",)),
    "parts": ("parts:folder", ("augment.size",)),
}
LABELLED = ("finetune", "parts")
CONTINUED = {"localmim": "localmim:continue", "hjepa": "hjepa:continue"}
HVIT = {"simclr": "simclr_hvit:folder", "finetune": "finetune_hvit:folder"}
WHY = (
    "needs no labels, no large batch, and cannot collapse; it reads a quarter of each "
    "image"
)
VITS = {
    "mini": dict(width=192, depth=8, heads=3),
    "ti": dict(width=192, depth=12, heads=3),
    "s": dict(width=384, depth=12, heads=6),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
}
RATES = {"mini": 1e-3, "ti": 1e-3, "s": 5e-4, "b": 3e-4, "l": 2e-4}
VIEWS = {"cpu": 40_000, "gpu": 10_000_000, "tpu": 10_000_000}  # Images a run sees.
# What compiling evaluations and drawing pictures takes of a CPU's memory, at most.
BESIDE = 3 * 2**28
ROOM = 0.7  # Share of the memory that is free, which a run may take.


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line, or `vitssl.train`, says; "" and 0 leave it to us."""

    data: str
    method: str = ""
    model: str = ""
    weights: str = ""
    size: int = 0
    epochs: float = 0.0
    steps: int = 0
    batch_size: int = 0
    labels: str = ""
    workdir: str = ""
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UsageError for what cannot be meant."""
        faults = []
        if self.method and self.method not in METHODS:
            faults.append(f"--method={self.method}: one of {', '.join(METHODS)}")
        if self.method == "distill" and not self.weights:
            faults.append("--method=distill: needs a teacher, --weights=WEIGHTS")
        taking = ("localmim", "hjepa", "finetune", "distill")
        if self.weights and (self.method or "localmim") not in taking:
            faults.append(f"--weights: of {', '.join(taking)}, not of {self.method}")
        if self.labels not in ("", "none") and not self.labels.endswith(tables.ENDS):
            known = " *".join(tables.ENDS)
            faults.append(
                f"--labels={self.labels}: none, a table of labels (*{known}), or leave "
                "it out"
            )
        for key in ("size", "epochs", "steps", "batch_size"):
            if getattr(self, key) < 0:
                faults.append(f"--{key}={getattr(self, key)}: above 0")
        if faults:
            raise errors.UsageError("command line:\n  " + "\n  ".join(faults))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe and what is changed in it for a folder and a machine."""

    spec: str
    workdir: str
    overrides: dict
    typed: tuple[str, ...] = ()  # As the user gave them; they win.
    why: str = ""

    def words(self) -> list[str]:
        """Return "key=value" texts, in the order in which they are applied."""
        return [f"{k}={v}" for k, v in self.overrides.items()] + list(self.typed)

    def command(self) -> str:
        """Return the command that does the same, several lines for a shell."""
        words = [f"--config={self.spec}", f"--workdir={self.workdir}"]
        words += [f"--config.{word}" for word in self.words()]
        return "vitssl train " + " \\\n    ".join(map(shlex.quote, words))

    def read(self) -> experiment.Experiment:
        """Return the checked experiment."""
        return experiment.read(experiment.load(self.spec, self.words()))

    def changed(self, **overrides: Any) -> "Plan":
        """Return a plan with other values."""
        return dataclasses.replace(self, overrides=self.overrides | overrides)


def plan(asked: Asked, found: survey.Survey, platform: str) -> Plan:
    """Return what fits a folder and a kind of machine; memory is looked at later.

    Args:
        platform: "cpu", "gpu" or "tpu".

    Raises:
        UsageError: a model that is not known, or does not fit the method.
        DataError: the method learns from labels, and there are none.
    """
    method, why = asked.method or "localmim", "" if asked.method else WHY
    if method in LABELLED and len(found.classes) < 2:
        raise errors.DataError(
            f"{decode.printable(asked.data)}: --method={method} learns from labels, "
            f"and there are no classes ({found.why_none or 'one only'}); put images of "
            f"each class into a folder of its own, or take --method=localmim"
        )
    if method == "parts" and found.several:
        raise errors.DataError(
            f"{decode.printable(found.table)}: several labels an image; --method=parts "
            "learns one an image, --method=finetune several"
        )
    name = decode.printable(pathlib.Path(asked.data).expanduser().resolve().name)
    name = re.sub(r"[^\w.-]+", "_", name) or "images"
    workdir = asked.workdir or str(pathlib.Path("runs") / f"{name}-{method}")
    spec, sides = METHODS[method]
    chosen = {"data.root": str(pathlib.Path(found.root).absolute())}
    chosen |= _of_data(found, method)
    trained = _trained(asked, method)
    if trained:
        spec, more = _started(asked, method, spec, sides, trained, found)
    else:
        spec, more = _model(asked, method, spec, sides, found, platform)
    chosen |= more | _length(asked, found, platform)
    if found.several:
        chosen |= _several(spec, method)
    return Plan(spec, workdir, chosen, asked.overrides, why)


def _several(spec, method) -> dict:
    """Return what images of several labels change in a recipe."""
    best = experiment.load(spec).checkpoint.best
    chosen = {"checkpoint.best": f"{best.removesuffix('top1')}map"}
    return chosen | ({"objective.loss": "binary"} if method == "finetune" else {})


def _of_data(found: survey.Survey, method) -> dict:
    """Return what the folder decides."""
    chosen: dict[str, Any] = {}
    labels = found.labels
    if labels == "any" and method in LABELLED:
        labels = "folder"
    if labels != "folder":
        chosen["data.options.labels"] = labels
    if found.divided:
        chosen["data.options.divided"] = "yes"
    if found.range:
        chosen["data.options.value_range"] = found.range
    if found.channels != 3:
        chosen |= {"data.channels": found.channels}
        chosen |= {"data.mean": found.mean, "data.std": found.std}
    share = len(found.broken) / max(1, found.read + len(found.broken))
    if share:
        # As many again may be broken among those that were not looked at.
        chosen["data.bad_share"] = round(min(0.5, 2 * share + 0.01), 3)
    return chosen


def _trained(asked, method) -> dict:
    """Return the section `model`, and the normalisation, of weights to go on from."""
    if not asked.weights or method == "distill":
        return {}
    past = opened.past(asked.weights)
    if past.imported:
        about = past.weights.about
        return dict(model=about.model, mean=about.mean, std=about.std, size=0)
    s = past.experiment
    model = s.config.get("model", ml_collections.ConfigDict()).to_dict()
    data = s.settings.data
    return dict(model=model, mean=data.mean, std=data.std, size=s.training_size)


def _started(asked, method, spec, sides, trained, found):
    """Return (recipe, overrides) for weights that have a model of their own."""
    model = dict(trained["model"])
    name = model.pop("name", "vit")
    if not model:
        raise errors.UsageError(
            f"--weights={asked.weights}: a whole method, no encoder alone; give its "
            "recipe by --config and --config.init.from"
        )
    kinds = ("vit", "hvit") if method == "finetune" else ("vit",)
    if name not in kinds or asked.model:
        raise errors.UsageError(
            f"--weights={asked.weights}: a {name}; --method={method} goes on from "
            f"{' or '.join(kinds)}, and --model is theirs"
        )
    spec = HVIT[method] if name == "hvit" else CONTINUED.get(method, spec)
    both = {len(trained["mean"]), found.channels}
    if len(both) > 1 and both != {1, 3}:
        raise errors.UsageError(
            f"--weights={asked.weights}: read {len(trained['mean'])} channel(s), the "
            f"images have {found.channels}"
        )
    side = asked.size or trained["size"] or model.get("image_size", 0)
    side = side if isinstance(side, int) else min(side)
    known = config.schema(MODELS[name])
    own = {
        f"model.{k}": v
        for k, v in model.items()
        if k in known and k not in ("image_size", "dtype", "remat")
    }
    # Grey images are read as colours, if the weights want that.
    own |= {"data.channels": len(trained["mean"])}
    own |= {"data.mean": trained["mean"], "data.std": trained["std"]}
    return spec, {"init.from": asked.weights} | own | _sides(side, model, sides)


def _model(asked, method, spec, sides, found, platform):
    """Return (recipe, overrides) for a model by its name, or one that we choose."""
    chosen = {"teacher.from": asked.weights} if method == "distill" else {}
    if asked.model == "hvit" or (method == "simclr" and not asked.model):
        if method not in HVIT:
            raise errors.UsageError(f"--model=hvit: --method={method} needs a ViT")
        side = asked.size or (96 if found.sides[1] >= 64 else 48)
        return HVIT[method], _sides(side, {}, sides, multiple=24)
    if method == "parts" and not asked.model:
        side = asked.size or (96 if found.sides[1] >= 80 else 48)
        return spec, _sides(side, dict(patch=8), sides)
    name = asked.model or ("vit_mini" if platform == "cpu" else "vit_s")
    fits = re.fullmatch(
        r"vit_?(mini|ti|s|b|l)[_/]?(\d*)", name.lower().replace("-", "_")
    )
    if not fits or fits[2] == "0":
        known = ", ".join(f"vit_{size}" for size in VITS)
        raise errors.UsageError(
            f"--model={asked.model}: one of {known}, with a patch if you like "
            "(vit_s16), or hvit"
        )
    size = fits[1]
    side = asked.size or _side(found, platform)
    # Twelve to fourteen patches a side, of 4, 8 or 16 pixels.
    patch = int(fits[2] or next((p for p in (16, 8) if side >= 10 * p), 4))
    model = VITS[size] | dict(patch=patch)
    if method == "simclr":
        spec = "simclr_hvit:folder_vit"
    chosen |= {f"model.{k}": v for k, v in model.items()}
    if method == "hjepa":
        chosen |= {"predictor.heads": model["heads"]}
        chosen |= {"predictor.depth": max(2, model["depth"] // 2)}
    if method == "localmim":
        # Cells of two pixels at least.
        chosen["stages.scales"] = tuple(min(s, patch / 2) for s in (4.0, 2.0, 1.0, 0.5))
    chosen["optim.lr"] = RATES[size]
    return spec, chosen | _sides(side, model, sides)


def _side(found, platform) -> int:
    """Return a side of training images: no larger than most images are."""
    most = 96 if platform == "cpu" else 224
    return next((s for s in (224, 96, 64) if most >= s <= found.sides[1]), 32)


def _sides(side, model, keys, multiple=0) -> dict:
    """Return the overrides of the sides of crops: multiples of the patch.

    Grids are even, so that targets of half the grid's resolution fit.
    """
    multiple = multiple or 2 * model.get("patch", 16)
    large = max(multiple, round(side / multiple) * multiple)
    sizes = [large, max(multiple, large // 2 // multiple * multiple)]
    return dict(zip(keys, sizes, strict=False)) | {"model.image_size": large}


def _length(asked, found, platform) -> dict:
    """Return batch, epochs and what follows from them."""
    most = 64 if platform == "cpu" else 256
    least = asked.batch_size or 2 ** int(math.log2(max(2, min(most, found.train // 2))))
    batch = min(least, found.train)
    per_epoch = found.train // batch
    epochs = asked.epochs or min(800.0, max(5.0, VIEWS[platform] / found.train))
    if asked.steps:
        epochs = asked.steps / per_epoch
    epochs = float(f"{epochs:.3g}")
    total = max(1, asked.steps or round(epochs * per_epoch))
    tenth = float(f"{max(epochs / 10, 20 / per_epoch):.4g}")
    chosen = {"batch_size": batch, "epochs": epochs, "steps": asked.steps}
    chosen |= {"optim.warmup_epochs": float(f"{epochs / 20:.4g}")}
    chosen |= {"evals.every_epochs": tenth, "checkpoint.every_epochs": tenth}
    chosen |= {
        "log.every_steps": max(1, min(50, total // 20)),
    }
    if epochs <= 2:  # What waits for an epoch would hardly train.
        chosen["optim.thaw"] = ()
    chosen |= {"evals.batch_size": min(64, max(2, found.test))}
    # A tenth of a class's images is enough of a neighbourhood where there are few.
    chosen["evals.knn_k"] = (min(20, max(1, found.train // 10)),)
    return chosen


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run will take.

    Attributes:
        memory: peak in bytes: of the device; on a CPU, of the process.
        limit: what of it is free; 0 if unknown.
        seconds: for all steps and evaluations, by two steps that were made.
    """

    memory: int
    limit: int
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Return whether it is within our share."""
        return not self.limit or self.memory <= ROOM * self.limit


def fitted(made: Plan) -> tuple[Plan, build.Parts, Cost]:
    """Return a plan whose step fits the memory that is free: in parts, or smaller.

    Raises:
        OutOfMemoryError: not even one image at a time fits.
    """
    free, batch = memory.free(), 0
    while True:
        parts = build.build(made.read())
        e = memory.estimate(parts)
        cost = Cost(_promised(parts, e), free)
        s = parts.experiment.settings
        batch = s.batch_size // s.accumulate
        if cost.fits:
            return made, parts, cost
        rest = ROOM * free - (cost.memory - e.activations)
        most = int(rest / max(1.0, e.activations / e.images)) * (batch // e.images)
        if batch <= 1 or most < 1:
            raise errors.OutOfMemoryError(
                f"a step of one image needs more than {memory.size(ROOM * free)}, "
                f"{ROOM:.0%} of what is free; take a smaller --model or --size\n"
                f"{memory.advice(parts)}"
            )
        most = min(most, batch // 2)
        if parts.method.divisible:
            more = range(s.accumulate + 1, s.batch_size + 1)
            ways = (k for k in more if s.batch_size % k == 0)
            k = next((k for k in ways if s.batch_size // k <= most), s.batch_size)
            made = made.changed(accumulate=k)
        else:
            made = made.changed(batch_size=most)


def _promised(parts, e: memory.Estimate) -> int:
    """Return the peak of a run: a step, beside it what else lives at that time."""
    state = e.parameters + e.optimizer + e.extra
    total = e.total + state  # At the end the untrained network is there, too.
    if memory.resident() is None:
        return total
    s = parts.experiment.settings
    # Batches ahead, images of evaluations, and what the process has by now.
    side = s.evals.image_size
    pixels = math.prod(side if isinstance(side, tuple) else (side, side))
    images = min(s.evals.cache_bytes, 2 * len(parts.source) * pixels * s.data.channels)
    return total + 10 * e.batch + images + memory.resident() + BESIDE


def measured(parts: build.Parts, cost: Cost) -> Cost:
    """Return the cost with its seconds, by the pace of two steps of the run."""
    s, phase = parts.experiment.settings, parts.phase(0)
    state = parts.fresh()
    times = []
    rows = devices.batch_sharding(parts.mesh)
    stream = parts.stream(0)
    with stream:
        for _ in range(3):
            start = time.perf_counter()
            batch = devices.put(next(stream), rows)
            state, metrics = parts.compiled.get(phase, batch)(state, batch)
            float(metrics["loss"])
            times.append(time.perf_counter() - start)
    step = sum(times[1:]) / 2
    seen = (
        len(parts.source) * 1.2
    )  # Bank and test; a forward pass is a third of a step.
    every = s.evals.every_epochs * parts.run.steps_per_epoch
    rounds = 3 + (1 + parts.run.total_steps // every if every else 0)
    evaluation = rounds * seen / s.batch_size * step / 3
    return dataclasses.replace(cost, seconds=parts.run.total_steps * step + evaluation)


def run(
    asked: Asked, *, dry_run: bool = False, show: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Look at a folder, plan, train and evaluate; return the final metrics.

    Raises:
        VitsslError: one line of what is wrong; see `errors`.
    """
    asked.check()
    found = survey.look(asked.data, labels=asked.labels)
    show(f"{decode.printable(asked.data)}\n{found}")
    devices.start()
    made = plan(asked, found, jax.default_backend())
    made, parts, cost = fitted(made)
    method = parts.experiment.settings.method
    why = f": {made.why} (--method={'|'.join(METHODS)})" if made.why else ""
    show(f"  method    {method}{why}\n\nThe same as\n\n{made.command()}\n")
    there = f" of {memory.size(cost.limit)} that are free" if cost.limit else ""
    show(f"  memory    at most {memory.size(cost.memory)}{there}")
    begun = pathlib.Path(made.workdir, "checkpoints").exists()
    if begun:
        show(f"  time      {made.workdir} goes on, and says how long it will take")
    else:
        cost = measured(parts, cost)
        steps = parts.run.total_steps
        show(f"  time      about {log.duration(cost.seconds)}: {steps} steps")
    checked = parts.experiment
    del parts  # Its program and its state; the run makes its own.
    if dry_run:
        return {}
    name = pathlib.Path(made.workdir).name
    values = loop.run(made.read(), made.workdir, name=name)
    show("\nnext:\n" + "\n".join(f"  {line}" for line in _next(asked, made, checked)))
    return values


def _next(asked, made, checked):
    """Yield commands that go on from a finished run."""
    run_, data = shlex.quote(made.workdir), shlex.quote(asked.data)
    yield f"vitssl report {run_}"
    if checked.kind.labelled:
        yield f"vitssl predict {run_} --images={data} --to=classes.csv"
    elif made.overrides.get("data.options.labels") not in ("none", "any"):
        labels = f" --labels={shlex.quote(asked.labels)}" if asked.labels else ""
        yield f"vitssl train {data}{labels} --method=finetune --weights={run_}"
    yield f"vitssl extract {run_} --images={data} --to=features.npz"
    yield f"vitssl convert export {run_} --to=weights.safetensors"


def train(
    data: disk.AnyPath,
    method: str = "",
    model: str = "",
    *,
    verbose: bool = False,
    overrides: Iterable[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train on a folder of images by what fits it and this machine: `vitssl train DIR`.

        vitssl.train("photos", method="hjepa", model="vit_s16", epochs=50)

    Args:
        data: folder of images, in class folders or not.
        method: "hjepa", "localmim", "finetune", ...; see `vitssl train --help`.
        model: "vit_s16", "hvit", ...
        verbose: show every line of the log.
        overrides: ("optim.lr=1e-3", ...): any other key of the config.
        options: weights, size, epochs, steps, batch_size, labels, workdir; what is left
            out is chosen, and told.

    Returns:
        the metrics of the final evaluation, {"final/trained/knn/top1": ...}.

    Raises:
        UsageError: also for an option that there is not.
        VitsslError: whatever ends a run; the message says what to do.
    """
    known = [f.name for f in dataclasses.fields(Asked)]
    for key in options:
        if key not in known:
            raise errors.UsageError(f"train({key}=...): {config.unknown(key, known)}")
    given = dict(method=method, model=model, overrides=tuple(overrides)) | options
    with notebook.bar(verbose):
        return run(Asked(str(data), **given))


def parse(argv: Sequence[str]) -> tuple[Asked, bool]:
    """Return (what is asked, whether it is a dry run) of a command line."""
    parser = errors.Parser("vitssl train", __doc__, allow_abbrev=False)
    parser.add_argument("data", metavar="DIR")
    for field in dataclasses.fields(Asked)[1:-1]:
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--dry_run", action="store_true")
    own: list[str] = []
    rest: list[str] = []
    for word in argv:
        mine = word.startswith("--config.")
        (rest if mine else own).append(word)
    flags = vars(parser.parse_args(own))
    dry_run = flags.pop("dry_run")
    typed = []
    for word in rest:
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            parser.error(f"{word}: write {word}=VALUE")
        # What all else follows from is ours, whichever way it is said.
        if key in ("epochs", "steps", "batch_size") and not flags[key]:
            try:
                flags[key] = type(flags[key])(value)
                continue
            except ValueError:
                pass
        typed.append(f"{key}={value}")
    return Asked(**flags, overrides=tuple(typed)), dry_run


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    asked, dry_run = parse(argv)
    log.to_terminal()
    run(asked, dry_run=dry_run)
    return 0
