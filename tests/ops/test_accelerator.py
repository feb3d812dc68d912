"""What a device says of itself."""

import types

import jax
import numpy as np
import pytest

from vitssl.ops import accelerator


@pytest.mark.parametrize(
    "said, found",
    [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", (0, 0)), ("", (0, 0))],
)
def test_only_a_gpu_by_nvidia_has_a_compute_capability(monkeypatch, said, found):
    assert accelerator.capability() == (0, 0)
    device = types.SimpleNamespace(compute_capability=said)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert accelerator.capability() == found


def test_products_are_made_in_parts_where_no_unit_is_for_float32(monkeypatch):
    assert accelerator.precision() == "highest"
    preset = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
    with monkeypatch.context() as on_a_tpu:
        on_a_tpu.setattr(accelerator, "on_tpu", lambda: True)
        assert accelerator.precision() == preset
    monkeypatch.setattr(accelerator, "capability", lambda: (8, 0))
    assert accelerator.precision() == preset
    # What the preset stands for: halves of 8 bits each.
    x, y = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    high = [np.asarray(jax.numpy.asarray(t, "bfloat16"), np.float32) for t in (x, y)]
    low = [
        np.asarray(jax.numpy.asarray(t - h, "bfloat16"), np.float32)
        for t, h in zip((x, y), high, strict=True)
    ]
    parts = high[0] @ high[1] + high[0] @ low[1] + low[0] @ high[1]
    exact = x.astype(np.float64) @ y
    assert np.abs(parts - exact).max() < 1e-3 < np.abs(high[0] @ high[1] - exact).max()
