"""Every recipe of configs/ runs: two steps on its data's own layout, and a final table.

Recipes are shrunk by overrides alone (width, depth, sizes, batch); `pytest -s` prints
each with its seconds. Those that start from a checkpoint get the run of the recipe
that makes it, so the road from pre-training to evaluation is walked as well.
"""

import json
import math
import pathlib
import time

import jax
import ml_collections
import pytest

from tests import layouts
from vitssl import config, main
from vitssl.evals import linear
from vitssl.run import experiment

pytestmark = pytest.mark.usefixtures("few_executables")
ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = config.files(ROOT / "configs")
RECIPES = [
    f"{path.stem}:{name}"
    for path in CONFIGS
    for name in config.module(str(path)).RECIPES
    if not name.startswith("rival_")  # Run by the study that they are arms of,
]
SLOW = ("hjepa:evidence",)  # which has eleven.
SEARCHES = ("rates", "lengths")  # Of what is run by the study of the same name.

# Where a recipe starts from what another one has made: (files, recipe of RECIPES).
STARTS = {
    "finetune_vit:": "localmim:",
    "linprobe_vit:": "localmim:",
    "knn:": "localmim:",
    "finetune_vit:ft_vitb": "localmim:localmim_vitb_100_1gpu",
    "linprobe_vit:lp_vitb": "localmim:localmim_vitb_100_1gpu",
    "knn:knn_vitb": "localmim:localmim_vitb_100_1gpu",
    "finetune_hvit:": "simclr_hvit:",
    "finetune_vit:digits": "localmim:digits",
    "distill:": "localmim:digits",
    "distill:evidence_student": "distill:evidence_teacher",
    "parts:evidence_run": "hjepa:birds",
    "latent_mim:eurosat": "latent_mim:nano",
    "latent_mim:pastis": "latent_mim:nano",
    "latent_mim:mados": "latent_mim:nano",
    "latent_mim:geotiff": "latent_mim:nano",
}
EVERYWHERE = {
    "steps": 2,
    "batch_size": 8,
    "optim.warmup_epochs": 0.0,
    "data.threads": 1,
    "data.workers": 0,
    "evals.batch_size": 8,
    "evals.online_samples_train": 16,
    "evals.online_samples_test": 8,
    "evals.final_samples_train": 16,
    "evals.final_samples_test": 8,
    "evals.knn_k": "(3,)",
    "evals.probe_epochs": 1,
    "log.tensorboard": False,
    "log.pictures": False,
    "log.every_steps": 1,
}
# What makes no other program, nor another road: arms that differ in these are one here.
LENGTHS = ("steps=", "epochs=", "optim.lr=", "optim.warmup_epochs=", "data.per_class=")
LENGTHS += ("optim.wd=", "objective.background=", "objective.concentration=")
# Two blocks freeze at one event: before the third of four steps, the fifth of six.
FREEZING = {
    "finetune_vit:freezing": {
        "steps": 4,
        "freeze.layers": "(('backbone/(cls|pos_embed|patch_embed/.*)', 0), "
        "('backbone/block_0/.*', 0), ('backbone/(block_1|norm)/.*', 1))",
    },
    "localmim:evidence": {
        "steps": 6,
        "evals.final": "()",  # They are scored by fine-tuning.
        "model.depth": 3,
        "stages.blocks": "(0, 2)",
        "stages.scales": "(1.0, 1.0)",
        "freeze.layers": "(('encoder/(cls|patch_embed/.*|block_[01]/.*)', 0), "
        "('(norm|decoder)_0/.*', 0), ('encoder/(block_2|norm)/.*', 1))",
        "study.arms.one_target": (
            "freeze.schedule=none",
            "stages.blocks=(2,)",
            "stages.scales=(1.0,)",
            "steps=1",
        ),
        # What differs from another arm in length alone.
        "study.arms.none_shorter": ("freeze.schedule=none", "steps=1"),
        "study.arms.store_steps": ("freeze.schedule=cubic", "steps=1"),
        "study.arms.store_batch": (
            "freeze.schedule=cubic",
            "freeze.store.views=2",
            "freeze.grow_batch=(12,)",
        ),
        "study.arms.decoders": (
            "freeze.schedule=none",
            "optim.freeze=(('(norm|decoder)_0/.*', 0.4),)",
        ),
        "study.arms.stacked": (
            "freeze.schedule=none",
            "freeze.grow_depth=((0.0, 2), (0.5, 3))",
        ),
        "study.columns": "('then/final/test/top1',)",
    },
}


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    """One device, and probes that need not converge: half of a study's time here."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setitem(linear.logistic.__kwdefaults__, "iterations", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return source -> data.root; each tree is written once."""
    base, made = tmp_path_factory.mktemp("data"), {}

    def root(source):
        if source not in layouts.MAKERS:
            return ""
        if source not in made:
            made[source] = layouts.make(source, base / source)
        return made[source]

    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """Return recipe -> its workdir; each is run once, and what it starts from too."""
    made = {}

    def workdir(recipe):
        start = STARTS.get(recipe, STARTS.get(recipe.split("_from")[0]))
        start = start or STARTS.get(recipe.split("_cubic")[0])
        key = "teacher.from" if recipe.startswith("distill") else "init.from"
        given = {key: workdir(start)} if start else {}
        argv = command(recipe, data, **given)
        # Recipes that differ in what two steps do not reach, or in numbers that are
        # the same for all here, are one run.
        resolved = _resolved(argv)
        if resolved not in made:
            folder = tmp_path_factory.mktemp("run") / recipe.replace(":", "-")
            begin = time.perf_counter()
            assert main.main([*argv, f"--workdir={folder}"]) == 0, recipe
            print(f"{recipe}: {time.perf_counter() - begin:.1f} s")
            made[resolved] = folder
        return made[resolved]

    return workdir


