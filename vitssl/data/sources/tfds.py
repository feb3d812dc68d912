"""Data sets prepared by tensorflow-datasets as array_record, without tensorflow."""

import dataclasses
import functools
import re
from typing import Any, ClassVar

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import layout

EXPECTED = "ROOT/<dataset>/<version>/ prepared with file_format='array_record'"


@dataclasses.dataclass(frozen=True, eq=False)
class Records(layout.Source):
    """Examples of a prepared data set, decoded here; opened anew in each process."""

    dataset: str
    root: str
    split: str
    image_key: str
    label_key: str
    encoded: bool
    channels: int
    classes: tuple[str, ...]
    name: ClassVar[str] = "tfds"

    @functools.cached_property
    def _records(self):
        decoders = {}
        if self.encoded:
            decoders = {self.image_key: _library().decode.SkipDecoding()}
        builder = _builder(self.dataset, self.root)
        return builder.as_data_source(split=self.split, decoders=decoders)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32; reads every record once."""
        if not self.label_key:
            return np.full(len(self), -1, np.int32)
        found = (self._label(self._records[i]) for i in range(len(self)))
        return np.fromiter(found, np.int32, len(self))

    def _label(self, record):
        return int(record[self.label_key]) if self.label_key else -1

    def __len__(self):
        return len(self._records)

    def example(self, i: int) -> dict:
        """Return example i."""
        record = self._records[i]
        image = record[self.image_key]
        if self.encoded:
            name = f"{self.dataset} {self.split}[{i}]"
            image = decode.decode(image, channels=self.channels, name=name)
        return {"image": image, "label": self._label(record)}


def _library() -> Any:
    try:
        import tensorflow_datasets

        return tensorflow_datasets.core and tensorflow_datasets
    except (ImportError, AttributeError) as e:  # It hides a failed import of its own.
        raise errors.DataError(
            "tfds: tensorflow-datasets is not installed, or not completely; install "
            f"the extra: pip install 'vitssl[tfds]' ({e})"
        ) from e


def _builder(dataset, root):
    """Return the builder of what is prepared; the data set's own code is not run."""
    library = _library()
    path = _version(dataset, layout.root_of("tfds", root, EXPECTED))
    try:
        return library.builder_from_directory(path)
    except Exception as e:  # noqa: BLE001 - a dozen of its own kinds.
        layout.fail("tfds", f"not a prepared data set: {_first(e)}", path, EXPECTED)


def _version(dataset, root):
    """Return the folder of the newest, or the named, version of a data set."""
    name, _, version = dataset.partition(":")
    found = sorted(p.parent for p in (root / name).rglob("dataset_info.json"))
    found = [p for p in found if not version or p.name == version]
    if not found:
        layout.fail("tfds", f"no data set {dataset!r}", root / name, EXPECTED)
    if len({p.parent for p in found}) > 1:
        several = ", ".join(str(p.relative_to(root)) for p in found)
        raise errors.DataError(
            f"tfds: {root}: {dataset!r} could be each of {several}; name one"
        )
    return max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def _first(error):
    """Return the first line of what tensorflow-datasets says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open(root, split, *, dataset="", image="image", label="label"):
    """A data set of tensorflow-datasets that was prepared as array_record.

    Args:
        root: its data_dir; or, with dataset="", the folder of the version itself.
        split: in its language: "train", "train[:50%]", "test" ...
        dataset: "name" or "name/config", the newest version or that after a ":".
        image, label: keys of the features; label="" leaves everything unlabelled.

    Raises:
        DataError: the library (extra [tfds]), the data set, the split or a feature is
            missing, or it was prepared in another file format.
    """
    builder = _builder(dataset, root)
    features = builder.info.features
    wanted = [key for key in (image, label) if key]
    unknown = [key for key in wanted if key not in features]
    if unknown:
        raise errors.DataError(
            f"tfds: {dataset or root} has no feature {', '.join(unknown)}; "
            f"it has: {', '.join(sorted(features))}"
        )
    shape, dtype = features[image].shape, np.dtype(features[image].np_dtype)
    encoded = isinstance(features[image], _library().features.Image)
    if len(shape) != 3 or not shape[2] or (dtype != np.uint8 and not encoded):
        raise errors.DataError(
            f"tfds: feature {image!r} is {dtype} {shape}; want uint8 [H, W, C]"
        )
    classes = tuple(getattr(features[label], "names", None) or ()) if label else ()
    source = Records(
        dataset, str(root), split, image, label, encoded, int(shape[2]), classes
    )
    try:
        len(source)
    except errors.DataError:
        raise
    except Exception as e:  # noqa: BLE001 - a dozen of its own kinds.
        splits = ", ".join(builder.info.splits) or "none prepared"
        raise errors.DataError(
            f"tfds: {dataset or root} split {split!r}: {_first(e)}\n"
            f"  expected: {EXPECTED}\n  found:    splits {splits}, format "
            f"{builder.info.file_format}"
        ) from e
    return source
