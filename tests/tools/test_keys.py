"""What a config key means is said by the class that reads it."""

import pytest

from tests import runs
from vitssl import cli, errors
from vitssl.tools import keys

CONFIGS = runs.ROOT / "configs"


def said(key):
    return keys.explain(key, CONFIGS).splitlines()


def test_a_key_has_a_meaning_a_type_a_default_and_recipes():
    lines = said("optim.lr")
    assert lines[:2] == [
        "optim.lr",
        "  peak learning rate; for `lr_batch` images if that is not 0.",
    ]
    assert "    type     float above 0" in lines
    assert "    default  none; a recipe has to state it" in lines
    rest = lines[lines.index("    set by") + 1 :]
    (mine,) = [line for line in rest if "hjepa:cifar10_vitti" in line]
    assert mine.startswith("      0.0001: ")


@pytest.mark.parametrize(
    "key, lines",
    [
        ("accumulate", ["    type     int 1 or more", "    default  1"]),
        ("precision", ["    type     one of float32, bfloat16"]),
        ("freeze.t_0", ["    default  0.8"]),
        ("freeze.store.views", ["    type     int in [0, "]),
        ("init.from", ["    default  ''"]),
        ("data.options.size", ["  data.source=fields:", "    default  48"]),
        ("model.depths", ["  model.name=hvit:", "  model.name=resnet:"]),
        ("optim.gamma", ["  see schedule: shape after the warm-up; ends at `min_lr`."]),
        ("--config.seed", ["    default  none; a recipe has to state it"]),
    ],
)
def test_keys_of_every_kind_are_explained(key, lines):
    found = said(key)
    for line in lines:
        assert any(one.startswith(line) for one in found), found


def test_a_section_lists_its_keys():
    lines = said("freeze")
    assert lines[0] == "freeze"
    assert any(line.split()[:2] == ["t_0", "when"] for line in lines)


@pytest.mark.parametrize(
    "key, near", [("optm.lr", "optim.lr"), ("evals.knn_kk", "evals.knn_k"), ("x", "")]
)
def test_a_key_that_is_none_names_the_nearest(key, near, capsys):
    with pytest.raises(errors.UsageError, match=f"{key}: no such key.*{near}"):
        keys.explain(key, CONFIGS)
    assert cli.main(["recipes", f"--explain={key}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nearly_every_key_is_explained_and_none_is_left_out():
    tree = keys._tree()
    bare = [
        f"{section}.{leaf} ({one.of})"
        for section, found in tree.items()
        for leaf, each in found.items()
        for one in each
        if not one.meaning
    ]
    assert [key for key in bare if "data.source=mixture" not in key] == []
    # What a config may hold, the tree holds.
    from vitssl.run import experiment

    for name in ("hjepa", "localmim", "parts", "latent_mim", "simclr_hvit"):
        c = experiment.load(f"{CONFIGS}/{name}.py")
        for key, _ in experiment._leaves(c):
            section, _, leaf = key.rpartition(".")
            assert leaf in tree.get(section, {}) or leaf == "name", key


def test_attributes_are_read_from_a_docstring():
    doc = """Title.

    Attributes:
        a: one thing,
            told at length.
        b, c: two.
        from_: a word of Python.

    Source: none: at all.
    """
    import inspect

    assert keys.attributes(inspect.cleandoc(doc)) == {
        "a": "one thing, told at length.",
        "b": "two.",
        "c": "two.",
        "from": "a word of Python.",
    }
