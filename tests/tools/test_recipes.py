"""configs/README.md says what the configs say, and its commands are valid."""

import json
import shlex
import shutil

import pytest

from tests import runs
from vitssl import cli, config
from vitssl.run import experiment
from vitssl.tools import recipes

CONFIGS = runs.ROOT / "configs"


@pytest.fixture(scope="module")
def files():
    return recipes.read(CONFIGS)


def test_the_readme_is_up_to_date(files):
    text = (CONFIGS / "README.md").read_text()
    assert text == recipes.markdown(files), "run: vitssl recipes --write"


def test_every_config_has_a_demo_and_a_smoke_run_without_data(files):
    for file in files:
        found = {r.spec.partition(":")[2]: r for r in file.recipes}
        assert {"", "smoke"} <= set(found), file.path
        assert "data.root" not in found[""].data and "give" not in found["smoke"].data


def test_recipes_that_need_data_or_weights_say_so(files):
    (knn,) = [f for f in files if f.path.name == "knn.py"]
    assert knn.recipes[0].data == "leaves (give `init.from`)"
    (hjepa,) = [f for f in files if f.path.name == "hjepa.py"]
    data = {r.spec.partition(":")[2]: r.data for r in hjepa.recipes}
    assert data["imagenet_vitb"] == "imagenet (give `data.root`)"
    assert data["digits"] == "digits" and data["scenes"] == "scenes"


def test_the_overrides_of_every_docstring_are_valid(files):
    count = 0
    for file in files:
        for line in file.overrides:
            # What follows two spaces is a remark; DIR and ... are the reader's.
            words = shlex.split(line.partition("  ")[0])
            given = [w.removeprefix("--config.") for w in words if w != "..."]
            # Configs that only evaluate need a checkpoint, which is the reader's.
            taught = ["teacher.from=DIR"] * (file.path.stem == "distill")
            c = experiment.load(str(file.path), [*taught, *given, "init.from=DIR"])
            if "..." not in words:
                experiment.read(c)
            count += len(given)
    assert count >= 5


def test_every_recipe_is_explained_and_every_explanation_has_its_recipe(files):
    bare = [r.spec for file in files for r in file.recipes if not r.text]
    assert bare == [], "say in the docstring's block Arguments what they are"
    absent = {f.path.name: f.absent for f in files if f.absent}
    assert absent == {}, "explained in the docstring, but not in RECIPES"


def _named(files):
    return {r.name: r for file in files for r in file.recipes}


def test_recipes_are_listed_by_what_they_are_for(files):
    named = _named(files)
    for name, purpose in {
        "hjepa": "laptop",
        "knn": "laptop",  # It needs a run, and that a laptop makes.
        "localmim:folder": "folder",
        "latent_mim:geotiff": "folder",
        "parts:cub_k8": "gpu",
        "mae:imagenet_vitl": "papers",
    }.items():
        assert named[name].purpose == purpose
    text = recipes.text(files)
    places = [text.index(heading) for heading in recipes.PURPOSES.values()]
    assert places == sorted(places) and places[0] == 0
    for r in named.values():
        assert f"\n  {r.name} " in text


def test_no_two_recipes_are_the_same(files):
    for file in files:
        path = str(file.path)
        specs = [f"{path}:{r.spec.partition(':')[2]}".rstrip(":") for r in file.recipes]
        configs = [config.to_json(experiment.load(spec)) for spec in specs]
        assert len(set(configs)) == len(configs), path
    also = _named(files)["finetune_vit:ft_vitb_from100_1gpu"].also
    assert "ft_vitb_from100_8gpu" in also and not any("(the same)" in f for f in also)
    # Every name is still there to be found.
    for file in files:
        module = config.module(str(file.path))
        names = [r.spec.partition(":")[2] for r in file.recipes]
        names += [name for r in file.recipes for name in r.also]
        assert sorted(names) == sorted(module.RECIPES)


