"""Multi-crop: several random crops of one image at two sizes.

Sources: SwAV (arXiv:2006.09882) for multi-crop, H-JEPA (jonwiggins/H-JEPA
src/data/multicrop_transforms.py) for the defaults.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Literal

import cv2
import numpy as np

from vitssl import ranges
from vitssl.data import colour, geometry, resample, views

# At 5 the hue goes all the way round.
Jitter = Annotated[float, ranges.Range(0, 5)]


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """The section `multicrop` of a config: how many crops, how large, how coloured.

    Called with an example and a numpy Generator, from which all randomness comes, it is
    the transform that makes them. Changing the number of local crops changes no global
    crop.

    Attributes:
        num_global_crops, num_local_crops: G and L of an image.
        global_crop_size, local_crop_size: side of a crop, in pixels.
        global_crop_scale, local_crop_scale: smallest and largest share of the image's
            area that a crop covers.
        global_color_jitter, local_color_jitter: strength of the colour jitter; 0 is
            off, 1 is brightness and contrast 0.4, saturation 0.2, hue 0.1.
        color_jitter_prob: probability that a crop is jittered at all.
        horizontal_flip_prob: probability that a crop is mirrored.
        interpolation: `bicubic`: PIL's, with antialias. `fast`: within half a grey
            level of it in the mean, four times as fast (see `resample`).
        colour: `host`: colours are changed by OpenCV, here. `device`: the crops leave
            here unchanged, and the method calls `vitssl.ops.jitter` with `recipe`.
        grayscale_prob: probability that a crop loses its colour.
        blur_prob: probability of Gaussian blur for (global crop 0, other global
            crops, local crops).
        solarize_prob: probability of solarisation, for global crop 1 only.
        adaptive: let the number of local crops grow with the epoch, from
            min_local_crops to max_local_crops at adaptive_warmup_epochs;
            num_local_crops is not used.
    """

    num_global_crops: ranges.Count = 2
    num_local_crops: ranges.OrNone = 6
    global_crop_size: ranges.Count = 224
    local_crop_size: ranges.Count = 96
    global_crop_scale: tuple[ranges.Share, ranges.Share] = (0.4, 1.0)
    local_crop_scale: tuple[ranges.Share, ranges.Share] = (0.05, 0.4)
    global_color_jitter: Jitter = 0.4
    local_color_jitter: Jitter = 0.4
    color_jitter_prob: ranges.Probability = 1.0
    horizontal_flip_prob: ranges.Probability = 0.5
    interpolation: Literal["bicubic", "fast"] = "bicubic"
    colour: Literal["host", "device"] = "host"
    grayscale_prob: ranges.Probability = 0.0
    blur_prob: tuple[(ranges.Probability,) * 3] = (0.0, 0.0, 0.0)
    solarize_prob: ranges.Probability = 0.0
    adaptive: bool = False
    min_local_crops: ranges.OrNone = 2
    max_local_crops: ranges.OrNone = 10
    adaptive_warmup_epochs: ranges.OrNone = 0

    def check(self) -> Iterator[str]:
        """Yield one line per combination that is impossible."""
        yield from ranges.in_order(self, "global_crop_scale", "local_crop_scale")
        if self.adaptive and self.min_local_crops > self.max_local_crops:
            most = self.max_local_crops
            yield f"min_local_crops={self.min_local_crops}: 0 to max_local_crops={most}"
        elif self.adaptive and not self.adaptive_warmup_epochs:
            yield (
                "adaptive_warmup_epochs=0: adaptive=True never leaves min_local_crops="
                f"{self.min_local_crops}; give the epoch of max_local_crops"
            )

    def faults(self, model, *, local=True) -> Iterator[str]:
        """Yield one line per kind of crop that does not fit a backbone.

        Args:
            model: see `models.Backbone`.
            local: whether local crops are used, if there are any.
        """
        kinds = ["global"] + ["local"] * (local and self.locals_at(10**9) > 0)
        for kind in kinds:
            size = getattr(self, f"{kind}_crop_size")
            for fault in model.check_image(size):
                yield f"multicrop.{kind}_crop_size={size}: {fault}"

    def locals_at(self, epoch: int) -> int:
        """Return the number of local crops of an epoch (0-based)."""
        if not self.adaptive:
            return self.num_local_crops
        low, high = self.min_local_crops, self.max_local_crops
        if not self.adaptive_warmup_epochs:
            return low  # As the original does; `check` refuses it.
        return int(low + (high - low) * min(1.0, epoch / self.adaptive_warmup_epochs))

    def grid(self, kind: Literal["global", "local"], patch: int) -> tuple[int, int]:
        """Return (h, w) of a crop in patches."""
        side = getattr(self, f"{kind}_crop_size") // patch
        return side, side

    def recipe(self, kind: Literal["global", "local"], index: int) -> dict:
        """Return the colour settings of one crop: keywords of `colour.augment`.

        `vitssl.ops.jitter.augment` takes the same ones.
        """
        first, others, local = self.blur_prob
        near = kind == "global"
        return dict(
            strength=self.global_color_jitter if near else self.local_color_jitter,
            prob=self.color_jitter_prob,
            grayscale_prob=self.grayscale_prob,
            blur_prob=(others if index else first) if near else local,
            solarize_prob=self.solarize_prob if near and index == 1 else 0.0,
        )

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return the crops of an image, to be stacked into a batch; see `draw`."""
        return self.draw(example, rng)[0]

    def draw(self, example: dict, rng) -> tuple[dict, np.random.Generator]:
        """Return the crops of an image, and a stream for what else is drawn of it.

        Args:
            example: image uint8 [H, W, C], label, index, and `epoch`, which sets the
                number of local crops if it is adaptive: it must be the same for all
                examples of a batch.
            rng: numpy Generator.

        Returns:
            dict: global uint8 [G, s, s, C], local uint8 [L, l, l, C], global_box and
            local_box float32 [G or L, 5] of `geometry.relative`, label, index int32 [].
            Keys of a kind with no crops are absent.
        """
        other, local = (
            np.random.Generator(np.random.PCG64(seed))
            for seed in rng.integers(2**63, size=2).tolist()
        )
        out = views.labels(example)
        for kind, stream in (("global", rng), ("local", local)):
            if count := self.counts(example)[kind == "local"]:
                out |= self._kind(kind, count, example["image"], stream)
        return out, other

    def reduction(self, size: tuple[int, int]) -> float:
        """Return how many pixels of an image become one, at least; see `reduced`."""
        kinds = [(self.global_crop_scale, self.global_crop_size)]
        if self.max_local_crops if self.adaptive else self.num_local_crops:
            kinds.append((self.local_crop_scale, self.local_crop_size))
        return min(geometry.reduction(size, *kind) for kind in kinds)

    def counts(self, example: dict) -> tuple[int, int]:
        """Return (G, L) of an example, by its `epoch`."""
        return self.num_global_crops, self.locals_at(int(example.get("epoch", 0)))

    def _kind(self, kind, count, image, rng):
        """Return the crops of one size and their boxes."""
        size, scale = (getattr(self, f"{kind}_crop_{x}") for x in ("size", "scale"))
        crops = np.empty((count, size, size, image.shape[-1]), image.dtype)
        boxes = np.empty((count, 5), np.float32)
        for i in range(count):
            box = geometry.draw_box(rng, image.shape[:2], scale)
            flip = rng.random() < self.horizontal_flip_prob
            crop = resample.resize(image, (size, size), box, self.interpolation)
            if self.colour == "host":
                own = self.recipe(kind, i)
                change = functools.partial(colour.augment, rng=rng, **own)
                crop = colour.only(crop, change)
            crops[i] = cv2.flip(crop, 1).reshape(crop.shape) if flip else crop
            boxes[i] = geometry.relative(box, image.shape[:2], flip)
        return {kind: crops, f"{kind}_box": boxes}
