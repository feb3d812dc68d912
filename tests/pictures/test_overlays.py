"""Pictures of parts: labels, layout, and one that can be written."""

import numpy as np
from PIL import Image

from vitssl.pictures import drawing, overlays


def test_labels_are_those_of_the_maps_where_nothing_is_enlarged():
    maps = np.random.default_rng(0).random((2, 5, 7, 4))
    np.testing.assert_array_equal(overlays.labels(maps, (5, 7)), maps.argmax(-1))


def test_layout_is_the_most_square_pair():
    assert [overlays.layout(n) for n in (1, 7, 12, 16)] == [
        (1, 1),
        (1, 7),
        (3, 4),
        (4, 4),
    ]


def test_every_part_has_a_colour_of_its_own():
    colours = overlays.palette(16)
    assert len(np.unique(colours.round(3), axis=0)) == 16


def test_it_is_written_where_there_are_maps(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    material = drawing.Material(images=images, parts=rng.random((2, 4, 4, 3)))
    paths = drawing.write_all(tmp_path, material)
    assert [p.name for p in paths] == ["parts.png"]
    assert paths[0].stat().st_size > 1000


def test_a_sheet_of_many_images_fits_a_screen(tmp_path):
    images = np.zeros((128, 8, 8, 3), np.uint8)
    overlays.write(tmp_path / "a.jpg", images, np.zeros((128, 2, 2, 3)))
    with Image.open(tmp_path / "a.jpg") as sheet:
        assert sheet.size == (8 * 125, 16 * 125)
