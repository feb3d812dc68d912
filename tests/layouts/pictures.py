"""Pictures that tell what they are: a bright thing of its class's colour."""

import typing

import cv2
import numpy as np

SIZE = (40, 56)  # Not square, so that exchanged axes show.
LAND, WATER = (0, 60, 0), (0, 0, 60)
COLOURS = np.array(
    [
        (250, 20, 20),
        (20, 250, 20),
        (20, 20, 250),
        (250, 250, 20),
        (250, 20, 250),
        (20, 250, 250),
        (250, 250, 250),
        (250, 130, 20),
        (130, 20, 250),
        (20, 250, 130),
    ],
    np.uint8,
)


class Picture(typing.NamedTuple):
    """A thing before noise.

    Attributes:
        image: uint8 [H, W, 3].
        mask: uint8 [H, W], 255 on the thing.
        box: x, y, width, height of the thing.
    """

    image: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]


def thing(label, number, *, size=SIZE, place=(0, 0, 0)):
    """Return a picture, a pure function of the arguments.

    Args:
        label: chooses the colour.
        number: chooses where the thing is, and the noise behind it (below 60).
        size: H, W.
        place: colour added to the background.
    """
    height, width = size
    h, w = height * 2 // 5, width * 2 // 7
    y, x = number * 3 % (height - h + 1), number * 5 % (width - w + 1)
    rng = np.random.default_rng((label, number))
    image = rng.integers(0, 60, (*size, 3), np.uint8) + np.array(place, np.uint8)
    image[y : y + h, x : x + w] = COLOURS[label % len(COLOURS)]
    mask = np.zeros(size, np.uint8)
    mask[y : y + h, x : x + w] = 255
    return Picture(image, mask, (x, y, w, h))


def label_of(image):
    """Return the label modulo 10 whose colour the thing in an image has."""
    colours = COLOURS.astype(int)
    pixels = image[image.max(-1) > 160][:, None].astype(int)  # [n, 1, 3]
    nearest = np.abs(pixels - colours).sum(-1).argmin(-1)
    return int(np.bincount(nearest).argmax())


def save(path, image):
    """Write an image [H, W, 3] or [H, W] in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.ndim == 3:
        image = image[..., ::-1]  # OpenCV wants blue first.
    # Without subsampled colours, so that the borders of the thing stay sharp.
    jpeg = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111)
    options = () if path.suffix.lower() == ".png" else jpeg
    coded, data = cv2.imencode(path.suffix, image, options)
    assert coded
    path.write_bytes(data.tobytes())


def text(path, lines):
    """Write a text file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
