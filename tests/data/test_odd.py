"""Every odd file and folder of `tests.odd` comes to what stands beside it."""

import numpy as np
import pytest

from tests import odd
from vitssl import errors
from vitssl.data import decode, sources

IMAGES = odd.images()


@pytest.mark.parametrize("what", IMAGES)
def test_an_odd_image_has_its_right_value_or_one_line(what, tmp_path):
    one, path = IMAGES[what], tmp_path / IMAGES[what].name
    path.write_bytes(one.data)
    options = dict(channels=one.channels, bounds=one.bounds)
    if isinstance(one.want, str):
        with pytest.raises(errors.DataError, match=one.want) as told:
            decode.read(path, **options)
        assert str(told.value).startswith(f"{path}: ") and "\n" not in str(told.value)
        return
    got = decode.read(path, **options)
    assert got.dtype == np.uint8 and got.shape == one.want.shape
    assert np.abs(got.astype(int) - one.want).max() <= one.off


@pytest.mark.parametrize("what", odd.TREES)
def test_an_odd_folder_has_its_right_classes_and_images(what, tmp_path):
    tree = odd.TREES[what]
    tree.write(tmp_path)
    if tree.refused:
        with pytest.raises(errors.DataError, match=tree.refused):
            sources.open("folder", str(tmp_path), "all", **tree.options)
        return
    found = sources.open("folder", str(tmp_path), "all", **tree.options)
    assert found.classes == tree.classes
    assert tuple(found.relative(i) for i in range(len(found))) == tree.images
