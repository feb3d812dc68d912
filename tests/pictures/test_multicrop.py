import numpy as np
import pytest

from vitssl.pictures import multicrop


def batch(images=2, local=3):
    rng = np.random.default_rng(0)
    shape = {"global": (images, 2, 16, 16, 3), "local": (images, local, 8, 8, 3)}
    return {k: rng.integers(0, 256, s, np.uint8) for k, s in shape.items()}


@pytest.mark.parametrize("local", [0, 3])
def test_every_crop_has_a_tile_in_its_order(local):
    b = batch(local=local)
    figure = multicrop.crops(b["global"], b["local"])
    assert len(figure.axes) == 2 * (2 + local)
    titles = [a.get_title() for a in figure.axes[: 2 + local]]
    assert titles == ["global 0", "global 1"] + [f"local {i}" for i in range(local)]
    shown = np.asarray(figure.axes[1].images[0].get_array())
    np.testing.assert_allclose(shown, b["global"][0, 1] / 255, atol=1e-6)
    shown = np.asarray(figure.axes[-1].images[0].get_array())
    last = b["local"][1, -1] if local else b["global"][1, 1]
    np.testing.assert_allclose(shown, last / 255, atol=1e-6)


def test_local_crops_may_be_missing():
    assert len(multicrop.crops(batch()["global"], None).axes) == 4


def test_boxes_lie_where_the_crops_were_taken():
    b = batch(images=1, local=1)
    boxes = np.zeros((1, 2, 5)), np.zeros((1, 1, 5))
    boxes[0][0, 0] = [0.25, 0.5, 0.5, 0.125, 1]
    original = [np.zeros((40, 80, 3), np.uint8)]
    figure = multicrop.crops(b["global"], b["local"], original=original, boxes=boxes)
    first, *_ = figure.axes[0].patches
    assert len(figure.axes[0].patches) == 3
    assert (first.get_x(), first.get_y()) == (39.5, 9.5)
    assert (first.get_width(), first.get_height()) == (10, 20)
    titles = [a.get_title() for a in figure.axes]
    assert titles == ["image", "global 0 ⇄", "global 1", "local 0"]
