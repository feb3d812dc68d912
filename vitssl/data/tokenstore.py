"""Tokens of a frozen prefix on disk: what training reads in place of running it.

A store is a folder with a file for each view. `00002.tokens` has a place of fixed size
for every image: its tokens [T, D], then 8 bytes, the mark of what made them (the frozen
weights) and the CRC-32 of tokens and mark. Tokens are there if both fit, else they are
made again. So a process may be killed while it writes, files may be damaged or deleted,
and the tokens behind more blocks take the place of those behind fewer. What was never
written takes no room on the disk.
"""

import dataclasses
import errno
import math
import os
import pathlib
import zlib

import numpy as np

from vitssl import errors

SUFFIX = ".tokens"
_END = 8  # Bytes after the tokens of a place: mark and checksum.


@dataclasses.dataclass(frozen=True)
class Store:
    """Where the tokens of every view are; they may be there or not.

    Place v * images + i is view v of image i.

    Attributes:
        root: the folder.
        images: N, images of the training set.
        shape: (T, D) of a view.
        dtype: numpy dtype of the tokens.
        mark: number below 2^32 that says what made the tokens.
    """

    root: str
    images: int
    shape: tuple[int, int]
    dtype: np.dtype
    mark: int = 0
    _files: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def view_bytes(self) -> int:
        """Return the bytes of the tokens of one view of one image."""
        return math.prod(self.shape) * self.dtype.itemsize

    def size(self, views: int) -> int:
        """Return the bytes of so many views of every image."""
        return views * self.images * (self.view_bytes + _END)

    def path(self, view: int) -> pathlib.Path:
        """Return the file of a view."""
        return pathlib.Path(self.root) / f"{view:05d}{SUFFIX}"

    def marked(self, places) -> np.ndarray:  # [n] -> bool [n]
        """Return which places bear the mark, without a look at their tokens."""
        ends = self._read(places, _END, self.view_bytes)
        return ends[:, :4].copy().view("<u4")[:, 0] == self.mark

    def read(self, places) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens [n, T, D], which of them are there: bool [n])."""
        rows = self._read(places, self.view_bytes + _END)
        ends = rows[:, -_END:].copy().view("<u4")
        there = ends[:, 0] == self.mark
        for i in np.flatnonzero(there):
            there[i] = zlib.crc32(rows[i, :-4]) == ends[i, 1]
        tokens = np.ascontiguousarray(rows[:, :-_END]).view(self.dtype)
        return tokens.reshape(-1, *self.shape), there

    def write(self, places, tokens: np.ndarray) -> None:
        """Write the tokens [n, T, D] of some places.

        Raises:
            DataError: the disk is full, or refuses.
        """
        rows = np.empty((len(places), self.view_bytes + _END), np.uint8)
        data = np.ascontiguousarray(tokens, self.dtype).reshape(len(places), -1)
        rows[:, :-_END] = data.view(np.uint8)
        rows[:, -_END:-4] = np.frombuffer(self.mark.to_bytes(4, "little"), np.uint8)
        for row, place in zip(rows, places, strict=True):
            row[-4:] = np.frombuffer(zlib.crc32(row[:-4]).to_bytes(4, "little"), "u1")
            view, image = divmod(int(place), self.images)
            try:
                self._put(view, image * row.size, row)
            except OSError as e:
                raise errors.DataError(
                    f"freeze.store: {self.path(view)} cannot be written "
                    f"({e.strerror}); free space and run the same command again, or "
                    "set freeze.store.dir"
                ) from e

    def _read(self, places, count, skip=0):  # -> uint8 [n, count]
        """Return bytes of some places; 0 where there are none."""
        rows = np.zeros((len(places), count), np.uint8)
        for row, place in zip(rows, places, strict=True):
            view, image = divmod(int(place), self.images)
            at = image * (self.view_bytes + _END) + skip
            try:
                file = self._file(view)
                file.seek(at)
                file.readinto(row)
            except OSError as e:
                path = self.path(view)
                raise errors.DataError(
                    f"freeze.store: {path} cannot be read ({e.strerror}); delete it "
                    "and run the same command again: it is made anew"
                ) from e
        return rows

    def _put(self, view, at, row):
        file = self._file(view)
        file.seek(at)
        if file.write(row) != row.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _file(self, view):
        if view not in self._files:
            self.path(view).touch()
            self._files[view] = self.path(view).open("r+b", buffering=0)
        return self._files[view]

    def close(self) -> None:
        """Close the files; may be called twice."""
        while self._files:
            self._files.popitem()[1].close()
