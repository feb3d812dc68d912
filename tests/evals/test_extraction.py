"""Feature extraction: which rows come back, how often it compiles, what is cached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import errors
from vitssl.evals import extraction
from vitssl.run import devices

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 3)).astype(np.uint8)


def _batches(size=4, order=range(11)):
    order = list(order)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        pad = size - len(rows)
        index = np.array(rows + [-1] * pad, np.int32)
        yield {
            "image": IMAGES[rows + [0] * pad],
            "label": np.where(index < 0, -1, index % 3).astype(np.int32),
            "index": index,
            "valid": index >= 0,
            "box": np.zeros(size),
        }


@dataclasses.dataclass
class Network:
    traces: int = 0

    def features(self, params, extra, image):
        self.traces += 1
        x = image.astype(jnp.float32) / 255
        tokens = x.reshape(len(x), -1, 3) * params + extra["shift"]  # [B, N, 3]
        return {"pooled": tokens.mean(1), "tokens": tokens}


def _truth(scale, shift):
    return (IMAGES.reshape(11, -1, 3) / 255.0 * scale + shift).mean(1)


def _state(scale, shift):
    return jnp.float32(scale), {"shift": jnp.float32(shift)}


def test_every_valid_image_comes_back_once_in_the_order_of_its_index():
    network, mixed = Network(), np.random.default_rng(1).permutation(11)
    found = extraction.extract(
        network.features,
        _state(2, 1),
        _batches(order=mixed),
        names=("pooled", "tokens"),
    )
    np.testing.assert_allclose(found["pooled"], _truth(2, 1), rtol=1e-5)
    assert found["tokens"].shape == (11, 16, 3)
    assert found["index"].tolist() == list(range(11))
    assert found["label"].tolist() == [i % 3 for i in range(11)]
    assert set(found) == {"pooled", "tokens", "label", "index"}


def test_other_states_and_other_passes_share_one_compilation():
    network = Network()
    for scale in (1, 2, 3):
        found = extraction.extract(network.features, _state(scale, 0), _batches())
        np.testing.assert_allclose(found["pooled"], _truth(scale, 0), rtol=1e-5)
    assert network.traces == 1


def test_it_moves_nothing_between_host_and_device_implicitly():
    network, state = Network(), _state(1, 0)
    with jax.transfer_guard("disallow"):
        found = extraction.extract(network.features, state, _batches())
    assert len(found["pooled"]) == 11


@pytest.mark.parametrize("size", [4, 6])
def test_four_devices_give_the_rows_of_one(size):
    mesh = devices.mesh(devices.Mesh(), 4)
    state = jax.device_put(_state(2, 1), devices.replicated(mesh))
    found = extraction.extract(
        Network().features,
        state,
        _batches(size),
        sharding=devices.batch_sharding(mesh),
    )
    np.testing.assert_allclose(found["pooled"], _truth(2, 1), rtol=1e-5)
    assert found["index"].tolist() == list(range(11))


def test_every_device_gets_all_rows_as_every_process_needs_them():
    mesh = devices.mesh(devices.Mesh(), 4)
    sharding = devices.batch_sharding(mesh)
    batch = next(_batches(8))
    batch.pop("box")
    found = extraction._apply(
        jax.device_put(_state(2, 1), devices.replicated(mesh)),
        jax.device_put(batch, sharding),
        features=Network().features,
        names=("pooled",),
        sharding=sharding,
    )
    assert all(rows.is_fully_replicated for rows in found.values())


def test_what_cannot_be_extracted_is_said():
    state = _state(1, 0)
    with pytest.raises(ValueError, match=r"no \['cls'\]; there is \['pooled', 'tok"):
        extraction.extract(Network().features, state, _batches(), names=("cls",))
    with pytest.raises(ValueError, match="no valid image"):
        extraction.extract(Network().features, state, [])
    with pytest.raises(errors.NonFiniteError, match="pooled"):
        extraction.extract(Network().features, _state(np.nan, 0), _batches())


class Loader:
    """Batches in one buffer that is used again, as loaders do."""

    passes = closed = 0

    def __call__(self):
        self.passes += 1
        return self._batches()

    def _batches(self):
        buffer = np.zeros((2, 4, 4, 3), np.uint8)
        try:
            for i in range(3):
                buffer[:] = i
                yield {"image": buffer, "label": np.full(2, i)}
        finally:
            self.closed += 1


def test_a_cache_reads_once_what_fits():
    loader = Loader()
    cached = extraction.Cached(loader, 3 * (96 + 16))
    for _ in range(3):
        assert [b["image"][0, 0, 0, 0] for b in list(cached)] == [0, 1, 2]
    assert loader.passes == loader.closed == 1


def test_a_cache_reads_again_what_does_not_fit():
    loader = Loader()
    cached = extraction.Cached(loader, 3 * (96 + 16) - 1)
    for _ in range(3):
        assert [int(b["label"][0]) for b in cached] == [0, 1, 2]
    assert loader.passes == loader.closed == 3


def test_a_pass_broken_off_is_not_cached():
    loader = Loader()
    cached = extraction.Cached(loader, 2**20)
    iterator = iter(cached)
    next(iterator)
    iterator.close()
    assert loader.closed == 1
    assert len(list(cached)) == 3
    assert loader.passes == 2


@pytest.mark.parametrize("channels", [1, 3, 4, 12])
def test_pixels_are_the_image_in_units_of_one(channels):
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, channels))
    image = image.astype(np.uint8)
    found = extraction.Pixels(8)(image)["pooled"]
    np.testing.assert_allclose(found, image.reshape(2, -1) / 255, rtol=1e-6)


def test_large_pixels_are_averaged_down():
    # Squares of 2 x 2 equal pixels, in a picture that varies slowly.
    ramp = np.repeat(np.repeat(np.arange(16).reshape(4, 4), 2, 0), 2, 1)
    image = np.broadcast_to(ramp[None, :, :, None], (1, 8, 8, 3)).astype(np.uint8)
    found = extraction.Pixels(4)(image)["pooled"].reshape(4, 4, 3)
    np.testing.assert_allclose(found[1:3, 1:3, 0] * 255, ramp[2:6:2, 2:6:2], atol=0.1)
    assert extraction.Pixels(4)(np.zeros((1, 8, 16, 1), np.uint8))["pooled"].shape == (
        1,
        2 * 4,
    )


def test_a_subset_is_drawn_from_everywhere_and_always_the_same():
    drawn = extraction.subset(1000, 100)
    assert len(set(drawn.tolist())) == 100
    assert (np.diff(drawn) > 0).all()
    # The mean of 100 of 0..999 has a standard error of 29.
    assert 380 < drawn.mean() < 620
    np.testing.assert_array_equal(drawn, extraction.subset(1000, 100))
    assert extraction.subset(1000, 100, seed=1).tolist() != drawn.tolist()
    assert (
        extraction.subset(5, 0).tolist()
        == extraction.subset(5, 9).tolist()
        == [*range(5)]
    )
