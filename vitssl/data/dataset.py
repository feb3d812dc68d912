"""The config section `data`, and the sources it names."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from vitssl import errors
from vitssl.data import sources


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
            counted ("skip", at most 1 % of the set) or ends the run ("raise").
        threads, workers: decoding threads and processes of each process of the run;
            -1 = what suits the machine (`pipeline.resources`).
        per_class: if not 0, the training split has so many labelled images of every
            class and no others, drawn by the run's seed; a smaller number is a part of
            a larger one.
        options: keyword arguments of the source.
    """

    source: str
    root: str
    split: str
    bank_split: str
    test_split: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    on_bad_image: Literal["skip", "raise"] = "skip"
    threads: int = -1
    workers: int = -1
    per_class: int = 0
    options: Any = dataclasses.field(default_factory=dict)

    def check(self) -> Iterator[str]:
        """Yield what is out of range or cannot be combined."""
        if self.source not in sources.SOURCES:
            near = difflib.get_close_matches(self.source, sources.SOURCES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(sorted(sources.SOURCES))
            yield f"source={self.source!r}: one of {known}{hint}"
        else:
            yield from self._check_options()
        if self.channels < 1:
            yield f"channels={self.channels}: 1 or more"
        for key in ("mean", "std"):
            have = len(getattr(self, key))
            if have != self.channels:
                yield f"{key} has {have} values for channels={self.channels}"
        if any(s <= 0 for s in self.std):
            yield f"std={self.std}: every value above 0"
        if self.per_class < 0:
            yield f"per_class={self.per_class}: 0 (all) or more"
        if self.threads < -1 or self.workers < -1:
            yield f"threads={self.threads}, workers={self.workers}: -1 (auto) or more"

    def _check_options(self) -> Iterator[str]:
        known = sources.options_of(self.source)
        for key, value in dict(self.options).items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                have = ", ".join(known) or "none"
                yield f"options.{key}: {self.source} has: {have}{hint}"
            elif type(value) is not type(known[key]) and not (
                type(value) is int and type(known[key]) is float
            ):
                kind = type(known[key]).__name__
                yield f"options.{key}={value!r}: want {kind}, like {known[key]!r}"

    def open(self, split: str, seed: int = 0):
        """Return the source of one split.

        Args:
            split: its name.
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
            return few(source, self.per_class, seed)
        return source


def few(source, count: int, seed: int) -> "Subset":
    """Return `count` images of every class, the same for the same seed.

    Raises:
        UsageError: the source does not know its labels.
        DataError: a class has fewer.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        raise errors.UsageError(
            f"data.per_class={count}: {source.name} knows no labels before its images "
            "are read"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label, name in enumerate(source.classes):
        own = [i for i in order if labels[i] == label][:count]
        if len(own) < count:
            raise errors.DataError(
                f"data.per_class={count}: {source.name} split {source.split!r} has "
                f"{len(own)} images of class {name!r}"
            )
        chosen += own
    return Subset(source, np.sort(np.array(chosen, np.int64)))


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some images of a source, by index, as a source.

    Attributes:
        whole: the source.
        indices: [M] which of its images.
    """

    whole: Any
    indices: Any

    def __len__(self):
        """Return M."""
        return len(self.indices)

    def __getitem__(self, i):
        """Return example i of the subset."""
        return self.whole[int(self.indices[i])]

    @property
    def labels(self):
        """Return the labels [M], or None if the whole does not know them."""
        labels = getattr(self.whole, "labels", None)
        return None if labels is None else labels[self.indices]

    @property
    def name(self) -> str:
        """Return the name of the whole."""
        return self.whole.name

    @property
    def root(self) -> str:
        """Return the root of the whole."""
        return self.whole.root

    @property
    def split(self) -> str:
        """Return the split of the whole."""
        return self.whole.split

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names of the whole."""
        return self.whole.classes

    @property
    def channels(self) -> int:
        """Return the channels of the whole."""
        return self.whole.channels
