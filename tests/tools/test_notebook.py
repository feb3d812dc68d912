"""What notebooks show: a bar that is written over, pictures as images."""

import logging

import pytest
from matplotlib.figure import Figure

from tests.tools import made
from vitssl import errors
from vitssl.progress import Progress
from vitssl.tools import notebook


def test_the_bar_shows_steps_and_keeps_what_matters(capsys, monkeypatch):
    package = logging.getLogger("vitssl")
    before = package.handlers[:], package.level, package.propagate
    monkeypatch.setattr(notebook, "_PAUSE", 0.0)
    with notebook.bar():
        logger, told = logging.getLogger("vitssl.run.loop"), Progress("training", 12)
        logger.info("  devices   many lines of the start")
        told.update(3, lambda: " 3/12  loss 0.5")
        told.update(6, lambda: " 6/12  loss 0.4")
        logger.info("  after step 6: k-NN 50.0%")
        logger.warning("look out")
        told.update(12, lambda: "12/12  loss 0.3")
        told.close()
        logger.info("It learned: a lot.")
    said = capsys.readouterr().out
    assert "many lines" not in said
    first, second = said.split("\r")[1:3]
    assert first.startswith("█" * 6 + "░" * 18 + " 3/12  loss 0.5")
    assert second.startswith("█" * 12 + "░" * 12 + " 6/12  loss 0.4")
    # What is kept begins a line of its own, and the last bar ends its line.
    assert "\n  after step 6: k-NN 50.0%\nlook out\n\r" + "█" * 24 in said
    assert said.endswith("\nIt learned: a lot.\n")
    assert (package.handlers, package.level, package.propagate) == before


def test_a_run_asked_for_every_line_shows_them(capsys):
    with notebook.bar(verbose=True):
        logging.getLogger("vitssl.run.loop").info("  devices   one")
    assert capsys.readouterr().out == "  devices   one\n"


def test_pictures_are_stacked_at_one_width(tmp_path):
    run = made.run(tmp_path / "a")
    found = notebook.pictures(run, "neighbours", "anything_else", width=6)
    assert found.size == (6, 12) and found.getpixel((0, 0)) == (0, 0, 0)
    assert notebook.pictures(run, "neighbours", width=20).size == (20, 8)
    with pytest.raises(errors.UsageError, match="no picture 'x'; there is: anything_e"):
        notebook.pictures(run, "x")


def test_a_figure_becomes_an_image_every_notebook_shows():
    found = notebook.picture(Figure(figsize=(2, 1)))
    assert found.size == (220, 110) and found._repr_png_().startswith(b"\x89PNG")
