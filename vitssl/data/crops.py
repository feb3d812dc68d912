"""Multi-crop: several random crops of one image at two sizes, with their masks.

Sources: SwAV (arXiv:2006.09882) for multi-crop, H-JEPA (jonwiggins/H-JEPA
src/data/multicrop_transforms.py) for the defaults, DINOv2 (arXiv:2304.07193) for the
preset. Boxes follow torchvision's RandomResizedCrop.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np

from vitssl import sizes
from vitssl.data import colour, resample
from vitssl.methods.hjepa import masks
from vitssl.methods.hjepa.masks import Masks

RATIO = (3 / 4, 4 / 3)  # Width / height of a crop box.
ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """The section `multicrop` of a config: how many crops, how large, how coloured.

    Attributes:
        num_global_crops, num_local_crops: G and L; either may be 0.
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
            min_local_crops to max_local_crops at adaptive_warmup_epochs. With
            adaptive_warmup_epochs=0 it stays at min_local_crops (as the original does);
            num_local_crops is not used.
    """

    num_global_crops: int
    num_local_crops: int
    global_crop_size: int
    local_crop_size: int
    global_crop_scale: tuple[float, float]
    local_crop_scale: tuple[float, float]
    global_color_jitter: float
    local_color_jitter: float
    color_jitter_prob: float
    horizontal_flip_prob: float
    interpolation: Literal["bicubic", "fast"]
    colour: Literal["host", "device"]
    grayscale_prob: float = 0.0
    blur_prob: tuple[float, float, float] = (0.0, 0.0, 0.0)
    solarize_prob: float = 0.0
    adaptive: bool = False
    min_local_crops: int = 0
    max_local_crops: int = 0
    adaptive_warmup_epochs: int = 0

    def check(self) -> Iterator[str]:
        """Yield one line per value or combination that is impossible."""
        for key in ("num_global_crops", "num_local_crops"):
            if getattr(self, key) < 0:
                yield f"{key}={getattr(self, key)}: 0 or more"
        most = self.max_local_crops if self.adaptive else self.num_local_crops
        if self.num_global_crops + most < 1:
            yield "num_global_crops=0: with no local crop either, there is no crop"
        for kind in ("global", "local"):
            size = getattr(self, f"{kind}_crop_size")
            if size < 1:
                yield f"{kind}_crop_size={size}: at least 1 pixel"
            low, high = scale = getattr(self, f"{kind}_crop_scale")
            if not 0 < low <= high <= 1:
                yield f"{kind}_crop_scale={scale}: 0 < smallest <= largest <= 1"
            strength = getattr(self, f"{kind}_color_jitter")
            if not 0 <= strength <= 5:
                yield (
                    f"{kind}_color_jitter={strength}: 0 (off) to 5, where the hue "
                    "goes all the way round"
                )
        probs = {
            key: (getattr(self, key),)
            for key in (
                "color_jitter_prob",
                "horizontal_flip_prob",
                "grayscale_prob",
                "solarize_prob",
            )
        } | {"blur_prob": self.blur_prob}
        for key, values in probs.items():
            if not all(0 <= p <= 1 for p in values):
                yield f"{key}={getattr(self, key)}: a probability, 0 to 1"
        if self.adaptive and not 0 <= self.min_local_crops <= self.max_local_crops:
            yield (
                f"min_local_crops={self.min_local_crops}: 0 to max_local_crops="
                f"{self.max_local_crops}"
            )
        if self.adaptive_warmup_epochs < 0:
            yield f"adaptive_warmup_epochs={self.adaptive_warmup_epochs}: 0 or more"

    def locals_at(self, epoch: int) -> int:
        """Return the number of local crops of an epoch (0-based)."""
        if not self.adaptive:
            return self.num_local_crops
        low, high = self.min_local_crops, self.max_local_crops
        if not self.adaptive_warmup_epochs:
            return low
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

    def get_crop_info(self, patch: int, epoch: int = 0) -> dict[str, int]:
        """Return sizes and counts of the crops of an image."""
        counts = self.num_global_crops, self.locals_at(epoch)
        return dict(
            global_crop_size=self.global_crop_size,
            local_crop_size=self.local_crop_size,
            global_num_patches=math.prod(self.grid("global", patch)),
            local_num_patches=math.prod(self.grid("local", patch)),
            num_global_crops=counts[0],
            num_local_crops=counts[1],
            total_crops=sum(counts),
        )


def dinov2() -> dict:
    """Return the values of the section `multicrop` for DINOv2's crops.

    Blur has the declared probabilities. The original's code blurs global crop 0 never
    and the other global crops nine times in ten, because a wrapper inverts them.
    """
    return dict(
        num_global_crops=2,
        num_local_crops=8,
        global_crop_size=224,
        local_crop_size=96,
        global_crop_scale=(0.32, 1.0),
        local_crop_scale=(0.05, 0.32),
        global_color_jitter=1.0,
        local_color_jitter=1.0,
        color_jitter_prob=0.8,
        horizontal_flip_prob=0.5,
        interpolation="bicubic",
        colour="host",
        grayscale_prob=0.2,
        blur_prob=(1.0, 0.1, 0.5),
        solarize_prob=0.2,
        adaptive=False,
        min_local_crops=0,
        max_local_crops=0,
        adaptive_warmup_epochs=0,
    )


@dataclasses.dataclass(frozen=True)
class MultiCropTransform:
    """The transform of one training example: crops, boxes, masks.

    Called with an example and a numpy Generator, from which all randomness comes.
    Changing the number of local crops changes neither the global crops nor their masks,
    changing the masks changes no crop.

    Attributes:
        crops: the section `multicrop`.
        masks: the section `masking`, or None for a method without masks.
        patch: side of a patch, in pixels; used with masks only.
    """

    crops: MultiCrop
    masks: Masks | None = None
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
            local_box float32 [G or L, 5] = (top, left, height, width as shares of the
            image, 1.0 if mirrored), label, index int32 [], and the arrays of
            `masks.multicrop`. Keys of a kind with no crops are absent.
        """
        c, image = self.crops, example["image"]
        counts = c.num_global_crops, c.locals_at(int(example.get("epoch", 0)))
        mask_rng, local_rng = (
            np.random.Generator(np.random.PCG64(seed))
            for seed in rng.integers(2**63, size=2).tolist()
        )
        out = {key: np.int32(example.get(key, -1)) for key in ("label", "index")}
        for kind, count, stream in zip(
            ("global", "local"), counts, (rng, local_rng), strict=True
        ):
            if count:
                out |= self._kind(kind, count, image, stream)
        if self.masks:
            grids = (c.grid(kind, self.patch) for kind in ("global", "local"))
            step = example.get("step")
            sizes = None if step is None else np.random.default_rng(int(step))
            out |= masks.multicrop(mask_rng, self.masks, *grids, counts, size_rng=sizes)
        return out

    def _kind(self, kind, count, image, rng):
        """Return the crops of one size and their boxes."""
        c = self.crops
        size, scale = (getattr(c, f"{kind}_crop_{x}") for x in ("size", "scale"))
        crops = np.empty((count, size, size, image.shape[-1]), np.uint8)
        boxes = np.empty((count, 5), np.float32)
        for i in range(count):
            box = draw_box(rng, image.shape[:2], scale)
            flip = rng.random() < c.horizontal_flip_prob
            crop = resample.resize(image, (size, size), box, c.interpolation)
            if c.colour == "host":
                crop = colour.augment(crop, rng, **c.recipe(kind, i))
            crops[i] = cv2.flip(crop, 1).reshape(crop.shape) if flip else crop
            boxes[i] = relative(box, image.shape[:2], flip)
        return {kind: crops, f"{kind}_box": boxes}


