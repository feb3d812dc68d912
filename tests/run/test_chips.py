"""Kinds of accelerators: told by the names that JAX gives, and by their shapes."""

import types

import jax
import pytest

from vitssl import errors
from vitssl.run import chips, devices


@pytest.mark.parametrize(
    "said, name, bf16, float32",
    [
        ("NVIDIA H200", "h200", 989e12, 494e12),
        ("NVIDIA H100 80GB HBM3", "h100", 989e12, 494e12),
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12, 156e12),
        ("NVIDIA L40S", "l40s", 362e12, 183e12),
        ("TPU v4", "v4", 275e12, 275e12),
        ("TPU v5 lite", "v5e", 197e12, 197e12),
        ("TPU v5e", "v5e", 197e12, 197e12),
        ("TPU v5", "v5p", 459e12, 459e12),
        ("TPU v5p", "v5p", 459e12, 459e12),
        ("TPU v6 lite", "v6e", 918e12, 918e12),
        ("NVIDIA GeForce RTX 4090", "", 0.0, 0.0),
        ("cpu", "", 0.0, 0.0),
    ],
)
def test_a_device_is_known_by_what_jax_calls_it(said, name, bf16, float32, monkeypatch):
    device = types.SimpleNamespace(device_kind=said)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert chips.of_device(said) is chips.known().get(name)
    assert devices.peak_flops("bfloat16") == bf16
    assert devices.peak_flops("float32") == float32


@pytest.mark.parametrize(
    "on, shape",
    [
        ("h200", (1, 1)),
        ("h200:8", (1, 8)),
        ("h100:3", (1, 3)),
        ("h200:256", (32, 8)),
        ("h200:3x4", (3, 4)),
        ("v5e", (1, 1)),
        ("v5e:16", (4, 4)),
        ("v5e:8", (2, 4)),
        ("v6e:16x16", (16, 16)),
        ("v5p", (2, 2, 1)),
        ("v5p:2x2x4", (2, 2, 4)),
    ],
)
def test_a_number_of_devices_is_hosts_or_a_slice(on, shape):
    assert chips.named(on)[1] == shape


@pytest.mark.parametrize(
    "on, says",
    [
        ("h20", "--on=h20: no such kind of device; did you mean h200?"),
        ("mi300", "--on=mi300: no such kind of device; one of a100, h100"),
        ("", "--on=: no such kind of device; one of"),
        ("h200:", "--on=h200:: '' is no number or shape"),
        ("h200:0", "'0' is no number or shape, as 8 or 4x4 are"),
        ("h200:-8", "'-8' is no number"),
        ("h200:8x", "'8x' is no number"),
        ("h200:12", "no whole hosts of 8 NVIDIA H200 141GB; nearest: 8, 16"),
        ("h200:4x16", "come as N, or as HOSTSxN with N up to 8"),
        ("h200:2x2x2", "come as N, or as HOSTSxN"),
        ("v5e:3x3", "no such slice of TPU v5e; there is 1x1, 2x2"),
        ("v5e:7", "no such slice of TPU v5e"),
        ("v5p:4x4", "no such slice of TPU v5p; there is 2x2x1"),
        ("v5e:2x2:2", "'2x2:2' is no number"),
    ],
)
def test_devices_that_there_are_not_are_said_in_one_line(on, says):
    with pytest.raises(errors.UsageError) as e:
        chips.named(on)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", chips.known())
def test_every_kind_has_its_figures(name):
    kind = chips.known()[name]
    fast, slow = kind.products["bf16"], kind.products["f32"]
    assert fast >= kind.products["tf32"] > slow > 1e12
    assert 1e11 < kind.bandwidth < 1e13 and 2**33 < kind.memory < 2**38
    assert kind.link >= kind.network > 1e10
    if kind.platform == "cuda":
        assert kind.capability >= (8, 0) and kind.target["core_count"] > 100
        assert kind.per_host and not kind.topologies
    else:
        assert kind.topologies and not kind.target and not kind.capability
