"""The package stays as small, flat and orderly as it has become; see `tests.house`."""

import pytest

from tests import house

FILES = {
    "__init__.py": '"""The package."""\n',
    "errors.py": '"""Errors.\n\nTwo\n"""\n\nimport json  # Standard.\n\nX = 1\n',
    "tree.py": "import jax\n",
    "losses/__init__.py": "",
    "losses/tiny.py": "from toy import errors\n\n\ndef tiny():\n    return errors.X\n",
    "ops/__init__.py": "",
    "ops/mix.py": "def mix():\n    from toy.losses.tiny import tiny\n\n    tiny()\n",
    "data/__init__.py": "",
    "data/masks.py": (
        "from toy import tree\nfrom toy.data import views\n\n\n"
        "class Masks:\n"
        "    def draw(self):\n        return self._draw() + tree.x\n\n"
        "    def _draw(self):\n        return _draw()\n\n"
        "    def check(self):\n        # Nothing.\n        yield from views.V\n\n\n"
        "def _draw():\n    def inner():\n        return 1\n\n    return inner()\n"
    ),
    "data/views.py": "from toy.data import masks\n\nV = masks.Masks().draw()\n",
    "methods/__init__.py": "",
    "methods/a/masks.py": "import numpy as np\n",
    "methods/b/masks.py": "",
    "methods/b/names.py": "from toy.run import loop\n",
    "run/__init__.py": "",
    "run/loop.py": "",
    "run/tiny.py": "import toy.run.loop\n",
}


@pytest.fixture
def toy(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/x.py").write_text("A = 1\n\nB = 2\n")
    return house.House(tmp_path / "toy", tmp_path / "configs")


@pytest.fixture(scope="module")
def rows():
    return house.measure()


def test_the_table_has_a_row_for_everything_measured(rows):
    print("\n" + house.table(rows))
    assert list(rows) == list(house.CEILINGS)


@pytest.mark.parametrize("name", house.CEILINGS)
def test_no_ceiling_is_passed(rows, name):
    ceiling, now = house.CEILINGS[name].ceiling, house.number(rows[name])
    assert now <= ceiling, f'see: python -m tests.house "{name}"'


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings(toy):
    assert toy.modules["errors"].code == 2 and toy.modules["data.masks"].code == 13
    assert toy.lines() == sum(text.count("\n") for text in FILES.values())
    assert toy.config_lines() == 3 and toy.check_lines() == 3
    assert toy.largest_file() == 21 and toy.largest_function() == 5
    assert toy.at_the_top() == ["__init__.py", "errors.py", "tree.py"]


def test_an_importer_counts_once_and_wherever_it_imports(toy):
    assert toy.single_importer() == [
        "data.masks <- data.views",
        "data.views <- data.masks",
        "errors <- losses.tiny",
        "losses.tiny <- ops.mix",
        "tree <- data.masks",
    ]


def test_private_names_are_counted_in_their_file_and_inner_functions_not(toy):
    found = [line.split(" ")[1] for line in toy.one_reference()]
    # `_draw`, method and function, is used twice by name; `mix` and `check` never.
    assert found == ["Masks.draw", "tiny"]


def test_floors_and_circles_follow_the_imports_of_modules(toy):
    assert toy.floors() == ["data.masks <-> data.views", "tree"]
    assert toy.floors_inside() == ["ops.mix", "losses.tiny", "errors"]
    assert toy.graph()["ops.mix"] == set()
    assert toy.graph(inside=True)["ops.mix"] == {"losses.tiny"}
    assert toy.circles() == ["data.masks <-> data.views"]


def test_arrows_up_are_those_from_a_lower_room(toy):
    assert toy.arrows_up() == [
        "methods/b/names.py:1 -> run.loop",
        "ops/mix.py:2 -> losses.tiny",
    ]


def test_host_modules_reach_jax_through_others_too(toy):
    assert toy.reach_jax() == [
        "data.masks: data.masks > tree > jax",
        "data.views: data.views > data.masks > tree > jax",
    ]


def test_a_name_in_two_folders_is_found_but_rooms_may_share_theirs(toy):
    assert toy.repeated_names() == ["tiny: losses, run"]


def test_a_room_without_a_level_and_a_call_that_moved_are_named(toy):
    with pytest.raises(LookupError, match="attic.x: no level; write 'attic'"):
        house._level("attic.x")
    assert toy.calls(("ops.mix:mix", "losses.tiny:tiny")) == ["losses.tiny:tiny"]
    with pytest.raises(LookupError, match="ops.mix:gone: moved"):
        toy.calls(("ops.mix:gone",))
