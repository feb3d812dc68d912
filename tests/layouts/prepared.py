"""A data set of tensorflow-datasets, written as array_record without tensorflow."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.layouts import pictures


def blots(root, splits):
    """Write the data set "tiny_blots"; return the folder of its version.

    Args:
        splits: {name: images uint8 [N, H, W, 3]}; label i modulo 2, "dull" or "bright".
    """
    tfds = pytest.importorskip("tensorflow_datasets")

    # It is written more than once in a process.
    class TinyBlots(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # It has no package to look for checksums in.

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["dull", "bright"]),
                    "id": tfds.features.Scalar(np.int64),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {k: self._generate_examples(v) for k, v in splits.items()}

        def _generate_examples(self, images):
            for i, image in enumerate(images):
                png = io.BytesIO()  # Arrays it would encode with tensorflow.
                Image.fromarray(image).save(png, "PNG")
                yield i, {"image": png.getvalue(), "label": i % 2, "id": i}

    builder = TinyBlots(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return root / "tiny_blots" / "1.0.0"


def tfds(root):
    """Write 24 blots to train and 12 to test."""
    made = [pictures.thing(i % 2, i).image for i in range(36)]
    return blots(root, {"train": made[:24], "test": made[24:]})
