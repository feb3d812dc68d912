"""Features of a folder of images, or a feature program, on the command line.

    vitssl extract WEIGHTS --images=FOLDER --to=FEATURES.npz
        [--image_size=N] [--batch_size=64] [--names=pooled,tokens] [--pool=cls|mean]
        [--part=target|encoder] [--output_patch=N] [--upsampling=shift]
        [--divided=auto|yes|no] [--source=NAME --split=test]
    vitssl extract WEIGHTS --program=FOLDER [--image_size=N] [--batch=N]

WEIGHTS is a run's workdir, one checkpoint of it, or an import of vitssl.convert, of an
encoder or of a whole method; one that finds parts has --names=pooled,tokens,maps, too.
A method that reads several sensors takes --source=olmoearth: FOLDER is its data.root.
FEATURES.npz holds "pooled" [M, D], "label" [M], "classes" and "path" [M].
FEATURES.parquet (extra [parquet]) has one row an image: "class", "label", "path" and
each feature as a list, whose shape the schema's metadata tells under "shapes".
"""

import json
import math
import pathlib
import sys

import numpy as np

from vitssl import errors
from vitssl.convert import place
from vitssl.data import decode, pipeline, sources, views
from vitssl.data.sources import folder
from vitssl.evals import extraction
from vitssl.run import inference
from vitssl.tools import program, writing

KINDS = (".npz", ".parquet")


def run(
    weights: inference.Features,
    images,
    to,
    *,
    batch_size: int = 64,
    divided: str = "auto",
    names: tuple[str, ...] = ("pooled",),
    kind: str = "folder",
    split: str = "test",
    show=print,
) -> dict[str, np.ndarray]:
    """Extract the features of a folder and write them; return them too.

    Images of a folder are resized on their short side and cut to a central square;
    those of another data set go through the evaluation transform of the method.

    Args:
        weights: of `inference.load`.
        images: folder, with one sub-folder per class or flat; every image is taken,
            with label -1 where it lies in no class.
        to: `.npz` or `.parquet` file.
        batch_size: images at once.
        divided: "yes", "no" or "auto": whether the first folders are splits.
        names: of "pooled" and "tokens", and "maps" where parts are found.
        kind: of data set, a key of `sources.SOURCES`.
        split: of one that is no folder.
        show: receives lines of progress.

    Returns:
        {name: float32 [M, ...], "label": int32 [M], "path": text [M], "classes"}.

    Raises:
        DataError: no images.
        UsageError: another ending, unknown names, or pyarrow is missing.
    """
    to = _checked(to, batch_size, names)
    if not weights.image_size:
        raise errors.UsageError("--image_size=N is missing; these weights have none")
    shapes = weights.shapes()
    if wrong := [name for name in names if name not in shapes]:
        raise errors.UsageError(f"--names={wrong[0]}: these have {', '.join(shapes)}")
    source, transform = _opened(weights, images, kind, split, divided, show)
    each = sum(4 * math.prod(shapes[name].shape) for name in names)
    place.check(to, "--to", each * len(source))
    with pipeline.evaluate(source, transform, batch_size=batch_size) as batches:
        found = extraction.extract(
            weights.apply,
            (weights.state,),
            writing.watched(batches, len(source), batch_size, show),
            names=names,
        )
    index = found.pop("index")
    path = getattr(source, "path", str)  # Some have one file for all.
    found["path"] = np.array([path(i) for i in index])
    found["classes"] = np.array(source.classes)
    with writing.whole(to) as part:
        _write(part, found)
    show(
        f"{to}: {len(index)} images, "
        + ", ".join(f"{n} {found[n].shape}" for n in names)
    )
    return found


def _checked(to, batch_size, names):
    """Return where to write, once the flags are sound: before weights are read."""
    to, known = writing.place(to, KINDS), (*inference.NAMES, inference.MAPS)
    writing.counts(batch_size=batch_size)
    if wrong := [name for name in names if name not in known]:
        raise errors.UsageError(f"--names={wrong[0]}: of {', '.join(known)}")
    return to


def _opened(weights, images, kind, split, divided, show):
    """Return (source, transform) of the images."""
    if kind == "folder":
        options = dict(channels=weights.channels, divided=divided, labels="any")
        source = folder.open(str(images), "all", **options)
        writing.compare(source, weights, show)
        return source, views.Evaluate(weights.image_size, 1.0)
    if weights.method is None:
        raise errors.UsageError(f"--source={kind}: an encoder alone reads folders")
    given = dict(channels=weights.channels) | weights.method.reads
    known = sources.options_of(kind) if kind in sources.SOURCES else {}
    options = {key: value for key, value in given.items() if key in known}
    source = sources.open(kind, str(images), split, **options)
    return source, weights.method.evaluation_transform(weights.image_size)


def _write(to, found):
    if to.suffix == ".npz":
        np.savez(to, **found)
        return
    pyarrow, parquet = writing.arrow(KINDS[0])
    classes = np.array([*map(decode.printable, found["classes"]), ""])
    columns, shapes = {"class": classes[found["label"]]}, {}
    for name, x in found.items():
        if name == "classes":
            continue
        if x.dtype.kind == "U":  # The format holds UTF-8 alone.
            x = np.array(list(map(decode.printable, x)))
        columns[name] = pyarrow.array(x.ravel())
        if x.ndim > 1:  # One list of fixed length in each row; its shape stands apart.
            size = int(np.prod(x.shape[1:]))
            made = pyarrow.FixedSizeListArray.from_arrays
            columns[name], shapes[name] = made(columns[name], size), x.shape[1:]
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({"shapes": json.dumps(shapes)})
    parquet.write_table(table, to)


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    return errors.exit_code(_main, argv)


def _main(argv) -> int:
    flags = errors.Parser("vitssl extract", __doc__)
    flags.add_argument("weights")
    flags.add_argument("--images", default="")
    flags.add_argument("--to", default="")
    flags.add_argument("--program", default="")
    flags.add_argument("--image_size", type=int, default=0)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--batch", default="b", help="fixed size of a program's batch")
    flags.add_argument("--divided", default="auto", choices=("auto", "yes", "no"))
    flags.add_argument("--names", default="pooled")
    flags.add_argument("--source", default="folder", help="kind of data set")
    flags.add_argument("--split", default="test", help="of one that is no folder")
    flags.add_argument("--pool", default="")
    flags.add_argument("--part", default="")
    flags.add_argument("--output_patch", type=int, default=0, help="side of a token")
    flags.add_argument("--upsampling", default="shift")
    f = flags.parse_args(argv)
    if bool(f.program) == bool(f.images and f.to):
        raise errors.UsageError("give --images=FOLDER --to=FILE, or --program=FOLDER")
    names = tuple(f.names.split(","))
    if f.program:
        place.check(pathlib.Path(f.program) / "features.jax", "--program")
    else:
        _checked(f.to, f.batch_size, names)
    found = inference.load(
        f.weights,
        part=f.part,
        pool=f.pool,
        image_size=f.image_size,
        output_patch=f.output_patch,
        upsampling=f.upsampling,
    )
    if f.program:
        with place.writing("--program", f.program):
            print(program.export(found, f.program, batch=f.batch))
        return 0
    options = dict(batch_size=f.batch_size, divided=f.divided, names=names)
    with place.reading(errors.DataError):
        run(found, f.images, f.to, kind=f.source, split=f.split, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
