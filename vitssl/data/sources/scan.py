"""What lies in one folder of a tree of images, read once per process.

A run opens its splits several times, and a folder of a million names takes seconds. A
folder that has not changed since it was read, by its own times, is not read again.
"""

import array
import os
import time
from typing import NamedTuple

from vitssl.data import decode

# What systems put into folders: thumbnails, and what was deleted.
SYSTEM = frozenset(
    ("@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin")
    + ("lost+found", "system volume information", "__macosx")
)
IMAGE, FOLDER, SYSTEMS, PIPE, OTHER = "image", "folder", "system's", "pipe", "other"
SETTLED = 2.0  # Seconds; file systems tell times in steps of up to two.
MOST = 1 << 22  # Images whose names are kept.


class Entry(NamedTuple):
    """Something in a folder.

    Attributes:
        kind: IMAGE, FOLDER, SYSTEMS (a folder), PIPE (or a device), OTHER; of a link
            the kind of what it leads to.
        inode: of itself, also of a link.
    """

    name: str
    kind: str
    link: bool
    inode: int


class Listing(NamedTuple):
    """What a folder holds, but for names that begin with a dot.

    Attributes:
        names: of the image files that are no links: sorted, joined by null characters.
        inodes: of these.
        rest: everything else.
    """

    names: str
    inodes: array.array
    rest: tuple[Entry, ...]

    def images(self) -> list[str]:
        """Return the names of the image files that are no links, sorted."""
        return self.names.split("\0") if self.names else []

    def plain(self) -> bool:
        """Return whether all images are those of `images`."""
        return not any(e.kind == FOLDER or e.kind == IMAGE for e in self.rest)

    def entries(self) -> list[Entry]:
        """Return everything, by name."""
        own = zip(self.images(), self.inodes, strict=True)
        return sorted([*self.rest, *(Entry(n, IMAGE, False, i) for n, i in own)])


class _Kept:
    """{path: (identity and times, Listing)} of folders that need not be read again."""

    def __init__(self):
        self.of, self.images = {}, 0

    def put(self, path, times, found):
        _, before = self.of.get(path, (None, None))
        self.images += len(found.inodes) - len(before.inodes if before else ())
        if self.images > MOST:
            self.of, self.images = {}, len(found.inodes)
        self.of[path] = times, found


_kept = _Kept()


def read(folder) -> Listing:
    """Return what lies in a folder; it is read only if it may have changed.

    One that holds links is read each time: what they lead to has other times.
    """
    path, stat = os.fspath(folder), os.stat(folder)
    # Times can be set back, except that of the last change of anything (ctime).
    now = stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns
    before, found = _kept.of.get(path, (None, None))
    if before == now:
        return found
    # A change within the same step of the clock as our reading would not show.
    settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED
    found = _read(path)
    if settled and not any(e.link for e in found.rest):
        _kept.put(path, now, found)
    return found


def _read(path):
    images, rest = [], []
    with os.scandir(path) as entries:
        for e in entries:
            name = e.name
            if name[0] == ".":
                continue
            named = name[name.rfind(".") :].lower() in decode.SUFFIXES
            if named and e.is_file(follow_symlinks=False):
                images.append((name, e.inode()))
            else:
                rest.append(Entry(name, _kind(e, named), e.is_symlink(), e.inode()))
    images.sort()
    names = "\0".join([name for name, _ in images])
    return Listing(names, array.array("Q", [i for _, i in images]), tuple(rest))


def _kind(entry, named):
    if entry.is_dir():
        return SYSTEMS if entry.name.lower() in SYSTEM else FOLDER
    # A link that leads nowhere is named as a broken image, where it is read.
    if not entry.is_file() and os.path.exists(entry.path):
        return PIPE
    return IMAGE if named else OTHER
