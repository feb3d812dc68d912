import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from vitssl.pictures import masking, panels

GRID = (4, 4)
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def levels():
    """Two levels on a 4 x 4 grid: two blocks each, context the top left quarter."""
    context, targets = np.zeros((2, 4, 4), bool), np.zeros((2, 2, 4, 4), bool)
    context[:, :2, :2] = True
    targets[:, 0, 3, :2] = targets[:, 1, :2, 3] = True
    targets[1, 1, 2, 3] = True
    return context.reshape(2, 16), targets.reshape(2, 2, 16)


def pixels(axis):
    return np.asarray(axis.images[0].get_array())


def test_the_context_is_the_image_where_visible_and_grey_elsewhere():
    context, targets = levels()
    figure = masking.hierarchical(IMAGE, context, targets)
    shown = pixels(figure.axes[0])
    image = IMAGE / 255
    np.testing.assert_allclose(shown[:8, :8], image[:8, :8], atol=1e-6)
    grey = 0.07 * image + 0.93 * np.array(to_rgb(panels.HIDDEN))
    np.testing.assert_allclose(shown[8:], grey[8:], atol=1e-6)
    np.testing.assert_allclose(shown[:8, 8:], grey[:8, 8:], atol=1e-6)


def test_every_block_of_targets_has_its_own_colour():
    context, targets = levels()
    figure = masking.hierarchical(IMAGE, context, targets)
    assert len(figure.axes) == 4  # Two rows, two levels.
    shown = pixels(figure.axes[2])
    pale = 0.45 * (IMAGE / 255) + 0.55
    for block, colour in zip(
        (np.s_[12:, :8], np.s_[:8, 12:]), panels.COLOURS, strict=False
    ):
        want = 0.4 * pale[block] + 0.6 * np.array(to_rgb(colour))
        np.testing.assert_allclose(shown[block], want, atol=1e-6)
    np.testing.assert_allclose(shown[8:12], pale[8:12], atol=1e-6)
    titles = [a.get_title() for a in figure.axes]
    assert titles[2:] == ["predicts 25 %", "predicts 31 %"]
    assert titles[:2] == ["level 0: sees 25 %", "level 1: sees 25 %"]


def test_the_union_of_the_blocks_will_do():
    context, targets = levels()
    figure = masking.hierarchical(IMAGE, context, targets.any(1))
    assert figure.axes[3].get_title() == "predicts 31 %"
    assert len(figure.axes[3].collections) == 1  # One outline.


def test_levels_blend_by_the_share_of_each_use():
    context, targets = levels()
    view = masking.combined_view(context, targets.any(1), GRID)
    wanted, seen, unused = (
        np.array(to_rgb(c)) for c in (masking.WANTED, masking.SEEN, masking.UNUSED)
    )
    np.testing.assert_allclose(view[0, 0], seen)
    np.testing.assert_allclose(view[3, 0], wanted)
    np.testing.assert_allclose(view[2, 3], (wanted + unused) / 2)  # Level 1 only.
    np.testing.assert_allclose(view[3, 3], unused)
    figure = masking.combined(IMAGE, context, targets)
    np.testing.assert_allclose(pixels(figure.axes[1]), view)


def test_crops_without_masks_or_targets_say_so():
    context, targets = levels()
    crops = np.stack([IMAGE] * 2)
    found = {
        "global_context": np.stack([context] * 2),
        "global_targets": np.stack([targets.any(1)] * 2),
    }
    figure = masking.multicrop(crops, crops[:, :8, :8], found)
    axes = np.array(figure.axes).reshape(4, 4)  # 2 H rows, G + L columns.
    words = [[t.get_text() for t in a.texts] for a in axes[:, 2:].ravel()]
    assert words == [["N/A"]] * 8
    assert all(a.images for a in axes[:, :2].ravel())

    found["local_context"] = np.ones((2, 2, 16), bool)
    found["local_targets"] = np.zeros((2, 2, 16), bool)
    found["local_targets"][0, :, :3] = True
    figure = masking.multicrop(crops, crops[:, :8, :8], found)
    axes = np.array(figure.axes).reshape(4, 4)
    assert [t.get_text() for t in axes[1, 3].texts] == ["No Targets"]
    assert axes[0, 3].images and axes[1, 2].images and not axes[1, 2].texts
    labels = [a.get_ylabel() for a in axes[:, 0]]
    assert labels[0] == "level 0\ncontext" and labels[3] == "level 1\ntargets"


def test_a_single_mask_is_shown_five_ways():
    context, targets = levels()
    figure = masking.single(IMAGE, context[0], targets[0])
    assert len(figure.axes) == 5
    np.testing.assert_allclose(pixels(figure.axes[0]), IMAGE / 255, atol=1e-6)
    removed = pixels(figure.axes[2])
    np.testing.assert_allclose(removed[12:, :8], [[to_rgb(panels.HIDDEN)] * 8] * 4)
    np.testing.assert_allclose(removed[8:12], IMAGE[8:12] / 255, atol=1e-6)


def test_samplers_stand_side_by_side_each_on_its_own_grid():
    context, targets = levels()
    wide = {"a": (context[0], targets[0]), "b": (np.ones(4, bool), np.zeros(4, bool))}
    figure = masking.strategies(IMAGE, wide)
    titles = [a.get_title() for a in figure.axes]
    assert titles == ["a: 25 %", "b: 100 %", "predicts 25 %", "predicts 0 %"]


def test_statistics_count_every_draw_and_every_patch():
    rng = np.random.default_rng(0)
    context = rng.random((50, 2, 16)) < 0.3
    targets = rng.random((50, 2, 16)) < 0.6
    figure = masking.statistics(context, targets)
    charts = [a for a in figure.axes if a.get_ylabel().startswith("level")]
    assert len(charts) == 2
    bars = charts[1].containers
    assert [sum(b.get_height() for b in bar) for bar in bars] == [50, 50]
    maps = [a for a in figure.axes if a.images and a.get_title().startswith("how")]
    np.testing.assert_allclose(pixels(maps[3]).ravel(), targets[:, 1].mean(0))
    np.testing.assert_allclose(pixels(maps[0]).ravel(), context[:, 0].mean(0))


def test_the_animation_has_a_frame_for_the_image_each_context_and_each_block(tmp_path):
    context, targets = levels()
    path = tmp_path / "masks.gif"
    assert masking.animation(IMAGE, context, targets, path=path) == 7
    with Image.open(path) as gif:
        assert gif.n_frames == 7
        assert gif.info["duration"] == 500


def test_a_grid_need_not_be_square():
    context, targets = np.ones((1, 8), bool), np.zeros((1, 8), bool)
    targets[0, 7], context[0, 7] = True, False
    figure = masking.hierarchical(
        np.zeros((8, 16, 1), np.uint8), context, targets, (2, 4)
    )
    assert pixels(figure.axes[0])[7, 15].max() > 0.5
    assert pixels(figure.axes[0])[7, 11].max() == 0
    with pytest.raises(ValueError, match="no square"):
        masking.hierarchical(IMAGE, context, targets)
