"""Sets in files that hold many images: WebDataset's tar, parquet of `datasets`."""

import io
import json
import tarfile

import pytest
from PIL import Image

from tests.layouts import pictures

NAMES = ("ant", "bee", "cow")


def png(label, number) -> bytes:
    """Return a picture of a class as the bytes of a file."""
    out = io.BytesIO()
    Image.fromarray(pictures.thing(label, number).image).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members):
    """Write members, {name: bytes or a `tarfile.TarInfo`}, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _samples():
    """Yield (split, number of the file, [(label, number)])."""
    for split, files, each in (("train", 2, 12), ("val", 1, 12)):
        for k in range(files):
            yield split, k, [(i % 3, k * each + i) for i in range(each)]


def tar(root):
    """Write {train,val}-00000.tar with .cls, and classes.json."""
    for split, k, samples in _samples():
        members = {}
        for label, number in samples:
            members[f"{number:06d}.png"] = png(label, number)
            members[f"{number:06d}.cls"] = str(label).encode()
        write_tar(root / f"{split}-{k:05d}.tar", members)
    (root / "classes.json").write_text(json.dumps(NAMES))
    return root


def array_record(root):
    """Write {train,val}-00000.array_record with their tables, and classes.json."""
    module = pytest.importorskip("array_record.python.array_record_module")
    root.mkdir(parents=True, exist_ok=True)
    for split, k, samples in _samples():
        path, rows = root / f"{split}-{k:05d}.array_record", ["key,file,label"]
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for label, number in samples:
            writer.write(png(label, number))
            rows.append(f"{number:08d},{number}.png,{label}")
        writer.close()
        path.with_suffix(".csv").write_text("\n".join(rows) + "\n")
    (root / "classes.json").write_text(json.dumps(NAMES))
    return root


def features(names=NAMES):
    """Return the metadata that `datasets` gives a schema."""
    of = {"label": {"names": list(names), "_type": "ClassLabel"}}
    of["image"] = {"_type": "Image"}
    return {"huggingface": json.dumps({"info": {"features": of}})}


def table(samples):
    """Return the pyarrow.Table of (label, bytes), as `datasets` stores it."""
    pyarrow = pytest.importorskip("pyarrow")
    images = [
        {"bytes": data, "path": f"{i}.png"} for i, (_, data) in enumerate(samples)
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = dict(
        image=pyarrow.array(images, kind),
        label=pyarrow.array([label for label, _ in samples], pyarrow.int64()),
    )
    return pyarrow.table(columns).replace_schema_metadata(features())


def parquet(root):
    """Write data/{train,val}-0000k-of-0000n.parquet, five rows a group."""
    parquet = pytest.importorskip("pyarrow.parquet")
    (root / "data").mkdir(parents=True)
    for split, k, samples in _samples():
        made = table([(label, png(label, number)) for label, number in samples])
        of = 2 if split == "train" else 1
        path = root / "data" / f"{split}-{k:05d}-of-{of:05d}.parquet"
        parquet.write_table(made, path, row_group_size=5)
    return root
