"""Classes of a folder of images, from a run that was trained on labels.

    vitssl predict RUN --images=FOLDER --to=FILE.csv|.parquet|.json
        [--top=5] [--threshold=0.5] [--batch_size=64] [--overlay=FOLDER]

RUN is a workdir, or one checkpoint of it (RUN@best), of fine-tuning or of part
discovery. It predicts as its final evaluation does: by averaged weights and over the
views of scoring.tta, where it has them.

FILE has a row for every image at any depth: "file" (from FOLDER on), "class",
"probability", the next likely ones "class_2", "probability_2" and so on, and "error",
which says why an image could not be read. Of a run that learned several labels an
image, "labels" comes first: those whose probability is above --threshold, the likeliest
first, separated by "|". --overlay draws into a folder what the
network saw: parts over the image, or the image dark where its attention is not.
"""

import csv
import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.convert import place
from vitssl.data import decode, pipeline
from vitssl.data.sources import folder, wrappers
from vitssl.evals import extraction
from vitssl.pictures import overlays
from vitssl.run import inference
from vitssl.tools import writing

KINDS = (".csv", ".parquet", ".json")


def run(
    path, images, to, *, top=5, threshold=None, batch_size=64, overlay="", show=print
) -> list[dict]:
    """Name the classes of all images below a folder; write and return the rows.

    Args:
        path: of a run, see `inference.load`.
        images: the folder.
        to: file of an ending of `KINDS`.
        top: classes of each image.
        threshold: probability above which an image has a label, of a run that learned
            several; None is one half.
        batch_size: images at once.
        overlay: folder for one picture of every image; "" = none.
        show: receives lines of progress.

    Raises:
        UsageError: what cannot be written or asked for; the run names no classes.
        DataError: no images, or none that can be decoded.
    """
    to = writing.place(to, KINDS)
    writing.counts(top=top, batch_size=batch_size)
    if threshold is not None and not 0 <= threshold < 1:
        raise errors.UsageError(f"--threshold={threshold}: from 0 on, below 1")
    if overlay:
        _make(overlay)
    files = _files(images)
    weights = inference.load(path)
    headline, several = weights.headline, weights.method.several
    if threshold is not None and not several:
        raise errors.UsageError(
            f"--threshold={threshold}: {path} names one class an image; leave it out"
        )
    files = dataclasses.replace(files, channels=weights.channels)
    writing.compare(files, weights, show)
    transform = weights.method.evaluation_transform(weights.image_size)
    reduction = getattr(transform, "reduction", None)
    source = _Remembering(files.reduced(reduction), {})
    size = min(batch_size, len(source))
    with pipeline.evaluate(source, transform, batch_size=size) as batches:
        seen = writing.watched(batches, len(source), size, show)
        if overlay:
            seen = _drawing(seen, weights, source, pathlib.Path(overlay))
        count = len(weights.classes)
        best = _Best(weights.method, count if several else min(top, count))
        found = extraction.outputs(best, weights.state, seen)
    limit = None if not several else 0.5 if threshold is None else threshold
    rows = [
        _row(
            source, i, weights.classes, found["which"][i], found["share"][i], top, limit
        )
        for i in range(len(source))
    ]
    with writing.whole(to) as part:
        _write(part, rows)
    broken = len(source.faults)
    if broken == len(rows):
        first = rows[0]["error"]
        raise errors.DataError(
            f"--images={images}: none of {broken} images can be decoded, see {to}; "
            f"the first: {first}"
        )
    show(
        f"{to}: {len(rows)} images, {broken} of them broken; by {headline} of "
        f"{weights.name}"
    )
    return rows


def _make(directory):
    with place.writing("--overlay", directory):
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    place.check(pathlib.Path(directory) / "a.png", "--overlay")


