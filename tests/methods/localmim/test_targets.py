"""HOG: bins without an arc tangent, and histograms in both forms of their sum."""

import jax
import numpy as np
import pytest

from vitssl.methods.localmim import targets
from vitssl.ops import accelerator


@pytest.mark.parametrize("nbins", [7, 9, 18])
def test_bins_are_those_of_the_angle(nbins):
    gx, gy = np.random.default_rng(0).normal(size=(2, 40_000)).astype(np.float32)
    angle = np.arctan2(gx.astype(float), gy.astype(float)) / np.pi * nbins
    off = np.abs(angle - np.rint(angle))
    found = np.asarray(jax.jit(targets.bins, static_argnums=2)(gx, gy, nbins))
    differ = found != np.floor(angle).astype(int) % nbins
    assert not differ[off > 1e-6].any() and (off > 1e-6).mean() > 0.999


def test_bins_of_directions_along_an_axis():
    # Up and down are one orientation, and so are left and right; nothing is bin 0.
    gx = np.float32([0, -0.0, 0, 1, -1, 1e-9, -1e-9, 1e-9, 0])
    gy = np.float32([1, 1, -1, 0, 0, 1, 1, -1, 0])
    found = targets.bins(gx, gy, 9).tolist()
    assert found == [0, 0, 0, 4, 4, 0, 8, 0, 0]


@pytest.mark.parametrize("bias", [None, (0.2, -0.1)])
def test_histograms_have_the_same_sums_in_both_forms(bias, monkeypatch):
    image = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
    at_once = {}
    for on_cpu in (True, False):
        monkeypatch.setattr(accelerator, "on_cpu", lambda value=on_cpu: value)
        at_once[on_cpu] = np.asarray(targets.histograms(image, 4, 9, bias))
    assert at_once[True].shape == (2, 4, 6, 3, 9)
    np.testing.assert_allclose(at_once[True], at_once[False], atol=2e-6)
    gx, gy = (np.asarray(g) for g in targets.gradients(image))
    if bias:
        gx, gy = gx + bias[0], gy + bias[1]
    angle = np.floor(np.arctan2(gx, gy) / np.pi * 9).astype(int) % 9
    cell = np.s_[1, 4:8, 8:12, 2]
    wanted = np.bincount(angle[cell].ravel(), np.hypot(gx, gy)[cell].ravel(), 9) / 16
    np.testing.assert_allclose(at_once[True][1, 1, 2, 2], wanted, atol=2e-6)
