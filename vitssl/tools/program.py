"""A trained feature function as a program that runs without this package."""

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import disk, errors, sizes
from vitssl.convert import safetensors
from vitssl.run import inference


def export(
    features: inference.Features,
    to: disk.AnyPath,
    *,
    platforms: Sequence[str] = ("cpu", "cuda"),
    batch: str | int = "b",
) -> pathlib.Path:
    """Write the feature function as a program that runs without this package.

    FOLDER/features.jax is compiled for any batch size on every platform, FOLDER/
    weights.safetensors its argument, README.md the lines that run it.

    Args:
        features: of `load`.
        to: the folder.
        platforms: of `jax.export`.
        batch: name of the symbolic batch size, or a number for a fixed one.

    Returns:
        The folder.

    Raises:
        UsageError: the weights say no image size, or the method's features cannot
            be traced for a batch of any size.
    """
    if not features.image_size:
        raise errors.UsageError("program: give --image_size=N, the weights have none")
    # A run's state is a pair of trees; a file holds arrays by name.
    found, structure = jax.tree_util.tree_flatten_with_path(features.state)
    names = [_name(path) for path, _ in found]
    leaves = {n: np.asarray(x) for n, (_, x) in zip(names, found, strict=True)}

    def run(weights, images):
        state = jax.tree.unflatten(structure, [weights[name] for name in names])
        made = features.apply(state, images)
        return {name: made[name] for name in inference.NAMES}

    (size,) = jax.export.symbolic_shape(str(batch))
    shape = (*sizes.pair(features.image_size), features.channels)
    image = jax.ShapeDtypeStruct((size, *shape), jnp.uint8)
    weights = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in leaves.items()}
    try:
        made = jax.export.export(jax.jit(run), platforms=platforms)(weights, image)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as e:
        raise errors.UsageError(
            f"program: this method wants to know its batch size ({e}); give --batch=N, "
            "or --part=target or encoder for the encoder alone"
        ) from e
    folder = pathlib.Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.jax").write_bytes(bytes(made.serialize()))
    safetensors.write(folder / "weights.safetensors", leaves)
    whole = [str(batch), *map(str, shape)]
    about = dict(
        images=whole, dtype="uint8", platforms=list(platforms), outputs=inference.NAMES
    )
    (folder / "program.json").write_text(json.dumps(about, indent=1))
    (folder / "README.md").write_text(_PROGRAM.format(shape=", ".join(whole)))
    return folder


def _name(path) -> str:
    """Return the name of a leaf: keys of dicts and places in tuples, by slashes."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)


_PROGRAM = """\
# Features as a program

Needs jax and safetensors, nothing else:

```python
import jax, safetensors.numpy
program = jax.export.deserialize(bytearray(open("features.jax", "rb").read()))
weights = safetensors.numpy.load_file("weights.safetensors")
found = program.call(weights, images)  # uint8 [{shape}]
found["pooled"], found["tokens"]
```
"""
