"""The config section `objective` of `methods.simclr.method`."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from vitssl.losses import contrastive


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        loss: "nt_xent": SimCLR's, with 2 B - 2 negatives per anchor; "infonce": across
            the views alone, with B - 1 (what the released HViT computes).
        temperature: divides the similarities; 0.07 in the HViT guide, 0.1 in its runs,
            0.5 in its supplement and in SimCLR.
        pool: the feature that is projected, one of the backbone's poolings.
    """

    loss: Literal["nt_xent", "infonce"] = "nt_xent"
    temperature: float = 0.07
    pool: Literal["mean", "gap", "cls"] = "mean"

    def __call__(self, a, b):
        """Return (loss [], metrics) of the projections [B, P] of both views."""
        function = getattr(contrastive, self.loss)
        return function(a, b, temperature=self.temperature, eps=1e-12)

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.temperature <= 0:
            yield f"temperature={self.temperature}: must be above 0"
