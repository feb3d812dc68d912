"""ImageNet-9's layout on disk, and foregrounds before other backgrounds."""

import cv2
import numpy as np
import pytest

from vitssl import errors
from vitssl.data.sources import in9

CLASSES = ("00_dog", "01_bird")


def write(root, *, size=8, masks=True):
    """Write two foregrounds of each class, three backgrounds, and mixed_rand."""
    rng = np.random.default_rng(0)
    for variant, count in (("original", 2), ("mixed_rand", 2), ("only_bg_t", 3)):
        for name in CLASSES[:1] if variant == "only_bg_t" else CLASSES:
            folder = root / variant / "val" / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f"{name}_{i}.png"), image)
                if variant == "original" and masks:
                    (root / "fg_mask" / "val" / name).mkdir(parents=True, exist_ok=True)
                    mask = rng.random((size, size)) < 0.5
                    np.save(root / "fg_mask" / "val" / name / f"{name}_{i}", mask)
    return root


def test_variants_are_splits_and_masks_are_none(tmp_path):
    assert in9.variants(write(tmp_path)) == ("mixed_rand", "only_bg_t", "original")
    source = in9.open(tmp_path, "mixed_rand")
    assert source.classes == CLASSES and source.labels.tolist() == [0, 0, 1, 1]
    assert len(in9.open(tmp_path, "test")) == 4
    with pytest.raises(errors.DataError, match="no split 'mixed_same'"):
        in9.open(tmp_path, "mixed_same")


def test_every_foreground_meets_every_background(tmp_path):
    write(tmp_path)
    source = in9.challenge(tmp_path, 99)
    assert len(source) == 4 * 3 and source.labels.tolist() == [0] * 6 + [1] * 6
    front, back = in9.open(tmp_path, "original"), in9.open(tmp_path, "only_bg_t")
    mask = np.load(tmp_path / "fg_mask/val/01_bird/01_bird_0.npy")
    image = source[2 * 3 + 1]["image"]
    np.testing.assert_array_equal(image[mask], front[2]["image"][mask])
    np.testing.assert_array_equal(image[~mask], back[1]["image"][~mask])
    assert in9.challenge(tmp_path, 2).chosen.tolist() == [0, 2]


def test_missing_masks_and_other_sizes_are_refused(tmp_path):
    write(tmp_path / "a", masks=False)
    with pytest.raises(errors.DataError, match="4 of 4 foregrounds have no mask"):
        in9.challenge(tmp_path / "a", 2)
    write(tmp_path / "b")
    np.save(tmp_path / "b/fg_mask/val/00_dog/00_dog_0.npy", np.ones((4, 4)))
    with pytest.raises(errors.DataError, match="differ in size"):
        in9.challenge(tmp_path / "b", 2)[0]
    with pytest.raises(errors.DataError, match="no variant"):
        (tmp_path / "c").mkdir()
        in9.variants(tmp_path / "c")
