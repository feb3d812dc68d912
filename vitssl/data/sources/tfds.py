"""Data sets prepared by tensorflow-datasets as array_record, without tensorflow."""

import dataclasses
import functools
import typing

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import layout

EXPECTED = "ROOT/<dataset>/<version>/ prepared with file_format='array_record'"


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Examples of a prepared data set, decoded here; opened anew in each process."""

    dataset: str
    root: str
    split: str
    image: str
    label: str
    encoded: bool
    channels: int
    classes: tuple[str, ...]
    name: str = "tfds"

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def _records(self):
        decoders = {}
        if self.encoded:
            decoders = {self.image: _library().decode.SkipDecoding()}
        builder = _builder(self.dataset, self.root)
        return builder.as_data_source(split=self.split, decoders=decoders)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32; reads every record once."""
        if not self.label:
            return np.full(len(self), -1, np.int32)
        records = self._records
        return np.array([records[i][self.label] for i in range(len(self))], np.int32)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        record = self._records[i]
        image = record[self.image]
        if self.encoded:
            name = f"{self.dataset} {self.split}[{i}]"
            image = decode.decode(image, channels=self.channels, name=name)
        return {"image": image, "label": int(record[self.label]) if self.label else -1}


def _library() -> typing.Any:
    try:
        import tensorflow_datasets

        return tensorflow_datasets.core and tensorflow_datasets
    except (ImportError, AttributeError) as e:  # It hides a failed import of its own.
        raise errors.DataError(
            "tfds: tensorflow-datasets is not installed, or not completely; install "
            f"the extra: pip install 'vitssl[tfds]' ({e})"
        ) from e


def _builder(dataset, root):
    library = _library()
    path = layout.root_of("tfds", root, EXPECTED)
    try:
        if not dataset:
            return library.core.builder_from_directory(path)
        return library.builder(dataset, data_dir=str(path))
    except Exception as e:  # noqa: BLE001 - a dozen of its own kinds.
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        layout.fail("tfds", f"no data set {dataset!r}: {first}", path, EXPECTED)


def open(root, split, *, dataset="", image="image", label="label"):
    """A data set of tensorflow-datasets that was prepared as array_record.

    Args:
        root: its data_dir; or, with dataset="", the folder of the version itself.
        split: in its language: "train", "train[:50%]", "test" ...
        dataset: "name", "name/config" or "name:version".
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
            f"it has: {', '.join(features)}"
        )
    shape, dtype = features[image].shape, np.dtype(features[image].dtype)
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
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise errors.DataError(
            f"tfds: {dataset or root} split {split!r}: {first}\n"
            f"  expected: {EXPECTED}\n  found:    splits {splits}, format "
            f"{builder.info.file_format}"
        ) from e
    return source
