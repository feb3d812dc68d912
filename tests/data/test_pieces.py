"""Files that hold many images: the same batches as of the folder they came from."""

import contextlib
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from tests import layouts
from tests.layouts import packed, pictures
from vitssl import errors
from vitssl.data import pipeline, sources, views
from vitssl.data.sources import tables, tar
from vitssl.tools import pack


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vitssl" / "tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of classes in splits, for reading only."""
    return layouts.make("folder", tmp_path_factory.mktemp("folder"))


def _silent(line):
    del line


def _batches(source, start, count, seed=3):
    transform = views.Supervised(24, (0.3, 1.0))
    loader = pipeline.train(
        source, transform, batch_size=5, seed=seed, start_step=start, threads=0
    )
    return [loader.load(t) for t in range(start, start + count)]


def _same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def _as_parquet(source, file, *, arrow=""):
    """Write a split of a folder as `datasets` would."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [(int(y), source.encoded(i)) for i, y in enumerate(source.labels)]
    made = packed.table(rows).replace_schema_metadata(packed.features(source.classes))
    file.parent.mkdir(parents=True, exist_ok=True)
    if not arrow:
        parquet.write_table(made, file, row_group_size=7)
        return
    new = pyarrow.ipc.new_stream if arrow == "stream" else pyarrow.ipc.new_file
    with new(file, made.schema) as out:
        out.write_table(made, max_chunksize=6)


@pytest.fixture(params=["pack", "repack", "array_record", "parquet", "stream", "file"])
def other(request, folder, tmp_path):
    """The folder in another form: (kind, root)."""
    if request.param in ("pack", "repack"):
        pack.run(folder, tmp_path / "a", images=7, show=_silent)
        if request.param == "pack":
            return "tar", tmp_path / "a"
        pack.run(tmp_path / "a", tmp_path / "b", kind="tar", images=100, show=_silent)
        return "tar", tmp_path / "b"
    if request.param == "array_record":
        pack.run(folder, tmp_path / "a", form="array_record", images=7, show=_silent)
        return "array_record", tmp_path / "a"
    form = request.param.removeprefix("parquet")
    for split in ("train", "val"):
        source = sources.open("folder", str(folder), split)
        at = f"data/{split}-00000-of-00001.parquet"
        at = f"{split}/data-00000-of-00001.arrow" if form else at
        _as_parquet(source, tmp_path / "p" / at, arrow=form)
    return "parquet", tmp_path / "p"


def test_batches_are_those_of_the_folder_wherever_a_run_starts_again(folder, other):
    kind, root = other
    for split in ("train", "val", "test"):
        ours = sources.open(kind, str(root), split)
        theirs = sources.open("folder", str(folder), split)
        assert ours.classes == theirs.classes == ("ant", "bee", "cow")
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert [ours.encoded(i) for i in range(len(ours))] == [
            theirs.encoded(i) for i in range(len(theirs))
        ]
    ours = sources.open(kind, str(root), "train")
    whole = _batches(sources.open("folder", str(folder), "train"), 0, 11)
    _same(_batches(ours, 0, 6) + _batches(ours, 6, 5), whole)
    with pipeline.train(
        ours, views.Supervised(24, (0.3, 1.0)), batch_size=5, seed=3, threads=3
    ) as loader:  # Threads share files and row groups.
        _same([next(loader) for _ in range(11)], whole)


def test_a_worker_process_gets_no_open_files(other):
    import pickle

    kind, root = other
    source = sources.open(kind, str(root), "val")
    first = source[0]["image"]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[0]["image"], first)


