"""Published files of a data set to the folders that its source reads.

    vitssl prepare siim_acr FOLDER --to=ROOT [--tubes=FILE] [--rle=FILE] [--test=0.2]

FOLDER holds the competition's DICOM files, at any depth, and train-rle.csv or
stage_2_train.csv (ImageId, EncodedPixels). ROOT gets {train_set, full_test_set,
robust_test_set, non_robust_test_set}/{0,1}/<id>.dcm, hard links where the disk allows
them, and all_masks/<id>.png: all lesions of an image together, upright.

--tubes names who has a chest tube (.csv of id,0 or 1; .json; .pkl, of which nothing is
executed): as in the published split these images are the test, "robust" where the tube
tells nothing of the label. Without it a share of the images, drawn by their names, is.

ROOT appears when it is complete. Until then everything lies in ROOT.partial, and the
same command goes on from there.
"""

import csv
import json
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Mapping

import cv2

from vitssl import errors
from vitssl.data import dicom, pickles
from vitssl.data.sources import siim_acr

RLE = ("train-rle.csv", "stage_2_train.csv")
PLAN = "prepared.json"


def siim(folder, to, *, tubes="", rle="", test: float = 0.2, show=print) -> dict:
    """Prepare SIIM-ACR; return {folder of the layout: images}.

    Args:
        folder, to, tubes, rle: see the module.
        test: share of the images that are the test, without `tubes`.
        show: receives lines of progress.

    Raises:
        UsageError: `to` is there, or begun with other arguments.
        DataError: files are missing, or not such files.
    """
    folder, to = pathlib.Path(folder).expanduser(), pathlib.Path(to).expanduser()
    if to.exists():
        raise errors.UsageError(f"--to={to}: is there already; give another")
    if not folder.is_dir():
        raise errors.DataError(f"{folder}: no such folder")
    table = pathlib.Path(rle) if rle else _table(folder)
    lesions = _lesions(table)
    files = {path.stem: path for path in sorted(folder.rglob("*.dcm"))}
    known = [i for i in lesions if i in files]
    if not known:
        raise errors.DataError(
            f"{folder}: none of its {len(files)} .dcm files has a row in {table}"
        )
    for what, count in (
        (f"id(s) of {table.name} without a DICOM file", len(lesions) - len(known)),
        (f"DICOM file(s) without a row in {table.name}", len(files) - len(known)),
    ):
        if count:
            show(f"left out: {count} {what}")
    places = _places(known, lesions, _tubes(tubes) if tubes else None, test)
    if not tubes:
        show(f"no --tubes: {test:.0%} of the images, drawn by name, are the test")
    partial = to.with_name(f"{to.name}.partial")
    try:
        _begin(partial, dict(folder=str(folder.absolute()), images=places))
        for n, i in enumerate(known, 1):
            _one(partial, files[i], lesions[i], places[i])
            if n % 1000 == 0:
                show(f"{n}/{len(known)} images")
        partial.rename(to)
    except OSError as e:
        raise errors.DataError(f"{e.filename or partial}: {e.strerror}") from e
    return {
        name: sum(name in folders for folders in places.values())
        for name in siim_acr.SPLITS.values()
    }


def _table(folder) -> pathlib.Path:
    for name in RLE:
        if found := sorted(folder.rglob(name)):
            return found[0]
    raise errors.DataError(f"{folder}: holds no {' or '.join(RLE)}; give --rle=FILE")


def _lesions(table) -> dict[str, list[str]]:
    """Return {id: run lengths of each lesion, [] of a healthy image}."""
    found = {}
    try:
        with table.open(newline="") as lines:
            head, *rows = [[c.strip() for c in row] for row in csv.reader(lines) if row]
        at = [head.index(name) for name in ("ImageId", "EncodedPixels")]
        for row in rows:
            name, runs = (row[k] for k in at)
            found.setdefault(name, []).extend([runs] if runs not in ("-1", "") else [])
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as e:
        raise errors.DataError(
            f"{table}: no table with the columns ImageId, EncodedPixels ({e})"
        ) from e
    return found


