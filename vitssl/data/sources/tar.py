"""Tar files of images in the layout of WebDataset, read at random.

A sample is the members of one key, the path up to the first dot of the name: an image,
and KEY.cls, KEY.json or KEY.txt with its label. Nothing is ever unpacked. Where each
image lies is looked up once per file and kept in ~/.cache/vitssl/tar (or below
XDG_CACHE_HOME), under the file's path, size and time; it is safe to delete.

Source: github.com/webdataset/webdataset, "The WebDataset Format".
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tarfile
from typing import Literal

import numpy as np

from vitssl import disk, errors, ranges
from vitssl.data import decode
from vitssl.data.sources import folder, layout, pieces, tables

EXPECTED = (
    "ROOT/**/*.tar, or ROOT=train-{000..012}.tar or train-*.tar, of KEY.jpg with "
    f"KEY.cls, .json or .txt (class names in {pieces.CLASSES} beside them)"
)
SIDES = (".cls", ".json", ".txt")
KEYS = ("label", "class", "cls")  # Of a label in a .json.
FORMAT = 1
_LONGEST = 1 << 16  # Bytes of a label's file.
_TEXT = 200  # Characters of a label.
_HANDLES = 256  # Files that stay open.
_ZERO = bytes(tarfile.BLOCKSIZE)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tar(pieces.Packed):
    """Images in tar files: size int64 [N], in bytes."""

    size: np.ndarray

    @functools.cached_property
    def _files(self):
        return {}

    def encoded(self, i: int) -> bytes:
        """Return the bytes of image i.

        Raises:
            DataError: the file cannot be read, or is not what it was.
        """
        path = os.path.join(self.root, self.pieces[self.piece[i]])
        size, offset = int(self.size[i]), int(self.offset[i])
        name = decode.printable(self.path(i))
        if size > decode.MAX_BYTES:
            raise errors.DataError(
                f"{name}: {size} bytes, at most {decode.MAX_BYTES} are read"
            )
        try:
            file = self._files.get(path) or open_file(path, "rb")
            if len(self._files) < _HANDLES:
                self._files.setdefault(path, file)
            data = os.pread(file.fileno(), size, offset)
        except OSError as e:
            why = e.strerror or e
            raise errors.DataError(f"{name}: cannot be read: {why}") from e
        if len(data) < size:
            raise errors.DataError(f"{name}: cannot be read: its file has been cut")
        return data


open_file = open  # `open` below opens a data set.


def open(
    root,
    split,
    *,
    channels=3,
    files="",
    holdout: ranges.BelowOne = 0.1,
    labels: Literal["auto", "cls", "json", "txt", "folder", "none"] = "auto",
    value_range: tuple[float, ...] = (),
):
    """Images in tar files, in the order of the files and in them.

    Names of files say their split ("train-00000.tar"), else their folders do; where
    none does, a fixed share of the images is held out.

    Args:
        root: folder, file, or pattern; see `pieces.find`.
        split: "train", "val", "test" or "all".
        files: pattern of the files to take, from root on.
        holdout: share of the images to hold out where no file names a split.
        labels: where they are; "auto" is the first that there is, of .cls, .json, .txt
            (if at most half of the texts differ) and the first folder of the members.
        value_range: as of "folder".

    Raises:
        DataError: no such file, one that is compressed or damaged, not that split.
    """
    bounds = folder.bounds_of(value_range)
    split = layout.split_of("tar", split, folder.SPLITS)
    place = pieces.find("tar", root, files, (".tar",), EXPECTED)
    samples, out = [], collections.Counter()
    for k in range(len(place.pieces)):
        found, left = index(place.path(k))
        samples += [(k, *sample) for sample in found]
        out.update(left)
    if out:
        layout.once(f"tar: {decode.printable(place.base)}: left out: {_told(out)}")
    said = _labels(place, samples, labels)
    known = place.known() if labels != "none" else ()
    label, classes = tables.numbered(str(place.base), said, known)
    rows = [
        pieces.Row(k, name, offset, size, None) for k, name, offset, size, _ in samples
    ]
    about = dict(classes=classes, labels=label, holdout=holdout, split=split)
    return pieces.packed(
        lambda rows, **fields: Tar(
            size=np.array([r.size for r in rows], np.int64), **fields
        ),
        place, rows, **about, channels=channels, bounds=bounds,
    )  # fmt: skip


def _told(out) -> str:
    return ", ".join(f"{n} {decode.printable(k)}" for k, n in sorted(out.items()))


def _labels(place, samples, wanted) -> list:
    """Return what is said of each sample, None where nothing is."""
    for side in SIDES:
        said = [sides.get(side) for *_, sides in samples]
        given = [s for s in said if s is not None]
        if wanted == side[1:]:
            return said
        captions = side == ".txt" and 2 * len(set(given)) > len(given)
        if wanted == "auto" and given and not captions:
            if side != ".cls":  # It is a label, the others may be anything.
                layout.once(
                    f"tar: {decode.printable(place.base)}: labels of {len(given)} of "
                    f"{len(said)} images by their {side} (data.options.labels decides)"
                )
            return said
    names = [name if wanted != "none" else "" for _, name, *_ in samples]
    return [name.partition("/")[0] if "/" in name else None for name in names]


def index(path) -> tuple[list, dict]:
    """Return ([(name, offset, size, {".cls": label})], {what was left out: count}).

    Raises:
        DataError: no tar file, a compressed one, or damage.
    """
    try:
        decode.regular(path)
        about = os.stat(path)
    except OSError as e:
        raise errors.DataError(
            f"{decode.printable(path)}: cannot be read: {e.strerror or e}"
        ) from e
    key = f"{FORMAT} {os.path.abspath(path)!r} {about.st_size} {about.st_mtime_ns}"
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    kept = _cache() / name
    try:
        return _checked(disk.read(kept), about.st_size)
    except (disk.Damaged, ValueError, TypeError, KeyError, AttributeError):
        pass  # It was never written, or not by us.
    found, out = _scan(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        disk.write(kept, json.dumps({"samples": found, "out": out}))
    except (OSError, ValueError) as e:
        layout.once(f"tar: {kept.parent}: {e}: files are looked through at each start")
    return found, out


def _cache() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "vitssl" / "tar"


def _checked(kept, end):
    samples = [
        (str(name), int(offset), int(size), dict(sides))
        for name, offset, size, sides in kept["samples"]
    ]
    if any(not 0 <= at <= at + n <= end for _, at, n, _ in samples):
        raise ValueError("an image outside of its file")
    return samples, {str(k): int(n) for k, n in kept["out"].items()}


def _scan(path):
    """Look through a tar file; see `index`."""
    images, sides, out = [], {}, collections.Counter()
    where = decode.printable(path)
    try:
        with open_file(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # A million of them would stay.
                _meet(member, raw, images, sides, out)
            _check_end(raw, tar.offset)
    except (tarfile.TarError, OSError, ValueError) as e:
        raise errors.DataError(
            f"{where}: no whole tar file without compression ({errors.told(e)}); copy "
            "it again, or unpack a .tar.gz to .tar"
        ) from e
    if sides:
        images = _first_of_each(images, out)
    used = {_key(name) for name, _, _ in images}
    if loose := len([k for k in sides if k not in used]):
        out["label(s) without an image"] += loose
    return [(n, at, size, sides.get(_key(n), {})) for n, at, size in images], dict(out)


def _meet(member, raw, images, sides, out):
    """Sort a member of a tar file into images, labels and what is left out."""
    name = member.name.removeprefix("./")
    base = name.rpartition("/")[2]
    suffix = os.path.splitext(base)[1].lower()
    if member.isdir() or base[:1] == ".":
        return
    if not member.isreg() or member.issparse():
        out["link(s), device(s) or sparse file(s)"] += 1
    elif member.name[:1] == "/" or ".." in name.split("/"):
        out["name(s) that lead out of the file"] += 1
    elif suffix in decode.SUFFIXES:
        images.append((name, member.offset_data, member.size))
    elif suffix in SIDES and member.size <= _LONGEST:
        data = os.pread(raw.fileno(), member.size, member.offset_data)
        label = _label(suffix, data.decode("utf-8", "replace").strip())
        if label is not None:
            sides.setdefault(_key(name), {})[suffix] = label
    else:
        out[suffix or "without a suffix"] += 1


def _label(suffix, text):
    """Return the label that a member says, None without one."""
    if suffix == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if isinstance(found, dict):
            found = next((found[k] for k in KEYS if k in found), None)
        if isinstance(found, bool) or not isinstance(found, int | str):
            return None
        text = str(found)
    return text[:_TEXT] or None


def _key(name) -> str:
    """Return the path of a member up to the first dot of its name."""
    above, slash, base = name.rpartition("/")
    return above + slash + base.partition(".")[0]


def _first_of_each(images, out):
    """Return one image of every key: that of the shortest name, then the first."""
    best = {}
    for image in images:
        key = _key(image[0])
        if key not in best or len(image[0]) < len(best[key][0]):
            best[key] = image
    if more := len(images) - len(best):
        out["further image(s) of a sample"] += more
    return sorted(best.values(), key=lambda image: image[1])


def _check_end(raw, at):
    """Raise ValueError unless a tar file ends here: `tarfile` stops at any damage."""
    block = os.pread(raw.fileno(), tarfile.BLOCKSIZE, at)
    if block and block != _ZERO:
        raise ValueError(f"damaged at byte {at}")
