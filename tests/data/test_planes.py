"""Spectral planes beside colours: 16 bits from the file to the model."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import layouts
from vitssl import errors
from vitssl.data import colour, sources, views
from vitssl.data.sources import sarcld, spectral
from vitssl.methods.classify import views as classify_views
from vitssl.methods.simclr import views as simclr_views
from vitssl.models import patches
from vitssl.ops import jitter


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    base = tmp_path_factory.mktemp("sarcld")
    return layouts.trees.sarcld_photographs(base, count=6, copied=())


def _with_planes(root, tmp_path, value, suffix, **options):
    """Return SAR-CLD-2024 with one plane per photograph: `value` + its number."""
    for c, name in enumerate(sarcld.CLASSES):
        os.makedirs(tmp_path / sarcld.ORIGINAL / name, exist_ok=True)
        for i in range(6):
            path = tmp_path / sarcld.ORIGINAL / name / (layouts.trees.leaf(c, i))
            plane = np.full((40, 56), value + value.dtype.type(i), value.dtype)
            if suffix == ".npy":
                np.save(f"{path}.npy", plane)
            else:
                layouts.satellites.tiff(path.with_suffix(suffix), plane[None])
    own = dict(planes=suffix.strip(".").replace("tif", "tiff"), planes_root=tmp_path)
    own |= dict(planes_root=str(tmp_path)) | options
    return sources.open("sarcld", str(root), "all", channels=4, **own)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize(
    ("value", "bounds"),
    [(np.uint16(1000), (0.0, 65535.0)), (np.float32(0.125), (0.0, 8.0))],
)
def test_a_plane_reaches_the_model_with_16_bits(root, tmp_path, suffix, value, bounds):
    """Neighbours that are one value in 8 bits stay apart through every transform."""
    values = {}
    step = value.dtype.type(1) if value.dtype == np.uint16 else np.float32(1e-3)
    for plane in (value, value + step):
        source = _with_planes(root, tmp_path, plane, suffix, planes_range=bounds)
        example = source[7]  # Number 1 of its class.
        for name, view in TRANSFORMS.items():
            row = view(example, np.random.default_rng(0))
            image = row.get("image", row.get("global"))
            assert image.dtype == np.uint16, name
            x = patches.normalise(jnp.asarray(image), (0.5,) * 4, (0.25,) * 4)
            share = np.asarray(x)[..., 3] * 0.25 + 0.5
            want = (float(plane) + 1 - bounds[0]) / (bounds[1] - bounds[0])
            np.testing.assert_allclose(np.median(share), want, atol=4e-5)
            values.setdefault(name, []).append(np.median(image[..., 3]))
    assert all(b - a >= 1 for a, b in values.values()), values


TRANSFORMS = {
    "evaluate": views.Evaluate(24),
    "warp": views.Warp(24),
    "supervised": views.Supervised(24, (0.5, 1.0)),
    "fast": views.Supervised(24, (0.5, 1.0), interpolation="fast"),
    "mim": views.SingleCrop(24, (0.5, 1.0)),
    "simclr": simclr_views.Views(24, jitter_prob=1.0, blur_prob=1.0),
    "leaves": classify_views.Leaves(24, "mild"),
}


def test_the_range_of_planes_may_be_their_own(root, tmp_path):
    source = _with_planes(root, tmp_path, np.float32(-3.0), ".npy", planes_range=())
    assert source.range == (-3.0, 2.0)
    seen = [source[i]["image"][0, 0, 3] for i in range(6)]
    assert seen == [round(65535 * k / 5) for k in range(6)]
    with pytest.raises(errors.UsageError, match="planes_range=.*lowest, highest"):
        _with_planes(root, tmp_path, np.float32(0), ".npy", planes_range=(1.0, 1.0))


def test_a_damaged_plane_names_its_file(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 4)))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:140])
    with pytest.raises(errors.DataError, match="x.npy: cannot be decoded"):
        spectral.read(str(tmp_path / "x.npy"), (5, 4), 1)


def test_colours_of_a_deep_image_are_changed_as_those_of_a_plain_one():
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (12, 12, 3), np.uint8)
    plane = rng.integers(0, 65536, (12, 12, 1), np.uint16)
    deep = np.concatenate([plain.astype(np.uint16) * 257, plane], -1)
    for change in (colour.grayscale, lambda x: colour.blur(x, 1.0, 3)):
        found = colour.only(deep, change)
        want = change(plain).astype(np.uint16) * 257
        np.testing.assert_array_equal(found[..., :3], want)
        np.testing.assert_array_equal(found[..., 3:], plane)
    key, recipe = jax.random.key(3), dict(prob=1.0, grayscale_prob=0.0)
    recipe |= dict(strength=1.0, blur_prob=1.0, solarize_prob=0.5)
    one = jitter.augment(key, jnp.asarray(plain), **recipe)
    two = np.asarray(jitter.augment(key, jnp.asarray(deep), **recipe))
    np.testing.assert_array_equal(two[..., 3:], plane)
    np.testing.assert_allclose(two[..., :3] / 257, one, atol=0.51)
