"""An image with what is known of it: resized, cropped, mirrored and warped together.

A frame is a dict of "image" uint8 [H, W, C] and any of: "mask" uint8 [H, W]; "parts"
uint8 [H, W], a part number per pixel, 0 the background; "keypoints" float32 [P, 3] as
(x, y, visible) in pixels; "box" float32 [4] as (x, y, width, height); "swap_same" and
"swap_random", the image before other backgrounds. Nothing is changed in place.
"""

import cv2
import numpy as np

from vitssl.data import resample

IMAGES = ("image", "swap_same", "swap_random")
LABELS = ("mask", "parts")


def _each(frame, images, labels):
    """Return the frame with functions applied to its images and its label maps."""
    out = dict(frame)
    for keys, function in ((IMAGES, images), (LABELS, labels)):
        for key in keys:
            if key in frame:
                out[key] = function(frame[key])
    return out


def resize(frame, size, interpolation="bilinear", scale=None):
    """Resize to size = (height, width); label maps take the nearest pixel.

    Args:
        frame: see the module.
        size: of the result.
        interpolation: "bilinear", "bicubic" (PIL's) or "plain" (OpenCV's bilinear).
        scale: of the coordinates, (y, x); None = new size over old.
    """
    old = frame["image"].shape[:2]
    if tuple(old) == tuple(size):
        return dict(frame)

    def picture(image):
        if interpolation == "plain":  # OpenCV's bilinear, without antialiasing.
            resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
            return resized.reshape(*size, image.shape[-1])
        return resample.resize(image, size, None, interpolation)

    at = 0.0 if interpolation == "plain" else 0.5  # OpenCV reads at the corner.
    out = _each(frame, picture, lambda m: _nearest(m, size, at))
    sy, sx = scale or (size[0] / old[0], size[1] / old[1])
    return _points(out, lambda xy: xy * (sx, sy), lambda b: b * (sx, sy, sx, sy))


def resize_short(frame, side, interpolation="bilinear"):
    """Resize so that the shorter side is `side`; the longer one is cut to an integer.

    Coordinates are scaled alike in both directions, by side / shorter side.
    """
    rows, columns = frame["image"].shape[:2]
    short = min(rows, columns)
    size = max(side, side * rows // short), max(side, side * columns // short)
    return resize(frame, size, interpolation, (side / short,) * 2)


def crop(frame, top, left, side):
    """Cut out [side, side] pixels.

    Keypoints that leave it become invisible and are moved to its border; invisible
    ones are left alone. A box is shifted and its corner kept inside, its size stays.
    """
    rows, columns = slice(top, top + side), slice(left, left + side)
    cut = lambda x: np.ascontiguousarray(x[rows, columns])  # noqa: E731
    out = _each(frame, cut, cut)
    if "keypoints" in frame:
        points = frame["keypoints"].astype(np.float32)
        moved = points[:, :2] - (left, top)
        kept = np.clip(moved, 0, side)
        visible = points[:, 2] > 0
        inside = visible & (moved == kept).all(-1)
        xy = np.where(visible[:, None], kept, points[:, :2])
        flag = np.where(visible, inside, points[:, 2])
        out["keypoints"] = np.column_stack([xy, flag]).astype(np.float32)
    if "box" in frame:
        corner = np.clip(frame["box"][:2] - (left, top), 0, side)
        out["box"] = np.append(corner, frame["box"][2:]).astype(np.float32)
    return out


def centre_crop(frame, side):
    """Cut out the central [side, side]; half a pixel is rounded to even."""
    top, left = (round((n - side) / 2) for n in frame["image"].shape[:2])
    return crop(frame, top, left, side)


def mirror(frame):
    """Flip left and right."""
    width = frame["image"].shape[1]
    flip = lambda x: np.ascontiguousarray(x[:, ::-1])  # noqa: E731
    out = _each(frame, flip, flip)
    return _points(
        out,
        lambda xy: np.column_stack([width - xy[:, 0], xy[:, 1]]),
        lambda b: np.array([width - b[0] - b[2], *b[1:]]),
    )


def upend(frame):
    """Flip top and bottom."""
    height = frame["image"].shape[0]
    flip = lambda x: np.ascontiguousarray(x[::-1])  # noqa: E731
    out = _each(frame, flip, flip)
    return _points(
        out,
        lambda xy: np.column_stack([xy[:, 0], height - xy[:, 1]]),
        lambda b: np.array([b[0], height - b[1] - b[3], *b[2:]]),
    )


def affine(frame, angle, translate, scale):
    """Turn by degrees, shift by whole pixels (x, y) and scale, about the centre.

    Nearest sampling, 0 outside. Boxes and keypoints are dropped: nothing trains on
    them.

    Source: torchvision.transforms.RandomAffine on PIL images.
    """
    height, width = frame["image"].shape[:2]
    matrix = inverse_matrix((height, width), angle, translate, scale)
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP

    def warp(x):
        y = cv2.warpAffine(x, matrix, (width, height), flags=flags)
        return y.reshape(x.shape)

    out = _each(frame, warp, warp)
    return {k: v for k, v in out.items() if k not in ("keypoints", "box")}


def inverse_matrix(size, angle, translate, scale):
    """Return the [2, 3] map from output (x, y, 1) to input pixels; see `affine`."""
    cy, cx = (size[0] - 1) / 2, (size[1] - 1) / 2
    a = np.deg2rad(angle)
    c, s = np.cos(a) / scale, np.sin(a) / scale
    tx, ty = cx + translate[0], cy + translate[1]
    return np.array([[c, s, cx - c * tx - s * ty], [-s, c, cy + s * tx - c * ty]])


def _points(frame, move, move_box):
    """Return the frame with its coordinates moved."""
    if "keypoints" in frame:
        points = frame["keypoints"]
        xy = move(points[:, :2])
        frame["keypoints"] = np.column_stack([xy, points[:, 2]]).astype(np.float32)
    if "box" in frame:
        frame["box"] = np.asarray(move_box(frame["box"]), np.float32)
    return frame


def _nearest(labels, size, at):
    """Resize a label map: pixel i reads floor((i + at) old / new)."""
    rows, columns = (
        ((np.arange(n) + at) * old / n).astype(int)
        for n, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]
