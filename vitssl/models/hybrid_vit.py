"""Any ViT with another patch size inside, and features on a finer grid outside."""

import dataclasses
from typing import Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp

from vitssl import tree
from vitssl.data import modalities, states
from vitssl.models import upsample, vit
from vitssl.ops import resize

Mode = Literal["bilinear", "nearest", "pixel_shuffle", "skip", "shift"]


class Dense(NamedTuple):
    """What a `HybridViT` makes of images, after the last norm.

    Attributes:
        prefix: class token and registers, never upsampled; of "shift": their mean over
            the windows.
        tokens_p: of "shift": of the window at no offset but the padding's.
    """

    prefix: jax.Array  # [B, P, D]
    tokens_p: jax.Array  # [B, h, w, D]
    features_q: jax.Array  # [B, h r, w r, D]


@dataclasses.dataclass(frozen=True)
class HybridViT:
    """A ViT that processes patches of side p and puts out features for sides of q.

    Parameters are {"vit": those of the ViT, with its own patch, "up": those of the
    upsampler}: a converted checkpoint goes in as it is. For another p the kernel of the
    patch embedding and the position table are resampled inside.

    Attributes:
        vit: the network; its patch is the base of the kernel.
        p: side of the patches it processes.
        q: side of the patches of the features, a divisor of p.
        mode: of `upsample.Upsampler`; or "shift", which needs no training: the network
            runs on r x r shifted images, each giving every r-th row and column. Its
            features are real at every place, and cost r^2 forward passes.
        anchor: computed positions of another p are those of corners, or of centres,
            see `methods.latent_mim.encodings.space`.
        channels: C of an image, for the "skip" upsampler.
    """

    vit: vit.ViT
    p: int
    q: int
    mode: Mode = "bilinear"
    anchor: upsample.Anchor = "center"
    channels: int = 3

    @property
    def factor(self):
        """Fine tokens per coarse token and side."""
        return upsample.factor(self.p, self.q)

    @property
    def network(self) -> vit.ViT:
        """The ViT for patches of side p."""
        base = self.vit
        if self.p == base.patch:
            return base
        scale = self.p / base.patch
        shift = (scale - 1) / 2 if self.anchor == "center" else 0.0
        first, offset = base.spacing
        return base.clone(
            patch=self.p,
            image_size=tuple(side * self.p for side in base.table_grid),
            spacing=(first * scale, first * shift + offset),
        )

    @property
    def _upsampler(self):
        mode = "bilinear" if self.mode == "shift" else self.mode
        names = tuple(f"band{i}" for i in range(self.channels))
        field = modalities.Modality("image", (names,))
        return upsample.Upsampler((field,), self.p, self.q, mode, self.vit.dtype)

    def init(self, rng, image):
        """Return fresh parameters for images like `image` [B, H, W, C]."""
        base = self.vit.patch
        small = jnp.zeros((1, base, base, image.shape[-1]))
        first, second = jax.random.split(rng)
        params = {"vit": self.vit.init(first, small)["params"]}
        z = jnp.zeros((1, 1, 1, 1, 1, self.vit.width))
        pixels = jnp.zeros((1, self.p, self.p, 1, image.shape[-1]))
        up = self._upsampler.init(second, *self._fields(z, pixels))
        return params | ({"up": up["params"]} if "params" in up else {})

    def _fields(self, z, pixels):
        mask = jnp.full(z.shape[:-1], states.ONLINE, jnp.int32)
        return {"image": z}, {"image": mask}, {"image": pixels}

    def fitted(self, params):
        """Return the ViT's parameters with the kernel resized to p.

        By the pseudo-inverse, see `ops.resize.kernel`; the very same tree where p is
        the ViT's own patch. The position table is resampled by the network.
        """
        if self.p == self.vit.patch:
            return params
        flat = dict(tree.flat(params))
        name = "patch_embed/kernel"
        flat[name] = resize.kernel(flat[name], self.p)
        return tree.nest(flat)

    def apply(self, params, image, *, train=False, rngs=None) -> Dense:
        """Encode normalised images [B, H, W, C]; p = q gives the patch tokens as such.

        Args:
            train: drop paths, by rngs={"drop_path": key}.

        Raises:
            ValueError: q does not divide p, or p does not divide the image.
        """
        r, inner = self.factor, self.fitted(params["vit"])

        def encode(image):
            x, out = self.network.apply(
                {"params": inner}, image, train=train, rngs=rngs
            )
            first, (h, w) = self.network.prefix, out["grid"]
            y = einops.rearrange(x[:, first:], "b (h w) d -> b h w d", h=h, w=w)
            return x[:, :first], y

        if r == 1:
            prefix, y = encode(image)
            return Dense(prefix, y, y)
        if self.mode == "shift":
            return self._shift(encode, image)
        prefix, y = encode(image)
        given = self._fields(y[:, :, :, None, None], image[:, :, :, None])
        fine, _ = self._upsampler.apply({"params": params.get("up", {})}, *given)
        return Dense(prefix, y, fine["image"][:, :, :, 0, 0])

    def _shift(self, encode, image):
        """Run the network on r x r shifted windows, one after the other."""
        r, q = self.factor, self.q
        before = (self.p - q) // 2
        after = self.p - q - before
        side = ((0, 0), (before, after), (before, after), (0, 0))
        padded = jnp.pad(image, side, mode="reflect")
        h, w = image.shape[1:3]

        def window(offset):
            start = (0, offset[0] * q, offset[1] * q, 0)
            size = (len(image), h, w, image.shape[-1])
            return encode(jax.lax.dynamic_slice(padded, start, size))

        offsets = jnp.stack(jnp.unravel_index(jnp.arange(r * r), (r, r)), axis=1)
        prefix, y = jax.lax.map(window, offsets)  # [r r, B, ...]
        fine = einops.rearrange(y, "(a c) b h w d -> b (h a) (w c) d", a=r, c=r)
        return Dense(prefix.mean(0), y[0], fine)
