"""Run a network over evaluation batches and collect its features on the host.

An evaluator never sees a method: it gets a callable `features(*state, image)` that
returns {"pooled": [B, D], "tokens": [B, N, D], ...}. `state` is an argument of the
compiled function, so that the trained network, the untrained one and every later step
of a run share one program.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vitssl import errors
from vitssl.models import patches
from vitssl.ops import across

_KEYS = ("image", "label", "labels", "index", "valid")


def extract(
    features: Callable,
    state: tuple,
    batches: Iterable[dict],
    *,
    names: tuple[str, ...] = ("pooled",),
    sharding: NamedSharding | None = None,
) -> dict[str, np.ndarray]:
    """Return the features of every valid image of `batches`, ordered by "index".

    It is compiled once for each `features`, `names` and shape of a batch. Besides the
    result two batches are held at a time: one is computed while the last is copied.

    Args:
        features: hashable; a bound method of the same object counts as the same
            function. It is given what `picture` returns.
        state: leading arguments of `features`, such as (params, extra).
        batches: {"image": uint8 [B, H, W, C], "label", "index": int32 [B], "valid":
            bool [B]}; rows that are not valid (padding) are dropped.
        names: which entries of the features to keep.
        sharding: of a batch over devices; each of several processes then passes its
            own part of every batch, and all of them get all rows. None: the default
            device.

    Returns:
        {name: float32 [M, ...] for each of names, "label": int32 [M], "index"}, and
        "labels" [M, K] if the batches have them.

    Raises:
        ValueError: there is no valid image, or `features` returns no such name.
        NonFiniteError: a feature is not a finite number.
    """

    def run(batch):
        rows = {k: v for k, v in batch.items() if k in _KEYS or k.startswith("image/")}
        rows = _put(rows, sharding)
        return _apply(state, rows, features=features, names=names, sharding=sharding)

    return _all(run, batches)


def outputs(
    function: Callable,
    state: tuple,
    batches: Iterable[dict],
    *,
    sharding: NamedSharding | None = None,
) -> dict[str, np.ndarray]:
    """Return function(*state, batch) of every valid row, ordered by "index".

    Like `extract`, but the function gets the whole batch and all it returns is kept,
    in its own dtype.
    """

    def run(batch):
        rows = _put(dict(batch), sharding)
        return _outputs(state, rows, function=function, sharding=sharding)

    return _all(run, batches)


def _all(run, batches):
    """Return the rows of all batches, on the host, one batch ahead on the devices."""
    parts = collections.defaultdict(list)
    ahead = None
    for batch in batches:
        now = run(batch)
        _collect(ahead, parts)
        ahead = now
    _collect(ahead, parts)
    if not sum(map(len, parts["index"])):
        raise ValueError("extraction: the batches hold no valid image")
    order = np.argsort(np.concatenate(parts["index"]), kind="stable")
    # One name at a time, so that at most one of them is held twice.
    return {key: np.concatenate(parts.pop(key))[order] for key in list(parts)}


def picture(batch):
    """Return what a network gets of a batch: "image", or its parts as a dict."""
    if "image" in batch:
        return batch["image"]
    cut = len("image/")
    return {k[cut:]: v for k, v in batch.items() if k.startswith("image/")}


def _put(rows, sharding):
    """Return the rows of one batch on the device, or split over several."""
    if sharding is None:
        return jax.device_put(rows)
    pad = -len(rows["valid"]) % len(sharding.addressable_devices)
    if pad:  # Rows of zeros are not valid.
        rows = {
            key: np.pad(value, [(0, pad)] + [(0, 0)] * (np.ndim(value) - 1))
            for key, value in rows.items()
        }
    return jax.make_array_from_process_local_data(sharding, rows)


@functools.partial(jax.jit, static_argnames=("features", "names", "sharding"))
def _apply(state, batch, *, features, names, sharding):
    with across.over(sharding and sharding.mesh):
        found = features(*state, picture(batch))
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"features: no {missing}; there is {sorted(found)}")
    rows = {name: found[name].astype(jnp.float32) for name in names}
    return _whole(rows, batch, sharding)


@functools.partial(jax.jit, static_argnames=("function", "sharding"))
def _outputs(state, batch, *, function, sharding):
    with across.over(sharding and sharding.mesh):
        rows = dict(function(*state, batch))
    return _whole(rows, batch, sharding)


def _whole(rows, batch, sharding):
    """Return the rows with their labels, held whole by every process."""
    known = ("label", "labels", "index", "valid")
    rows |= {key: batch[key] for key in known if key in batch}
    if sharding is None:
        return rows
    # Every process needs all rows, and can only read what it holds whole.
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(rows, whole)


def _collect(rows, parts):
    """Append the valid rows of one batch to `parts`, on the host."""
    if rows is None:
        return
    rows = jax.device_get(rows)
    valid = rows.pop("valid")
    for key, value in rows.items():
        value = np.asarray(value)[valid]
        if not np.isfinite(value).all():
            raise errors.NonFiniteError(f"features[{key!r}]: not all are finite")
        parts[key].append(value)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The features of no network at all: the image itself, smaller, as one vector.

    Attributes:
        size: longest side kept; larger images are shrunk by antialiased bilinear
            resampling, so that a baseline of 3 * 224 * 224 numbers stays affordable.
    """

    size: int = 32

    def __call__(self, image) -> dict:
        """Return {"pooled": float32 [B, h * w * C]} in [0, 1] of [B, H, W, C]."""
        b, h, w, c = image.shape
        x = image.astype(jnp.float32) / patches.most(image.dtype)
        shrink = min(1.0, self.size / max(h, w))
        if shrink < 1:
            shape = (b, max(1, round(h * shrink)), max(1, round(w * shrink)), c)
            x = jax.image.resize(x, shape, "linear")
        return {"pooled": einops.rearrange(x, "b h w c -> b (h w c)")}


