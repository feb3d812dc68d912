import numpy as np
import pytest

from vitssl.pictures import confusion, panels, space


def clusters(each=15, width=6):
    """Return (features, labels) of three far apart classes, mixed."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), each)
    return 20 * np.eye(3, width)[labels] + rng.normal(size=(3 * each, width)), labels


def test_neighbours_of_the_same_class_have_solid_frames():
    images = np.zeros((4, 4, 4, 1), np.uint8)
    images[2] = 255
    query, bank = (
        np.array([[1.0, 0.0]]),
        np.array([[1.0, 0], [0.9, 0.1], [0, 1], [1, 1]]),
    )
    labels = np.array([7]), np.array([7, 3, 3, 3])
    figure = space.neighbours(
        images[:1],
        images,
        (query, bank),
        labels=labels,
        classes=("a",) * 7 + ("seven",),
    )
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert key == ["of the same class", "of another (dashed)"]
    assert len(figure.axes) == 5  # No more neighbours than there are images.
    assert figure.axes[0].get_title() == "query: seven"
    assert figure.axes[1].get_title() == "seven  1.0000"
    assert figure.axes[1].spines["left"].get_linestyle() == "-"
    assert figure.axes[2].get_title() == "a  0.9939"
    assert figure.axes[2].spines["left"].get_linestyle() != "-"
    assert np.asarray(figure.axes[4].images[0].get_array()).max() == 1.0


def test_principal_components_keep_the_two_largest_variances():
    x = np.random.default_rng(0).normal(size=(60, 4)) * [1, 5, 3, 0.1] + 7
    points = space.embed(x, "pca")
    centred = x - x.mean(0)
    spectrum = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(points, axis=0), spectrum[:2])


def test_tsne_separates_classes_and_repeats_itself():
    features, labels = clusters()
    points = space.embed(features, "tsne")
    np.testing.assert_array_equal(points, space.embed(features, "tsne"))
    centres = np.stack([points[labels == i].mean(0) for i in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(1)
    assert (nearest == labels).mean() > 0.95


def test_the_space_has_a_colour_and_a_name_for_each_class():
    features, labels = clusters()
    labels[:2] = -1
    figure = space.feature_space(features, labels, classes=("cat", "dog", "owl"))
    texts = [t.get_text() for t in figure.axes[1].get_legend().get_texts()]
    assert texts == ["unlabelled", "cat", "dog", "owl"]
    sizes = [len(c.get_offsets()) for c in figure.axes[0].collections]
    assert sizes == [2, 14, 14, 15]


def test_images_without_labels_need_no_legend():
    figure = space.feature_space(clusters()[0])
    assert figure.axes[1].get_legend() is None
    assert len(figure.axes[0].collections) == 1


def test_distributions_are_of_norms_deviations_and_spectrum():
    x = np.random.default_rng(0).normal(size=(40, 5)) * [4, 0, 2, 1, 3]
    figure = space.distributions({"a": x, "b": x[:20]})
    norms, deviation, spectrum = figure.axes
    assert [t.get_text() for t in norms.get_legend().get_texts()] == ["a", "b"]
    area = sum(p.get_width() * p.get_height() for p in norms.containers[0])
    assert area == pytest.approx(1)
    np.testing.assert_allclose(
        deviation.lines[0].get_ydata(), np.sort(x.std(0))[::-1], atol=1e-12
    )
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    np.testing.assert_allclose(spectrum.lines[0].get_ydata(), values / values[0])
    assert deviation.lines[0].get_color() in panels.COLOURS


def test_the_confusion_matrix_shows_counts_and_accuracy():
    figure = confusion.neighbours(np.array([[3, 1], [0, 4]]), ("cat", "dog"))
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert texts == {"3", "1", "4"}
    assert "87.5% (52.9-97.8) of 8 test images" in figure.get_suptitle()
