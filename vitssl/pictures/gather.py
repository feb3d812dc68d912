"""Collects from a trained network what there is to draw."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.data import npy, pipeline, views
from vitssl.data.sources import wrappers
from vitssl.evals import extraction
from vitssl.pictures import drawing, landscape


def gather(
    method,
    state,
    data,
    evals,
    *,
    seed=0,
    images=6,
    points=400,
    landscape_batches=0,
    untrained=None,
    metrics_path="",
) -> drawing.Material:
    """Run the network on a few images and return the arrays to draw, on the host.

    Args:
        method: its `pictures` returns further fields of `Material`.
        state: (params, extra) of the trained network.
        data, evals: config sections; of the latter the size of the images, and which
            features.
        images: how many images to draw one by one (4 of them as training crops).
        points: how many images of the test split to draw as points.
        landscape_batches: batches of 32 images whose mean loss makes the landscape, up
            to 10; 0 leaves it out. It costs 441 times their forward passes.
        untrained: (params, extra) of the same network before training, to compare.
        metrics_path: metrics.jsonl of the run.
    """
    source = data.open(data.split, seed)
    batch = next(_batches(method, source, min(4, images, len(source)), seed))
    bank = evaluation(data, evals.image_size, points, seed)
    shown = bank["image"][:images]
    called = {"trained": state} | ({"untrained": untrained} if untrained else {})
    found = {
        name: _vectors(method, each, bank, evals.features)
        for name, each in called.items()
    }
    tokens = jax.jit(method.features)(*state, shown)["tokens"]
    fields = method.pictures(*state, batch, shown)
    if landscape_batches:
        few = min(10, landscape_batches)
        stream = _batches(method, source, min(32, len(source)), seed)
        fields["plane"] = _plane(method, state, list(itertools.islice(stream, few)))
    return drawing.Material(
        images=shown,
        tokens=np.asarray(tokens, np.float32),
        batch=batch if "global" in batch else {},
        originals=[source[int(i)]["image"] for i in batch["index"]],
        features=found,
        bank=bank["image"],
        labels=bank["label"] if (bank["label"] >= 0).any() else None,
        classes=tuple(source.classes),
        metrics_path=metrics_path,
        scores=_scores(metrics_path),
        **fields,
    )


def _scores(metrics_path):
    """Return the arrays of the final scores that lie beside a metrics.jsonl.

    Raises:
        DataError: the file is damaged.
    """
    path = pathlib.Path(metrics_path).parent / "scores.npz"
    if not metrics_path or not path.exists():
        return {}
    try:
        return npy.archive(path)
    except (ValueError, OSError) as e:
        raise errors.DataError(
            f"{path}: damaged ({errors.told(e)}); evaluate again"
        ) from e


def evaluation(data, size, points, seed):
    """Return up to `points` images of the test split (0: all), as evaluators see them.

    {"image": uint8 [M, size, size, C], "label", "index": int32 [M]}, in random order,
    so that any first few are of all classes.
    """
    source = data.open(data.test_split)
    source = wrappers.Tolerant(source, data.on_bad_image, data.bad_share)
    chosen = extraction.subset(len(source), points, seed=seed)
    view = views.Evaluate(size)
    rows = []
    for i in np.random.default_rng(seed).permutation(chosen):
        rows.append(view(dict(source[int(i)], index=np.int32(i))))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _chunks(bank, size=64):
    """Yield `bank` as evaluation batches of one size, in its own order."""
    count = len(bank["image"])
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        batch = {k: v[np.minimum(rows, count - 1)] for k, v in bank.items()}
        # Features come back by index: here that is the place in `bank`.
        yield batch | {"index": rows.astype(np.int32), "valid": rows < count}


def _vectors(method, state, bank, name):
    """Return one vector per image [M, D] of a state; of tokens their mean."""
    found = extraction.extract(method.features, state, _chunks(bank), names=(name,))
    return found[name].mean(1) if found[name].ndim == 3 else found[name]


def _batches(method, source, size, seed):
    """Yield training batches, and close the loader in the end."""
    with pipeline.train(
        source, method.transform(), batch_size=size, seed=seed, threads=1
    ) as stream:
        yield from stream


def _plane(method, state, batches):
    """Return the loss on a plane through the parameters: see `landscape.plane`."""
    params, extra = state
    rng, phase = jax.random.key(0), method.phase(0)

    @jax.jit
    def loss(params):
        each = [method.loss(params, extra, b, rng, phase=phase)[0] for b in batches]
        return jnp.stack(each).mean()

    return landscape.plane(loss, jax.device_get(params))
