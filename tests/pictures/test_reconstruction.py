"""Hidden patches, filled in: strokes of histograms, and what a picture leaves grey."""

import matplotlib
import numpy as np

from vitssl.methods.localmim import targets
from vitssl.pictures import panels, reconstruction


def test_strokes_run_along_the_edge_that_made_the_histogram():
    image = np.zeros((1, 16, 16, 1), np.float32)
    image[:, :, 8:] = 1.0
    for of, along in ((image, 0), (image.swapaxes(1, 2), 1)):
        found = np.asarray(targets.histograms(of, 16, 9))[:, :, :, 0]
        # To full strength: two columns of sixteen pixels change.
        (drawn,) = reconstruction.glyphs(found / found.max(), side=15)
        middle = drawn.take(7, 1 - along)
        assert drawn.shape == (15, 15) and middle.max() == 1.0
        # A flat edge begins a bin, whose middle is ten degrees off.
        assert middle.min() > (1.0, 0.5)[along] - 1e-6
        across = drawn.take(7, along)
        assert across[[0, 1, -2, -1]].max() == 0.0


def test_predictions_are_grey_where_the_network_saw_and_targets_are_whole():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    hidden = np.zeros((2, 2, 2), bool)
    hidden[0, 0, 1] = hidden[1, 1] = True
    predicted, target = rng.random((2, 2, 8, 8, 3))
    stages = {"one": {"pixels": (predicted, target)}}
    figure = reconstruction.reconstruction(images, hidden, stages)
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    grey = np.array(matplotlib.colors.to_rgb(panels.HIDDEN))
    for b in range(2):
        image, masked, ours, right = shown[4 * b : 4 * b + 4]
        where = hidden[b].repeat(4, 0).repeat(4, 1)
        np.testing.assert_allclose(image, images[b] / 255, atol=1e-6)
        np.testing.assert_allclose(masked[~where], image[~where])
        np.testing.assert_allclose(masked[where], np.tile(grey, (where.sum(), 1)), 1e-6)
        np.testing.assert_allclose(ours[where], predicted[b][where], atol=1e-6)
        np.testing.assert_allclose(ours[~where], np.tile(grey, (64 - where.sum(), 1)))
        np.testing.assert_allclose(right, target[b], atol=1e-6)


def test_features_share_their_colours():
    rng = np.random.default_rng(1)
    target = rng.normal(size=(1, 4, 4, 6))
    same, other = reconstruction._views("tokens", (target, target))
    np.testing.assert_array_equal(same, other)
    assert same.shape == (1, 4, 4, 3)
