"""configs/README.md says what the configs say, and its commands are valid."""

import pytest

from tests import runs
from vitssl import cli, errors, experiment, recipes

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
        assert "give" not in found[""].data + found["smoke"].data


def test_recipes_that_need_data_say_so(files):
    (hjepa,) = [f for f in files if f.path.name == "hjepa.py"]
    data = {r.spec.partition(":")[2]: r.data for r in hjepa.recipes}
    assert data["imagenet_vitb"] == "imagenet (give `data.root`)"
    assert data[""] == "digits" and data["evidence_run"] == "scenes"


def test_the_overrides_of_every_docstring_are_valid(files):
    count = 0
    for file in files:
        for line in file.overrides:
            # What follows two spaces is a remark; DIR and ... are the reader's.
            words = line.partition("  ")[0].split()
            given = [w.removeprefix("--config.") for w in words if w != "..."]
            experiment.load(str(file.path), given)
            count += len(given)
    assert count >= 5


def _config(tmp_path, docstring):
    path = tmp_path / "x.py"
    source = (CONFIGS / "hjepa.py").read_text()
    path.write_text(f'"""{docstring}"""\n' + source.split('"""', 2)[2])
    return path


def test_a_recipe_that_is_not_explained_is_an_error(tmp_path, capsys):
    _config(tmp_path, "X.\n\nArguments:\n    (none)    demo\n    nothing  no\n")
    assert cli.main(["recipes", str(tmp_path)]) == 2
    assert "recipe 'cifar10_vitb' is not explained" in capsys.readouterr().err
    with pytest.raises(errors.UsageError, match=r"no config \(\*\.py\) in it"):
        recipes.read(tmp_path / "empty")


def test_arguments_are_read_from_a_docstring():
    lines = (
        "Title.\n\nArguments (`x`):\n    (none)     demo,\n               slow\n"
        "    a, b\n               two of them\n"
        "    c          one\n\nOther:\n    d   no\n"
    ).splitlines()
    assert recipes.arguments(lines) == {
        "": "demo, slow",
        "a": "two of them",
        "b": "two of them",
        "c": "one",
    }
