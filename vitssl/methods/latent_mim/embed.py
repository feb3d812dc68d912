"""Patch embeddings whose patch size is an argument (FlexiViT), one per bandset.

Source: Beyer et al. 2022, arXiv:2212.08013; allenai/olmoearth_pretrain
nn/flexi_patch_embed.py and nn/flexi_vit.py (MultiModalPatchEmbeddings).
"""

from typing import Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl.data import states
from vitssl.data.modalities import Modality
from vitssl.models import layers, patches, xavier
from vitssl.models.upsample import clean
from vitssl.ops import accelerator, resize

Resize = Literal["input", "weights"]


class FlexiPatchEmbed(nn.Module):
    """A linear map of patches of any size, by one kernel of a base size.

    Attributes:
        base: side in pixels of the patch the kernel is for.
        resize: "input": the image is resized so that a patch becomes base pixels,
            bicubic with antialiasing; a token of a smaller patch then sees a little of
            its neighbours. "weights": the kernel is resized instead
            (`ops.resize.kernel`) and a token sees its own pixels alone.
    """

    width: int  # D
    base: int
    channels: int  # C
    resize: Resize = "input"
    dtype: str = "float32"

    def setup(self):
        """Declare the kernel [base, base, C, D] and the bias, torch's convolution."""
        shape = (self.base, self.base, self.channels, self.width)
        init = layers.uniform_fan_in(self.base**2 * self.channels)
        self.kernel = self.param("kernel", init, shape)
        self.bias = self.param("bias", init, (self.width,))

    def __call__(self, image, patch):  # [..., H, W, C] -> [..., h, w, D]
        """Embed every patch, of `patch` pixels a side.

        With resize="input" a remainder of the image is not cut off: the whole image is
        stretched to H // patch patches.

        Raises:
            ValueError: an image smaller than a patch, or a patch that does not divide
                it where the image is not resized.
        """
        kernel, side = self.kernel, self.base
        if self.resize == "weights":
            kernel, side = resize.kernel(kernel, patch), patch
        elif patch != side:
            h, w = (n // patch for n in image.shape[-3:-1])
            if not h or not w:
                raise ValueError(
                    f"patch={patch} is larger than an image of "
                    f"{image.shape[-3]}x{image.shape[-2]} pixels"
                )
            image = resize.image(image, h * side, w * side)
        h, w = patches.grid(image, side)
        x = patches.patchify(image, side)  # [..., h w, side side C]
        x = self._linear(x, kernel)
        return einops.rearrange(x, "... (h w) d -> ... h w d", h=h, w=w)

    def at(self, image, row, column, time, patch):
        """Embed some patches [B, K] of [B, H, W, T, C], none of the others: [B, K, D].

        `row`, `column` and `time` [B, K] int32 say where they are.
        """
        height, width = image.shape[1:3]
        h, w = height // patch, width // patch
        kernel, side = self.kernel, self.base
        plain = self.resize == "weights" or patch == side
        if plain:
            patches.grid(image[:, :, :, 0], patch)  # Raises if it does not divide.
            kernel, side = resize.kernel(kernel, patch), patch
        rows, columns = (
            _plain_windows(n, patch) if plain else resize.windows(size, n, side)
            for size, n in ((height, h), (width, w))
        )
        y = _around(rows[0], rows[1].shape[-1], row)  # [B, K, U]
        x = _around(columns[0], columns[1].shape[-1], column)  # [B, K, V]
        batch = jnp.arange(len(image))[:, None, None, None]
        block = image[batch, y[..., None], x[:, :, None], time[..., None, None]]
        if not plain:
            block = jnp.einsum(
                "bkpu,bkqv,bkuvc->bkpqc",
                jnp.asarray(rows[1])[row],
                jnp.asarray(columns[1])[column],
                block.astype(jnp.float32),
                precision=accelerator.precision(),
            )
        block = einops.rearrange(block, "b k p q c -> b k (p q c)")
        return self._linear(block, kernel)

    def _linear(self, x, kernel):
        kernel = einops.rearrange(kernel, "p q c d -> (p q c) d")
        return layers.linear(x, kernel, self.bias, self.dtype)


def _plain_windows(count, size):
    start = np.arange(count, dtype=np.int32) * size
    return start, np.ones((1, 1, size), np.float32)


def _around(start, span, index):
    """Return the `span` samples from start[index] on: [B, K] -> [B, K, span]."""
    return jnp.asarray(start)[index][..., None] + jnp.arange(span, dtype=jnp.int32)


class PatchEmbeddings(nn.Module):
    """The patch embeddings of all bandsets of all modalities.

    By itself, frozen as drawn, it is the random-projection target of latent masked
    image modelling.

    Attributes:
        base: patch side the kernels are for, in pixels of the field.
        resize: see `FlexiPatchEmbed`.
        by_time: embed one time after the other. An image resized for patches of q
            pixels has (base / q)^2 times as many; so only one time's exist at once.
    """

    modalities: tuple[Modality, ...]
    width: int
    base: int = 8
    resize: Resize = "input"
    dtype: str = "float32"
    by_time: bool = False

    def setup(self):
        """Declare one embedding `<modality>_<bandset>` each."""
        for m in self.modalities:
            for g, bands in enumerate(m.channels):
                if m.space:
                    one = FlexiPatchEmbed(
                        self.width,
                        self.base * m.factor,
                        len(bands),
                        self.resize,
                        self.dtype,
                    )
                else:
                    one = xavier.Linear(self.width, self.dtype)
                setattr(self, f"{m.name}_{g}", one)

    def __call__(self, fields, patch):
        """Return {name: [B, h, w, T, S, D], [B, T, S, D] or [B, S, D]} of all tokens.

        Args:
            fields: {name: array}, see `Modality`; missing values count as 0.
            patch: side in pixels of the field.
        """
        found = {}
        for m in self.modalities:
            x = clean(fields[m.name])
            if not m.space:
                found[m.name] = self._stacked(m, x)
                continue
            side = patch * m.factor
            resized = self.resize == "input" and patch != self.base
            if self.by_time and resized and x.shape[3] > 1:
                x = einops.rearrange(x, "b h w t c -> t b h w c")
                y = jax.lax.map(lambda x, m=m, side=side: self._stacked(m, x, side), x)
                found[m.name] = einops.rearrange(y, "t b h w s d -> b h w t s d")
                continue
            # The batch, which devices share, stays in front: behind the times, XLA
            # would hand every device all of it.
            x = einops.rearrange(x, "b h w t c -> b t h w c")
            y = self._stacked(m, x, side)  # [B, T, h, w, S, D]
            found[m.name] = einops.rearrange(y, "b t h w s d -> b h w t s d")
        return found

    def _stacked(self, m, x, *side):
        """Return the tokens of all bandsets of [..., C]: [..., S, D]."""
        parts = [
            getattr(self, f"{m.name}_{g}")(x[..., np.array(bands)], *side)
            for g, bands in enumerate(m.channels)
        ]
        return jnp.stack(parts, axis=-2)

    def at(self, fields, name, index, patch):
        """Embed some tokens of one modality: [B, K, D].

        `index` is int32 [B, K], into its tokens flattened in the order (h, w, T, S).
        """
        m = next(m for m in self.modalities if m.name == name)
        x = clean(fields[name])
        if not m.space:
            y = einops.rearrange(self._stacked(m, x), "b ... d -> b (...) d")
            return patches.take(y, index)  # Of [B, T S, D] or [B, S, D].
        side = patch * m.factor
        shape = m.tokens(x.shape[1] // side, x.shape[3], x.shape[2] // side)
        row, column, time, group = jnp.unravel_index(index, shape)
        y = 0.0
        for g, bands in enumerate(m.channels):
            one = getattr(self, f"{name}_{g}")
            z = one.at(x[..., np.array(bands)], row, column, time, side)
            y = y + jnp.where((group == g)[..., None], z, 0)
        return y


def token_mask(fields, m, patch):  # -> [B, h, w, T, S], [B, T, S] or [B, S]
    """Return the mask int32 of the tokens of one modality.

    Args:
        fields: its array, and perhaps its mask: per token, or per pixel
            [B, H, W, T, S], of which the pixel in a patch's top left corner decides.
            Absent: all ONLINE.
        patch: side in pixels of the field.

    Raises:
        ValueError: a mask of another shape.
    """
    size, side, key = fields[m.name].shape, patch * m.factor, m.mask_key
    whole = (*size[:-1], len(m.channels))
    shape = whole
    if m.space:
        shape = (size[0], size[1] // side, size[2] // side, *whole[3:])
    if key not in fields:
        return jnp.full(shape, states.ONLINE, jnp.int32)
    mask = fields[key]
    if m.space and mask.shape == whole:
        mask = mask[:, : shape[1] * side : side, : shape[2] * side : side]
    if mask.shape != shape:
        raise ValueError(
            f"{key} has shape {mask.shape}: want {shape} (per token) or {whole} (per "
            f"pixel) for {m.name} {size} at patch={patch}"
        )
    return mask.astype(jnp.int32)