@pytest.mark.parametrize("form", pack.FORMS)
def test_a_pack_that_was_killed_goes_on_and_is_the_same(
    folder, tmp_path, monkeypatch, form
):
    given = dict(form=form, show=_silent)
    pack.run(folder, tmp_path / "whole", images=7, **given)
    (real, end), calls = pack.FORMS[form], []

    def dying(file, source, which):
        if len(calls) == 3:
            (file.parent / ".vitssl.1.tar").write_bytes(b"half")
            raise KeyboardInterrupt
        calls.append(file.name)
        real(file, source, which)

    monkeypatch.setitem(pack.FORMS, form, (dying, end))
    with contextlib.suppress(KeyboardInterrupt):
        pack.run(folder, tmp_path / "to", images=7, **given)
    assert not (tmp_path / "to").exists() and (tmp_path / "to.part").is_dir()
    with pytest.raises(errors.UsageError, match="of other images or options was begun"):
        pack.run(folder, tmp_path / "to", images=8, **given)
    other = next(name for name in pack.FORMS if name != form)
    with pytest.raises(errors.UsageError, match="of other images or options was begun"):
        pack.run(folder, tmp_path / "to", form=other, images=7, show=_silent)
    monkeypatch.setitem(
        pack.FORMS,
        form,
        (lambda file, *rest: (calls.append(file.name), real(file, *rest)), end),
    )
    made = pack.run(folder, tmp_path / "to", images=7, **given)
    assert made == {"train": 24, "val": 12} and len(calls) == len(set(calls)) == 6
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "to" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(errors.UsageError, match="is there already"):
        pack.run(folder, tmp_path / "to", **given)


def test_pack_keeps_names_splits_and_what_has_no_class(tmp_path, capsys):
    for n in range(20):
        pictures.save(tmp_path / "in" / f"{n}.png", pictures.thing(0, n).image)
    given = [str(tmp_path / "in"), f"--to={tmp_path}/out", "--option=holdout=0.25"]
    assert pack.main(given) == 0
    assert "15 in train, 5 in val\nnext: " in capsys.readouterr().out
    for split in ("train", "test"):
        ours = sources.open("tar", str(tmp_path / "out"), split)
        theirs = sources.open("folder", str(tmp_path / "in"), split, holdout=0.25)
        assert ours.labels.tolist() == [-1] * len(theirs)
        names = (tmp_path / "out").joinpath(
            f"{theirs.split}.csv".replace("test", "val")
        )
        assert names.read_text().splitlines()[1] == f"00000000,{theirs.relative(0)},"
    for words, code, told in (
        (["--source=digits"], 2, "its images are no files"),
        (["--images=0"], 2, "--images=0: 1 or more"),
        (["--option=labels"], 2, "--option=labels: want KEY=VALUE"),
        (["--option=lables=any"], 2, "did you mean 'labels'"),
    ):
        assert pack.main([str(tmp_path / "in"), f"--to={tmp_path}/x", *words]) == code
        assert told in capsys.readouterr().err


def test_array_records_keep_several_labels_and_tar_does_not(tmp_path, capsys):
    for n in range(20):
        pictures.save(tmp_path / "in" / f"{n}.png", pictures.thing(0, n).image)
    rows = [f"{n},{'a' * (n % 2)}|{'b' * (n % 3 > 0)}" for n in range(20)]
    (tmp_path / "several.csv").write_text("\n".join(["file,labels", *rows]))
    given = [f"{tmp_path}/in", f"--option=labels={tmp_path}/several.csv"]
    given += [f"--to={tmp_path}/out"]
    assert pack.main(given) == 2
    assert "take --format=array_record" in capsys.readouterr().err
    assert pack.main([*given, "--format=array_record", "--images=8"]) == 0
    for split in ("train", "val"):
        ours = sources.open("array_record", str(tmp_path / "out"), split)
        theirs = sources.open(
            "folder", f"{tmp_path}/in", split, labels=f"{tmp_path}/several.csv"
        )
        assert ours.classes == theirs.classes == ("a", "b")
        np.testing.assert_array_equal(ours.several, theirs.several)
        np.testing.assert_array_equal(ours[1]["labels"], theirs[1]["labels"])
        assert ours.encoded(1) == theirs.encoded(1)