@dataclasses.dataclass(frozen=True)
class Colours:
    """The features of no network either: how often each colour occurs.

    Attributes:
        levels: of every channel; the first three channels are counted together.
    """

    levels: int = 4

    def __call__(self, image) -> dict:
        """Return {"pooled": shares [B, levels^min(C, 3)]} of [B, H, W, C]."""
        steps = int(patches.most(image.dtype)) + 1
        level = image[..., :3].astype(jnp.int32) * self.levels // steps
        place, count = 0, 1
        for c in range(level.shape[-1]):
            place, count = place * self.levels + level[..., c], count * self.levels
        place = einops.rearrange(place, "b h w -> b (h w)")
        each = jax.vmap(lambda row: jnp.bincount(row, length=count))(place)
        return {"pooled": each / place.shape[1]}


@dataclasses.dataclass(frozen=True)
class Patches:
    """The pixels of an image, averaged over its patches as tokens are into features.

    Attributes:
        side: of a patch, in pixels; what is over at the right and below is left out.
    """

    side: int

    def __call__(self, image) -> dict:
        """Return {"pooled": float32 [B, p * p * C]} in [0, 1] of [B, H, W, C]."""
        h, w = image.shape[1:3]
        p = min(self.side, h, w)
        x = image[:, : h // p * p, : w // p * p].astype(jnp.float32)
        x = einops.reduce(x, "b (h p) (w q) c -> b (p q c)", "mean", p=p, q=p)
        return {"pooled": x / patches.most(image.dtype)}


@dataclasses.dataclass(frozen=True)
class Together:
    """Several features of an image in one pass.

    Attributes:
        parts: (name, what returns {"pooled": [B, D]}) of each.
    """

    parts: tuple[tuple[str, Callable], ...]

    def __call__(self, image) -> dict:
        """Return {name: [B, D]}."""
        return {name: function(image)["pooled"] for name, function in self.parts}


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The features of images made smaller or larger first.

    Attributes:
        features: as `extract` takes it.
        scale: of both sides, which are rounded to whole patches.
        side: of a patch, in pixels.
    """

    features: Callable
    scale: float
    side: int

    def __call__(self, *arguments) -> dict:
        """Return the features of [B, H, W, C], the last of the arguments."""
        *state, image = arguments
        size = scaled(image.shape[1:3], self.scale, self.side)
        shape = (len(image), *size, image.shape[-1])
        x = jax.image.resize(image.astype(jnp.float32), shape, "linear")
        if jnp.issubdtype(image.dtype, jnp.integer):  # Floats would pass as normalised.
            x = jnp.round(x).astype(image.dtype)
        return self.features(*state, x)


def scaled(size, scale: float, side: int):  # (h, w) -> (h, w)
    """Return the sides of an image at a scale, in whole patches of `side` pixels."""
    return tuple(max(1, round(scale * n / side)) * side for n in size)


class Cached:
    """Evaluation batches that are read once and then kept, if they fit into memory.

    Args:
        make: returns a fresh iterable of the batches; called again for every pass as
            long as they do not fit. An iterator with `close` is closed after its pass.
        max_bytes: largest total size to keep; 0 keeps nothing.
    """

    def __init__(self, make: Callable[[], Iterable[dict]], max_bytes: int):
        self._make, self._max_bytes = make, max_bytes
        self._kept = None

    def __iter__(self) -> Iterator[dict]:
        """Yield the batches; a pass that is broken off keeps nothing."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        batches = iter(self._make())
        try:
            for batch in batches:
                if kept is not None:
                    # Loaders hand out views of buffers that they use again.
                    batch = {key: np.array(value) for key, value in batch.items()}
                    kept.append(batch)
                    size += sum(value.nbytes for value in batch.values())
                    if size > self._max_bytes:
                        kept = None
                yield batch
        finally:
            if hasattr(batches, "close"):
                batches.close()
        self._kept = kept


def subset(length: int, samples: int, *, seed: int = 0) -> np.ndarray:
    """Return `samples` distinct indices below `length`, rising; all if there are fewer.

    A folder is sorted by class, so its first n images are no sample of it. 0 means all.
    """
    if not 0 < samples < length:
        return np.arange(length)
    return np.sort(np.random.default_rng(seed).permutation(length)[:samples])