def test_memory_and_time_are_known_or_a_dash(files, monkeypatch):
    found = {"hjepa": dict(bytes=3 * 2**29, images=32, on="cpu")}
    found["parts:cub_k8"] = dict(bytes=2**34, images=128, on="H200")
    monkeypatch.setattr(recipes, "_measured", lambda: found)
    assert recipes.memory_of("hjepa") == "1.50 GiB / 32 images"
    assert recipes.memory_of("parts:cub_k8") == "16.00 GiB / 128 images, H200"
    assert recipes.memory_of("hjepa:folder") == "-"
    named = _named(files)
    assert named["hjepa"].time == "minutes" and named["hjepa:smoke"].time == "seconds"
    assert named["hjepa:evidence"].time == "1 hour"
    assert named["hjepa:imagenet_vitb"].time == "-"


def test_what_is_measured_is_of_recipes_that_there_are(files):
    names = {n for f in files for r in f.recipes for n in (r.name,)}
    stored = json.loads((CONFIGS / recipes.MEASURED).read_text())
    assert set(stored) <= names and len(stored) >= 4


def test_words_choose_recipes(files, capsys):
    chosen = _named(recipes.chosen(files, ["folder", "labels"]))
    assert "hjepa:folder" in chosen and "hjepa" not in chosen
    assert set(_named(recipes.chosen(files, ["LAPTOP", "simclr"]))) >= {"simclr_hvit"}
    assert recipes.chosen(files, []) == files
    assert cli.main(["recipes", "vit", "nonsense"]) == 2
    assert "none has all of it; there is: folder, laptop" in capsys.readouterr().err


def test_what_a_recipe_is_comes_from_the_nearest_place():
    def made():
        """Return the thing.

        More of it.
        """

    said = {"a": "of the block", "b_*": "of a pattern", "c": "as c_2 does"}
    assert recipes.explain("a", said, made) == "of the block"
    assert recipes.explain("b_1", said, made) == "of a pattern"
    assert recipes.explain("d", said, made) == "the thing"
    assert recipes.explain("c_2", said, lambda: 0) == "as c_2 does"
    assert recipes.explain("e", said, lambda: 0) == ""


def test_a_folder_without_configs_is_one_line(tmp_path, capsys):
    assert cli.main(["recipes", str(tmp_path)]) == 2
    assert "no config (*.py) in it" in capsys.readouterr().err


def test_configs_work_from_any_folder_and_their_helpers_are_no_recipes(tmp_path):
    for path in CONFIGS.glob("*.py"):
        shutil.copy(path, tmp_path)
    base = tmp_path / "base.py"
    base.write_text(base.read_text().replace("batch_size=256", "batch_size=255"))
    found = experiment.load(f"{tmp_path}/knn.py:smoke")
    assert found.evals.batch_size == 255 and found.epochs == 0
    assert experiment.load(f"{CONFIGS}/knn.py:smoke").evals.batch_size == 256
    names = [path.name for path in config.files(tmp_path)]
    assert "knn.py" in names and "base.py" not in names


def test_options_and_names_do_what_they_say():
    plain = experiment.load(f"{CONFIGS}/finetune_hvit.py:sarcld_small")
    c = experiment.load(f"{CONFIGS}/finetune_hvit.py:sarcld_small,out_of_memory")
    assert (plain.accumulate, c.accumulate, c.model.remat) == (1, 4, True)
    assert c.batch_size == plain.batch_size == 32
    c = experiment.load(f"{CONFIGS}/localmim.py:freeze_cubic080_1gpu_save5")
    assert c.checkpoint.keep_every_epochs == 5


def test_arguments_are_read_from_a_docstring():
    lines = (
        "Title.\n\nArguments (`x`):\n    (none)     demo,\n               slow\n"
        "    a, b\n               two of them\n"
        "    e_{1,2}x, f_*  several\n    c          one\n\nOther:\n    d   no\n"
    ).splitlines()
    assert recipes.arguments(lines) == {
        "": "demo, slow",
        "a": "two of them",
        "b": "two of them",
        "e_1x": "several",
        "e_2x": "several",
        "f_*": "several",
        "c": "one",
    }
