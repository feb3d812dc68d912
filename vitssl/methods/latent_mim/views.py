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

from vitssl import errors
from vitssl.data import geometry, modalities, resample, samples, states
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
    scale: tuple[float, float] = (0.2, 1.0)
    views: int = 2

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.views not in (1, 2):
            yield f"views={self.views}: 1 or 2"
        low, high = self.scale
        if not 0 < low <= high <= 1:
            yield f"scale={self.scale}: 0 < smallest <= largest <= 1"

    def which(self, rng) -> int:
        """Return the number of a random turn of `shapes.TURNS`."""
        if self.turns == "none":
            return 0
        if self.turns == "flip":
            return 4 * int(rng.integers(2))
        return int(rng.integers(len(shapes.TURNS)))


@dataclasses.dataclass(frozen=True)
class Training:
    """The training transform.

    Attributes:
        kinds: modalities of a sample, in order.
        sampling, strategy, augment: config sections.
        patches, output: processed patch sizes to choose from, and the output's; see
            `shapes.draw`.
        mean, std: of "rgb".
    """

    kinds: tuple[Modality, ...]
    sampling: shapes.Sampling
    strategy: field_masks.Strategy
    augment: Augment
    patches: tuple[int, ...]
    output: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return a training row; see the module.

        Raises:
            DataError: the sample lacks a modality, or is smaller than the crop.
        """
        step = int(example.get("step", 0))
        shape = shapes.draw(self.sampling, self.kinds, step, self.patches, self.output)
        crop = self._crop(example, shape, rng)
        crop = samples.normalise(crop, self.mean, self.std)
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
        starts = samples.valid_starts(
            example["present"], shape.times, example["length"]
        )
        start = int(starts[rng.integers(len(starts))])
        rows, columns = shapes.spatial(rng, shape, side, self.sampling.cutmix)
        return samples.subset(example, names, start, shape.times, rows, columns)

    def _picture(self, example, shape, rng):
        image, size = example["image"], (shape.side * shape.p,) * 2
        box = geometry.draw_box(rng, image.shape[:2], self.augment.scale)
        image = resample.resize(image, size, box, "bicubic")
        return _of_picture(image)

    def _view(self, crop, shape, rng, step, v):
        """Return the arrays and masks of one view."""
        turn = self.augment.which(rng)
        out, gone = {}, {}
        for kind in self.kinds:
            x = crop[kind.name]
            x = shapes.turn(x, turn) if kind.space else x
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
    """The evaluation transform: the centre of a sample, nothing random.

    Attributes:
        kinds: modalities that are read.
        size: side in 10 m pixels.
        times: most time steps, spread over those that are there.
        mean, std: of "rgb".
        truth: column of the example that holds a class per pixel [H, W], or "".
    """

    kinds: tuple[Modality, ...]
    size: int
    times: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    truth: str = "cover"

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
            if self.truth in example:
                out["truth"] = example[self.truth][at][:, at].astype(np.int32)
        crop = samples.normalise(crop, self.mean, self.std)
        out |= {f"image/{name}": np.asarray(x) for name, x in crop.items()}
        return out | _numbers(example)

    def _centre(self, example, at):
        """Return the centre of a sample at `times` of its steps."""
        names = [k.name for k in self.kinds]
        crop = samples.subset(example, names, 0, modalities.TIMES, at, at)
        steps = spread(example["length"], self.times)
        crop["timestamps"] = crop["timestamps"][steps]
        for kind in self.kinds:
            if kind.time:
                crop[kind.name] = np.take(crop[kind.name], steps, axis=-2)
        return crop


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
