"""Images stored as raw planes inside larger files: CIFAR's and STL-10's layouts."""

import dataclasses
import functools
import typing

import numpy as np


class Block(typing.NamedTuple):
    """Consecutive images of one file.

    Attributes:
        path: of the file.
        offset: of the first image, in bytes.
        count: number of images.
        held: the bytes themselves [count, C, H, W] where they are not to be found as
            one piece in the file, else an empty array.
    """

    path: str
    offset: int
    count: int
    held: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Planes:
    """uint8 images [C, H, W] (or [C, W, H]) in blocks of files, mapped into memory.

    What is pickled is the paths, never the pixels: each process maps the files anew.

    Attributes:
        blocks: the files, in order.
        shape: (C, H, W) of an image as stored.
        transposed: each plane is stored column by column.
        labels: int32 [N], -1 = unlabelled.
    """

    blocks: tuple[Block, ...]
    shape: tuple[int, int, int]
    transposed: bool
    labels: np.ndarray
    classes: tuple[str, ...]
    root: str
    name: str
    split: str

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[0]

    @functools.cached_property
    def _maps(self):
        maps = []
        for path, offset, count, held in self.blocks:
            if not len(held):
                shape = (count, *self.shape)
                held = np.memmap(path, np.uint8, "r", offset, shape)
            maps.append(held)
        return maps

    @functools.cached_property
    def _ends(self):
        return np.cumsum([block.count for block in self.blocks])

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if not 0 <= i < len(self.labels):
            raise IndexError(i)
        block = int(np.searchsorted(self._ends, i, side="right"))
        first = self._ends[block] - self.blocks[block].count
        stored = self._maps[block][i - first]  # [C, H, W], or [C, W, H]
        image = stored.transpose((2, 1, 0) if self.transposed else (1, 2, 0))
        return {"image": np.ascontiguousarray(image), "label": int(self.labels[i])}


def subset(source, keep):
    """The images `keep` (indices) of a source; the order is theirs."""
    return Subset(source, np.asarray(keep, np.int64))


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some images of another source, `keep` [N] are their indices there."""

    source: typing.Any
    keep: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """[N] int32."""
        return self.source.labels[self.keep]

    def __getattr__(self, key):
        # classes, channels, root, name and split are those of the whole.
        if key.startswith("_") or key in ("source", "keep"):
            raise AttributeError(key)
        return getattr(self.source, key)

    def __len__(self):
        return len(self.keep)

    def __getitem__(self, i):
        return self.source[int(self.keep[i])]
