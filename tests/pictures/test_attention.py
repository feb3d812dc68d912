import numpy as np
import pytest

from vitssl.pictures import attention


def softmax_attention(layers, heads, tokens, seed=0):
    a = np.exp(np.random.default_rng(seed).normal(size=(layers, heads, tokens, tokens)))
    return a / a.sum(-1, keepdims=True)


def test_rollout_is_the_sum_over_all_paths():
    a = softmax_attention(2, 3, 4)
    rolled = attention.rollout(a)
    for i in range(4):
        for j in range(4):
            total = 0.0
            for middle in range(4):  # Two layers: one token between.
                last = sum(a[1, h, i, middle] for h in range(3)) / 3
                first = sum(a[0, h, middle, j] for h in range(3)) / 3
                last = (last + (i == middle)) / 2
                first = (first + (middle == j)) / 2
                total += last * first
            assert rolled[i, j] == pytest.approx(total)


def test_rollout_of_layers_that_look_nowhere_else_is_the_identity():
    a = np.broadcast_to(np.eye(5), (6, 2, 5, 5))
    np.testing.assert_allclose(attention.rollout(a), np.eye(5))


def test_rollout_rows_sum_to_one_even_if_attention_rows_do_not():
    a = 3 * softmax_attention(4, 2, 6)
    np.testing.assert_allclose(attention.rollout(a).sum(-1), 1.0)


def test_the_image_looks_through_its_class_token_or_through_all_patches():
    matrix = np.arange(36.0).reshape(6, 6)
    np.testing.assert_array_equal(attention.on_patches(matrix, 4), [2, 3, 4, 5])
    np.testing.assert_array_equal(attention.on_patches(matrix, 6), matrix.mean(0))


@pytest.mark.parametrize("tokens, side", [(4, 2), (5, 2), (10, 3), (50, 7), (201, 14)])
def test_the_grid_is_the_largest_square_that_fits(tokens, side):
    assert attention.infer_grid(tokens) == (side, side)


@pytest.mark.parametrize(
    "layers, names",
    [
        (1, ["last"]),
        (2, ["early", "middle", "last"]),
        (12, ["early", "middle", "last"]),
    ],
)
def test_depths_are_distinct_layers(layers, names):
    found = attention.depths(layers)
    assert len(set(found.values())) == len(found)
    assert set(found) <= set(names) and found["last"] == layers - 1
    if layers == 12:
        assert found == {"early": 3, "middle": 6, "last": 11}


def test_heads_are_drawn_by_layer_and_head():
    a = softmax_attention(3, 2, 10)
    figure = attention.heads(np.zeros((6, 6, 3), np.uint8), a)
    axes = np.array(figure.axes[:9]).reshape(3, 3)
    shown = np.asarray(axes[2, 1].images[0].get_array())
    np.testing.assert_allclose(shown.ravel(), a[2, 0, 0, 1:])
    assert axes[1, 0].get_ylabel() == "layer 1"
    # The heads of a layer have one scale, and its bar.
    limits = [[x.images[0].get_clim() for x in row[1:]] for row in axes]
    tops = a[:, :, 0, 1:].max((1, 2))
    np.testing.assert_allclose(limits, [[(0, top)] * 2 for top in tops])
    assert len(figure.axes) == 9 + 3


def test_of_many_layers_the_first_and_last_are_kept():
    a = softmax_attention(24, 1, 5)
    figure = attention.heads(np.zeros((4, 4, 3), np.uint8), a, layers=6)
    labels = [x.get_ylabel() for x in figure.axes if "layer" in x.get_ylabel()]
    assert len(labels) == 6
    assert labels[0] == "layer 0" and labels[-1] == "layer 23"


def test_rollout_is_drawn_for_every_image():
    a = np.stack([softmax_attention(4, 2, 10, seed) for seed in range(3)])
    images = np.full((3, 6, 6, 1), 255, np.uint8)
    figure = attention.layers(images, a)
    axes = np.array(figure.axes[:18]).reshape(6, 3)
    want = np.stack([attention.rollout(x)[0, 1:].reshape(3, 3) for x in a])
    shown = [np.asarray(axis.images[0].get_array()) for axis in axes[-2]]
    np.testing.assert_allclose(shown, want)
    # What all patches get alike says nothing: from the minimum, one scale for a row.
    limits = [axis.images[0].get_clim() for axis in axes[-2]]
    np.testing.assert_allclose(limits, [(want.min(), want.max())] * 3)


def test_an_overlay_runs_smoothly_from_patch_to_patch():
    values = np.array([0.0, 1.0, 0.0, 1.0])
    over = attention.overlay(np.zeros((40, 40, 3)), values, (2, 2))[20].sum(-1)
    assert over[0] < over[20] < over[-1]
    assert np.abs(np.diff(over)).max() < 0.15 * np.ptp(over)
    image = attention.overlay(np.ones((40, 40, 3)), values, (2, 2))[20].sum(-1)
    np.testing.assert_allclose(image - over, 1.2)  # The image stays visible.


def test_one_patch_shows_its_own_row_and_is_marked():
    a = softmax_attention(8, 2, 11)  # A class token, a register, 3 x 3 patches.
    figure = attention.patch(np.zeros((9, 9, 3), np.uint8), a, (1, 2), (3, 3))
    last = next(x for x in figure.axes if x.get_title() == "last (layer 7)")
    query = 2 + 1 * 3 + 2
    shown = np.asarray(last.images[0].get_array()).ravel()
    np.testing.assert_allclose(shown, a[7].mean(0)[query, 2:])
    (mark,) = last.patches
    assert (mark.get_x(), mark.get_y()) == (1.5, 0.5)
    (mark,) = figure.axes[0].patches
    assert (mark.get_x(), mark.get_y(), mark.get_width()) == (5.5, 2.5, 3)