def test_what_is_wrong_with_array_records_is_one_line(tmp_path):
    root = packed.array_record(tmp_path / "in")
    first, table = root / "train-00000.array_record", root / "train-00000.csv"
    table.unlink()  # Records of others have no table.
    source = sources.open("array_record", str(root), "train")
    assert source.labels.tolist() == [-1] * 12 + [0, 1, 2] * 4
    whole, rows = first.read_bytes(), "key,file,label\n0,0.png,0\n"
    for text, data, told in (
        (rows, whole, "train-00000.csv: 1 rows for 12 records"),
        ("key,file\n0,1\n", whole, "no table of records .its columns are key, file"),
        (rows.replace(",0\n", ",-1\n"), whole, "no table of records .a label below 0"),
        (rows, whole[: len(whole) // 2], "train-00000.array_record: no whole ArrayRec"),
        (rows, b"", "train-00000.array_record: no whole ArrayRecord file"),
    ):
        table.write_text(text)
        first.write_bytes(data)
        with pytest.raises(errors.DataError, match=told) as caught:
            sources.open("array_record", str(root), "train")
        assert "\n" not in str(caught.value)


# --- Tar


def _open(root, split="all", **options):
    return sources.open("tar", str(root), split, **options)


def _members(*labels, ending=".cls", text=str):
    found = {}
    for i, label in enumerate(labels):
        found[f"{i}.png"] = packed.png(0, i)
        if label is not None:
            found[f"{i}{ending}"] = text(label).encode()
    return found


@pytest.mark.parametrize(
    "given, labels, classes",
    [
        (_members(1, 0, 1), [1, 0, 1], ("0", "1")),
        (_members("b", "a", None), [1, 0, -1], ("a", "b")),
        (_members(7001, 12, 7001), [1, 0, 1], ("12", "7001")),
        (_members("x", "y", "x", "y", ending=".txt"), [0, 1, 0, 1], ("x", "y")),
        (_members("a cat", "a dog", ending=".txt"), [-1, -1], ()),  # Captions.
        (
            _members(1, 0, ending=".json", text=lambda y: json.dumps({"label": y})),
            [1, 0],
            ("0", "1"),
        ),
        (_members(1, 0, ending=".json", text=lambda y: "{not json"), [-1, -1], ()),
        (
            {f"{c}/{i}.v2.png": packed.png(0, i) for c in "ba" for i in (0, 1)},
            [1, 1, 0, 0],
            ("a", "b"),
        ),
    ],
)
def test_labels_are_where_they_are(tmp_path, given, labels, classes):
    packed.write_tar(tmp_path / "x.tar", given)
    source = _open(tmp_path)
    assert source.labels.tolist() == labels and source.classes == classes
    assert _open(tmp_path, labels="none").labels.tolist() == [-1] * len(labels)


def test_names_of_classes_lie_beside(tmp_path):
    packed.write_tar(tmp_path / "x.tar", _members(1, 0))
    (tmp_path / "classes.json").write_text('["no", "yes", "rare"]')
    assert _open(tmp_path).classes == ("no", "yes", "rare")
    packed.write_tar(tmp_path / "y.tar", _members(3))
    with pytest.raises(errors.DataError, match=r"labels 0\.\.3 of 3 classes"):
        _open(tmp_path)
    (tmp_path / "classes.json").write_text('["no", "no"]')
    with pytest.raises(errors.DataError, match="JSON list of the classes, each once"):
        _open(tmp_path)


def test_files_are_given_by_pattern_and_split_by_name(tmp_path):
    for n, name in enumerate(("train-000", "train-001", "train-002", "valid", "more")):
        packed.write_tar(tmp_path / "s" / f"{name}.tar", _members(*[0] * (n + 1)))
    at = tmp_path / "s"
    assert [len(_open(at, s)) for s in ("train", "val", "test", "all")] == [6, 4, 4, 15]
    for pattern, count in (
        ("train-{000..001}.tar", 3),
        ("train-{000,002}.tar", 4),
        ("train-00[02].tar", 4),
        ("{train-*,more}.tar", 11),
        ("valid.tar", 4),
    ):
        assert len(_open(at / pattern)) == len(_open(at, files=pattern)) == count
    with pytest.raises(errors.DataError, match="no file of split 'train', only of val"):
        _open(at / "valid.tar", "train")
    with pytest.raises(errors.DataError, match="no such file"):
        _open(at / "train-{000..003}.tar")
    (at / "train").mkdir()
    shutil.move(at / "more.tar", at / "train" / "more.tar")
    assert len(_open(at, "train")) == 11  # By its folder.


def test_without_splits_a_share_is_held_out(tmp_path):
    packed.write_tar(tmp_path / "x.tar", _members(*[0, 1] * 10))
    train, val = (_open(tmp_path, s, holdout=0.2) for s in ("train", "val"))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(val.labels).tolist() == [2, 2]


def _link(name, to, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def test_links_and_names_that_lead_out_are_left_out_and_counted(tmp_path, caplog):
    given = {"a/1.png": packed.png(0, 1), "../b/2.png": packed.png(0, 2)}
    given |= {"/b/3.png": packed.png(0, 3), "a/../../4.png": packed.png(0, 4)}
    given |= {"b/5.png": _link("b/5.png", "/etc/passwd"), "x.heic": b"x"}
    given["b/6.png"] = _link("b/6.png", "a/1.png", tarfile.LNKTYPE)
    given |= {"b/7.png": packed.png(0, 7), "b/._7.png": b"mac"}
    packed.write_tar(tmp_path / "x.tar", given)
    source = _open(tmp_path)
    assert [source.relative(i) for i in range(len(source))] == [
        "x.tar/a/1.png",
        "x.tar/b/7.png",
    ]
    assert (
        "left out: 1 .heic, 2 link(s), device(s) or sparse file(s), 3 name(s) that "
        "lead out of the file" in caplog.text
    )


def test_a_sample_with_masks_is_one_image(tmp_path, caplog):
    given = _members(0, 1) | {"0.mask.png": packed.png(1, 0), "9.cls": b"1"}
    packed.write_tar(tmp_path / "x.tar", dict(sorted(given.items())))
    source = _open(tmp_path)
    assert [source.relative(i) for i in (0, 1)] == ["x.tar/0.png", "x.tar/1.png"]
    assert len(source) == 2
    assert "1 further image(s) of a sample, 1 label(s) without an image" in caplog.text


def test_what_is_damaged_is_one_line_or_is_counted(tmp_path):
    given = {f"a/{i}.png": packed.png(0, i) for i in range(4)}
    path = tmp_path / "x.tar"
    packed.write_tar(path, given | {"a/4.png": b"no image"})
    data = path.read_bytes()
    with pytest.raises(errors.DataError, match=r"x\.tar/a/4\.png: cannot be decoded"):
        _open(tmp_path)[4]
    loader = pipeline.evaluate(
        _open(tmp_path), views.Supervised(24, (0.3, 1.0)), batch_size=5, threads=0
    )
    assert loader.load(0)["valid"].tolist() == [True] * 4 + [False]
    source = _open(tmp_path)
    for broken, says in (
        (data[: len(data) // 4], "unexpected end of data"),
        (b"\x1f\x8b" + data, "unpack a .tar.gz to .tar"),
        (b"", "no whole tar file"),
    ):
        path.write_bytes(broken)
        with pytest.raises(errors.DataError, match=says) as caught:
            _open(tmp_path)
        assert str(caught.value).count("\n") == 0
    with pytest.raises(errors.DataError, match="a/3.png: cannot be read: its file has"):
        source[3]
    second = data.index(b"a/1.png")
    path.write_bytes(data[:second] + b"\xff" * 512 + data[second + 512 :])
    with pytest.raises(errors.DataError, match=f"damaged at byte {second}"):
        _open(tmp_path)


def test_an_index_is_kept_until_its_file_changes(tmp_path, cache, monkeypatch):
    packed.write_tar(tmp_path / "x.tar", _members(0, 1))
    assert len(_open(tmp_path)) == 2
    (kept,) = cache.iterdir()
    with monkeypatch.context() as m:
        m.setattr(tar, "_scan", None)  # Not looked through again.
        assert _open(tmp_path).labels.tolist() == [0, 1]
    for damage in ("", "[1]", '{"samples": [["a", 0, 99999999, {}]], "out": {}}'):
        kept.write_text(damage)
        assert _open(tmp_path).labels.tolist() == [0, 1]
    packed.write_tar(tmp_path / "x.tar", _members(1, 0))
    os.utime(tmp_path / "x.tar", ns=(1, 1))
    assert _open(tmp_path).labels.tolist() == [1, 0]
    shutil.rmtree(cache)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file is in the way")
    assert _open(tmp_path).labels.tolist() == [1, 0]


# --- Parquet


def _table(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def test_columns_are_found_or_named(tmp_path):
    images = [packed.png(0, i) for i in range(3)]
    path, at = tmp_path / "x.parquet", str(tmp_path)
    _table(path, img=images, fine_label=["b", "a", None], note=["x", "y", "z"])
    source = sources.open("parquet", at, "all")
    assert source.labels.tolist() == [1, 0, -1] and source.classes == ("a", "b")
    by = sources.open("parquet", at, "all", label="note", image="img")
    assert by.labels.tolist() == [0, 1, 2]
    assert sources.open("parquet", at, "all", label="").labels.tolist() == [-1] * 3
    for options, says in (
        (dict(image="pixels"), "no column 'pixels'; it has: img, fine_label, note"),
        (dict(label="img"), "holds bytes; want one number or name"),
    ):
        with pytest.raises(errors.DataError, match=says):
            sources.open("parquet", at, "all", **options)
    _table(path, left=images, right=images, label=[[0, 1], [1], [0]])
    with pytest.raises(
        errors.DataError, match="several image columns.*data.options.im"
    ):
        sources.open("parquet", at, "all")
    with pytest.raises(errors.DataError, match="holds list; want one"):
        sources.open("parquet", at, "all", image="left")


def test_damaged_rows_and_files_are_one_line(tmp_path):
    path, at = tmp_path / "x.parquet", str(tmp_path)
    rows = [dict(bytes=packed.png(0, 0), path=None), dict(bytes=b"x", path=None)]
    _table(path, image=[*rows, dict(bytes=None, path="/etc/passwd")], label=[0, 1, 0])
    source = sources.open("parquet", at, "all")
    assert source[0]["image"].shape == (40, 56, 3)
    for i, says in ((1, "x.parquet/1: cannot be decoded"), (2, "a path alone is not")):
        with pytest.raises(errors.DataError, match=says):
            source[i]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(errors.DataError, match="x.parquet: cannot be read") as caught:
        sources.open("parquet", at, "all")
    assert "\n" not in str(caught.value)


def test_row_groups_are_let_go_and_read_again(folder, tmp_path, monkeypatch, caplog):
    from vitssl.data.sources import parquet

    source = sources.open("folder", str(folder), "train")
    _as_parquet(source, tmp_path / "train.parquet")
    monkeypatch.setattr(parquet, "HELD", 1)
    ours = sources.open("parquet", str(tmp_path), "train")
    for i in (0, 23, 3, 8):
        assert ours.encoded(i) == source.encoded(i)
    assert len(ours._groups) == 1 and "vitssl pack makes tar files" in caplog.text


def test_without_pyarrow_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(errors.DataError, match=r"pip install 'vitssl\[parquet\]'"):
        sources.open("parquet", str(tmp_path), "all")


# --- Labels


@pytest.mark.parametrize(
    "said, labels, classes",
    [
        ([2, 0, None], [2, 0, -1], ("0", "1", "2")),
        (["2", "0", "-1"], [2, 0, -1], ("0", "1", "2")),
        ([5, 9, 5], [0, 1, 0], ("5", "9")),
        (["b", 3, "a"], [2, 0, 1], ("3", "a", "b")),
        ([None, ""], [-1, -1], ()),
    ],
)
def test_labels_are_numbered(said, labels, classes):
    got, names = tables.numbered("x", said)
    assert got.tolist() == labels and got.dtype == np.int32 and names == classes
