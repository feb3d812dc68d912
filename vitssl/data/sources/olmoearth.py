"""OlmoEarth's pretraining set: a folder of HDF5 samples; see `data.samples`."""

import dataclasses

import numpy as np

from vitssl import errors
from vitssl.data import modalities, samples
from vitssl.data.sources import layout

SPLITS = {"train": "train", "val": "test", "test": "test"}


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Samples of several modalities; `[i]` is what `olmoearth.read` returns.

    Attributes:
        indices: numbers of the files.
        names: modalities of every sample, there or not.
    """

    folder: str
    indices: np.ndarray
    names: tuple[str, ...]
    split: str
    channels: int
    classes: tuple[str, ...] = ()
    name: str = "olmoearth"

    @property
    def root(self) -> str:
        """Return the folder of the files."""
        return self.folder

    @property
    def labels(self) -> np.ndarray:
        """[N] int32 of -1: there are none."""
        return np.full(len(self), -1, np.int32)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        path = f"{self.folder}/sample_{self.indices[i]}.h5"
        return samples.read(path, self.names) | {"label": -1}


def open(
    root,
    split,
    *,
    modalities=modalities.TRAINED,
    channels=1,
    filter_file="",
    max_samples=0,
    share=1.0,
    holdout=0,
    seed=3622,
):
    """Samples that have at least one sensor of the modalities asked for.

    Args:
        root: the folder of the samples, or one above it.
        split: "train" or "test" ("val" is the same): see holdout.
        modalities: names.
        channels: not used: each modality has its own.
        filter_file: .npy of sample numbers to keep, "" for all.
        max_samples: of the training split, drawn without replacement; 0 = all.
        share: of the training split, where max_samples is 0.
        holdout: number of samples that are the test split, the last ones; with 0 both
            splits are all samples.
        seed: of what is drawn.

    Raises:
        DataError: no such folder, or not of this layout.
        UsageError: an unknown modality, a number out of range.
    """
    split = layout.split_of("olmoearth", split, SPLITS)
    names = tuple(modalities)
    if holdout < 0 or max_samples < 0 or not 0 < share <= 1:
        raise errors.UsageError(
            f"olmoearth: holdout={holdout}, max_samples={max_samples}: 0 or more; "
            f"share={share}: above 0, at most 1"
        )
    sensors = [n for n in names if _kind(n).time and _kind(n).space]
    folder = samples.directory(layout.root_of("olmoearth", root, samples.EXPECTED))
    index, has = samples.metadata(folder)
    keep = np.zeros(len(index), bool)
    for name in sensors:
        keep |= has.get(name, np.zeros(len(index), bool))
    if filter_file:
        keep &= np.isin(index, np.load(filter_file))
    index = index[keep]
    if holdout:
        index = index[-holdout:] if split == "test" else index[:-holdout]
    if split == "train":
        count = max_samples or round(share * len(index))
        if count < len(index):
            rng = np.random.default_rng(seed)
            index = np.sort(rng.choice(index, count, replace=False))
    return Samples(str(folder), index, names, split, channels)


def _kind(name):
    return modalities.find(name)
