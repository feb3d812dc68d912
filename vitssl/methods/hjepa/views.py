"""Multi-crop: several random crops of one image at two sizes, with their masks.

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
from vitssl.methods.hjepa import masks

# At 5 the hue goes all the way round.
Jitter = Annotated[float, ranges.Range(0, 5)]


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """The section `multicrop` of a config: how many crops, how large, how coloured.

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

    num_global_crops: ranges.Count
    num_local_crops: ranges.OrNone
    global_crop_size: ranges.Count
    local_crop_size: ranges.Count
    global_crop_scale: tuple[ranges.Share, ranges.Share]
    local_crop_scale: tuple[ranges.Share, ranges.Share]
    global_color_jitter: Jitter
    local_color_jitter: Jitter
    color_jitter_prob: ranges.Probability
    horizontal_flip_prob: ranges.Probability
    interpolation: Literal["bicubic", "fast"]
    colour: Literal["host", "device"]
    grayscale_prob: ranges.Probability = 0.0
    blur_prob: tuple[(ranges.Probability,) * 3] = (0.0, 0.0, 0.0)
    solarize_prob: ranges.Probability = 0.0
    adaptive: bool = False
    min_local_crops: ranges.OrNone = 0
    max_local_crops: ranges.OrNone = 0
    adaptive_warmup_epochs: ranges.OrNone = 0

    def check(self) -> Iterator[str]:
        """Yield one line per combination that is impossible."""
        for key in ("global_crop_scale", "local_crop_scale"):
            yield from masks.in_order(self, key)
        if self.adaptive and self.min_local_crops > self.max_local_crops:
            most = self.max_local_crops
            yield f"min_local_crops={self.min_local_crops}: 0 to max_local_crops={most}"
        elif self.adaptive and not self.adaptive_warmup_epochs:
            yield (
                "adaptive_warmup_epochs=0: adaptive=True never leaves min_local_crops="
                f"{self.min_local_crops}; give the epoch of max_local_crops"
            )

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


@dataclasses.dataclass(frozen=True)
class MultiCropTransform:
    """The transform of one training example: crops, boxes, masks.

    Called with an example and a numpy Generator, from which all randomness comes.
    Changing the number of local crops changes neither the global crops nor their masks,
    changing the masks changes no crop.

    Attributes:
        crops: the section `multicrop`.
        masking: the section `masking`, or None for no masks.
        patch: side of a patch, in pixels; used with masks only.
    """

    crops: MultiCrop
    masking: masks.Masking | None = None
    patch: int = 1

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return the crops of an image, ready to be stacked into a batch.

        Args:
            example: image uint8 [H, W, C], label, index, and `epoch`, which sets the
                number of local crops if it is adaptive: it must be the same for all
                examples of a batch. An entry `step`, if there is one, is the number of
                the batch: the `ijepa` sampler then shares its block sizes in the batch.
            rng: numpy Generator.

        Returns:
            dict: global uint8 [G, s, s, C], local uint8 [L, l, l, C], global_box and
            local_box float32 [G or L, 5] of `geometry.relative`, label, index int32 [],
            and the arrays of `masks.multicrop`. Keys of a kind with no crops are
            absent.
        """
        c, image = self.crops, example["image"]
        counts = c.num_global_crops, c.locals_at(int(example.get("epoch", 0)))
        mask_rng, local_rng = (
            np.random.Generator(np.random.PCG64(seed))
            for seed in rng.integers(2**63, size=2).tolist()
        )
        out = views.labels(example)
        streams = rng, local_rng
        for kind, count, stream in zip(
            ("global", "local"), counts, streams, strict=True
        ):
            if count:
                out |= self._kind(kind, count, image, stream)
        if self.masking:
            grids = (c.grid(kind, self.patch) for kind in ("global", "local"))
            step = example.get("step")
            shared = None if step is None else np.random.default_rng(int(step))
            out |= masks.multicrop(
                mask_rng, self.masking, *grids, counts, size_rng=shared
            )
        return out

    def _kind(self, kind, count, image, rng):
        """Return the crops of one size and their boxes."""
        c = self.crops
        size, scale = (getattr(c, f"{kind}_crop_{x}") for x in ("size", "scale"))
        crops = np.empty((count, size, size, image.shape[-1]), image.dtype)
        boxes = np.empty((count, 5), np.float32)
        for i in range(count):
            box = geometry.draw_box(rng, image.shape[:2], scale)
            flip = rng.random() < c.horizontal_flip_prob
            crop = resample.resize(image, (size, size), box, c.interpolation)
            if c.colour == "host":
                change = functools.partial(colour.augment, rng=rng, **c.recipe(kind, i))
                crop = colour.only(crop, change)
            crops[i] = cv2.flip(crop, 1).reshape(crop.shape) if flip else crop
            boxes[i] = geometry.relative(box, image.shape[:2], flip)
        return {kind: crops, f"{kind}_box": boxes}
