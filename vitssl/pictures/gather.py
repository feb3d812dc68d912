"""Collects from a trained network what there is to draw."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.data import npy, pipeline, views
from vitssl.data.sources import wrappers
from vitssl.evals import extraction, knn
from vitssl.pictures import drawing, landscape

BANK = 5_000  # Training images, at most, among which neighbours are looked for.
TOKENS = 64  # Images whose tokens make the mean of a position.
NEAR = 5  # Neighbours of an image.


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
    some = {key: rows[:TOKENS] for key, rows in bank.items()}
    tokens = extraction.extract(
        method.features, state, _chunks(some), names=("tokens",)
    )["tokens"]
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
        labels=bank["label"] if (bank["label"] >= 0).any() else None,
        neighbours=nearest(
            method, state, data, evals, bank, found["trained"], seed=seed
        ),
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


def nearest(method, state, data, evals, test, vectors, *, seed=0, queries=6) -> dict:
    """Return what `space.neighbours` draws: test images, and training images like them.

    Args:
        test: of `evaluation`; the queries are of as many classes as there are.
        vectors: [M, D], their features.
    """
    classes = np.unique(test["label"], return_index=True)[1]
    order = np.concatenate([np.sort(classes), np.arange(len(test["label"]))])
    asked = order[np.sort(np.unique(order, return_index=True)[1])][:queries]
    source = data.open(data.bank_split, seed)
    chosen = extraction.subset(len(source), BANK, seed=seed)
    if data.bank_split == data.test_split:  # An image is not its own neighbour.
        chosen = np.setdiff1d(chosen, test["index"][asked])
    if len(chosen) < NEAR:
        return {}
    view = views.Evaluate(evals.image_size)
    batches = pipeline.evaluate(
        wrappers.Subset(source, chosen),
        view,
        batch_size=64,
        threads=data.threads,
        on_bad_image=data.on_bad_image,
        bad_share=data.bad_share,
    )
    found = _extracted(method, state, batches, evals.features)
    _, near = knn.search(found["vector"], vectors[asked], NEAR)
    near = np.unique(near)
    images = [view(dict(source[int(chosen[i])], index=np.int32(0))) for i in near]
    known = (test["label"][asked] >= 0).all()
    return dict(
        queries=test["image"][asked],
        bank=np.stack([row["image"] for row in images]),
        features=(vectors[asked], found["vector"][near]),
        labels=(test["label"][asked], found["label"][near]) if known else None,
        total=len(chosen),
        count=NEAR,
    )


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
    return _extracted(method, state, _chunks(bank), name)["vector"]


def _extracted(method, state, batches, name):
    """Return {"vector": [M, D], "label": [M]} of evaluation batches."""
    found = extraction.extract(method.features, state, batches, names=(name,))
    x = found[name]
    return found | {"vector": x.mean(1) if x.ndim == 3 else x}


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
