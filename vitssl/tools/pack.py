"""A folder of images as few large files, which disks and networks read faster.

    vitssl pack DIR --to=SHARDS [--format=tar] [--images=1000] [--source=folder]
        [--option KEY=VALUE ...]

SHARDS/train-00000.tar and so on hold the bytes of the files as they are, in the layout
of WebDataset: 00000000.jpg, and 00000000.cls with the number of its class.
SHARDS/classes.json has the names of the classes, SHARDS/train.csv the file and class of
every key. A run reads them with --config.data.source=tar --config.data.root=SHARDS;
order and batches are those of DIR.

--format=array_record writes ArrayRecord files, a record for every image, and a table of
their names and labels beside each; a run reads them with data.source=array_record. Only
these keep several labels an image.

--source packs another kind of files, such as parquet; --option is one of its
data.options. A pack that was interrupted goes on where it was: SHARDS appears when all
is written, until then it is SHARDS.part.
"""

import ast
import csv
import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile
import time

import numpy as np

from vitssl import disk, errors
from vitssl.convert import place
from vitssl.data import decode, sources
from vitssl.data.sources import arrayrecord, pieces
from vitssl.tools import writing

SPLITS = ("train", "val", "test")
_PLAN = "pack.json"
_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"\x93NUM": ".npy",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def run(
    root, to, *, form="tar", kind="folder", options=(), images=1000, show=print
) -> dict:
    """Pack every split of a data set; return {split: images}.

    Args:
        root: its data.root.
        to: folder to make.
        form: of `FORMS`.
        kind: data.source: a kind whose examples are image files.
        options: {key: value} of data.options.
        images: in each file.
        show: receives lines of progress.

    Raises:
        UsageError: a place that cannot be written or holds other things, another kind.
        DataError: no such data; a file that cannot be read.
    """
    writing.counts(images=images)
    to = pathlib.Path(os.path.abspath(os.path.expanduser(to)))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise errors.UsageError(
            f"--to={decode.printable(to)}: is there already; give another"
        )
    write, end = FORMS[form]
    found = _splits(kind, root, dict(options))
    if form == "tar" and any(s.several is not None for s in found.values()):
        raise errors.UsageError(
            "--format=tar: keeps one label an image, and these have several; take "
            "--format=array_record"
        )
    part, done, since = to.with_name(f"{to.name}.part"), 0, time.perf_counter()
    total = sum(len(s) for s in found.values())
    with place.writing("--to", to):
        _begin(
            part, {"format": 1, "as": form, "images": images} | {"of": _digest(found)}
        )
        for split, source in found.items():
            for k in range(-(-len(source) // images)):
                which = range(k * images, min(len(source), (k + 1) * images))
                file = part / f"{split}-{k:05d}{end}"
                done += len(which)
                if not file.exists():
                    write(file, source, which)
                    seconds = time.perf_counter() - since
                    show(f"{file.name}: {done}/{total} images, {seconds:.1f} s")
            _list(part / f"{split}.csv", source)
        classes = next(iter(found.values())).classes
        disk.write(part / pieces.CLASSES, json.dumps(classes))
        if to.exists():
            to.rmdir()  # It is empty.
        os.rename(part, to)
    return {split: len(source) for split, source in found.items()}


def _splits(kind, root, options) -> dict:
    """Return {split: source}; "val" and "test" may be the same, and are packed once."""
    found, seen, first = {}, set(), None
    for split in SPLITS:
        try:
            source = sources.open(kind, root, split, **options)
        except errors.DataError as e:
            first = first or e
            continue
        if not hasattr(source, "encoded"):
            raise errors.UsageError(
                f"--source={kind}: its images are no files; use folder, tar, parquet, "
                "array_record, imagenet, plantvillage"
            )
        names = _digest({"": source})
        if names not in seen:
            found[split] = source
        seen.add(names)
    if not found:
        raise first
    return found


def _digest(found) -> str:
    """Return what stands for files, their order, labels and classes."""
    total = hashlib.sha256()
    for split, source in found.items():
        total.update(f"{split} {source.root!r} {source.classes}".encode())
        total.update(source.paths)
        for array in (source.ends, source.labels, source.several):
            total.update(b"" if array is None else array.tobytes())
    return total.hexdigest()


def _begin(part, plan):
    """Make the folder of a pack, or find that it is the same pack's.

    Raises:
        UsageError: it is another's.
    """
    if part.exists():
        try:
            same = disk.read(part / _PLAN) == plan
        except disk.Damaged:
            same = False
        if not same:
            raise errors.UsageError(
                f"{decode.printable(part)}: a pack of other images or options was "
                "begun there; delete it, or give another --to"
            )
        return
    part.mkdir(parents=True)
    disk.write(part / _PLAN, json.dumps(plan))


def _write_records(file, source, which):
    """Write one ArrayRecord file, whole or not at all, and before it its table."""
    _rows(file.with_suffix(".csv"), arrayrecord.table(source, which))
    with writing.whole(file) as part:
        arrayrecord.write(part, source, which)


def _write_tar(file, source, which):
    """Write one tar file, whole or not at all; the same bytes every time."""
    with writing.whole(file) as part:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in which:
                data, label = source.encoded(i), int(source.labels[i])
                _add(tar, f"{i:08d}{_ending(source.relative(i), data)}", data)
                if label >= 0:
                    _add(tar, f"{i:08d}.cls", str(label).encode())


def _add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _ending(name, data) -> str:
    """Return the ending of a file's name, or of files that begin as it does."""
    ending = os.path.splitext(name)[1].lower()
    if ending in decode.SUFFIXES:
        return ending
    return next((e for magic, e in _MAGIC.items() if data.startswith(magic)), ".jpg")


FORMS = {"tar": (_write_tar, ".tar"), "array_record": (_write_records, arrayrecord.END)}


def _list(file, source):
    """Write the names and classes of a split."""
    rows = [("key", "file", "class")]
    for i in range(len(source)):
        labels = [source.labels[i]] if source.labels[i] >= 0 else []
        labels = labels if source.several is None else np.flatnonzero(source.several[i])
        name = "|".join(source.classes[k] for k in labels)
        rows.append((f"{i:08d}", decode.printable(source.relative(i)), name))
    _rows(file, rows)


def _rows(file, rows):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    disk.write(file, text.getvalue())


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    return errors.exit_code(_main, argv)


def _main(argv) -> int:
    parser = errors.Parser("vitssl pack", __doc__)
    parser.add_argument("root", metavar="DIR")
    parser.add_argument("--to", required=True, metavar="SHARDS")
    parser.add_argument("--format", choices=FORMS, default="tar")
    parser.add_argument("--images", type=int, default=1000, help="in each file")
    parser.add_argument("--source", default="folder", help="kind of what is packed")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of it"
    )
    f = parser.parse_args(argv)
    options = dict(_option(text) for text in f.option)
    given = dict(form=f.format, kind=f.source, options=options, images=f.images)
    made = run(f.root, f.to, **given)
    told = ", ".join(f"{count} in {split}" for split, count in made.items())
    print(f"{f.to}: {told}")
    print(f"next: --config.data.source={f.format} --config.data.root={f.to}")
    return 0


def _option(text):
    key, mark, value = text.partition("=")
    if not mark:
        raise errors.UsageError(f"--option={text}: want KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