def command(recipe, data, **given):
    """Return the arguments that run a recipe in small."""
    file, _, name = recipe.partition(":")
    spec = f"{ROOT}/configs/{file}.py:{name}"
    # Read, so that sizes of 0 are those of training.
    learns = config.recipe(spec).method == "distill"  # Not what its study trains too.
    own = {"teacher.from": "untrained"} if learns else {}
    overrides = [f"{k}={v}" for k, v in own.items()]
    c = experiment.read(experiment.load(spec, ["init.from=DIR", *overrides])).config
    given = own | given
    changes = EVERYWHERE | shrunk(c) | given
    changes["data.root"] = data(c.data.source)
    if c.get("objective", {}).get("loss") == "binary":
        changes["data.options.labels"] = layouts.table(changes["data.root"])
    if c.epochs == 0:
        del changes["steps"]
    changes |= FREEZING.get(recipe, {})
    if "study" in c:
        changes["study.seeds"] = "(0,)"
        if then := c.study.get("then", ()):
            depth = f"model.depth={changes['model.depth']}"
            changes["study.then"] = (*first(then[0], data), depth)
        only = {}
        for arm, words in c.study.arms.items():
            own, kind = changes.get(f"study.arms.{arm}", words), _kind(words)
            if words and "=" not in words[0]:  # Of another config.
                own = first(words[0], data)
            elif own == words:
                own = kind
            changes[f"study.arms.{arm}"] = own
            only.setdefault(own, (arm, kind))
        # A search of what another study runs has one arm of it, and those of its own.
        others = config.module(f"{ROOT}/configs/{file}.py").RECIPES
        ran, _, search = name.partition("_")
        seen = others[ran]().study.arms.values() if search in SEARCHES else ()
        seen = set(map(_kind, seen))
        new = tuple(arm for arm, kind in only.values() if kind not in seen)
        changes["study.only"] = new or (next(iter(only.values()))[0],)
        before = c.study.get("first", ())
        if isinstance(before, ml_collections.ConfigDict):
            for key, made in before.items():
                words = first(made[0], data)
                if "teacher.from=@teacher" in made:  # What the arms start from.
                    words += (f"model.depth={changes['model.depth']}",)
                changes[f"study.first.{key}"] = (*words, *made[1:])
        elif before:
            changes["study.first"] = first(before[0], data)
    words = [f"--config.{k}={v}" for k, v in changes.items()]
    return [f"--config={spec}", *words]


def _kind(words) -> tuple:
    """Return the overrides of an arm without those that make no other program."""
    return tuple(w for w in words if not w.startswith(LENGTHS))


def _resolved(argv) -> str:
    flags = main.parse(argv)
    return config.to_json(experiment.load(flags["config"], flags["overrides"]))


def first(spec, data):
    """Return `study.first` in small."""
    recipe = pathlib.Path(spec).name.replace(".py", "")
    words = command(recipe if ":" in recipe else f"{recipe}:", data)[1:]
    return (f"{ROOT}/{spec}", *(w.removeprefix("--config.") for w in words))


def shrunk(c) -> dict:
    """Return the overrides that make a recipe's network and images small."""
    found = {}
    if c.get("per_device", 0):
        found["per_device"] = 4  # Two micro-batches, as on fewer devices than theirs.
    if thaw := c.optim.get("thaw", ()):  # Within these two steps.
        found["optim.thaw"] = tuple((pattern, 0.003) for pattern, _ in thaw)
    if c.method != "parts":  # Numbers alone, of which its rules make large ones.
        found |= {"optim.lr": 4e-4, "optim.min_lr": 4e-6, "optim.wd": 0.02}
    if c.get("model", {}).get("drop_path", 0):
        found["model.drop_path"] = 0.1
    if c.freeze.schedule != "none":  # The first of them before the second step.
        found["freeze.t_0"] = 0.65
    if "presence_group" in c.get("objective", {}):
        found["objective.presence_group"] = 1 if c.batch_size == 16 else 4
    found |= _METHODS.get(c.method, _image)(c)
    if c.method in ("localmim", "mae"):
        found |= {"decoder.width": 16, "decoder.heads": 2, "decoder.depth": 1}
    if c.method == "localmim":  # The finest target and the coarsest.
        scales = tuple(c.stages.scales)
        found |= {"stages.blocks": (0, 1), "stages.scales": (scales[0], scales[-1])}
    if "linear" in c.evals.final and c.precision == "bfloat16":
        # The demos measure all there is; of the published recipes k-NN is enough.
        found["evals.final"] = "('knn',)"
    if "model" in c:
        found |= _MODELS[c.model.name](c)
    return found


