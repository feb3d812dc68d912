"""What a token of a field is told about itself: bandset, time, month and place.

Source: allenai/olmoearth_pretrain nn/encodings.py and nn/flexi_vit.py
(CompositeEncodings).
"""

from typing import Literal

import einops
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl.data.modalities import Modality
from vitssl.models.upsample import Anchor

Frequencies = Literal["legacy", "standard"]
Channels = Literal["learnable", "random", "zero"]

GRID = 10.0  # Metres per pixel that positions are counted in.


def sincos(position, width, frequencies="legacy"):  # [N] -> [N, D] float64 numpy
    """Encode positions by sines, then cosines, of frequencies w_k, k < D / 2.

    "legacy": w_k = 10000^(-k / 2D), as OlmoEarth's weights were trained with, which
    span 1 to 10000^(-1/4) only; "standard": 10000^(-2k / D).

    Raises:
        ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"sincos: width={width} must be even")
    k = np.arange(width // 2)
    power = k / (2 * width) if frequencies == "legacy" else 2 * k / width
    angle = np.outer(position, 10000.0**-power)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def months(width):
    """Encode the months of the year 0..11: [12, D] float64 numpy.

    One sine, one cosine of the year's circle, each repeated D / 2 times.
    """
    angle = 2 * np.pi * np.arange(12) / 12
    both = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return np.repeat(both, width // 2, axis=1)


def space(grid, width, scale=1.0, frequencies="legacy", anchor="corner"):
    """Encode the places of a grid, the column in the first half: [h, w, D] numpy.

    Args:
        grid: (h, w).
        scale: size of a cell, in units of 10 m.
        anchor: a cell is where its corner is, index * scale, as in OlmoEarth's weights;
            "center": where its centre is, (index + 1/2) scale - 1/2, which is the same
            place for a coarse cell and the middle of the fine cells it covers.

    Raises:
        ValueError: a width that 4 does not divide.
    """
    if width % 4:
        raise ValueError(f"space: width={width} must be divisible by 4")
    row, column = _axes(grid, width // 2, scale, frequencies, anchor)
    h, w = grid
    return np.concatenate(
        [
            np.broadcast_to(column[None], (h, w, width // 2)),
            np.broadcast_to(row[:, None], (h, w, width // 2)),
        ],
        axis=-1,
    )


def _axes(grid, width, scale, frequencies, anchor):
    """Return what `space` knows of the rows and of the columns: [h, D], [w, D]."""
    codes = []
    for count in grid:
        at = np.arange(count) * scale
        if anchor == "center":
            at = (np.arange(count) + 0.5) * scale - 0.5
        codes.append(sincos(at, width, frequencies))
    return codes


class CompositeEncodings(nn.Module):
    """[bandset | time | month | place] of every token, a quarter of the width each.

    Bandsets have learned vectors; the rest are fixed tables. Time (the index in the
    crop) and month are zero for what does not change with time, place for what has
    none.

    Attributes:
        width: D, divisible by 16.
        frequencies, anchor: see `sincos` and `space`.
        channels: the bandsets' vectors start at "zero" and "learnable" from there, at
            "random" values in [0, 1], or stay "zero" and are no parameters.
        most_times: longest crop in time.
    """

    modalities: tuple[Modality, ...]
    width: int
    frequencies: Frequencies = "legacy"
    anchor: Anchor = "corner"
    channels: Channels = "learnable"
    most_times: int = 12

    @property
    def quarter(self):
        """Width of each of the four parts."""
        return self.width // 4

    def setup(self):
        """Declare one [S, D / 4] per modality, under its name."""
        if self.width % 16:
            raise ValueError(f"encodings: width={self.width} must be divisible by 16")
        init = nn.initializers.zeros
        if self.channels == "random":
            init = nn.initializers.uniform(1.0)
        for m in self.modalities:
            shape = (len(m.channels), self.quarter)
            zero = self.channels == "zero"
            value = jnp.zeros(shape) if zero else self.param(m.name, init, shape)
            setattr(self, f"set_{m.name}", value)

    def __call__(self, shapes, timestamps, patch, resolution=GRID):
        """Return the encodings of all tokens.

        Args:
            shapes: {name: (h, w, T, S), (T, S) or (S,)}, of any of the modalities.
            timestamps: [B, T, 3] int, (day, month 0-11, year).
            patch: side in pixels.
            resolution: metres per pixel.

        Returns:
            {name: [B or 1, *shape, D]} float32, batch 1 where no month matters.

        Raises:
            ValueError: more times than `most_times`.
        """
        found = {}
        for m in self.modalities:
            if m.name not in shapes:
                continue
            shape = shapes[m.name]
            parts = self._parts(m, shape, timestamps, patch, resolution)
            size = max(len(p) for p in parts)
            parts = [jnp.broadcast_to(p, (size, *shape, p.shape[-1])) for p in parts]
            found[m.name] = jnp.concatenate(parts, axis=-1)
        return found

    def at(self, name, index, shape, timestamps, patch, resolution=GRID):
        """Return the encodings [B, K, D] float32 of some tokens [B, K] of a modality.

        Args:
            index: int32 into its tokens, flattened in the order of `shape`.
            shape: of all its tokens.
            timestamps, patch, resolution: as in `__call__`.
        """
        m = next(m for m in self.modalities if m.name == name)
        places = jnp.unravel_index(index, shape)
        batch = jnp.arange(len(index))[:, None]
        found = []
        for p in self._parts(m, shape, timestamps, patch, resolution):
            # Axes of length 1 are the same for all.
            where = [
                at if size > 1 else jnp.zeros_like(index)
                for at, size in zip(places, p.shape[1:-1], strict=True)
            ]
            first = batch if len(p) > 1 else jnp.zeros_like(batch)
            found.append(p[(first, *where)])
        return jnp.concatenate(found, axis=-1)

    def _parts(self, m, shape, timestamps, patch, resolution):
        """Return arrays that broadcast to [B, *shape, ...], the widths D together.

        The place is two, of the column and of the row: their table would be a literal
        of the compiled step, tens of megabytes in all.
        """
        n, axes = self.quarter, len(shape)
        none = jnp.zeros((1,) * (axes + 1) + (n,))
        sets = getattr(self, f"set_{m.name}").reshape(
            (1,) * axes + (len(m.channels), n)
        )
        time = month = none
        place = [none]
        if m.time:
            count = shape[-2]
            if count > self.most_times:
                raise ValueError(
                    f"encodings: {m.name} has {count} times, at most {self.most_times}"
                )
            lead = "() " * (axes - 2)
            table = jnp.asarray(sincos(np.arange(count), n, self.frequencies))
            time = einops.rearrange(table, f"t d -> () {lead}t () d")
            month = jnp.asarray(months(n))[timestamps[:, :count, 1]]  # [B, T, D / 4]
            month = einops.rearrange(month, f"b t d -> b {lead}t () d")
        if m.space:
            scale = resolution * patch / GRID
            how = (scale, self.frequencies, self.anchor)
            row, column = map(jnp.asarray, _axes(shape[:2], n // 2, *how))
            place = [column[None, None, :, None, None], row[None, :, None, None, None]]
        return [p.astype(jnp.float32) for p in (sets, time, month, *place)]
