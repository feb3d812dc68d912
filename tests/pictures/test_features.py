import matplotlib
import numpy as np
import pytest

from vitssl.pictures import features, panels


def test_components_find_the_directions_of_most_variance_in_order():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0][:3]
    largest = np.abs(axes).argmax(1)
    axes *= np.sign(axes[np.arange(3), largest])[:, None]  # The sign is a rule.
    hidden = rng.normal(size=(36, 3))
    hidden = np.linalg.qr(hidden - hidden.mean(0))[0]  # Uncorrelated.
    x = (hidden * [9.0, 3.0, 1.0]) @ axes + 100.0
    found = features.components(x.reshape(4, 9, 8)).reshape(36, 3)
    low, high = np.percentile(hidden, (1, 99), axis=0)
    np.testing.assert_allclose(
        found, ((hidden - low) / (high - low)).clip(0, 1), atol=1e-6
    )


def test_components_are_those_of_all_images_together():
    x = np.random.default_rng(1).normal(size=(3, 16, 6)) * [5, 4, 3, 2, 1, 0.5]
    found = features.components(x)
    assert found.min() == 0 and found.max() == 1
    np.testing.assert_allclose(features.components(x[::-1])[::-1], found, atol=1e-9)
    assert abs(features.components(x[:1])[0] - found[0]).max() > 0.1


def test_constant_tokens_are_drawn_without_a_warning(recwarn):
    found = features.components(np.ones((2, 4, 5)))
    assert np.isfinite(found).all()
    assert not recwarn


def test_principal_components_are_drawn_under_their_images():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    x = rng.normal(size=(2, 16, 7))
    figure = features.principal(images, x)
    axes = np.array(figure.axes).reshape(3, 2)
    for row, each in ((1, x), (2, x - x.mean(0))):
        np.testing.assert_allclose(
            np.asarray(axes[row, 1].images[0].get_array()),
            features.components(each)[1].reshape(4, 4, 3),
        )


def test_what_only_a_position_says_is_gone_without_its_mean():
    place = 9 * np.random.default_rng(0).normal(size=(1, 4, 5))
    small = np.random.default_rng(1).normal(size=(40, 1, 5))  # The same everywhere.
    images = np.zeros((3, 2, 2, 3), np.uint8)
    figure = features.principal(images, place + small)  # Forty, of which three drawn.
    axes = np.array(figure.axes).reshape(3, 3)
    tokens, without = (
        np.stack([np.asarray(a.images[0].get_array()) for a in row]) for row in axes[1:]
    )
    assert np.ptp(tokens, axis=(1, 2)).max() > 0.5  # Within an image.
    np.testing.assert_allclose(np.ptp(without, axis=(1, 2)), 0, atol=1e-9)
    assert np.ptp(without, axis=0).max() > 0.1


def test_errors_and_cosines_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5))
    for i in range(3):
        for n in range(4):
            u, v = a[i, n], b[i, n]
            error = sum((u[d] - v[d]) ** 2 for d in range(5)) / 5
            assert features.errors(a, b)[i, n] == pytest.approx(error)
            cosine = u @ v / np.sqrt((u @ u) * (v @ v))
            assert features.cosines(a, b)[i, n] == pytest.approx(cosine)
    assert features.cosines(np.zeros((1, 2)), np.ones((1, 2))) == [0.0]


def predictions():
    rng = np.random.default_rng(0)
    target = [rng.normal(size=(2, n, 6)) for n in (16, 4)]
    predicted = [t + rng.normal(size=t.shape) for t in target]
    valid = [rng.random((2, n)) < 0.5 for n in (16, 4)]
    return np.zeros((2, 8, 8, 3), np.uint8), predicted, target, valid


def test_prediction_maps_show_the_predicted_cells_only():
    images, predicted, target, valid = predictions()
    figure = features.prediction(images, predicted, target, valid)
    axes = np.array(figure.axes[:10]).reshape(5, 2)
    for k, side in enumerate((4, 2)):
        for b in range(2):
            error = axes[1 + 2 * k, b].images[0].get_array()
            where = valid[k][b].reshape(side, side)
            np.testing.assert_array_equal(error.mask, ~where)
            want = features.errors(predicted[k], target[k])[b].reshape(side, side)
            np.testing.assert_allclose(error[where], want[where])
            cosine = axes[2 + 2 * k, b].images[0]
            want = features.cosines(predicted[k], target[k])[b].reshape(side, side)
            np.testing.assert_allclose(cosine.get_array()[where], want[where])
        # One scale per row, so that images can be compared, and its bar beside it.
        for row, measure in ((1, features.errors), (2, features.cosines)):
            one, other = (axis.images[0].get_clim() for axis in axes[row + 2 * k])
            values = measure(predicted[k], target[k])[valid[k]]
            high = 1.0 if row == 2 else values.max()
            low = 0.0 if row == 1 else values.min()
            assert one == other == pytest.approx((low, high))
    names = [a.get_ylabel() for a in figure.axes[10:]]
    assert names == ["error", "cosine", "error", "cosine"]


def test_level_statistics_name_the_mean_over_predicted_cells():
    _, predicted, target, valid = predictions()
    figure = features.level_statistics(predicted, target, valid)
    means = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    want = [
        f"level {k}\nmean {features.errors(p, t)[v].mean():.3g}"
        for k, (p, t, v) in enumerate(zip(predicted, target, valid, strict=True))
    ]
    assert means == want


def test_a_level_without_targets_stays_empty():
    images, predicted, target, valid = predictions()
    valid[1][:] = False
    figure = features.level_statistics(predicted, target, valid)
    assert figure.axes[0].get_xticklabels()[1].get_text() == "level 1"
    figure = features.prediction(images, predicted, target, valid)
    assert figure.axes[6].images[0].get_array().mask.all()
    assert figure.axes[6].get_facecolor() == matplotlib.colors.to_rgba(panels.HIDDEN)
