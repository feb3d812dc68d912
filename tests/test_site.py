"""The documentation site has every page, and what it documents is there."""

import importlib.util
import pydoc

import pytest

from tests import runs

yaml = pytest.importorskip("yaml")
SITE = runs.ROOT / "docs" / "site"


@pytest.fixture(scope="module")
def hooks():
    found = importlib.util.spec_from_file_location("hooks", SITE / "hooks.py")
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


def _pages(entries):
    for entry in entries:
        for value in entry.values():
            yield from _pages(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation(hooks):
    said = yaml.safe_load((SITE / "mkdocs.yml").read_text())
    written = {path.name for path in (runs.ROOT / "docs").glob("*.md")}
    listed = list(_pages(said["nav"]))
    assert len(set(listed)) == len(listed)
    assert set(listed) == written | {*hooks.PAGES.values(), "api.md"}
    assert all((runs.ROOT / path).is_file() for path in hooks.PAGES)


def test_every_documented_name_is_there(hooks):
    for name in (name for names in hooks.PYTHON.values() for name in names):
        assert pydoc.locate(name).__doc__, name


@pytest.mark.parametrize(
    "source, target, want",
    [
        ("README.md", "docs/images.md", "images.md"),
        ("docs/faults.md", "../README.md#options", "index.md#options"),
        ("docs/trainer.md", "compiled.md", "compiled.md"),
        ("docs/evidence.md", "../configs/evidence/x.png", "evidence/x.png"),
        ("README.md", "configs/hjepa.py", ""),
        ("launch/README.md", "../configs/README.md", "recipes.md"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(hooks, source, target, want):
    assert hooks._on_the_site(source, target) == want


def test_words_stay_where_a_link_leads_nowhere_and_code_is_left_alone(hooks):
    text = (
        "[`a`](b.md), ![c](d.png), [e](https://f), [g](#h), `[i](j)`\n```\n[k](l)\n```"
    )
    want = "`a`, c, [e](https://f), [g](#h), `[i](j)`\n```\n[k](l)\n```"
    assert hooks.relinked(text, lambda target: "") == want
    got = hooks.relinked(text, {"b.md": "B", "d.png": "D"}.get)
    assert got.startswith("[`a`](B), ![c](D), [e](https://f)")
