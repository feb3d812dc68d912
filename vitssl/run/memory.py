"""How much memory a step needs, and what to lower by how much if that is too much."""

import dataclasses
import os
import pathlib
import sys

import jax
import numpy as np

from vitssl import errors
from vitssl.run import devices

# XLA and the allocator need room of their own: this share of a device can be filled.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device.

    Attributes:
        parameters: trained and frozen.
        optimizer: moments of the trainable leaves.
        extra: what the method keeps beside (EMA target, batch statistics).
        batch: the input of one step.
        activations: all that lives within a step: activations, gradients, scratch.
        code: the compiled program.
        limit: what the device has; 0 if unknown.
        images: images in flight on the device, which `activations` grows with.
    """

    parameters: int
    optimizer: int
    extra: int
    batch: int
    activations: int
    code: int
    limit: int
    images: int

    @property
    def fixed(self) -> int:
        """Return what does not shrink with fewer images at a time."""
        return self.parameters + self.optimizer + self.extra + self.batch + self.code

    @property
    def total(self) -> int:
        """Return the peak of a step."""
        return self.fixed + self.activations

    @property
    def fits(self) -> bool:
        """Return whether a step fits; True if the limit is unknown."""
        return not self.limit or self.total <= USABLE * self.limit

    def most_images(self) -> int:
        """Return how many images at a time would fit on a device; 0 if none."""
        left = USABLE * self.limit - self.fixed
        return max(0, int(left / max(1.0, self.activations / self.images)))


def estimate(parts, executable=None) -> Estimate:
    """Return the memory of the first step of a run, which nothing has to run for.

    Args:
        parts: `build.Parts`.
        executable: its compiled step; None compiles it.

    Raises:
        OutOfMemoryError: the compiler itself says that it cannot fit.
    """
    phase = parts.phase(0)
    if executable is None:
        with refusals(parts):
            executable = parts.compiled.get(phase, parts.shapes(0))
    analysis = executable.memory_analysis()
    return dataclasses.replace(
        _state(parts),
        activations=int(getattr(analysis, "temp_size_in_bytes", 0)),
        code=int(getattr(analysis, "generated_code_size_in_bytes", 0)),
    )


def _state(parts) -> Estimate:
    """Return an estimate without what only a compiled step knows."""
    phase, s = parts.phase(0), parts.experiment.settings
    state = parts.compiled.abstract(phase)
    sharding = parts.compiled.state_sharding(phase)
    local = jax.tree.map(_shard_bytes, state, sharding)
    return Estimate(
        parameters=_total(local.params),
        optimizer=_total(local.opt),
        extra=_total(local.extra),
        batch=_total(jax.tree.map(_bytes, parts.shapes(0))) // jax.device_count(),
        activations=0,
        code=0,
        limit=limit(),
        images=max(1, s.batch_size // jax.device_count() // s.accumulate),
    )


def _shard_bytes(leaf, sharding) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    return int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _bytes(leaf) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize


def _total(sizes) -> int:
    return sum(jax.tree.leaves(sizes))


def limit() -> int:
    """Return the bytes that JAX may use of a device; of a CPU, the machine's memory.

    0 if unknown.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu" and hasattr(os, "sysconf"):  # Not on Windows.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def free() -> int:
    """Return the bytes of a device that a run may have now; 0 if unknown.

    Of a CPU, what the machine and its control group have left.
    """
    if jax.local_devices()[0].platform != "cpu":
        return limit()
    left = [limit()]
    lines = _read("/proc/meminfo").splitlines()
    left += [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")]
    most, used = (_read(f"/sys/fs/cgroup/memory.{k}") for k in ("max", "current"))
    if most.strip().isdigit() and used.strip().isdigit():
        left.append(int(most) - int(used))
    return min(left)


def resident() -> int | None:
    """Return the bytes this process has in a CPU's memory; None elsewhere, or unknown.

    Of now: the peak that getrusage tells is that of whatever started the process, too.
    """
    if jax.local_devices()[0].platform != "cpu":
        return None
    pages = _read("/proc/self/statm").split()
    if pages:
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows.
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read(path) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def table(e: Estimate) -> str:
    """Return the estimate as text."""
    rows = [
        ("parameters", e.parameters),
        ("optimizer", e.optimizer),
        ("EMA target and other state", e.extra),
        ("batch", e.batch),
        (f"activations of {e.images} images, gradients", e.activations),
        ("program", e.code),
        ("together", e.total),
    ]
    lines = [f"  {name:<42} {size(value):>10}" for name, value in rows]
    if e.limit:
        share = f"{100 * e.total / e.limit:.0f} % of {size(e.limit)}"
        lines.append(f"  {'of the device':<42} {share}")
    return "\n".join(["memory of a step on one device:", *lines])


def size(count: float) -> str:
    """Return 2**30 as "1.00 GiB", 5 * 2**20 as "5.0 MiB"."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def refusals(parts):
    """Return a context in which the device's refusal becomes OutOfMemoryError."""
    return _Refusals(parts)


class _Refusals:
    def __init__(self, parts):
        self._parts = parts

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        del kind, trace
        if not isinstance(error, jax.errors.JaxRuntimeError):
            return
        said = str(error)
        if "RESOURCE_EXHAUSTED" in said or "out of memory" in said.lower():
            first = said.strip().splitlines()[0][:300]
            text = f"out of device memory: {first}\n{advice(self._parts)}"
            raise errors.OutOfMemoryError(text) from error


def advice(parts) -> str:
    """Return what to lower, and by how much, for a step that did not fit."""
    s = parts.experiment.settings
    compiled = parts.compiled.finished(parts.phase(0))
    e = estimate(parts, compiled) if compiled is not None else _state(parts)
    lines = [
        f"  now: batch_size={s.batch_size}, accumulate={s.accumulate}, "
        f"precision={s.precision}: {e.images} images at a time on a device"
    ]
    if e.activations:
        lines[0] += f", {size(e.total)} by XLA's count"
    if e.limit:
        lines[0] += f"; it has {size(e.limit)}"
    if e.activations and e.limit and not e.most_images():
        lines.append(
            f"  {size(e.fixed)} of it are parameters, optimizer and target, which no "
            "smaller batch makes less: shard them (mesh.fsdp) or take a smaller model"
        )
    # Without a count of the step, or where it was too low, half as many is a step.
    most = e.most_images() if e.activations and e.limit else e.images // 2
    if e.fits:
        most = min(most, e.images // 2)
        half = max(1, s.evals.batch_size // 2)
        lines.append(f"  --config.evals.batch_size={half}: if it was an evaluation")
    lines += _fewer(parts, max(1, most))
    lines += _switches(parts)
    return "\n".join(lines)


def _fewer(parts, images: int):
    """Yield how to have at most so many images at a time on a device."""
    s, count = parts.experiment.settings, jax.device_count()
    rows = s.batch_size // count
    if rows <= 1:
        return
    if not parts.method.divisible:
        lower = min(images, rows // 2 or 1) * count
        yield f"  --config.batch_size={lower} (this loss cannot be accumulated)"
        return

    def fits(k):
        """Return whether the method can have its batch in k parts."""
        return rows % k == 0 and not any(parts.experiment.accumulating(k).faults())

    if s.per_device:  # It decides how often to accumulate.
        sizes = (k for k in range(1, images + 1) if rows % k == 0 and fits(rows // k))
        fewer = max(sizes, default=1)
        if fewer < s.per_device:
            yield f"  --config.per_device={fewer}: the same batch, less at a time"
        return
    ways = [k for k in range(s.accumulate + 1, rows + 1) if fits(k)]
    fitting = [k for k in ways if rows // k <= images] or ways[-1:]
    if fitting:
        k = fitting[0]
        yield (
            f"  --config.accumulate={k}: the same batch in {k} parts, "
            f"{rows // k} images at a time on a device"
        )
    lower = min(images * s.accumulate, rows // 2) * count
    if lower:
        yield f"  --config.batch_size={lower}: a smaller batch, if lr may change"


def _switches(parts):
    """Yield the switches that save memory and are not yet on."""
    s, sections = parts.experiment.settings, parts.experiment.sections
    if s.precision == "float32":
        yield "  --config.precision=bfloat16: half the activations"
    if getattr(sections.get("model"), "remat", None) is False:
        yield "  --config.model.remat=True: a third more time, far fewer activations"
    if jax.device_count() > 1 and s.mesh.fsdp == 1:
        n = jax.device_count()
        yield f"  --config.mesh.fsdp={n}: parameters and optimizer over {n} devices"
    crops = getattr(sections.get("multicrop"), "num_local_crops", 0)
    if crops:
        yield f"  --config.multicrop.num_local_crops={crops // 2}: fewer local crops"


def describe(parts) -> str:
    """Return the memory of a run's step, and advice if it is too much.

    Raises:
        OutOfMemoryError: it does not fit.
    """
    e = estimate(parts)
    text = f"{devices.describe(parts.mesh)}\n{table(e)}"
    if not e.fits:
        raise errors.OutOfMemoryError(f"a step does not fit\n{text}\n{advice(parts)}")
    more = e.most_images() if e.limit else 0
    if more > e.images:
        text += f"\n  room for about {more} images at a time on a device"
    return text
