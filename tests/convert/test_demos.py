"""The small networks that come with the package."""

import numpy as np
import pytest

import vitssl
from tests import runs
from vitssl import errors
from vitssl.convert import demos
from vitssl.data import sources, views
from vitssl.evals import knn
from vitssl.run import experiment, opened


@pytest.mark.parametrize("name", demos.names())
def test_a_demo_is_of_its_recipe_and_has_a_card(name):
    about = opened.past(f"demo:{name}").weights.about
    recipe = experiment.read(experiment.load(f"{runs.ROOT}/configs/{name}.py:digits"))
    model = recipe.config.model.to_dict()
    assert model | about.model == model  # Keys that came later have their defaults.
    card = (demos.FOLDER / f"{name}.md").read_text()
    trained, untrained = (
        about.metrics[f"final/{row}/knn/top1"] for row in ("trained", "untrained")
    )
    assert f"final/trained/knn/top1={trained}" in card and trained > untrained + 0.1
    assert f"| `{name}` |" in (demos.FOLDER / "README.md").read_text()
    # A path of whoever made it is nobody's business.
    assert about.config["data"]["root"] == ""


@pytest.mark.parametrize("name", demos.names())
def test_a_demo_scores_what_its_card_says(name):
    features, view, sides = vitssl.load(f"demo:{name}"), views.Evaluate(24), []
    for split in ("train", "test"):
        source = sources.open("digits", "", split)
        images = np.stack([view(source[i])["image"] for i in range(len(source))])
        vector = np.asarray(features(images)["pooled"])
        sides.append({"vector": vector, "label": source.labels})
    about = opened.past(f"demo:{name}").weights.about
    k = about.config["evals"]["knn_k"][0]
    found = knn.KNN((k,), (0.07,))(*sides, 10)["top1"]
    told = about.metrics["final/trained/knn/top1"]
    assert found == pytest.approx(told, abs=0.006)  # Two of 359, for 16 bits.


def test_demos_are_small_and_an_unknown_one_is_one_line():
    total = sum(path.stat().st_size for path in demos.FOLDER.iterdir())
    assert total < 5_000_000
    with pytest.raises(errors.CheckpointError, match="demo:mae: there is: demo:") as e:
        vitssl.load("demo:mae")
    assert "demo:localmim" in str(e.value)
