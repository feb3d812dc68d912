"""What a traced function may know of the devices that its arrays are split over.

The training step says so while it is traced (`over`). Elsewhere nothing is known, and
all is left to XLA.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec


def over(mesh):
    """Trace for the devices of a mesh; None = one device. A context manager."""
    empty = jax.sharding.AbstractMesh((), ())
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh if mesh else empty)


@jax.custom_vjp
def whole(x):
    """Return a parameter whole on every device, if `mesh.fsdp` has split it.

    It crosses in the dtype that it has here. Left to itself, XLA gathers activations
    where that seems less, as in a loop over blocks; its gradient XLA may split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1:
        return x
    # Or XLA moves a conversion behind the gathering.
    x = jax.lax.optimization_barrier(x)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


whole.defvjp(lambda x: (whole(x), None), lambda _, g: (g,))


def rows(*arrays):
    """Return arrays [B, ...] split alike, by rows, over the devices that B divides by.

    For kernels that XLA does not see into: left to itself, it may split the keys of an
    attention in another way than its queries, which cuDNN's refuses.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or len(arrays[0]) % mesh.size:
        return arrays
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return tuple(jax.lax.with_sharding_constraint(x, split) for x in arrays)
