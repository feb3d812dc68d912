"""Images stored raw inside larger files: the layouts of CIFAR and STL-10."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from vitssl.data.sources import layout


class Block(NamedTuple):
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
class Blocks(layout.Images):
    """uint8 images [C, H, W] (or [C, W, H]) in blocks of files, mapped into memory.

    What is pickled is the paths, never the pixels: each process maps the files anew.

    Attributes:
        blocks: the files, in order.
        shape: (C, H, W) of an image as stored.
        transposed: each plane is stored column by column.
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
        return [
            held
            if len(held)
            else np.memmap(path, np.uint8, "r", offset, (count, *self.shape))
            for path, offset, count, held in self.blocks
        ]

    @functools.cached_property
    def _ends(self):
        return np.cumsum([block.count for block in self.blocks])

    def image(self, i: int) -> np.ndarray:
        """Return image i, channels last."""
        block = int(np.searchsorted(self._ends, i, side="right"))
        first = self._ends[block] - self.blocks[block].count
        stored = self._maps[block][i - first]  # [C, H, W], or [C, W, H]
        axes = (2, 1, 0) if self.transposed else (1, 2, 0)
        return np.ascontiguousarray(stored.transpose(axes))
