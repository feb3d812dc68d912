"""Sources made of another source."""

import dataclasses
import logging
import threading
from typing import Any, Literal

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import layout

logger = logging.getLogger("vitssl.data")

SHARED = "name root split classes channels labels several path".split()


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapper(layout.Source):
    """A source that leaves to `whole` what it does not say itself."""

    whole: Any

    def __getattr__(self, key):
        """Return what `whole` knows of `SHARED`: only where this object lacks it."""
        if key in SHARED:
            return getattr(self.whole, key)
        raise AttributeError(f"{type(self).__name__} has no {key!r}")

    def __len__(self):
        return len(self.whole)


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(Wrapper):
    """Some images of a source: [M] `indices` of its own."""

    indices: np.ndarray

    @property
    def labels(self):
        """Labels [M], or None if the whole does not know them."""
        labels = getattr(self.whole, "labels", None)
        return None if labels is None else labels[self.indices]

    @property
    def several(self):
        """Labels [M, K] of images that have several, or None."""
        several = getattr(self.whole, "several", None)
        return None if several is None else several[self.indices]

    def reduced(self, reduction):
        """Return the subset whose images are decoded so; see `layout.Source`."""
        return dataclasses.replace(self, whole=self.whole.reduced(reduction))

    def __len__(self):
        return len(self.indices)

    def example(self, i: int) -> dict:
        """Return example i of the subset."""
        return self.whole[int(self.indices[i])]


@dataclasses.dataclass(frozen=True, eq=False)
class WithColumns(Wrapper):
    """Image files whose examples carry further columns: groups, keypoints, masks.

    Attributes:
        columns: {name: array [N, ...]}.
        masks: paths [N] of mask images ("" = all background), or () for none. A mask
            is read as uint8 [H, W], 1 where a pixel is above 0.
    """

    columns: dict = dataclasses.field(default_factory=dict)
    masks: tuple[str, ...] = ()

    def example(self, i: int) -> dict:
        """Return example i."""
        example = self.whole[i] | {k: column[i] for k, column in self.columns.items()}
        if self.masks:
            example["mask"] = np.zeros(example["image"].shape[:2], np.uint8)
            if self.masks[i]:
                mask = decode.read(self.masks[i], channels=1)[..., 0]
                example["mask"] = (mask > 0).astype(np.uint8)
        return example


class Tolerant(Wrapper):
    """A source that survives broken images, but not many of them.

    `[i]` gives the example i with its own `index`; where image i cannot be decoded
    and the policy is "skip", the next one that can (i + 1, i + 2, ..., around the
    end). Which one is a pure function of the files: order, threads and processes do
    not matter. Each process keeps its own count of what it met.

    Attributes:
        bad: what is broken (index, or in a mixture the file), and why.
    """

    def __init__(self, whole, policy: Literal["skip", "raise"], share: float = 0.01):
        """Wrap any source; broken means that `whole[i]` raises a DataError.

        Args:
            share: of the set that may be broken; one image always may.

        Raises:
            UsageError: no such policy.
        """
        super().__init__(whole)
        if policy not in ("skip", "raise"):
            raise errors.UsageError(
                f"data.on_bad_image={policy!r}: one of 'skip', 'raise'"
            )
        self.policy, self.share = policy, share
        self.bad = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return Tolerant, (self.whole, self.policy, self.share)

    def example(self, i: int) -> dict:
        """Return example i of epoch 0."""
        return self.at(i, 0)

    def at(self, i: int, epoch: int) -> dict:
        """Return example i as it is in an epoch; only mixtures differ between epochs.

        Raises:
            DataError: as the policy and the share say.
        """
        if self.policy == "raise":
            return {**self._take(i, epoch), "index": i}
        where = getattr(self.whole, "where", None)
        for at in range(i, i + len(self)):
            at %= len(self)
            # In a mixture item i is another file in another epoch.
            file = where(at, epoch) if where else at
            if file in self.bad:
                continue
            try:
                return {**self._take(at, epoch), "index": at}
            except errors.DataError as e:
                self._count(file, e)
        raise errors.DataError(
            f"{self.name}: {decode.printable(self.root)}: no image can be decoded"
        )

    def _take(self, i, epoch):
        at = getattr(self.whole, "at", None)
        return at(i, epoch) if at else self.whole[i]

    def _count(self, file, error):
        with self._lock:
            if file not in self.bad:
                self.bad[file] = str(error)
                logger.warning("skipped a broken image: %s", error)
            bad = list(self.bad.values())
        if len(bad) > max(1, self.share * len(self)):
            shown = "\n  ".join(bad[:5])
            raise errors.DataError(
                f"{self.name}: {decode.printable(self.root)}: {len(bad)} of "
                f"{len(self)} images are broken, more than data.bad_share={self.share} "
                "allows; repair them or take them out of the folder"
                f"\n  {shown}" + "\n  ..." * (len(bad) > 5)
            )
