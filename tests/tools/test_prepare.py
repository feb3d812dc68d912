"""SIIM-ACR from its published files: masks by value, splits, a second start."""

import json
import pickle

import numpy as np
import pytest

from tests.layouts import radiographs
from vitssl.data import decode, sources
from vitssl.data.sources import siim_acr
from vitssl.tools import prepare


def test_run_lengths_go_down_the_columns_and_skip_from_the_last_run():
    # 3 rows, 4 columns: skip 1, run 2; skip 1, run 3.
    got = siim_acr.run_lengths("1 2 1 3", (3, 4))
    np.testing.assert_array_equal(got, [[0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    both = siim_acr.lesions(["1 2", "0 1 10 1"], (3, 4))
    np.testing.assert_array_equal(both, [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]])
    assert not siim_acr.run_lengths("-1", (3, 4)).any()
    assert not siim_acr.lesions([], (3, 4)).any()
    for text, told in (
        ("1 2 3", "pairs"),
        ("1 x", "invalid literal"),
        ("3 10", "pixel 13, the image has 12"),
        ("1 -2", "pairs of whole"),
    ):
        with pytest.raises(ValueError, match=told):
            siim_acr.run_lengths(text, (3, 4))


def encoded(mask) -> str:
    """Return the run lengths of a mask, one pixel at a time."""
    words, last = [], 0
    for at in np.flatnonzero(np.asarray(mask).T.ravel()):
        words += [at - last, 1]
        last = at + 1
    return " ".join(map(str, words))


@pytest.fixture
def published(tmp_path):
    """Return (folder, {id: mask}) as the competition gives them: 4 healthy, 4 ill."""
    folder, masks, rows = tmp_path / "siim", {}, ["ImageId, EncodedPixels"]
    for n in range(8):
        pixels, mask = radiographs.radiograph(n)
        path = folder / f"dicom-images-train/study{n}/series/id.{n}.dcm"
        path.parent.mkdir(parents=True)
        path.write_bytes(radiographs.dicom(pixels, radiographs.KINDS[n % 2]))
        if n < 4:
            rows.append(f"id.{n}, -1")
            continue
        masks[f"id.{n}"] = mask > 0
        top, bottom = mask.copy(), mask.copy()  # Two lesions of one image.
        top[len(mask) // 2 :] = 0
        bottom[: len(mask) // 2] = 0
        rows += [f"id.{n},{encoded(part)}" for part in (top, bottom)]
    rows.append("id.without,-1")
    (folder / "train-rle.csv").write_text("\n".join(rows) + "\n")
    return folder, masks


TUBES = {"id.0": 0, "id.1": 1, "id.4": 0, "id.5": 1}


@pytest.mark.parametrize("kind", [".csv", ".json", ".pkl"])
def test_the_source_reads_what_is_prepared(published, tmp_path, capsys, kind):
    folder, masks = published
    tubes, to = tmp_path / f"tubes{kind}", tmp_path / "root"
    if kind == ".csv":
        tubes.write_text("id,tube\n" + "".join(f"{i},{x}\n" for i, x in TUBES.items()))
    elif kind == ".json":
        tubes.write_text(json.dumps(TUBES))
    else:
        tubes.write_bytes(pickle.dumps(TUBES, 2))
    given = ["siim_acr", str(folder), f"--to={to}", f"--tubes={tubes}"]
    assert prepare.main(given) == 0
    told = capsys.readouterr().out
    assert "left out: 1 id(s) of train-rle.csv without a DICOM file" in told
    assert "train_set 4, full_test_set 4, robust_test_set 2" in told
    split = {"train": "2367", "test": "0145", "robust": "14", "non_robust": "05"}
    for name, want in split.items():
        source = sources.open("siim_acr", str(to), name, masks=True)
        names = [source.path(i).rpartition("id.")[2][0] for i in range(len(source))]
        assert sorted(names) == sorted(want)
        for i, n in enumerate(names):
            example = source[i]
            assert example["label"] == (int(n) > 3)
            there = masks.get(f"id.{n}", np.zeros(example["mask"].shape))
            np.testing.assert_array_equal(example["mask"], there)
            original = folder / f"dicom-images-train/study{n}/series/id.{n}.dcm"
            pixels = decode.read(str(original), channels=3)
            np.testing.assert_array_equal(example["image"], pixels)


def test_an_interrupted_preparation_goes_on_and_appears_whole(
    published, tmp_path, capsys, monkeypatch
):
    folder, masks = published
    to, count, whole = tmp_path / "root", [], prepare._whole

    def stops(path, data):
        count.append(path.name)
        if path.suffix == ".png" and len(count) > 3:
            raise OSError(28, "No space left on device", str(path))
        whole(path, data)

    monkeypatch.setattr(prepare, "_whole", stops)
    given = ["siim_acr", str(folder), f"--to={to}", "--test=0.5"]
    assert prepare.main(given) == 3
    told = capsys.readouterr().err
    assert "No space left" in told and told.count("\n") == 1
    assert not to.exists()
    before = len(list((tmp_path / "root.partial/all_masks").glob("*.png")))
    assert 0 < before < len(masks)
    monkeypatch.setattr(prepare, "_whole", whole)
    assert prepare.main([*given[:-1], "--test=0.9"]) == 2
    assert "begun with other files or options" in capsys.readouterr().err
    assert prepare.main(given) == 0
    assert len(list((to / "all_masks").glob("*"))) == len(masks)
    assert not (tmp_path / "root.partial").exists() and not list(to.rglob("*.half"))
    trained = {p.stem for p in (to / "train_set").rglob("*.dcm")}
    tested = {p.stem for p in (to / "full_test_set").rglob("*.dcm")}
    assert trained | tested == {f"id.{n}" for n in range(8)}
    assert not trained & tested
    assert prepare.main(given) == 2
    assert "is there already" in capsys.readouterr().err


def test_faults_are_one_line(published, tmp_path, capsys):
    folder, _ = published
    table = tmp_path / "other.csv"
    table.write_text("ImageId,EncodedPixels\nid.4,5 999999999\n")
    columns = tmp_path / "columns.csv"
    columns.write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    code = tmp_path / "evil.pkl"
    code.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for where, flags, exit_code, told in (
        (folder, [f"--rle={table}"], 3, "run lengths end at pixel"),
        (folder, [f"--rle={columns}"], 3, "ImageId, EncodedPixels"),
        (folder, [f"--tubes={tmp_path}/no.csv"], 3, "--tubes="),
        (folder, [f"--tubes={code}"], 3, "refused"),
        (folder, ["--test=1.5"], 2, "between 0 and 1"),
        (tmp_path / "empty", [], 3, "holds no train-rle.csv"),
        (tmp_path / "none", [], 3, "no such folder"),
    ):
        to = tmp_path / f"to{len(flags)}{told[:3]}"
        assert prepare.main(["siim_acr", str(where), f"--to={to}", *flags]) == exit_code
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1, said
        assert not to.exists()
