"""Tokens of a frozen prefix on disk: what training reads in place of running it.

A store is a folder of shards. `00012.tokens` holds rows [T, D], one after another, and
then 4 bytes: their CRC-32. Row v * images + i is view v of image i. A shard is written
beside its place and renamed, so it is there whole or not at all, and a process that is
killed leaves nothing that is half of one.
"""

import dataclasses
import functools
import math
import os
import pathlib
import threading
import zlib
from collections.abc import Collection

import numpy as np

from vitssl import errors

SUFFIX = ".tokens"
_CHECK = 4  # Bytes after the rows.
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Store:
    """Where the tokens of every view are; the files may be there or not.

    Attributes:
        root: the folder.
        images: N, images of the training set.
        views: V, views of an image.
        rows: of a shard; the last one may have fewer.
        shape: (T, D) of a row.
        dtype: numpy dtype of the tokens.
    """

    root: str
    images: int
    views: int
    rows: int
    shape: tuple[int, int]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one view."""
        return math.prod(self.shape) * self.dtype.itemsize

    def span(self, shard: int) -> range:
        """Return the rows of a shard."""
        first = shard * self.rows
        return range(first, min(self.views * self.images, first + self.rows))

    def shards(self, views: Collection[int]) -> list[int]:
        """Return the shards that hold a row of these views."""
        found = set()
        for v in views:
            last = (v + 1) * self.images - 1
            found.update(range(v * self.images // self.rows, last // self.rows + 1))
        return sorted(found)

    def size(self, shard: int) -> int:
        """Return the bytes of a shard's file."""
        return len(self.span(shard)) * self.row_bytes + _CHECK

    def path(self, shard: int) -> pathlib.Path:
        """Return the file of a shard."""
        return pathlib.Path(self.root) / f"{shard:05d}{SUFFIX}"

    def has(self, shard: int) -> bool:
        """Return whether a shard is there, by its size."""
        try:
            return self.path(shard).stat().st_size == self.size(shard)
        except OSError:
            return False

    def write(self, shard: int, rows: np.ndarray) -> None:
        """Write the rows [n, T, D] of a shard.

        Raises:
            DataError: the disk is full, or refuses.
        """
        data = np.ascontiguousarray(rows, self.dtype).view(np.uint8)
        path = self.path(shard)
        beside = path.with_suffix(".part")
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(_CHECK, "little"))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as e:
            raise errors.DataError(
                f"freeze.store: {path} cannot be written ({e.strerror}); free space "
                "and run the same command again, or set freeze.store.dir"
            ) from e

    def read(self, shard: int) -> np.ndarray:
        """Return the rows [n, T, D] of a shard, mapped and once checked.

        Raises:
            DataError: it is not there, or not what was written.
        """
        with _LOCK:
            return _mapped(self, shard)

    def row(self, view: int, image: int) -> np.ndarray:
        """Return the tokens [T, D] of a view of an image."""
        shard, row = divmod(view * self.images + image, self.rows)
        return np.array(self.read(shard)[row])


@functools.lru_cache(maxsize=512)  # Each holds a file open.
def _mapped(store, shard):
    path = store.path(shard)
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as e:
        raise errors.DataError(f"freeze.store: {path} cannot be read: {e}") from e
    check = int.from_bytes(bytes(data[-_CHECK:]), "little")
    if len(data) != store.size(shard) or zlib.crc32(data[:-_CHECK]) != check:
        raise errors.DataError(
            f"freeze.store: {path} is damaged (its checksum is another); delete it and "
            "run the same command again: it is made anew"
        )
    return data[:-_CHECK].view(store.dtype).reshape(-1, *store.shape)
