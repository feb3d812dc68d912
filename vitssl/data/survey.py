"""What lies in a folder of images, and what follows from it for a config."""

import collections
import dataclasses
import pathlib

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import folder, layout, tables

SAMPLE = 200  # Images that are read: spread evenly over the sorted list.
LEAST = 16  # Images to train on.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # Mean and std.
_TOPS = (255, 1023, 4095, 16383, 65535)  # Of 8, 10, 12, 14, 16 bits.


@dataclasses.dataclass(frozen=True)
class Survey:
    """A folder of images, looked at.

    Attributes:
        root: of the splits, or of all images.
        train, test: images of either split.
        divided: whether the splits are folders; else a share is held out.
        classes: {name: images} of all splits; {} where they are none.
        table: of the labels, "" where folders are classes.
        several: whether an image has several labels, or none, by that table.
        parted: whether it says the splits, too.
        bare: images that lie in no class folder.
        why_none: why class folders are not taken for classes, or "".
        sides: shortest, median and longest short side of the images read, in pixels.
        channels: of an image: 1 where all that were read are grey.
        range: (lowest, highest) value of deep images that is not 0 to 65535, or ().
        mean, std: of pixels in [0, 1].
        measured: whether these are the folder's own.
        read: images read.
        broken: what is wrong with those that could not be, a line each.
    """

    root: str
    train: int
    test: int
    divided: bool
    classes: dict[str, int]
    bare: int
    why_none: str
    sides: tuple[int, int, int]
    channels: int
    range: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    measured: bool
    read: int
    broken: tuple[str, ...]
    table: str = ""
    several: bool = False
    parted: bool = False

    @property
    def labels(self) -> str:
        """Value of data.options.labels."""
        if self.table:
            return self.table
        if not self.classes:
            return "none"
        return "any" if self.bare else "folder"

    def __str__(self) -> str:
        """Return what was found, a line each."""
        how = "their folders" if self.divided else "a tenth is held out"
        how = "as the table says" if self.parted else how
        low, middle, high = self.sides
        pixels = f"{low} px" if low == high else f"{low} to {high} px, half {middle}+"
        kind = {1: "grey", 3: "colour"}.get(self.channels, f"{self.channels} channels")
        lines = [
            f"  images    {self.train} to train on, {self.test} to test ({how})",
            f"  pixels    {kind}, shorter side {pixels}; {self.read} read",
            f"  {'labels ' if self.several else 'classes'}   {self._classes()}",
        ]
        if self.range:
            lines.append(f"  values    of more than 8 bits, in {self.range}: measured")
        if self.measured:
            lines.append(
                f"  mean, std {self.mean}, {self.std}: measured on {self.read} images"
            )
        if self.broken:
            lines.append(f"  broken    {len(self.broken)}, left out: {self.broken[0]}")
        return "\n".join(lines)

    def _classes(self) -> str:
        if not self.classes:
            return f"none ({self.why_none})"
        counts = sorted(self.classes.items(), key=lambda pair: -pair[1])
        some = ", ".join(f"{decode.printable(k)} {n}" for k, n in counts[:6])
        more = f", ... ({len(counts)} classes)" if len(counts) > 6 else ""
        beside = f"; {self.bare} images in none" if self.bare else ""
        table = f"; by {decode.printable(self.table)}" if self.table else ""
        return f"{some}{more}{beside}{table}"


