"""The section `data`: what a source is opened with."""

import numpy as np
import pytest
from PIL import Image

from vitssl import errors
from vitssl.data import dataset


def _data(source, root, channels, **options):
    half = (0.5,) * channels
    splits = ("train", "train", "test")
    return dataset.Data(source, str(root), *splits, channels, half, half, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_read_with_the_channels_of_the_config(channels, tmp_path):
    for i in range(4):
        pixels = np.full((8, 8, 3), (200, 100, 0), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    source = _data("folder", tmp_path, channels).open("train")
    image = source[0]["image"]
    assert image.shape == (8, 8, channels)
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    want = [118] if channels == 1 else [200, 100, 0]
    np.testing.assert_allclose(image[0, 0], want, atol=1)


def test_a_source_of_other_channels_says_what_to_set():
    with pytest.raises(errors.UsageError, match="birds has 3; set data.channels"):
        _data("birds", "", 1).open("train")


def test_an_option_wins_over_the_section(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    wrong = _data("folder", tmp_path, 1, options={"channels": 3})
    with pytest.raises(errors.UsageError, match="data.channels=1: folder has 3"):
        wrong.open("all")
