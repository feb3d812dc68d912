"""Devices: start-up of several processes, the mesh, where arrays live.

Parameters are replicated by default, or sharded over the mesh axis `fsdp`; the batch
is split over both axes. Losses are written on the global batch, so nothing here or in
a method calls a collective.
"""

import contextlib
import dataclasses
import os
import sys
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vitssl import errors, ranges
from vitssl.run import chips, compilecache, log

# Smaller arrays are kept whole everywhere: splitting them costs more than it saves.
_FSDP_MIN_SIZE = 2**14

# Words of collectives, and of JAX's runtime, about a process that does not answer.
_GONE = ("Connection closed", "Connection reset", "Broken pipe", "Socket closed")
_GONE += ("heartbeat", "unhealthy", "remote process exited", "NCCL")
# Address space that JAX, its threads and the checkpoint library want before a step.
LEAST_SPACE = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Config section `mesh`.

    Attributes:
        fsdp: number of devices over which parameters and optimizer state are split;
            1 replicates them. The batch is split over all devices in either case.
        fsdp_min_size: arrays with fewer scalars are replicated.
        gradients: what the gradients of matrices are summed in, over the batch and over
            the devices. bfloat16 (with precision=bfloat16) sends half the bytes, and
            256 devices then add numbers of 8 bits; kernels of products that are made
            in float32 are rounded to it too.
        combine: so many megabytes of gradients cross the devices at a time, on GPUs; 0
            = as many as XLA puts together, which may be all, after the backward pass.
            Smaller ones (such as 32) overlap with it.
    """

    fsdp: ranges.Count = 1
    fsdp_min_size: int = _FSDP_MIN_SIZE
    gradients: Literal["float32", "bfloat16"] = "float32"
    combine: ranges.OrNone = 0


def start() -> None:
    """Join the other processes of the job, if the environment names a job.

    What is compiled from now on is kept, see `compilecache`.

    JAX finds Slurm, Open MPI, Kubernetes and TPU pods itself; elsewhere set
    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        OutOfMemoryError: a limit of this process (ulimit -v) is too low for JAX, which
            would be killed rather than told.
    """
    compilecache.start()
    _check_limits()
    _join()


def _join() -> None:
    given = "JAX_COORDINATOR_ADDRESS" in os.environ
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if not (given or slurm) or jax.distributed.is_initialized():
        return
    if given:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    else:
        jax.distributed.initialize()


def _check_limits() -> None:
    try:
        import resource
    except ImportError:  # No Unix, no limits.
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_SPACE:
        raise errors.OutOfMemoryError(
            f"the address space of this process is limited to {limit / 2**30:.2g} GiB "
            f"(ulimit -v); JAX needs {LEAST_SPACE / 2**30:.0f} GiB or more: raise the "
            "limit, or bound the resident memory instead (systemd, cgroups)"
        )


def mesh(spec: Mesh, batch_size: int, accumulate: int = 1) -> jax.sharding.Mesh:
    """Return the mesh (data, fsdp) over all devices of all processes.

    Several CPUs keep no compiled program from now on, see `compilecache.stop`.

    Raises:
        UsageError: fsdp or the (micro-)batch does not divide over the devices.
    """
    count = jax.device_count()
    if count % spec.fsdp:
        raise errors.UsageError(
            f"mesh.fsdp={spec.fsdp} does not divide {count} devices"
        )
    unit = count * accumulate
    if batch_size % unit:
        low = batch_size // unit * unit
        near = [str(n) for n in (low, low + unit) if n]
        of = f"{count} devices" + (f" x {accumulate}" if accumulate > 1 else "")
        raise errors.UsageError(
            f"batch_size={batch_size} does not split over {of}; "
            f"nearest that do: {', '.join(near)}"
        )
    shape = (count // spec.fsdp, spec.fsdp)
    # Auto axes: jax >= 0.10 would make explicit ones, which refuse plain linen code.
    made = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    if made.size > 1 and made.devices.flat[0].platform == "cpu":
        compilecache.stop()
    return made


def compiler_options(spec: Mesh) -> dict:
    """Return the options of `jax.jit` that the section asks for; {} but on GPUs."""
    if not spec.combine or jax.default_backend() != "gpu":
        return {}
    kinds = ("all_reduce", "all_gather", "reduce_scatter")
    size = spec.combine * 2**20
    return {f"xla_gpu_{kind}_combine_threshold_bytes": size for kind in kinds}


def batch_sharding(m: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis over every device."""
    return NamedSharding(m, PartitionSpec(("data", "fsdp")))


def replicated(m: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(m, PartitionSpec())


def state_sharding(m: jax.sharding.Mesh, spec: Mesh, abstract):
    """Return a sharding for every leaf of an abstract state.

    With fsdp > 1 the largest axis that divides is split; keys, scalars and small
    arrays are replicated.
    """
    split = m.shape["fsdp"]

    def one(leaf):
        whole = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if whole or split == 1 or leaf.size < spec.fsdp_min_size:
            return replicated(m)
        axes = [i for i, n in enumerate(leaf.shape) if n % split == 0]
        if not axes:
            return replicated(m)
        widest = max(axes, key=lambda i: leaf.shape[i])
        names = [None] * leaf.ndim
        names[widest] = "fsdp"
        return NamedSharding(m, PartitionSpec(*names))

    return jax.tree.map(one, abstract)


def put(batch, sharding: NamedSharding):
    """Return a global batch on the devices from this process's rows [b, ...].

    What is there already stays.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def one(a):
        if isinstance(a, jax.Array) and a.sharding == sharding:
            return a
        return jax.make_array_from_process_local_data(sharding, np.asarray(a))

    return jax.tree.map(one, batch)


def get(tree):
    """Return numpy copies of a tree on every process (gathers what is sharded)."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


@contextlib.contextmanager
def company(workdir):
    """End this process of a job where another one is gone, or it cannot save its part.

    It ends at once (exit code 7, and 4): nothing can be computed or saved alone, and
    what is under way, and JAX at exit, would wait for the others. What a device reports
    is seen here; where JAX's runtime hears of it first, it aborts the process itself.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() == 1 or not any(word in str(e) for word in _GONE):
            raise
        why = str(e).partition("\n")[0]
        text = f"another process of this job has ended ({why}); run the job again"
        _leave(workdir, errors.StalledError(text))
    except errors.CheckpointError as e:
        if jax.process_count() == 1:
            raise
        _leave(workdir, e)


def _leave(workdir, error):
    text = f"{type(error).__name__}: {error}"
    print(text, file=sys.stderr, flush=True)
    if is_main():
        log.write_status(workdir, state="failed", error=text)
    os._exit(error.code)


def meet(place: str) -> None:
    """Wait until every process of the job is at `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def is_main() -> bool:
    """Return whether this process writes the logs."""
    return jax.process_index() == 0


def describe(m: jax.sharding.Mesh) -> str:
    """Return one line: devices, processes, mesh."""
    kind = jax.devices()[0].device_kind
    axes = ", ".join(f"{k}={v}" for k, v in m.shape.items())
    return (
        f"{jax.device_count()} x {kind} ({jax.default_backend()}), "
        f"{jax.process_count()} process(es), mesh {axes}"
    )


# What a product of a dtype is made in by default.
_MADE_IN = {"bfloat16": "bf16", "float32": "tf32"}


def peak_flops(dtype: str) -> float:
    """Return the data-sheet peak of one device in FLOP/s, or 0.0 if unknown."""
    kind = chips.of_device(jax.devices()[0].device_kind)
    return kind.products[_MADE_IN[dtype]] if kind else 0.0