def draw_box(rng, size, scale, ratio=RATIO, attempts=ATTEMPTS):
    """Draw a crop box: area uniform in `scale`, width / height log-uniform in `ratio`.

    Args:
        rng: numpy Generator.
        size: (height, width) of the image.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        attempts: draws before the largest central box of an allowed shape is taken.

    Returns:
        (top, left, height, width) in pixels, inside the image.
    """
    rows, columns = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(attempts):
        u, v, y, x = rng.random(4).tolist()
        area = rows * columns * (scale[0] + u * (scale[1] - scale[0]))
        aspect = math.exp(low + v * (high - low))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            top, left = int(y * (rows - height + 1)), int(x * (columns - width + 1))
            return top, left, height, width
    height, width = rows, columns
    if columns / rows < ratio[0]:
        height = max(1, round(columns / ratio[0]))
    elif columns / rows > ratio[1]:
        width = max(1, round(rows * ratio[1]))
    return (rows - height) // 2, (columns - width) // 2, height, width


def shaped(size, ratio=RATIO):
    """Return the least and largest width / height of crops that become this size."""
    return tuple(r * sizes.aspect(size) for r in ratio)


def relative(box, size, flip):
    """Return (top, left, height, width, flipped), lengths as shares of the image."""
    (top, left, height, width), (rows, columns) = box, size
    return top / rows, left / columns, height / rows, width / columns, float(flip)
