"""Tokens of a frozen prefix on disk: what blocks 0 .. b - 1 make of every image.

DIR/manifest.json says of which weights, blocks, views and dtype; DIR/tokens-00000.npy
... hold float16 [rows, 1 + N, D], row = image * views + view, each mapped, not read.
The views are not stored: view v of image i is drawn from (seed, i, v), and drawn again
when the image is needed for its targets.

A view of ViT-B at 224 px is 197 * 768 * 2 bytes = 303 kB, 388 GB for ImageNet-1k.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import numpy as np

from vitssl import errors, ranges, tree

MANIFEST = "manifest.json"
KEYS = frozenset("weights boundary views seed view images".split())  # Of it.
SHARD = 1024  # Images per file.


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Config section `prefix`: mask features instead of patches.

    The first blocks, once frozen, see the whole image, without gradient, and what they
    give is masked. That costs more than the masked prefix, unless it is read from a
    store (`vitssl store`). Visible tokens have then seen the hidden ones: another task,
    not the same one made cheaper.

    Attributes:
        boundary: number of blocks before the mask; 0 is off.
        store: directory of stored tokens, or "" to compute them in every step.
    """

    boundary: ranges.OrNone = 0
    store: str = ""

    @property
    def pattern(self) -> str:
        """Return the pattern of the parameters up to the boundary."""
        blocks = "|".join(str(i) for i in range(self.boundary))
        return rf"encoder/(cls|patch_embed/.*|block_({blocks})/.*)"

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        if self.store and not self.boundary:
            yield "store: needs boundary, the number of blocks it holds the output of"


def digest(params, pattern: str) -> str:
    """Return a digest of the leaves whose names match a pattern."""
    h = hashlib.sha256()
    for name, leaf in sorted(tree.flat(params).items()):
        if re.fullmatch(pattern, name):
            h.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
    return h.hexdigest()


def generator(seed: int, image: int, view: int) -> np.random.Generator:
    """Return the random numbers of one view of one image."""
    return np.random.default_rng((seed, image, view))


@dataclasses.dataclass(frozen=True)
class Store:
    """An open store: its directory and its manifest."""

    root: str
    about: dict = dataclasses.field(hash=False, compare=False)

    def __getitem__(self, key) -> np.ndarray:
        """Return the tokens float16 [1 + N, D] of (image, view)."""
        image, view = key
        if not 0 <= image < self.about["images"]:
            raise errors.DataError(
                f"{self.root}: holds {self.about['images']} images, not number {image}"
            )
        shard, row = divmod(image, SHARD)
        return _mapped(self.root, shard)[row * self.about["views"] + view]

    def check(self, own: str, boundary: int) -> None:
        """Raise CheckpointError if the store is of other weights or blocks."""
        for key, have in (("boundary", boundary), ("weights", own)):
            if self.about[key] != have:
                raise errors.CheckpointError(
                    f"prefix.store={self.root}: {key} is {self.about[key]}, this run "
                    f"has {have}; write the store again from what init.from names"
                )

    def views(self, view: Callable, key: str) -> "Views":
        """Return the training transform that hands out tokens with their image.

        Raises:
            UsageError: the store was written with other views (`key` differs).
        """
        if self.about["view"] != key:
            raise errors.UsageError(
                f"prefix.store={self.root}: its views are {self.about['view']}, this "
                f"config has {key}; use the same augment, data.mean and data.std"
            )
        return Views(self, view)


@dataclasses.dataclass(frozen=True)
class Views:
    """Transform: a view of the example, as `view` made it, and its stored tokens."""

    store: Store
    view: Callable

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return what `view` returns, and "tokens" float16 [1 + N, D]."""
        about, index = self.store.about, int(example["index"])
        v = int(rng.integers(about["views"]))
        made = self.view(example, generator(about["seed"], index, v))
        return made | {"tokens": np.array(self.store[index, v])}


@functools.lru_cache(maxsize=64)
def _mapped(root, shard):
    path = pathlib.Path(root) / f"tokens-{shard:05d}.npy"
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # noqa: BLE001 - it is Python's parser that reads a header.
        raise errors.DataError(f"{path}: cannot be read: {errors.told(e)}") from e


def open(root) -> Store:
    """Open a store.

    Raises:
        DataError: there is none, it was not finished, or is damaged.
    """
    path = pathlib.Path(root) / MANIFEST
    try:
        about = json.loads(path.read_text())
        if not isinstance(about, dict) or not KEYS <= set(about):
            raise ValueError("not a whole one")
        return Store(str(root), about)
    except (OSError, ValueError, RecursionError) as e:
        raise errors.DataError(
            f"prefix.store={root}: no {MANIFEST} there that is whole; write it with "
            "vitssl store WORKDIR --to=DIR --boundary=N"
        ) from e


def write(root, source, view, run, *, about, batch_size=64, show=print) -> Store:
    """Run every view of every image through the prefix and store the tokens.

    Args:
        root: directory, made if missing.
        view: the training transform.
        run: uint8 [B, H, W, C] -> tokens [B, 1 + N, D].
        about: {"weights", "boundary", "views", "seed", "view"} of the manifest.
        batch_size: views per call of `run`.

    Raises:
        UsageError: there is a store already.
    """
    root = pathlib.Path(root)
    if (root / MANIFEST).exists():
        raise errors.UsageError(f"--to={root}: holds a store already; name another")
    root.mkdir(parents=True, exist_ok=True)
    count = len(source)
    for shard, first in enumerate(range(0, count, SHARD)):
        tasks = [
            (i, v)
            for i in range(first, min(count, first + SHARD))
            for v in range(about["views"])
        ]
        rows = []
        for at in range(0, len(tasks), batch_size):
            part = tasks[at : at + batch_size]
            images = [_view(source, view, about["seed"], i, v) for i, v in part]
            padded = np.stack(images + images[:1] * (batch_size - len(part)))
            rows.append(np.asarray(run(padded), np.float16)[: len(part)])
        np.save(root / f"tokens-{shard:05d}.npy", np.concatenate(rows))
        show(f"{min(count, first + SHARD)}/{count} images")
    about = dict(about, images=count, dtype="float16", tokens=list(rows[0].shape[1:]))
    (root / MANIFEST).write_text(json.dumps(about, indent=1))
    return open(root)


def _view(source, view, seed, i, v):  # -> [H, W, C]
    example = dict(source.at(i, 0), epoch=0, step=0)
    if int(example["index"]) != i:
        raise errors.DataError(
            f"{source.name}: image {i} is broken; a store needs every image"
        )
    return view(example, generator(seed, i, v))["global"][0]
