"""What H-JEPA trains on: the crops of an image, with their masks."""

import dataclasses

import numpy as np

from vitssl.data.crops import MultiCrop
from vitssl.methods.hjepa import masks
from vitssl.methods.hjepa.masks import Masking


@dataclasses.dataclass(frozen=True)
class MultiCropTransform:
    """The transform of one training example: crops, boxes, masks.

    Changing the number of local crops changes neither the global crops nor their masks,
    changing the masks changes no crop.

    Attributes:
        crops: the section `multicrop`.
        masking: the section `masking`.
        patch: side of a patch, in pixels.
    """

    crops: MultiCrop = MultiCrop()
    masking: Masking = Masking()
    patch: int = 16

    def reduction(self, size: tuple[int, int]) -> float:
        """Return how many pixels of an image become one, at least; see `reduced`."""
        return self.crops.reduction(size)

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return the crops of `MultiCrop.draw` and the arrays of `masks.multicrop`.

        An entry `step` of the example, if there is one, is the number of the batch: the
        `ijepa` sampler then shares its block sizes in the batch.
        """
        out, mask_rng = self.crops.draw(example, rng)
        grids = (self.crops.grid(kind, self.patch) for kind in ("global", "local"))
        step = example.get("step")
        shared = None if step is None else np.random.default_rng(int(step))
        counts = self.crops.counts(example)
        return out | masks.multicrop(
            mask_rng, self.masking, *grids, counts, size_rng=shared
        )
