"""What is read from whole samples: features of places, and probes of land cover.

Probes tell the class of every pixel: one on the features, one on the pixels themselves,
which says what the network adds. They are trained on every other image of a test split
and scored on the rest, or trained on the bank split and scored on the whole test split.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Literal

import einops
import jax.numpy as jnp
import numpy as np

from vitssl import errors, ranges
from vitssl.data import modalities, states
from vitssl.evals import segmentation


@dataclasses.dataclass(frozen=True)
class Readout:
    """Config section `readout`: what evaluations read from the network.

    Attributes:
        p, q: patches that are processed and put out; 0 = those of training.
        mode: "upsampled": tokens through the upsampler; "decoder": what the predictor
            answers about every fine token.
        times: most time steps of a sample.
        modalities: names; () = those that training may read.
        pool: of the features of a place: "mean" over all times; "times": those of
            different times side by side, which keeps the seasons apart.
    """

    p: ranges.OrNone = 0
    q: ranges.OrNone = 0
    mode: Literal["upsampled", "decoder"] = "upsampled"
    times: Annotated[int, ranges.Range(1, modalities.TIMES)] = 4
    modalities: tuple[str, ...] = ()
    pool: Literal["mean", "times"] = "mean"


@dataclasses.dataclass(frozen=True)
class Measures:
    """Config section `measures`.

    Attributes:
        classes: of a pixel; 0 where the data set knows no class per pixel.
        probe: "adamw": the original's, by `segmentation.Recipe`; "lbfgs": solved to the
            end, see `segmentation.solve`.
        epochs, lr, decay, batch_size: of "adamw".
        pixels: also probe the pixels themselves.
        beside: also probe the pixels of a patch q, and features beside them, which is
            what handing pixels on is worth without training.
        taught: what probes are trained on: every other image of the "test" split, at
            every evaluation, or the "bank" split (data.bank_split), at the end alone.
    """

    classes: ranges.OrNone = 0
    taught: Literal["test", "bank"] = "test"
    probe: Literal["adamw", "lbfgs"] = "adamw"
    epochs: ranges.Count = 50
    lr: ranges.Positive = 0.1
    decay: ranges.NotNegative = 0.01
    batch_size: ranges.Count = 8
    pixels: bool = True
    beside: bool = False

    @property
    def recipe(self) -> segmentation.Recipe:
        """Return how probes are trained."""
        return segmentation.Recipe(self.epochs, self.lr, self.decay, self.batch_size)

    def check(self) -> Iterator[str]:
        """Yield that a pixel cannot be of one class alone."""
        if self.classes == 1:
            yield "classes=1: 0 (none known per pixel), or 2 or more"
        if self.beside and not self.pixels:
            yield "beside=True: needs pixels=True"


def sample(kinds, images: dict) -> dict:
    """Return a user's sensors as evaluations read them; see `LatentMIM.sample`.

    Raises:
        UsageError: see there.
    """
    there = {k.name: np.asarray(images[k.name]) for k in kinds if k.name in images}
    known = ", ".join(k.name for k in kinds)
    spread = [k for k in kinds if k.space and k.name in there]
    if not spread or "timestamps" not in images:
        lacking = "timestamps" if spread else "a sensor with rows and columns"
        raise errors.UsageError(
            f"a sample lacks {lacking}; it has {', '.join(images)}; one reads {known}, "
            "and timestamps [B, T, 3] (day, month 0 to 11, year)"
        )
    stamps = np.asarray(images["timestamps"], np.int32)
    first = there[spread[0].name]
    size, batch = [n // spread[0].factor for n in first.shape[1:3]], len(first)
    if stamps.shape[:1] + stamps.shape[2:] != (batch, 3):
        raise errors.UsageError(f"timestamps {stamps.shape}: want [{batch}, T, 3]")
    found = {"timestamps": stamps}
    for kind in kinds:
        want = (batch, *kind.shape(size[0], stamps.shape[1]))
        if kind.space:
            want = (batch, *(n * kind.factor for n in size), *want[3:])
        x = there.get(kind.name, np.full(want, modalities.MISSING, np.float32))
        if x.shape != want:
            raise errors.UsageError(f"{kind.name} {x.shape}: want {want}")
        found[kind.name] = x.astype(np.float32)
    return found


def online(kind, x, patch):
    """Return the states of the tokens of x [B, H, W, T, C]: ONLINE or MISSING.

    Any missing pixel of a patch, `patch` 10 m pixels a side, counts.
    """
    gone = x == modalities.MISSING
    sets = [gone[..., list(c)].any(-1) for c in kind.channels]
    gone = jnp.stack(sets, axis=-1)
    if kind.space:
        n = patch * kind.factor
        gone = einops.reduce(gone, "b (h p) (w q) t s -> b h w t s", "max", p=n, q=n)
    return jnp.where(gone, states.MISSING, states.ONLINE)


def in_place(tokens: dict, mask: dict, pool: str = "mean"):  # -> [B, h, w, D]
    """Return one vector per place: means of what is ONLINE, float32.

    Over times and bandsets of each modality, then over the modalities that have any
    there; 0 of none.

    Args:
        tokens: {modality: [B, h, w, T, S, D]}; those without places are left out.
        pool: "mean", or "times": one mean for each time step, side by side:
            [B, h, w, T D]; what does not change with time counts at every one.
    """
    axes = (3, 4) if pool == "mean" else (4,)
    total, count = 0.0, 0.0
    for name, x in tokens.items():
        if x.ndim != 6:
            continue
        seen = (mask[name] == states.ONLINE)[..., None].astype(jnp.float32)
        held = seen.sum(axes)
        mean = (x.astype(jnp.float32) * seen).sum(axes) / jnp.maximum(held, 1)
        total, count = total + mean, count + (held > 0)
    found = total / jnp.maximum(count, 1)
    return einops.rearrange(found, "b h w ... d -> b h w (... d)")


def pixels(kinds, image):
    """Return all that is known of a pixel: [B, H, W, K], 0 where there is nothing."""
    parts = [image[k.name] for k in kinds if k.space and k.factor == 1]
    parts = [einops.rearrange(x, "b h w t c -> b h w (t c)") for x in parts]
    x = jnp.concatenate(parts, axis=-1)
    return jnp.where(x == modalities.MISSING, 0.0, x)


def halves(rows: dict) -> tuple[dict, dict]:
    """Return every other row {name: [M, ...]}, and the rest."""
    return {k: x[::2] for k, x in rows.items()}, {k: x[1::2] for k, x in rows.items()}


def scores(bank: dict, test: dict, measures: Measures) -> dict:
    """Return the measures of probes of the features, and of the pixels.

    Args:
        bank, test: rows that probes are trained on, and scored on: "tokens"
            [M, h, w, D], "truth" [M, H, W], perhaps "pixels" [M, H, W, K]; without a
            truth there is nothing to score.

    Returns:
        "miou", "accuracy", "macro_f1" of the features; "miou_pixels" of the pixels,
        each by itself; "miou_blocks" of those of a patch, "miou_beside" of features
        beside them; "miou_guess" of always saying the most frequent class; "iou" [C];
        "images" that were scored.

    Raises:
        UsageError: the truth has more classes than `measures` says.
    """
    if not measures.classes or not all(_known(x, measures) for x in (bank, test)):
        return {}
    found = _one("tokens", bank, test, measures)
    found.pop("macro_accuracy")
    if "pixels" in test:
        found["miou_pixels"] = _one("pixels", bank, test, measures)["miou"]
        if measures.beside:
            more = [_with_blocks(rows) for rows in (bank, test)]
            for name in ("blocks", "beside"):
                found[f"miou_{name}"] = _one(name, *more, measures)["miou"]
    known = bank["truth"][bank["truth"] >= 0]
    most = np.full_like(test["truth"], np.bincount(known).argmax())
    guess = segmentation.measure(most, test["truth"], measures.classes)
    return found | {"miou_guess": guess["miou"], "images": float(len(most))}


def _with_blocks(rows) -> dict:
    """Return rows with "blocks", the pixels of each token, and "beside", both."""
    x, features = rows["pixels"], rows["tokens"]
    h, w = features.shape[1:3]
    blocks = einops.rearrange(x, "m (h i) (w j) k -> m h w (i j k)", h=h, w=w)
    beside = np.concatenate([features, blocks], axis=-1)
    return rows | {"blocks": blocks, "beside": beside}


def _known(rows, measures) -> bool:
    """Return whether any pixel has a class."""
    most = int(rows["truth"].max(initial=-1)) if "truth" in rows else -1
    if most >= measures.classes:
        raise errors.UsageError(
            f"measures.classes={measures.classes}: a pixel is of class {most}, counted "
            f"from 0; set {most + 1} or more"
        )
    return most >= 0


def _one(name, bank, test, measures):
    """Return the measures of one kind of features [M, h, w, D]."""
    size, n = test["truth"].shape[1:], test[name].shape[1]
    pixels = max(1, size[0] // n)
    learn = functools.partial(segmentation.fit, recipe=measures.recipe)
    if measures.probe == "lbfgs":
        learn = segmentation.solve
    params = learn(bank[name], bank["truth"], classes=measures.classes, pixels=pixels)
    said = segmentation.predict(params, test[name], pixels, size)
    return segmentation.measure(said, test["truth"], measures.classes)
