"""Large photographs are decoded at a part of their size, and their crops stay."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from vitssl import errors
from vitssl.data import crops, decode, geometry, pipeline, reduced, sources, views
from vitssl.data.sources import wrappers
from vitssl.tools import pack

SIZE = (1205, 1603)  # No multiple of 8, nor of 2: the last pixels are of parts.


@pytest.fixture(scope="module")
def photograph():
    """Two photographs, one enlarged and one as fine as it is: uint8 [*SIZE, 3]."""
    coarse, fine = datasets.load_sample_images().images
    coarse = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    fine = np.tile(fine, (3, 3, 1))[: SIZE[0], : SIZE[1]]
    return cv2.addWeighted(coarse, 0.6, fine, 0.4, 0)


def _jpeg(image, orientation=1, **options):
    out, exif = io.BytesIO(), Image.Exif()
    exif[decode.ORIENTATION] = orientation
    given = dict(exif=exif) if orientation > 1 else {}
    Image.fromarray(image).save(out, "JPEG", quality=90, **given, **options)
    return out.getvalue()


VIEWS = {
    "evaluate": views.Evaluate(96),
    "long": views.Evaluate((48, 96), 1.0, "bilinear"),
    "warp": views.Warp((64, 128)),
    "single": views.SingleCrop(64, (0.2, 1.0)),
    "supervised": views.Supervised((48, 64), (0.3, 1.0), interpolation="fast"),
    "clipped": views.Supervised(64, (0.2, 1.0), crop="clipped"),
    "crops": crops.MultiCrop(
        num_global_crops=2,
        num_local_crops=2,
        global_crop_size=64,
        local_crop_size=32,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.1, 0.4),
        global_color_jitter=0.0,
        local_color_jitter=0.0,
        color_jitter_prob=0.0,
        horizontal_flip_prob=0.5,
        interpolation="bicubic",
        colour="host",
    ),
}
VIEWS["fast"] = dataclasses.replace(VIEWS["crops"], interpolation="fast")
PIXELS = ("image", "global", "local")


def _both(data, view, channels=3, seed=0):
    """Return the view of the whole image, and of the one that is decoded for it."""
    whole = decode.decode(data, channels=channels)
    part = decode.decode(data, channels=channels, reduction=view.reduction)
    assert isinstance(part, reduced.Reduced) and part.shape == whole.shape
    assert part.pixels.nbytes * 3 < whole.nbytes
    return [view({"image": x}, np.random.default_rng(seed)) for x in (whole, part)]


def _close(ours, theirs):
    """Compare two views; their pixels within what filters differ by.

    PIL's bicubic and Lanczos filters, both antialiased and both right, differ by 0.9
    levels in the mean on this photograph and by up to 8. A crop of a photograph that
    was decoded for it may differ by no more than one right filter from another.
    """
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key not in PIXELS:  # Boxes are the same boxes.
            np.testing.assert_array_equal(ours[key], theirs[key])
            continue
        away = np.abs(ours[key].astype(int) - theirs[key])
        assert away.mean() < 0.8 and away.max() <= 8, (key, away.mean(), away.max())


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_that_of_the_whole_photograph(photograph, name):
    _close(*_both(_jpeg(photograph), VIEWS[name]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fast", [True, False])
def test_it_may_be_turned(photograph, orientation, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    data = _jpeg(photograph, orientation, progressive=not fast)
    for channels in (3, 1):
        _close(*_both(data, VIEWS["long"], channels))


def test_filters_differ_by_more_than_the_tolerance(photograph):
    picture = Image.fromarray(photograph)
    bicubic, lanczos = (
        np.asarray(picture.resize((100, 100), how)).astype(int)
        for how in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    )
    away = np.abs(bicubic - lanczos)
    assert away.mean() > 0.8 and away.max() >= 8


@pytest.mark.parametrize("shape", [64, (48, 96)])
@pytest.mark.parametrize("size", [SIZE, (4000, 300), (300, 4000), (600, 1900)])
def test_no_crop_is_resized_from_less_than_what_is_said(size, shape):
    rng, ratio = np.random.default_rng(0), geometry.shaped(shape)
    sides = np.broadcast_to(shape, 2)
    for scale in ((0.05, 0.4), (0.4, 1.0), (1.0, 1.0)):
        least = geometry.reduction(size, scale, shape)
        boxes = [geometry.draw_box(rng, size, scale, ratio) for _ in range(300)]
        boxes += [geometry.clipped_box(rng, size, scale, ratio) for _ in range(300)]
        have = min((np.array(box[2:]) / sides).min() for box in boxes)
        assert least <= have + 0.5 / sides.min()
        # It is no idle bound either.
        assert have < 1.5 * least
    assert reduced.factor(lambda size: 3.39, SIZE) == 1
    assert [reduced.factor(lambda size, n=n: n, SIZE) for n in (3.4, 6.8, 99)] == [
        2,
        4,
        8,
    ]
    assert reduced.factor(lambda size: 99.0, (1000, 1000)) == 1
    assert reduced.factor(None, SIZE) == 1


def test_other_files_and_damage_are_as_ever(photograph, monkeypatch):
    how = VIEWS["evaluate"].reduction
    small = _jpeg(photograph[:300, :300])
    assert isinstance(decode.decode(small, channels=3, reduction=how), np.ndarray)
    png = cv2.imencode(".png", photograph)[1].tobytes()
    assert isinstance(decode.decode(png, channels=3, reduction=how), np.ndarray)
    data = _jpeg(photograph)
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(decode, "simplejpeg", None)
        with pytest.raises(errors.DataError, match="cannot be decoded"):
            decode.decode(data[: len(data) // 2], channels=3, reduction=how)


def test_batches_are_made_so_whatever_the_files_lie_in(
    photograph, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(6):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg(np.roll(photograph, 300 * i, 1)))
    for form in pack.FORMS:
        pack.run(tmp_path / "in", tmp_path / form, form=form, show=lambda line: None)
    factors, real = [], reduced.factor
    watched = lambda *given: factors.append(real(*given)) or factors[-1]  # noqa: E731
    monkeypatch.setattr(reduced, "factor", watched)
    view, found = views.SingleCrop(32), []
    for kind, root in (("folder", "in"), *((form, form) for form in pack.FORMS)):
        files = sources.open(kind, str(tmp_path / root), "train")
        assert files.image(0).shape == (*SIZE, 3)  # Who asks for it gets it whole.
        part = wrappers.Subset(files, np.arange(4))
        with pipeline.train(part, view, batch_size=4, seed=0, threads=0) as batches:
            found.append(batches.load(0))
        assert factors.pop(0) == 1 and factors == [8] * 4
        factors.clear()
    for other in found[1:]:
        np.testing.assert_array_equal(found[0]["global"], other["global"])
    masks = wrappers.WithColumns(files, masks=("",) * 4)
    assert masks.reduced(view.reduction) is masks  # It goes by pixels.