def _files(images) -> folder.Files:
    """Return all images below a folder; `folder.open` would leave out loose ones."""
    base = pathlib.Path(images).expanduser()
    if not base.is_dir():
        raise errors.DataError(f"--images={images}: no such folder")
    found = [(path, -1) for path in folder.walk(base)]
    if not found:
        endings = " ".join(sorted(decode.SUFFIXES))
        raise errors.DataError(f"--images={images}: no image in it ({endings})")
    about = dict(classes=(), channels=0, name="folder", split="all")
    return folder.files(base, found, **about)


@dataclasses.dataclass(frozen=True, eq=False)
class _Remembering(wrappers.Wrapper):
    """A source whose broken images are black, and why they are {index: text}."""

    faults: dict

    def example(self, i: int) -> dict:
        """Return example i."""
        try:
            return self.whole[i]
        except errors.DataError as e:
            self.faults[i] = " ".join(str(e).split())
            return {"image": np.zeros((8, 8, self.channels), np.uint8), "label": -1}


@dataclasses.dataclass(frozen=True)
class _Best:
    """(params, extra, batch) -> the likeliest classes of a batch."""

    method: Any
    count: int

    def __call__(self, params, extra, batch) -> dict:
        """Return {"which": int [B, count], "share": their probabilities}."""
        (x,) = self.method.class_logits(params, extra, batch["image"]).values()
        # Ordered by logits: probabilities may both be 1.
        logits, which = jax.lax.top_k(x.astype(jnp.float32), self.count)
        if self.method.several:
            return {"which": which, "share": jax.nn.sigmoid(logits)}
        whole = jax.nn.logsumexp(x.astype(jnp.float32), -1, keepdims=True)
        return {"which": which, "share": jnp.exp(logits - whole)}


def _drawing(batches, weights, source, directory):
    """Yield the batches, and draw their images one by one: attention is large."""
    for batch in batches:
        for i, image in zip(batch["index"], batch["image"], strict=True):
            if i >= 0 and i not in source.faults:
                fields = weights.method.pictures(*weights.state, {}, image[None])
                name = f"{source.whole.relative(int(i))}.png"
                with place.writing("--overlay", directory):
                    overlays.write_one(directory / name, image, fields)
        yield batch


def _row(source, i, classes, which, share, top, threshold) -> dict:
    """Return the row of image i; `threshold` is of several labels, else None."""
    row, known = (
        {"file": decode.printable(source.whole.relative(i))},
        i not in (source.faults),
    )
    if threshold is not None:
        labels = [
            classes[k] for k, p in zip(which, share, strict=True) if p > threshold
        ]
        row["labels"] = "|".join(labels) if known else None
    for n, (k, p) in enumerate(zip(which[:top], share, strict=False)):
        end = f"_{n + 1}" if n else ""
        row[f"class{end}"] = classes[k] if known else None
        row[f"probability{end}"] = round(float(p), 6) if known else None
    return row | {"error": source.faults.get(i)}


def _write(to, rows):
    if to.suffix == ".json":
        to.write_text(json.dumps(rows, indent=1))
    elif to.suffix == ".csv":
        with to.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        pyarrow, parquet = writing.arrow(KINDS[0])
        kinds = {True: pyarrow.float32(), False: pyarrow.string()}
        schema = [(key, kinds[key.startswith("probability")]) for key in rows[0]]
        table = pyarrow.Table.from_pylist(rows, pyarrow.schema(schema))
        parquet.write_table(table, to)


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    return errors.exit_code(_main, argv)


def _main(argv) -> int:
    parser = errors.Parser("vitssl predict", __doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--images", required=True, metavar="FOLDER")
    parser.add_argument("--to", required=True, metavar="FILE")
    parser.add_argument("--top", type=int, default=5, help="classes of each image")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="of several labels"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--overlay", default="", metavar="FOLDER")
    f = parser.parse_args(argv)
    options = dict(top=f.top, threshold=f.threshold, batch_size=f.batch_size)
    options |= {"overlay": f.overlay}
    with place.reading(errors.DataError):
        run(f.run, f.images, f.to, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