def _tubes(file) -> dict[str, bool]:
    """Return {id: whether there is a chest tube} of a file.

    Raises:
        DataError: no such file, or not of this kind.
    """
    path = pathlib.Path(file)
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_text())
        elif path.suffix in (".pkl", ".pickle"):
            found = pickles.read(path.read_bytes(), str(path))
        else:
            with path.open(newline="") as lines:
                rows = [row for row in csv.reader(lines) if len(row) > 1]
            found = {i: x for i, x, *_ in rows if x.strip() in ("0", "1")}
        if not isinstance(found, Mapping) or not found:
            raise ValueError("no ids")
        return {str(i): bool(int(x)) for i, x in found.items()}
    except (OSError, ValueError, TypeError, errors.CheckpointError) as e:
        raise errors.DataError(f"--tubes={path}: want id,0 or id,1 a line: {e}") from e


def _places(known, lesions, tubes, test) -> dict[str, list[str]]:
    """Return {id: folders of the layout that it belongs to}."""
    found = {}
    for i in known:
        if tubes is None:
            # A function of the name: no image changes sides when others come.
            chosen = zlib.crc32(i.encode()) < test * 2**32
            found[i] = ["full_test_set" if chosen else "train_set"]
        elif i in tubes:
            shortcut = tubes[i] == bool(lesions[i])
            subset = "non_robust_test_set" if shortcut else "robust_test_set"
            found[i] = ["full_test_set", subset]
        else:
            found[i] = ["train_set"]
    return found


def _begin(partial, plan) -> None:
    """Make the folder, or see that it was begun by the same command."""
    file = partial / PLAN
    if file.is_file() and json.loads(file.read_text()) != plan:
        raise errors.UsageError(
            f"{partial}: begun with other files or options; remove it, then run again"
        )
    for name in siim_acr.SPLITS.values():
        for label in (0, 1):
            (partial / name / str(label)).mkdir(parents=True, exist_ok=True)
    (partial / "all_masks").mkdir(exist_ok=True)
    _whole(file, json.dumps(plan).encode())


def _one(partial, file, runs, folders) -> None:
    """Place one image and its mask, where they are not there yet."""
    for name in folders:
        _linked(file, partial / name / str(int(bool(runs))) / file.name)
    mask = partial / "all_masks" / f"{file.stem}.png"
    if not runs or mask.exists():
        return
    try:
        shape = dicom.size(file.read_bytes())
        drawn = siim_acr.lesions(runs, shape)
    except errors.UsageError:
        raise
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        raise errors.DataError(f"siim_acr: {file}: {errors.told(e)}") from e
    _whole(mask, cv2.imencode(".png", 255 * drawn)[1].tobytes())


def _linked(file, to) -> None:
    if to.exists():
        return
    try:
        os.link(file, to)
    except OSError:  # Another disk, or one without links.
        half = to.with_name(f"{to.name}.half")
        shutil.copyfile(file, half)
        half.replace(to)


def _whole(path, data: bytes) -> None:
    half = path.with_name(f"{path.name}.half")
    half.write_bytes(data)
    half.replace(path)


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    return errors.exit_code(_main, argv)


def _main(argv) -> int:
    flags = errors.Parser("vitssl prepare", __doc__)
    flags.add_argument("data", choices=("siim_acr",))
    flags.add_argument("folder", metavar="FOLDER")
    flags.add_argument("--to", required=True, metavar="ROOT")
    flags.add_argument("--tubes", default="", help="who has a chest tube")
    flags.add_argument("--rle", default="", help="table of the lesions")
    flags.add_argument("--test", type=float, default=0.2, help="share, without --tubes")
    f = flags.parse_args(argv)
    if not 0 < f.test < 1:
        raise errors.UsageError(f"--test={f.test}: between 0 and 1")
    found = siim(f.folder, f.to, tubes=f.tubes, rle=f.rle, test=f.test)
    print(f"{f.to}: " + ", ".join(f"{name} {n}" for name, n in found.items()))
    print(f"  --config.data.source=siim_acr --config.data.root={f.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
