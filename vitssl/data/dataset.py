"""The config section `data`, and the sources it names."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np

from vitssl import errors, ranges
from vitssl.data import sources
from vitssl.data.sources import layout, wrappers

_OF_255 = "of pixels in 0..255: divide by 255"


@dataclasses.dataclass(frozen=True)
class Data:
    """Config section `data`.

    Attributes:
        source: key of `data.sources.SOURCES`.
        root: directory of the data set; "" for sources that are embedded.
        split: the split that trains.
        bank_split: labelled split whose features k-NN and probes learn from.
        test_split: labelled split whose accuracy is reported.
        channels: channels of an image; sources convert 1 <-> 3.
        mean, std: per-channel normalisation in units of [0, 1].
        sampling: shuffle visits every image once per epoch; balanced draws with
            replacement, every class equally often (weight 1 / its count).
        on_bad_image: a file that does not decode is replaced by the next one and
            counted ("skip", at most `bad_share` of the set) or ends the run ("raise").
        threads, workers: decoding threads and processes of each process of the run;
            -1 = what suits the machine (`loader.resources`).
        per_class: if not 0, the training split has so many labelled images of every
            class and no others, drawn by the run's seed; a smaller number is a part of
            a larger one.
        bad_share: share of the set that may be broken; one image always may.
        options: keyword arguments of the source.
    """

    source: str
    root: str
    split: str
    bank_split: str
    test_split: str
    channels: ranges.Count
    mean: tuple[Annotated[float, ranges.Range(0, 1, hint=_OF_255)], ...]
    std: tuple[Annotated[float, ranges.Range(0, 1, True, hint=_OF_255)], ...]
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    on_bad_image: Literal["skip", "raise"] = "skip"
    threads: Annotated[int, ranges.Range(-1)] = -1
    workers: Annotated[int, ranges.Range(-1)] = -1
    per_class: ranges.OrNone = 0
    bad_share: ranges.Probability = 0.01
    options: Any = dataclasses.field(default_factory=dict)

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        yield from sources.faults(self.source, dict(self.options))
        for key in ("mean", "std"):
            have = len(getattr(self, key))
            if have != self.channels:
                yield f"{key} has {have} values for channels={self.channels}"

    def open(self, split: str, seed: int = 0) -> layout.Source:
        """Return the source of one split.

        Args:
            seed: of the run, which draws the images of `per_class`.

        Raises:
            DataError: what is missing, where, and what the layout should be.
            UsageError: an option the source does not have, or other channels.
        """
        options = dict(self.options)
        if "channels" in sources.options_of(self.source):
            options.setdefault("channels", self.channels)
        source = sources.open(self.source, self.root, split, **options)
        if source.channels != self.channels:
            raise errors.UsageError(
                f"data.channels={self.channels}: {self.source} has {source.channels}; "
                "set data.channels, data.mean and data.std to that many"
            )
        if self.per_class and split == self.split:
            return _few(source, self.per_class, seed)
        return source


def _few(source, count: int, seed: int) -> wrappers.Subset:
    """Return `count` images of every class, the same for the same seed.

    Raises:
        UsageError: the source does not know its labels.
        DataError: a class has fewer.
    """
    labels = getattr(source, "labels", None)
    if getattr(source, "several", None) is not None:
        raise errors.UsageError(
            f"data.per_class={count}: images of {source.name} have several labels; set "
            "it to 0"
        )
    if labels is None:
        raise errors.UsageError(
            f"data.per_class={count}: {source.name} knows no labels before its images "
            "are read"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label, name in enumerate(source.classes):
        own = order[labels[order] == label][:count]
        if len(own) < count:
            raise errors.DataError(
                f"data.per_class={count}: {source.name} split {source.split!r} has "
                f"{len(own)} images of class {name!r}"
            )
        chosen += own.tolist()
    return wrappers.Subset(source, np.sort(np.array(chosen, np.int64)))
