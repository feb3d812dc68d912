"""Planckian jitter: an image as another light source would show it.

Source: Zini et al. 2023, arXiv:2202.07993; the table is the paper's, used as in
ananthu-aniraj/ifam utils/data_utils/planckian_color_jitter.py.
"""

import numpy as np

# Red, green, blue of black bodies from 3000 K to 15000 K in steps of 500 K.
ILLUMINANTS = np.array(
    [
        (0.6743, 0.4029, 0.0013),
        (0.6281, 0.4241, 0.1665),
        (0.5919, 0.4372, 0.2513),
        (0.5623, 0.4457, 0.3154),
        (0.5376, 0.4515, 0.3672),
        (0.5163, 0.4555, 0.4103),
        (0.4979, 0.4584, 0.4468),
        (0.4816, 0.4604, 0.4782),
        (0.4672, 0.4619, 0.5053),
        (0.4542, 0.4630, 0.5289),
        (0.4426, 0.4638, 0.5497),
        (0.4320, 0.4644, 0.5681),
        (0.4223, 0.4648, 0.5844),
        (0.4135, 0.4651, 0.5990),
        (0.4054, 0.4653, 0.6121),
        (0.3980, 0.4654, 0.6239),
        (0.3911, 0.4655, 0.6346),
        (0.3847, 0.4656, 0.6444),
        (0.3787, 0.4656, 0.6532),
        (0.3732, 0.4656, 0.6613),
        (0.3680, 0.4655, 0.6688),
        (0.3632, 0.4655, 0.6756),
        (0.3586, 0.4655, 0.6820),
        (0.3544, 0.4654, 0.6878),
        (0.3503, 0.4653, 0.6933),
    ]
)


def relight(image, index):
    """Return uint8 [H, W, 3] under illuminant `index`: red and blue against green.

    Other numbers of channels come back unchanged.
    """
    if image.shape[-1] != 3:
        return image
    red, green, blue = ILLUMINANTS[index]
    levels = np.arange(256)[:, None] * (red / green, 1.0, blue / green)
    table = np.minimum(levels, 255.0).astype(np.uint8)  # Fractions are cut off.
    return np.stack([table[image[..., c], c] for c in range(3)], axis=-1)


def jitter(image, rng, probability):
    """Return an image under a random illuminant, with a probability."""
    chance, which = rng.random(2).tolist()
    if chance >= probability:
        return image
    return relight(image, int(which * len(ILLUMINANTS)))
