"""From what lies in a folder to a recipe and what changes in it: `vitssl train DIR`."""

import dataclasses
import math
import pathlib
import re
import shlex
from typing import Any

import ml_collections

from vitssl import config, errors
from vitssl.data import decode, survey
from vitssl.data.sources import tables
from vitssl.models import MODELS
from vitssl.run import experiment, opened

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
    chosen = {"checkpoint.best": re.sub("(top1|f1_macro)$", "map", best)}
    if method == "finetune":
        chosen |= {"objective.loss": "binary", "objective.balanced": False}
        chosen |= {"scoring.calibration": False}
    return chosen


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
        if k in known and k not in ("image_size", "dtype", "remat", "scan")
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
