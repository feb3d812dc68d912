"""A source of images that fit in memory."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Images [N, H, W, C] uint8 and labels [N] int32, held in memory."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    root: str
    name: str
    split: str

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[-1]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": int(self.labels[i])}