def _side(c) -> int:
    """Return the side of the small images: whole patches, at every stage."""
    if c.model.name in ("resnet", "convnext"):
        return 64
    patch = c.model.patch
    if c.model.name == "hvit":
        return patch * 2 ** len(c.model.depths) // (1 if patch < 14 else 2)
    grid = {"localmim": 2, "classify": 2, "mae": 4}.get(c.method, 3)
    return c.model.image_size if patch < 14 else grid * patch


def _image(c) -> dict:
    side = _side(c)
    return {"augment.size": side, "evals.image_size": side}


def _hjepa(c) -> dict:
    patch = c.model.patch
    side = 6 * patch
    found = {"multicrop.global_crop_size": side, "evals.image_size": side}
    found["multicrop.local_crop_size"] = 3 * patch
    found |= {"predictor.depth": 1, "predictor.heads": 2, "masking.num_target_masks": 2}
    if c.predictor.width:
        found["predictor.width"] = 16
    return found


def _dino(c) -> dict:
    patch = c.model.patch
    side = 3 * patch
    found = {"multicrop.global_crop_size": side, "evals.image_size": side}
    found |= {"multicrop.local_crop_size": patch, "head.outputs": 16}
    found["multicrop.num_local_crops"] = min(2, c.multicrop.num_local_crops)
    return found | {"head.hidden": 16, "head.bottleneck": 8}


def _latent_mim(c) -> dict:
    found = {"network.size": "", "network.width": 16, "network.heads": 2}
    found |= {"network.depth": 1, "network.decoder_depth": 1}
    found |= {"readout.times": min(2, c.readout.times), "measures.epochs": 1}
    if c.data.source == "fields":
        return found | {"evals.image_size": 16, "data.options.count": 16}
    side = 32 if c.data.source == "imagenet" else 16
    most = max(1, side // max(c.hybrid.processing_patch_size or (8,)))
    found |= {"sampling.tile": side, "sampling.min_side": most}
    found |= {"sampling.max_side": most, "sampling.times": c.readout.times and 2}
    if c.sampling.times == 1:
        found["sampling.times"] = 1
    return found | {"evals.image_size": side, "hybrid.loss_tokens_per_modality": 32}


def _vit(c) -> dict:
    found = {"model.width": 16, "model.heads": 2, "model.depth": 2}
    side = {"hjepa": 6, "dino": 3, "distill": 6}.get(
        c.method, 0
    ) * c.model.patch or _side(c)
    return found | {"model.image_size": side}


def _hvit(c) -> dict:
    heads = c.model.heads
    depths = (1,) * len(c.model.depths)
    found = {"model.width": 4 * heads[0], "model.depths": depths}
    return found | {"model.image_size": _side(c)}


def _resnet(c) -> dict:
    found = {"model.depths": (1, 1, 1, 1), "model.widths": (8, 8, 16, 16)}
    return found | {"model.stem": 8}


def _distill(c) -> dict:
    side = 6 * c.model.patch
    found = {"multicrop.global_crop_size": side, "evals.image_size": side}
    found["multicrop.local_crop_size"] = 3 * c.model.patch
    return found | {"multicrop.num_local_crops": min(2, c.multicrop.num_local_crops)}


_METHODS = {
    "dino": _dino,
    "distill": _distill,
    "hjepa": _hjepa,
    "latent_mim": _latent_mim,
}
_MODELS = {"vit": _vit, "hvit": _hvit, "resnet": _resnet}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=[pytest.mark.slow] * (r in SLOW)) for r in RECIPES],
)
def test_every_recipe_runs(recipe, run):
    workdir = run(recipe)
    if (workdir / "study.json").exists():
        table = json.loads((workdir / "study.json").read_text())
        for arm, columns in table.items():
            # An arm without parts has no measure of them.
            values = [v for each in columns.values() for v in each if v is not None]
            assert len(values) > 1 and all(map(math.isfinite, values)), arm
        return
    status = json.loads((workdir / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["step"] == status["total_steps"]
    lines = [
        json.loads(x) for x in (workdir / "metrics.jsonl").read_text().split("\n") if x
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == status["step"] and all(map(math.isfinite, losses))
    assert any(key.startswith("final/") for line in lines for key in line), status
