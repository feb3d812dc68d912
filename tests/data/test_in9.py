"""ImageNet-9's layout on disk, and foregrounds before other backgrounds."""

import numpy as np
import pytest

from tests import layouts
from vitssl import errors
from vitssl.data.sources import in9

CLASSES = layouts.in9.CLASSES[:2]


def write(root, **keys):
    return layouts.in9.in9(root, size=(8, 10), names=CLASSES, **keys)


def test_variants_are_splits_and_masks_are_none(tmp_path):
    known = ("mixed_next", "mixed_rand", "mixed_same", "no_fg")
    known += ("only_bg_t", "only_fg", "original")
    assert in9.variants(write(tmp_path)) == known
    source = in9.open(tmp_path, "mixed_rand")
    assert source.classes == CLASSES and source.labels.tolist() == [0, 0, 1, 1]
    assert len(in9.open(tmp_path, "test")) == 4
    with pytest.raises(errors.DataError, match="no split 'only_bg_b'"):
        in9.open(tmp_path, "only_bg_b")


def test_every_foreground_meets_every_background(tmp_path):
    write(tmp_path)
    source = in9.challenge(tmp_path, 99)
    assert len(source) == 4 * 4 and source.labels.tolist() == [0] * 8 + [1] * 8
    front, back = in9.open(tmp_path, "original"), in9.open(tmp_path, "only_bg_t")
    mask = np.load(tmp_path / "fg_mask/val/01_bird/01_bird_0.npy")
    image = source[2 * 4 + 1]["image"]
    np.testing.assert_array_equal(image[mask], front[2]["image"][mask])
    np.testing.assert_array_equal(image[~mask], back[1]["image"][~mask])
    assert in9.challenge(tmp_path, 2).chosen.tolist() == [0, 3]


def test_missing_masks_and_other_sizes_are_refused(tmp_path):
    write(tmp_path / "a", masks=False)
    with pytest.raises(
        errors.DataError, match="4 of 4 images have no mask.*00_dog_0.npy"
    ):
        in9.challenge(tmp_path / "a", 2)
    write(tmp_path / "b")
    np.save(tmp_path / "b/fg_mask/val/00_dog/00_dog_0.npy", np.ones((4, 4)))
    with pytest.raises(errors.DataError, match="differ in size"):
        in9.challenge(tmp_path / "b", 2)[0]
    with pytest.raises(errors.DataError, match="no variant"):
        (tmp_path / "c").mkdir()
        in9.variants(tmp_path / "c")