def look(root, *, labels: str = "") -> Survey:
    """Return what lies in a folder; what is left out is logged by `folder`.

    Args:
        labels: "none" takes no folder for a class; a table of labels, see `tables`; ""
            takes one that lies in the folder, if that has no classes.

    Raises:
        DataError: no folder, no image, too few, or hardly one that can be read.
    """
    given, (root, splits) = root, _root(root)
    every, table, parted = folder.open(root, "all", labels="any"), "", False
    classes, why = _classes_of(every, labels)
    if labels not in ("", "none"):
        table = str(pathlib.Path(labels).expanduser().absolute())
    elif not labels and not classes:
        table = _table_in(given, root)
    if table:
        every = folder.open(root, "all", labels=table)
        parted = bool(tables.read(table).splits)
        each = layout.counts(every).tolist()
        classes = dict(zip(every.classes, each, strict=True))
    several = getattr(every, "several", None) is not None
    label = table or ("any" if classes else "none")
    train, test = (folder.open(root, s, labels=label) for s in ("train", "test"))
    if len(train) < LEAST or len(test) < 2:
        raise errors.DataError(
            f"{decode.printable(root)}: {len(train)} images to train on and "
            f"{len(test)} to test; {LEAST} and 2 are needed"
        )
    chosen = np.linspace(0, len(every) - 1, min(SAMPLE, len(every))).astype(int)
    paths, broken = [every.path(int(i)) for i in chosen], []
    channels, bounds = _kind(paths, broken)
    found = list(_images(paths, channels, bounds, broken))
    if len(found) < max(1, len(paths) // 2):
        raise errors.DataError(
            f"{decode.printable(root)}: {len(broken)} of {len(paths)} images cannot be "
            f"read; the first: {broken[0]}"
        )
    if channels == 3 and all(_grey(x) for x in found):
        channels, found = 1, [x[..., :1] for x in found]
    own = channels != 3
    mean, std = _moments(found) if own else IMAGENET
    sides = sorted(min(x.shape[:2]) for x in found)
    return Survey(
        root=str(root),
        train=len(train),
        test=len(test),
        divided=len(splits) > 1 and not parted,
        classes=classes,
        bare=int((every.labels < 0).sum()) if classes and not several else 0,
        why_none=why,
        sides=(sides[0], sides[len(sides) // 2], sides[-1]),
        channels=channels,
        range=bounds,
        mean=mean,
        std=std,
        measured=own,
        read=len(found),
        broken=tuple(broken),
        table=table,
        several=several,
        parted=parted,
    )


def _table_in(*folders) -> str:
    """Return the table of labels that lies in a folder, "" where none does.

    One that is no table of labels is left alone.

    Raises:
        DataError: there are several.
    """
    found, root = {}, folders[0]
    for entry in (e for f in folders for e in pathlib.Path(f).expanduser().iterdir()):
        if entry.name.lower().endswith(tables.ENDS) and entry.name[0] != ".":
            try:
                tables.read(entry)
            except errors.DataError:
                continue
            found[str(entry.absolute())] = None
    found = sorted(found)
    if len(found) > 1:
        names = ", ".join(decode.printable(pathlib.Path(f).name) for f in found)
        raise errors.DataError(
            f"{decode.printable(root)}: {names}: which has the labels? Give --labels="
            "FILE, or --labels=none"
        )
    return found[0] if found else ""


def _root(root):
    """Return (folder, its split folders); a lone split is the folder itself."""
    base, said = pathlib.Path(root).expanduser().absolute(), decode.printable(root)
    if not base.is_dir():
        what = "a file" if base.exists() else "no such folder"
        raise errors.DataError(f"{said}: {what}; give a folder of images")
    if next(folder.walk(base), None) is None:
        known = " ".join(sorted(decode.SUFFIXES))
        raise errors.DataError(f"{said}: no image in it, at any depth ({known})")
    splits = folder.split_folders(base, "auto")
    if len(splits) == 1:
        return base / next(iter(splits.values())), {}
    if splits and "train" not in splits:
        names = ", ".join(splits.values())
        raise errors.DataError(f"{said}: {names}, but no train folder to learn from")
    return base, splits


def _classes_of(source, labels) -> tuple[dict, str]:
    """Return ({class: images}, why there are none)."""
    known = source.labels[source.labels >= 0]
    counts = np.bincount(known, minlength=len(source.classes)).tolist()
    if labels == "none":
        return {}, "as asked"
    if not source.classes:
        return {}, "no sub-folders"
    if len(counts) == 1:
        return {}, f"one folder only, {decode.printable(source.classes[0])}"
    if len(known) < 4 * len(counts):
        return {}, f"{len(counts)} folders of {len(known) / len(counts):.1f} images"
    return dict(zip(source.classes, counts, strict=True)), ""


def _kind(paths, broken) -> tuple[int, tuple]:
    """Return (channels, range of the values) of images: those of most `.npy` files.

    Raises:
        DataError: values of which no range is known.
    """
    counts, tops, lows = collections.Counter(), [], []
    for path in paths:
        try:
            array = decode.stored(path)
        except errors.DataError:
            continue  # It is told where it is decoded.
        if array is None or array.ndim not in (2, 3) or not array.size:
            counts[3] += array is None
            continue
        grey = array.ndim == 2
        counts[1 if grey else array.shape[2]] += 1
        if array.dtype != np.uint8 and np.isfinite(array).any():
            tops.append(float(np.nanmax(array[np.isfinite(array)])))
            lows.append(float(np.nanmin(array[np.isfinite(array)])))
            whole = array.dtype.kind in "iu" and lows[-1] >= 0
            lows[-1] = 0.0 if whole else lows[-1]
    channels = max(counts, key=lambda c: (counts[c], c), default=3)
    if channels in (1, 3) and {1, 3} <= counts.keys():
        channels = 3  # Grey and colour together.
    if not tops:
        return channels, ()
    top, low = max(tops), min(lows)
    if low == 0.0 and top > 1:
        top = next((t for t in _TOPS if top <= t), top)
    return channels, () if (low, top) == (0.0, 65535) else (low, max(top, low + 1e-6))


def _images(paths, channels, bounds, broken):
    """Yield the images that can be read; of others what is wrong is added."""
    for path in paths:
        try:
            yield decode.read(path, channels=channels, bounds=bounds)
        except errors.DataError as e:
            broken.append(str(e))


def _grey(image) -> bool:
    return bool((image[..., :1] == image).all())


def _moments(images):
    """Return (mean, std) of each channel, in [0, 1], every image counting the same."""
    first = np.mean([x.mean((0, 1), np.float64) for x in images], 0) / 255
    second = np.mean([np.square(x, dtype=np.float64).mean((0, 1)) for x in images], 0)
    std = np.sqrt(np.maximum(second / 255**2 - first**2, 0))
    # A channel that never changes is left as it is.
    std = np.where(std < 1e-3, 1.0, std)
    return tuple(first.round(4).tolist()), tuple(std.round(4).tolist())
