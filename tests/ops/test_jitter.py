import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.test_colour import gap, picture
from vitssl.data import colour as host
from vitssl.ops import jitter


def test_host_and_device_share_their_numbers():
    for name in ("LUMA", "SPREAD", "BLUR_SIGMA", "BLUR_KERNEL"):
        assert getattr(jitter, name) == getattr(host, name)
    names = [[f.__name__ for f in m.OPERATIONS] for m in (jitter, host)]
    assert names[0] == names[1]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("index, most", [(0, 1), (1, 2), (2, 1.5), (3, 7)])
def test_operations_are_those_of_the_host(channels, index, most):
    images = np.stack([picture((20, 24), channels, seed) for seed in range(2)])
    factors = (0.1, -0.06) if index == 3 else (1.2, 0.7)
    got = jitter.OPERATIONS[index](images.astype(np.float32), jnp.array(factors))
    for i in range(2):
        off = gap(got[i], host.OPERATIONS[index](images[i], factors[i]))
        # The host's hue comes in 255 steps, six grey levels apart at most.
        assert off.max() <= most
        assert off.mean() < (2.5 if index == 3 else 0.6)


def test_hue_goes_round():
    image = picture((8, 8)).astype(np.float32)
    for turn in (0.0, 1.0):
        np.testing.assert_allclose(jitter.hue(image, jnp.array(turn)), image, atol=0.01)
    red = np.full((1, 1, 3), (200.0, 0.0, 0.0), np.float32)
    got = jitter.hue(red, jnp.array(1 / 3))
    np.testing.assert_allclose(got[0, 0], (0, 200, 0), atol=0.01)


@pytest.mark.parametrize("size", [(20, 24), (3, 9)])
def test_blur_grayscale_and_solarize_are_those_of_the_host(size):
    images = np.stack([picture(size, 3, seed) for seed in range(2)])
    x = images.astype(np.float32)
    blurred = jitter.blur(x, jnp.array([0.3, 1.9]))
    for i, sigma in enumerate((0.3, 1.9)):
        assert gap(blurred[i], host.blur(images[i], sigma)).max() <= 1.01
        assert gap(jitter.grayscale(x)[i], host.grayscale(images[i])).max() <= 1
    np.testing.assert_array_equal(
        jitter.solarize(x), [host.solarize(image) for image in images]
    )


def test_each_image_of_a_batch_has_its_own_order():
    images = np.stack([picture((12, 12))] * 2).astype(np.float32)
    factors = jnp.array([(1.5, 1.6, 0.4, 0.1)] * 2)
    orders = [(0, 1, 2, 3), (2, 3, 1, 0)]
    got = jitter.jitter(images, factors, jnp.array(orders))
    for i, order in enumerate(orders):
        want = images[0]
        for k in order:
            want = jitter.OPERATIONS[k](want, factors[0, k])
        np.testing.assert_allclose(got[i], want, atol=0.02)
    assert gap(got[0], got[1]).mean() > 2


def test_factors_have_the_distribution_of_the_host():
    factors, order = jitter.draw_jitter(jax.random.key(0), np.full(4000, 0.4))
    rng = np.random.default_rng(0)
    want = np.array([host.draw_jitter(rng, 0.4)[0] for _ in range(4000)])
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        a, b = np.quantile(factors, q, axis=0), np.quantile(want, q, axis=0)
        np.testing.assert_allclose(a, b, atol=0.015)
    assert len(np.unique(np.asarray(order), axis=0)) == 24


OFF = dict(strength=0.0, prob=1.0, grayscale_prob=0.0, blur_prob=0.0, solarize_prob=0.0)


@pytest.mark.parametrize(
    "key", ["prob", "grayscale_prob", "blur_prob", "solarize_prob"]
)
def test_each_operation_happens_as_often_as_it_should(key):
    images = np.stack([picture((8, 8))] * 1500)
    values = OFF | {key: 0.3} | ({"strength": 1.0} if key == "prob" else {})
    got = np.asarray(jitter.augment(jax.random.key(1), images, **values))
    assert got.dtype == np.uint8
    changed = (got != images).any((1, 2, 3)).mean()
    assert 0.23 < changed < 0.34


def test_everything_off_changes_nothing():
    images = picture((8, 8))[None]
    np.testing.assert_array_equal(
        jitter.augment(jax.random.key(0), images, **OFF), images
    )


def test_each_crop_follows_its_own_recipe():
    crops = np.stack([picture((8, 8), 3, seed) for seed in range(6)]).reshape(
        3, 2, 8, 8, 3
    )
    recipes = [OFF, OFF | {"solarize_prob": 1.0}]
    got = jax.jit(lambda key, x: jitter.augment_crops(key, x, recipes))(
        jax.random.key(0), crops
    )
    np.testing.assert_array_equal(got[:, 0], crops[:, 0])
    np.testing.assert_array_equal(got[:, 1], np.minimum(crops, 255 - crops)[:, 1])


def test_mean_and_spread_of_augmented_pixels_are_those_of_the_host():
    image = picture((12, 12))
    values = dict(
        strength=1.0, prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.2
    )
    device = np.asarray(
        jitter.augment(jax.random.key(3), np.stack([image] * 1500), **values), float
    )
    rng = np.random.default_rng(3)
    pixels = np.array([host.augment(image, rng, **values) for _ in range(1500)], float)
    assert gap(device.mean(0), pixels.mean(0)).mean() < 2
    assert gap(device.std(0), pixels.std(0)).mean() < 2


def test_spread_and_kernel_are_the_callers():
    image = np.stack([picture((24, 20), 3, seed) for seed in range(2)])
    wide = jitter.blur(image.astype(np.float32), jnp.array([1.9, 0.5]), 15)
    for i, sigma in enumerate((1.9, 0.5)):
        assert gap(wide[i], host.blur(image[i], sigma, 15)).max() <= 1.01
    factors, _ = jitter.draw_jitter(
        jax.random.key(0), np.ones(4000), (0.8, 1.5, 0.0, 0.2)
    )
    low, high = np.min(factors, 0), np.max(factors, 0)
    np.testing.assert_allclose(low, (0.2, 0.0, 1.0, -0.2), atol=0.01)
    np.testing.assert_allclose(high, (1.8, 2.5, 1.0, 0.2), atol=0.01)
