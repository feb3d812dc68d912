import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vitssl.pictures import panels


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_an_image_of_any_number_of_channels_becomes_three(channels):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), np.uint8)
    shown = panels.rgb(image)
    assert shown.shape == (4, 5, 3)
    assert shown.dtype == np.float32
    for c in range(3):
        if channels == 1:
            want = image[..., 0] / 255
        else:
            want = image[..., c] / 255 if c < channels else np.zeros((4, 5))
        np.testing.assert_allclose(shown[..., c], want, atol=1e-6)


def test_floats_are_taken_as_they_are_and_clipped():
    shown = panels.rgb(np.array([[[-1.0, 0.25, 3.0]]]))
    np.testing.assert_array_equal(shown, [[[0.0, 0.25, 1.0]]])


def test_paint_covers_the_patches_of_the_mask_and_nothing_else():
    image = np.full((8, 12, 3), 0.5, np.float32)
    mask = np.zeros((2, 3), bool)
    mask[1, 2] = mask[0, 0] = True
    painted = panels.paint(image, mask, "#FF0000", 0.5)
    want = image.copy()
    want[4:, 8:] = want[:4, :4] = [0.75, 0.25, 0.25]
    np.testing.assert_allclose(painted, want)
    np.testing.assert_array_equal(image, 0.5)


def test_paint_covers_every_pixel_when_the_grid_does_not_divide_the_image():
    painted = panels.paint(np.zeros((7, 10, 3)), np.ones((3, 3), bool), "white", 1.0)
    np.testing.assert_array_equal(painted, 1.0)


def test_outline_of_one_patch_is_its_four_edges():
    _, axes = panels.tiles(1, 1)
    mask = np.zeros((3, 2), bool)
    mask[1, 0] = True
    panels.outline(axes[0, 0], mask, (30, 40), "black")
    (lines,) = axes[0, 0].collections
    drawn = {tuple(map(tuple, s + 0.5)) for s in lines.get_segments()}
    assert drawn == {
        ((0, 10), (20, 10)),
        ((0, 20), (20, 20)),
        ((0, 10), (0, 20)),
        ((20, 10), (20, 20)),
    }


def test_the_inner_edges_of_a_block_are_not_outlined():
    _, axes = panels.tiles(1, 1)
    panels.outline(axes[0, 0], np.ones((2, 2), bool), (2, 2), "black")
    (lines,) = axes[0, 0].collections
    assert len(lines.get_segments()) == 8


def test_a_count_that_is_no_square_needs_a_grid():
    assert panels.square(49) == (7, 7)
    with pytest.raises(ValueError, match="12 patches are no square"):
        panels.square(12)


@pytest.mark.parametrize("headings", ["every", "first", "none"])
def test_tiles_are_squares_of_one_size_that_do_not_overlap(headings):
    figure, axes = panels.tiles(2, 3, "a title", size=1.5, headings=headings)
    width, height = figure.get_size_inches()
    boxes = [a.get_position() for a in axes.ravel()]
    for box in boxes:
        assert box.width * width == pytest.approx(1.5)
        assert box.height * height == pytest.approx(1.5)
        assert 0 <= box.x0 and box.x1 <= 1 and 0 <= box.y0 and box.y1 <= 1
    assert axes[0, 0].get_position().y0 > axes[1, 0].get_position().y1
    assert axes[0, 0].get_position().x1 < axes[0, 1].get_position().x0


def test_a_picture_is_returned_and_written_only_when_it_has_a_path(tmp_path):
    @panels.picture
    def one(colour):
        figure, axes = panels.tiles(1, 1, size=1.0, headings="none", label=False)
        panels.show(axes[0, 0], np.zeros((4, 4, 3)) + colour)
        return figure

    assert one(1.0).axes
    path = tmp_path / "new" / "one.png"
    one(0.0, path=path)
    with Image.open(path) as written:
        pixels = np.asarray(written.convert("RGB"))
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
    np.testing.assert_array_equal(middle, 0)
    np.testing.assert_array_equal(pixels[0, 0], 255)
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_the_style_does_not_leak_into_the_users_own_figures():
    import matplotlib

    before = dict(matplotlib.rcParams)
    panels.picture(lambda: panels.charts(2)[0])()
    assert dict(matplotlib.rcParams) == before


def test_nothing_is_imported_that_could_want_a_display():
    code = (
        "import sys; import vitssl.pictures.drawing; "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("rows, columns", [(40, 2), (2, 40), (24, 24)])
def test_so_many_tiles_as_there_are_fit_a_screen(rows, columns, tmp_path):
    @panels.picture
    def draw():
        options = dict(headings="none", label=False, right=0.9, key=[("red", "red")])
        return panels.tiles(rows, columns, "A title", **options)[0]

    draw(path=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert 1000 < max(image.size) <= panels.SIDE


def test_a_figure_of_any_size_is_written_no_larger_than_a_screen(tmp_path):
    @panels.picture
    def draw():
        return Figure(figsize=(4.0, 40.0))

    draw(path=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (200, 2000)


def test_values_of_patches_become_pixels_without_steps():
    wide = panels.smooth(np.array([[0.0, 1.0], [0.0, 1.0]]), (40, 60, 3))
    assert wide.shape == (40, 60) and wide.min() == 0 and wide.max() == 1
    assert (np.diff(wide, axis=1) >= 0).all() and np.diff(wide, axis=1).max() < 0.1
