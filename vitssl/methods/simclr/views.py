"""The two views of SimCLR: crop, mirror, jitter, grey, blur, each drawn on its own."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np

from vitssl import ranges, sizes
from vitssl.data import colour, geometry, resample

Pair = tuple[ranges.Positive, ranges.Positive]


@dataclasses.dataclass(frozen=True)
class Views:
    """Config section `augment`: two random views of every image.

    Attributes:
        size: side of a view, or (height, width), in pixels.
        scale: least and largest share of the area.
        ratio: least and largest width / height of the crop; times that of `size`.
        flip: probability that a view is mirrored.
        jitter: brightness, contrast, saturation (factors in 1 +- x, not below 0) and
            hue (turn in +- x); the four in random order.
        jitter_prob, grayscale_prob, blur_prob: probability of each, view by view.
        blur_sigma: least and largest, in pixels.
        blur_kernel: odd width in pixels; 0: max(3, 2 (size // 20) + 1), about a tenth
            of the shorter side.
        interpolation: see `data.resample.resize`.
        colour: host: colours and blur are changed by OpenCV, here. device: views leave
            here as they are, and the method calls `ops.jitter` with `recipe`.

    Source: Chen et al. 2020, arXiv:2002.05709, appendix A.
    """

    size: ranges.Count | tuple[ranges.Count, ranges.Count]
    scale: tuple[ranges.Share, ranges.Share] = (0.2, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    flip: ranges.Probability = 0.5
    jitter: tuple[
        ranges.NotNegative,
        ranges.NotNegative,
        ranges.NotNegative,
        Annotated[float, ranges.Range(0, 0.5)],
    ] = (0.8, 0.8, 0.8, 0.2)
    jitter_prob: ranges.Probability = 0.8
    grayscale_prob: ranges.Probability = 0.2
    blur_prob: ranges.Probability = 0.5
    blur_sigma: Pair = (0.1, 2.0)
    blur_kernel: ranges.OrNone = 0
    interpolation: Literal["bilinear", "bicubic", "fast"] = "bilinear"
    colour: Literal["host", "device"] = "host"

    @property
    def kernel(self) -> int:
        """Return the width of the blur in pixels."""
        return self.blur_kernel or max(3, 2 * (min(sizes.pair(self.size)) // 20) + 1)

    def recipe(self, size: sizes.Size) -> dict:
        """Return the keywords of `ops.jitter.augment` for views of a size."""
        return dict(
            strength=1.0,
            prob=self.jitter_prob if any(self.jitter) else 0.0,
            grayscale_prob=self.grayscale_prob,
            blur_prob=self.blur_prob,
            solarize_prob=0.0,
            spread=self.jitter,
            blur_sigma=self.blur_sigma,
            blur_kernel=dataclasses.replace(self, size=size).kernel,
        )

    def check(self) -> Iterator[str]:
        """Yield what does not fit together."""
        yield from ranges.in_order(self, "scale", "ratio", "blur_sigma")
        if self.blur_kernel and self.blur_kernel % 2 == 0:
            yield f"blur_kernel={self.blur_kernel}: odd, or 0 (by the size)"

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return {global [2, h, w, C], label, index int32 []}."""
        views = np.stack([self.view(example["image"], rng) for _ in range(2)])
        numbers = {k: np.int32(example.get(k, -1)) for k in ("label", "index")}
        return numbers | {"global": views}

    def view(self, image, rng):
        """Return one view [h, w, C] of an image [H, W, C], in its dtype."""
        ratio = geometry.shaped(self.size, self.ratio)
        box = geometry.draw_box(rng, image.shape[:2], self.scale, ratio)
        x = resample.resize(image, sizes.pair(self.size), box, self.interpolation)
        mirror, tint, grey, soft, where, pick, *u = rng.random(10).tolist()
        if mirror < self.flip:
            x = np.ascontiguousarray(x[:, ::-1])
        if self.colour == "device":
            return x
        if tint < self.jitter_prob and any(self.jitter):
            factors = []
            for i, spread in enumerate(self.jitter):
                low = max(0.0, 1.0 - spread) if i < 3 else -spread
                high = 1.0 + spread if i < 3 else spread
                factors.append(low + u[i] * (high - low))
            order = colour.ORDERS[int(pick * len(colour.ORDERS))]
            x = colour.only(x, lambda c: colour.jitter(c, factors, order))
        if grey < self.grayscale_prob:
            x = colour.only(x, colour.grayscale)
        if soft < self.blur_prob:
            low, high = self.blur_sigma
            sigma = low + where * (high - low)
            x = colour.only(x, lambda c: colour.blur(c, sigma, self.kernel))
        return x
