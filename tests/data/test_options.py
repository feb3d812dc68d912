"""Options of a data source: all of them are reachable, and none is left over."""

import logging
import pathlib

import pytest

from vitssl import config, errors
from vitssl.data import sources
from vitssl.run import experiment

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = config.files(ROOT / "configs")
PARTS = f"{ROOT}/configs/parts.py"


def _recipes():
    for path in CONFIGS:
        for name in config.module(str(path)).RECIPES:
            yield pytest.param(f"{path}:{name}", id=f"{path.stem}:{name}")


@pytest.mark.parametrize("spec", list(_recipes()))
def test_the_options_of_every_recipe_are_known_to_its_source(spec):
    data = config.recipe(spec).data
    assert set(data.options) <= set(sources.options_of(data.source))


@pytest.mark.parametrize("source", sources.SOURCES)
def test_every_option_of_every_source_can_be_set(source):
    c = experiment.load(PARTS, [f"data.source={source}", "data.options={}"])
    for key, default in sources.options_of(source).items():
        if key == "channels":
            continue
        assert c.data.options[key] == default
        text = default if isinstance(default, str) else repr(default)
        words = [f"data.options.{key}={text}", f"data.source={source}"]
        again = experiment.load(PARTS, words)
        assert again.data.options[key] == default


def test_another_source_keeps_the_options_it_has_and_says_which_it_lacks(caplog):
    caplog.set_level(logging.WARNING)
    c = experiment.load(PARTS, ["data.source=folder", "data.options.holdout=0.2"])
    assert dict(c.data.options) == dict(
        holdout=0.2,
        labels="folder",
        divided="auto",
        value_range=(),
        listed="",
        separator="auto",
    )
    assert caplog.messages == ["data.source=folder has no count, purity: dropped"]
    # Leaves are counted as well, and the file said how many.
    smoke = experiment.load(f"{PARTS}:smoke", ["data.source=leaves"])
    assert smoke.data.options.count == 64 and smoke.data.options.cast == 0.25


def test_another_source_with_the_same_option_has_its_own_default():
    # Birds are drawn with noise 12 and scenes with 8; no file said either.
    assert experiment.load(PARTS).data.options.noise == 12
    assert experiment.load(PARTS, ["data.source=scenes"]).data.options.noise == 8


def test_options_can_be_given_as_a_whole():
    c = experiment.load(PARTS, ["data.options={}"])
    assert c.data.options.purity == 0.95  # The source's default, not the demo's 0.5.
    c = experiment.load(PARTS, ["data.options={'count': 7}", "data.options.size=40"])
    assert (c.data.options.count, c.data.options.size) == (7, 40)


def test_another_model_keeps_the_keys_it_has(caplog):
    caplog.set_level(logging.WARNING)
    c = experiment.load(f"{ROOT}/configs/finetune_vit.py", ["model.name=convnext"])
    assert c.model.name == "convnext" and "heads" not in c.model
    assert "model.name=convnext has no" in caplog.messages[0]


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["data.options.cuont=3"], "did you mean 'count'"),
        (["data.options.count=many"], "data.options.count=many: want int"),
        (["data.options=3"], "data.options=3: want"),
        (["data.options={'cuont': 3}"], "data.options.cuont: birds has: count, "),
        (["data.options={'count': 'x'}"], "data.options.count='x': want int"),
        (["data.source=brids"], "did you mean 'birds'"),
        (["data.options.purity=2"], "data.options.purity=2.0: in [0, 1]"),
    ],
)
def test_mistakes_in_options_are_one_line(overrides, says):
    with pytest.raises(errors.UsageError, match=".") as caught:
        experiment.read(experiment.load(PARTS, overrides))
    assert says in str(caught.value)
