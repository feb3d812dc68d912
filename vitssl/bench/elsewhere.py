"""Devices that are not here, for XLA to compile for.

What is traced sees them as if they were: their number, their kind, their kernels.
"""

import contextlib
import copy
import importlib.util
import math
import os
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies

from vitssl import errors
from vitssl.bench import hlo
from vitssl.run import chips

# Of each platform: modules of which one has its compiler, the extra that installs it.
_COMPILERS = {
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "aot-cuda"),
    "tpu": (("libtpu",), "aot-tpu"),
}
# Autotuning runs candidates on the device; without it, no tiles of Triton's products.
_OPTIONS = {
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "tpu": {},
}
# What the compiler for TPUs asks the machine about, if it is not told.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # No device is taken, so several may compile at a time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CUDNN = (9, 10, 0)


class Elsewhere:
    """So many devices of a kind.

    Args:
        on: such as "h200:8" or "v5e:4x4".
        compiles: False only lowers, and needs no compiler.

    Raises:
        UsageError: there is no such kind, not in that number, or its compiler refuses.
    """

    def __init__(self, on: str, compiles: bool = True):
        self.kind, self.shape = chips.named(on)
        self.count = math.prod(self.shape)
        self._devices = None
        if compiles:
            try:
                self._devices = list(_topology(self.kind, self.shape).devices)
            except (RuntimeError, ValueError) as e:
                raise errors.UsageError(f"--on={on}: {errors.told(e)}") from e

    @property
    def compiles(self) -> bool:
        """Return whether there is a compiler for them."""
        return self._devices is not None

    def alone(self) -> "Elsewhere":
        """Return the same devices without their compiler, only to lower for."""
        found = copy.copy(self)
        found._devices = None
        return found

    @contextlib.contextmanager
    def seen(self):
        """Build and trace for them; what is computed is computed here."""

        def make_mesh(shape, names, *, axis_types):
            # What is only lowered is one program, whatever it is later split over.
            found = self._devices or jax.devices()[:1]
            shape = shape if self._devices else (1,) * len(shape)
            devices = np.array(found).reshape(shape)
            return jax.sharding.Mesh(devices, names, axis_types=axis_types)

        with (
            hlo.traced_for(self.kind.platform, self.kind.capability),
            mock.patch.object(jax, "device_count", lambda: self.count),
            mock.patch.object(jax, "make_mesh", make_mesh),
        ):
            yield

    def lower(self, program, *shapes):
        """Return a jitted function lowered for them."""
        only = {"lowering_platforms": (self.kind.platform,)}
        with self.seen():
            traced = program.trace(*shapes)
            return traced.lower(**({} if self._devices else only))

    def compile(self, lowered):
        """Return what was lowered, compiled.

        Raises:
            OutOfMemoryError: the compiler says that it cannot fit.
            UsageError: the compiler says anything else.
        """
        with self.seen():
            try:
                return lowered.compile(compiler_options=_OPTIONS[self.kind.platform])
            except jax.errors.JaxRuntimeError as e:
                full = "RESOURCE_EXHAUSTED" in str(e)
                kind = errors.OutOfMemoryError if full else errors.UsageError
                text = f"{self.kind.name}: {errors.told(e)}"
                raise kind(text) from e


def missing(kind: chips.Kind) -> str:
    """Return the extra that has the compiler for a kind; "" if it is installed."""
    modules, extra = _COMPILERS[kind.platform]
    return "" if any(map(importlib.util.find_spec, modules)) else extra


def _topology(kind, shape):
    if kind.platform == "tpu":
        for name, value in _TPU.items():
            os.environ.setdefault(name, value)
        name = next(n for n, k in chips.known().items() if k is kind)
        one = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(shape) == 1 else {}
        name = f"{name}:{'x'.join(map(str, shape))}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **one)
    shape = "x".join(map(str, (1, *shape)))
    return topologies.get_topology_desc(
        platform="cuda", target_config=_target(kind), topology=shape
    )


def _target(kind) -> str:
    """Return a kind in the text that XLA reads: a GpuTargetConfigProto."""
    major, minor = kind.capability
    special = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    fields = {
        "memory_bandwidth": int(kind.bandwidth),
        "device_memory_size": kind.memory,
        "name": f'"{kind.name}"',
        "device_vendor": '"NVIDIA Corporation"',
        "device_address_bits": 64,
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "compile_time_toolkit_version": '"13.0.0"',
        "dnn_version": '"{}.{}.{}"'.format(*_CUDNN),
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} {special} }}",
    }
    # A message takes no colon, which text format lets it have.
    info = "\n".join(f"{k}: {v}" for k, v in (kind.target | fields).items())
    dnn = "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*_CUDNN)
    return (
        f'gpu_device_info {{\n{info}\n}}\nplatform_name: "CUDA"\n{dnn}\n'
        f'device_description_str: "{kind.name}"\n'
    )
