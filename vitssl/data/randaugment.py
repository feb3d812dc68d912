"""RandAugment with operations that grow with the magnitude, as timm has it.

`RandAugment.parse("rand-m9-mstd0.5-inc1")` is what MAE and LocalMIM fine-tune with.

Sources: Cubuk et al. 2019, arXiv:1909.13719; timm.data.auto_augment.
"""

import dataclasses
import re

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vitssl import errors

MOST = 10.0  # Magnitudes are in [0, 10].
TRANSLATE = 0.45  # Largest shift, as a share of the side.


def _affine(image, matrix, fill):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, 1, fill
    )


def _solarize_add(image, share, sign, fill):
    add = min(128, int(share * 110))
    levels = [min(255, i + add) if i < 128 else i for i in range(256)]
    return image.point(levels * len(image.getbands()))


def _posterize(image, share, sign, fill):
    bits = 4 - int(share * 4)
    if not bits:  # Nothing of the image is left.
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits)


def _enhance(kind):
    def apply(image, share, sign, fill):
        return kind(image).enhance(max(0.1, 1 + sign * share * 0.9))

    return apply


# Each takes (image, magnitude / 10, +-1, colour of what comes from outside).
OPERATIONS = {
    "auto_contrast": lambda image, share, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, share, sign, fill: ImageOps.equalize(image),
    "invert": lambda image, share, sign, fill: ImageOps.invert(image),
    "rotate": lambda image, share, sign, fill: image.rotate(
        sign * share * 30, resample=Image.Resampling.BICUBIC, fillcolor=fill
    ),
    "posterize": _posterize,
    "solarize": lambda image, share, sign, fill: ImageOps.solarize(
        image, 256 - min(256, int(share * 256))
    ),
    "solarize_add": _solarize_add,
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, share, sign, fill: _affine(
        image, (1, sign * share * 0.3, 0, 0, 1, 0), fill
    ),
    "shear_y": lambda image, share, sign, fill: _affine(
        image, (1, 0, 0, sign * share * 0.3, 1, 0), fill
    ),
    "translate_x": lambda image, share, sign, fill: _affine(
        image, (1, 0, sign * share * TRANSLATE * image.size[0], 0, 1, 0), fill
    ),
    "translate_y": lambda image, share, sign, fill: _affine(
        image, (1, 0, 0, 0, 1, sign * share * TRANSLATE * image.size[1]), fill
    ),
}
MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Some random operations of random strength.

    Attributes:
        magnitude: mean strength, in [0, 10].
        deviation: its standard deviation.
        count: operations per image, drawn with replacement.
        prob: probability that each is applied.
        still: leave out what moves pixels: there are planes that would not follow.
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    count: int = 2
    prob: float = 0.5
    still: bool = False

    @classmethod
    def parse(cls, text: str) -> "RandAugment | None":
        """Return what timm's string asks for; None for "".

        Raises:
            UsageError: another policy than rand-...-inc1.
        """
        if not text:
            return None
        name, *parts = text.split("-")
        fields = {"m": "magnitude", "mstd": "deviation", "n": "count", "p": "prob"}
        given, growing = {}, False
        for part in parts:
            found = re.fullmatch(r"([a-z]+)([\d.]+)", part)
            key = found and found[1]
            if key == "inc":
                growing = float(found[2]) == 1
            elif key in fields:
                kind = int if key == "n" else float
                given[fields[key]] = kind(found[2])
            else:
                name = ""
        if name != "rand" or not growing:
            raise errors.UsageError(
                f"augment.randaugment={text!r}: like 'rand-m9-mstd0.5-inc1' (keys m, "
                "mstd, n, p; inc1 is required), or '' for none"
            )
        return cls(**given)

    def __call__(self, image, rng: np.random.Generator, fill=(128, 128, 128)):
        """Return the augmented image.

        Args:
            image: uint8 [H, W, C] with 1 or 3 channels.
            rng: all randomness.
            fill: colour of what comes from outside, C values in [0, 255].
        """
        depth = image.shape[-1]
        if depth not in (1, 3):
            raise errors.UsageError(f"RandAugment: {depth} channels; 1 or 3 work")
        picture = Image.fromarray(image[..., 0] if depth == 1 else image)
        fill = int(fill[0]) if depth == 1 else tuple(int(f) for f in fill[:3])
        names = [n for n in OPERATIONS if not (self.still and n in MOVING)]
        for i in rng.integers(0, len(names), self.count):
            strength = rng.normal(self.magnitude, self.deviation)
            sign = 1 if rng.random() < 0.5 else -1
            if rng.random() >= self.prob:
                continue
            share = float(np.clip(strength, 0.0, MOST)) / MOST
            picture = OPERATIONS[names[i]](picture, share, sign, fill)
        return np.asarray(picture).reshape(image.shape)
