"""H-JEPA pictures: the rollout of attention."""

import numpy as np

from tests.golden import reading
from vitssl.pictures import attention


def rollout(case):
    """The product of the layers, and what of it reaches the patches."""
    matrices = case.inputs["attention"]  # [layers, heads, T, T]
    layers, heads, tokens, _ = matrices.shape
    reading.agree(case.config, layers=layers, heads=heads, tokens=tokens)
    rolled = attention.rollout(matrices)
    case.close("rollout", rolled)
    patches = matrices.shape[-1] - 1  # The original has a class token, no registers.
    case.close("cls_row", attention.on_patches(np.asarray(rolled), patches))


CHECKS = {"attention rollout": rollout}
