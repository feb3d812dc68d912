"""From a sample of several sensors to what a step or an evaluation gets of it.

A training row holds `views` of one crop, each turned and masked by itself:

    "view/<modality>"       float32 [V, H, W, T, C], normalised, 0 where missing
    "view/<modality>_mask"  int8 [V, h, w, T, S] on the grid of processed patches
    "timestamps"            int32 [T, 3] (day, month 0-11, year)

An evaluation row has "image/<modality>", with `modalities.MISSING` where there is
nothing, and "image/timestamps". An ordinary picture is a sample with the one modality
"rgb" and one time step.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from vitssl import errors, ranges
from vitssl.data import geometry, modalities, resample, states
from vitssl.data import views as plain_views
from vitssl.data.modalities import Modality
from vitssl.methods.latent_mim import masks as field_masks
from vitssl.methods.latent_mim import shapes

# Purposes of the random numbers that a whole batch shares.
_COIN = 1


@dataclasses.dataclass(frozen=True)
class Augment:
    """Config section `augment`.

    Attributes:
        turns: "dihedral": each view is turned or mirrored in one of eight ways;
            "flip": mirrored left to right or not; "none".
        scale: of "rgb" alone: smallest and largest share of a picture's area that is
            cropped and resized.
        views: of each crop.
    """

    turns: Literal["dihedral", "flip", "none"] = "dihedral"
    scale: tuple[ranges.Share, ranges.Share] = (0.2, 1.0)
    views: Literal[1, 2] = 2

    def check(self) -> Iterator[str]:
        """Yield that the scale is upside down."""
        yield from ranges.in_order(self, "scale")

    def which(self, rng) -> int:
        """Return the number of a random turn of `TURNS`."""
        if self.turns == "none":
            return 0
        if self.turns == "flip":
            return 4 * int(rng.integers(2))
        return int(rng.integers(len(TURNS)))


@dataclasses.dataclass(frozen=True)
class Training:
    """The training transform."""

    kinds: tuple[Modality, ...]
    sampling: shapes.Sampling
    strategy: field_masks.Strategy
    augment: Augment
    patches: tuple[int, ...]  # Processed, to choose from; see `shapes.draw`.
    output: int  # Patch of the output.
    mean: tuple[float, ...] = ()  # Of "rgb".
    std: tuple[float, ...] = ()

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return a training row; see the module.

        Raises:
            DataError: the sample lacks a modality, or is smaller than the crop.
        """
        step = int(example.get("step", 0))
        shape = shapes.draw(self.sampling, self.kinds, step, self.patches, self.output)
        crop = self._crop(example, shape, rng)
        crop = normalise(crop, self.mean, self.std)
        rows = [
            self._view(crop, shape, rng, step, v) for v in range(self.augment.views)
        ]
        row = {f"view/{key}": np.stack([r[key] for r in rows]) for key in rows[0]}
        return row | {"timestamps": crop["timestamps"]} | _numbers(example)

    def _crop(self, example, shape, rng):
        """Return the modalities of a random crop, in their own units."""
        names = [k.name for k in self.kinds]
        if names == ["rgb"]:
            return self._picture(example, shape, rng)
        side = _side(example, self.kinds)
        starts = valid_starts(example["present"], shape.times, example["length"])
        start = int(starts[rng.integers(len(starts))])
        rows, columns = spatial(rng, shape, side, self.sampling.cutmix)
        return subset(example, names, start, shape.times, rows, columns)

    def _picture(self, example, shape, rng):
        image, size = example["image"], (shape.side * shape.p,) * 2
        box = geometry.draw_box(rng, image.shape[:2], self.augment.scale)
        image = resample.resize(image, size, box, "bicubic")
        return _of_picture(image)

    def _view(self, crop, shape, rng, step, v):
        """Return the arrays and masks of one view."""
        which = self.augment.which(rng)
        out, gone = {}, {}
        for kind in self.kinds:
            x = crop[kind.name]
            x = turn(x, which) if kind.space else x
            missing = states.missing(kind, x)
            whole = self.strategy.whole_patch
            gone[kind.name] = states.per_patch(kind, missing, shape.p, whole)
            out[kind.name] = np.where(x == modalities.MISSING, np.float32(0), x)
        shared = np.random.default_rng((self.sampling.seed, step, v, _COIN))
        coin = shared.random()
        masks = field_masks.draw(
            self.strategy, self.kinds, gone, rng, coin=coin, step=step
        )
        return out | {f"{name}_mask": mask for name, mask in masks.items()}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation transform: the centre of a sample, nothing random."""

    kinds: tuple[Modality, ...]
    size: int  # Side in 10 m pixels.
    times: int  # At most, spread over those that are there.
    mean: tuple[float, ...] = ()  # Of "rgb".
    std: tuple[float, ...] = ()
    truth: str = "cover"  # Column of the example: a class per pixel [H, W].

    def __call__(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        """Return an evaluation row; see the module.

        Raises:
            DataError: the sample lacks a modality, or is smaller than `size`.
        """
        del rng
        out = {}
        if [k.name for k in self.kinds] == ["rgb"]:
            view = plain_views.Evaluate(self.size, ratio=1.0)
            crop = _of_picture(view(example)["image"])
        else:
            side = _side(example, self.kinds)
            if side < self.size:
                raise errors.DataError(
                    f"evals.image_size={self.size}: a sample has {side} pixels a side"
                )
            at = (side - self.size) // 2 + np.arange(self.size)
            crop = self._centre(example, at)
            check_whole(crop, self.kinds)
            if self.truth in example:
                out["truth"] = example[self.truth][at][:, at].astype(np.int32)
        crop = normalise(crop, self.mean, self.std)
        out |= {f"image/{name}": np.asarray(x) for name, x in crop.items()}
        return out | _numbers(example)

    def _centre(self, example, at):
        """Return the centre of a sample at `times` of its steps."""
        names = [k.name for k in self.kinds]
        crop = subset(example, names, 0, modalities.TIMES, at, at)
        steps = spread(example["length"], self.times)
        crop["timestamps"] = crop["timestamps"][steps]
        for kind in self.kinds:
            if kind.time:
                crop[kind.name] = np.take(crop[kind.name], steps, axis=-2)
        return crop


def check_whole(crop: dict, kinds) -> None:
    """Refuse a sample whose every bandset lacks a band: nothing of it would be read.

    Raises:
        DataError: with the bands that are missing.
    """
    lacking = []
    for kind in kinds:
        x = crop[kind.name]
        there = (x != modalities.MISSING).any(tuple(range(x.ndim - 1)))
        if any(there[list(group)].all() for group in kind.channels):
            return
        gone = [b for b, here in zip(kind.bands, there, strict=True) if not here]
        lacking += [f"{kind.name} lacks {', '.join(gone)}"] * bool(there.any())
    if lacking:
        raise errors.DataError(
            f"{'; '.join(lacking)}: every bandset misses a band, so that the network "
            "reads nothing of the sample; data.options.impute=True fills what has a "
            "neighbour, inputs.groups names other bandsets"
        )


def spread(length: int, times: int) -> np.ndarray:
    """Return `times` steps evenly over `length`; with fewer the last is repeated."""
    if length < times:
        return np.minimum(np.arange(times), length - 1)
    return np.arange(times) * length // times


def _of_picture(image):
    """Return a picture uint8 [H, W, 3] as a sample."""
    stamps = np.zeros((1, 3), np.int32)
    return {"rgb": image[:, :, None], "timestamps": stamps}


def _side(example, kinds) -> int:
    """Return the side of a sample in 10 m pixels.

    Raises:
        DataError: it lacks a modality.
    """
    lacking = [k.name for k in kinds if k.name not in example]
    if lacking or "timestamps" not in example:
        has = [n for n in example if n in modalities.MODALITIES] or sorted(example)
        raise errors.DataError(
            f"a sample lacks {', '.join(lacking) or 'timestamps'}; it has: "
            f"{', '.join(has)}; data.options.modalities must hold those of the run"
        )
    kind = next(k for k in kinds if k.space)
    return example[kind.name].shape[0] // kind.factor


def _numbers(example):
    return {key: np.int32(example.get(key, -1)) for key in ("label", "index")}


# Crops.


def valid_starts(masks, times: int, length: int) -> np.ndarray:  # int [n >= 1]
    """Return the steps at which a crop of `times` steps may start.

    Args:
        masks: {modality: bool [at least length]}, True where a step is there; {} if
            that is not known.
        length: steps of the sample before padding; no longer than the crop: only 0.
    """
    if length <= times:
        return np.zeros(1, int)
    starts = np.arange(length - times + 1)
    if not masks:
        return starts
    any_there = np.any([np.asarray(m)[: len(starts)] for m in masks.values()], axis=0)
    return starts[any_there] if any_there.any() else starts


def subset(sample: dict, names, start: int, times: int, rows, columns) -> dict:
    """Return a crop of some modalities of a sample, in time and space.

    `rows` and `columns` are the 10 m pixels int [n] to keep, in order.
    """
    out = {"timestamps": sample["timestamps"][start : start + times]}
    for name in names:
        kind, x = modalities.find(name), sample[name]
        if kind.time:
            x = x[..., start : start + times, :]
        if kind.space:
            x = x[_fine(rows, kind.factor)][:, _fine(columns, kind.factor)]
        out[name] = x
    return out


def _fine(pixels, factor: int) -> np.ndarray:
    """Return the pixels of a finer grid that lie in 10 m pixels [n]: [n factor]."""
    pixels = np.asarray(pixels)
    return (pixels[:, None] * factor + np.arange(factor)).reshape(-1)


def normalise(sample: dict, mean=(), std=()) -> dict:
    """Return the sample, every modality normalised in float32.

    `mean` and `std` are those of "rgb", in units of [0, 1].
    """
    out = dict(sample)
    for name, x in sample.items():
        if name == "rgb":
            scaled = np.asarray(x, np.float32) / 255
            out[name] = (scaled - np.float32(mean)) / np.float32(std)
        elif name in modalities.MODALITIES:
            out[name] = modalities.normalise(name, x)
    return out


def spatial(rng, shape: shapes.Shape, tile: int, cutmix: bool):
    """Return (rows, columns): the 10 m pixels [side p] that a crop of a tile keeps.

    Source: allenai/olmoearth_pretrain@5411573 olmoearth_pretrain/data/dataset.py
    (OlmoEarthSample.subset).

    Raises:
        DataError: the sample is smaller than the crop.
    """
    size = shape.side * shape.p
    if size > tile:
        raise errors.DataError(
            f"a sample of {tile} x {tile} pixels holds no crop of {size}; set "
            f"sampling.tile={tile}"
        )
    if not cutmix:
        at = rng.integers(0, tile - size + 1, 2)
        return tuple(int(a) + np.arange(size) for a in at)
    count = tile // shape.p
    chosen = [np.sort(rng.permutation(count)[: shape.side]) for _ in range(2)]
    return tuple((c[:, None] * shape.p + np.arange(shape.p)).ravel() for c in chosen)


TURNS = (  # The eight ways to lay a square on itself: (quarter turns, then a flip).
    ("no_transform", 0, ""),
    ("rotate_90", 1, ""),
    ("rotate_180", 2, ""),
    ("rotate_270", 3, ""),
    ("hflip", 0, "h"),
    ("vflip", 0, "v"),
    ("hflip_rotate_90", 1, "h"),
    ("vflip_rotate_90", 1, "v"),
)


def turn(x: np.ndarray, which: int) -> np.ndarray:
    """Return an array [H, W, ...] turned or mirrored, by number of `TURNS`.

    Quarter turns are counter-clockwise, with row 0 on top.
    """
    _, quarters, flip = TURNS[which]
    x = np.rot90(x, quarters, axes=(0, 1))
    return {"": x, "h": x[:, ::-1], "v": x[::-1]}[flip]
