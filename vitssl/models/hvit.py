"""The hierarchical vision transformer: an RGB stream and, if wanted, a spectral one.

Attention is global in every stage: there are no windows, whatever "hierarchical"
suggests, so the cost of the first stage is quadratic in the number of patches.
"""

import itertools
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
from absl import logging
from flax import linen as nn

from vitssl import ranges, sizes
from vitssl.models import layers, pyramid
from vitssl.optim import freezeout


class CrossAttention(layers.Attention):
    """Attention of one sequence to another; the products are packed as in PyTorch."""

    @nn.compact
    def __call__(self, x, y, train=False):  # [B, N, D], [B, M, D] -> [B, N, D]
        d = x.shape[-1]
        # As one matrix: Xavier's bound comes from its whole shape, as in PyTorch.
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (d, 3 * d))
        bias = self.param("bias", nn.initializers.zeros, (3 * d,))
        q = layers.linear(x, kernel[:, :d], bias[:d], self.dtype)
        kv = layers.linear(y, kernel[:, d:], bias[d:], self.dtype)
        return self.mix(q, *jnp.split(kv, 2, axis=-1), train=train)


class DFCA(nn.Module):
    """Tokens of one stream enriched by what they attend to in the other.

    x = norm1(rgb + attention(rgb, spectral + m)), then norm2(x + mlp(x)): norms come
    after. The "disease mask" m is one learned vector added to every key and value. As
    a summand common to all keys it adds the same number to all scores of a query, and
    the softmax takes no notice: it cannot direct attention at anything. All it does is
    to add the constant W_o W_v m to every token.

    Attributes:
        dropout: of the attention map, its output and in and after the MLP.
        disease_mask: whether there is m.

    Source: w2sg-arnav/HierarchialViT hvit/models/dfca.py.
    """

    heads: int
    dropout: float = 0.1
    disease_mask: bool = True
    eps: float = 1e-5
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    @nn.compact
    def __call__(self, rgb, spectral, train=False):  # [B, N, D], [B, M, D] -> [B, N, D]
        d = rgb.shape[-1]
        if self.disease_mask:
            m = self.param("disease_mask", nn.initializers.zeros, (1, 1, d))
            spectral = spectral + layers.spread(m, spectral)
        attend = CrossAttention(
            self.heads,
            dtype=self.dtype,
            attention=self.attention,
            map_dropout=self.dropout,
            name="attn",
        )
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = rgb + drop(attend(rgb, spectral, train))
        x = layers.LayerNorm(self.eps, self.dtype, name="norm1")(x)
        mlp = layers.MLP(4 * d, self.dtype, self.dropout, name="mlp")
        return layers.LayerNorm(self.eps, self.dtype, name="norm2")(x + mlp(x, train))


class HViT(pyramid.Pyramid):
    """Hierarchical ViT; a backbone like `vit.ViT`.

    Names of the RGB stream's parameters are those of a ViT (patch_embed, pos_embed,
    block_i counted through all stages, norm), with patch_norm and merge_s; "spectral/"
    has the same again, "dfca", "rgb_to_dfca", "spectral_to_dfca" and "concat" join
    them.

    Attributes:
        spectral_channels: of the spectral image; 0 = there is none.
        rgb_channels: where one array holds both images, channels of the first, which
            come first. Without a spectral image, images have any number of channels.
        spectral_width: width of the spectral stream's first stage; 0 = `width`.
        fusion: dfca: cross-attention. concat: a linear layer of both tokens at a place;
            needs the same widths and grids, else the RGB tokens are handed on. none:
            the RGB tokens.
        dfca_width: the stream whose width DFCA works in, and hands on.
        dfca_heads, dfca_dropout, disease_mask: see `DFCA`.

    Source: w2sg-arnav/HierarchialViT hvit/models/hvt.py.
    """

    spectral_channels: ranges.OrNone = 0
    rgb_channels: ranges.Count = 3
    spectral_width: ranges.OrNone = 0
    fusion: Literal["dfca", "concat", "none"] = "dfca"
    dfca_width: Literal["rgb", "spectral"] = "rgb"
    dfca_heads: ranges.Count = 12
    dfca_dropout: ranges.BelowOne = 0.1
    disease_mask: bool = True

    prefix = 0  # Tokens before the patches.
    cls = False

    @property
    def fused_width(self) -> int:
        """Channels of a token of the output."""
        if self.spectral_channels and self.fusion == "dfca":
            return self._last(self.dfca_width == "spectral")
        return self.widths[-1]

    def _last(self, spectral: bool) -> int:
        """Return the width of a stream's last stage."""
        first = (spectral and self.spectral_width) or self.width
        return first * 2 ** (len(self.depths) - 1)

    @property
    def square(self) -> int:
        """Side, in pixels, of the square that a token of the last stage stands for."""
        return self.patch * 2 ** (len(self.depths) - 1)

    def setup(self):
        """Declare the parameters of both streams and of what joins them."""
        super().setup()
        if not self.spectral_channels:
            return
        shared = {
            name: getattr(self, name)
            for name in pyramid.Pyramid.__dataclass_fields__
            if name not in ("width", "parent", "name")
        }
        width = self.spectral_width or self.width
        self.spectral = pyramid.Pyramid(width=width, **shared)
        if self.fusion == "dfca":
            for name in ("rgb", "spectral"):
                if self._last(name == "spectral") != self.fused_width:
                    dense = layers.Dense(self.fused_width, self.dtype)
                    setattr(self, f"{name}_to_dfca", dense)
            self.dfca = DFCA(
                heads=self.dfca_heads,
                dropout=self.dfca_dropout,
                disease_mask=self.disease_mask,
                eps=self.norm_eps,
                dtype=self.dtype,
                attention=self.attention,
            )
        elif self.fusion == "concat":
            self.concat = layers.Dense(self.fused_width, self.dtype)

    def __call__(self, image, *, spectral=None, train=False, blank=None):
        """Encode images.

        Args:
            image: [B, H, W, C] float, normalised, of any size; with spectral_channels
                S and no `spectral`, the last S channels of rgb_channels + S are the
                spectral image.
            spectral: [B, H', W', S], or None. A model for both that is given RGB alone
                does without the other stream.
            train: dropout and drop path, from the streams "dropout" and "drop_path".
            blank: (mask [B, h w] bool, a token [D] for each stream): patches of the
                first stage whose content the token replaces; positions stay. Or None.

        Returns:
            {"tokens": [B, N, D] of the last stage, joined if there are two streams,
            "pooled": [B, D] float32, their mean, which a head normalises once more,
            "stages": the RGB stream's maps [B, h, w, D_s], before patch merging,
            "grids": their (h, w), "merged": see `pyramid.Pyramid.encode`,
            "rgb": [B, N, D], "rgb_pooled": before the streams are joined; "spectral",
            "spectral_pooled", "spectral_stages", "spectral_merged" if there is one}.

        Raises:
            ValueError: an image smaller than a patch, or another number of channels.
        """
        image, spectral = self._images(image, spectral)
        mask, fill = blank or (None, (None, None))
        tokens, stages = self.encode(image, train, mask, fill[0])
        out = {
            "rgb": tokens,
            "stages": stages["maps"],
            "grids": stages["grids"],
            "merged": stages["merged"],
        }
        if spectral is not None:
            other, stages = self.spectral.encode(spectral, train, mask, fill[1])
            out |= {"spectral": other, "spectral_stages": stages["maps"]}
            out["spectral_merged"] = stages["merged"]
            tokens = self._join(tokens, other, train)
        out["tokens"] = tokens
        for name, key in (("pooled", "tokens"), ("rgb_pooled", "rgb")):
            out[name] = out[key].astype(jnp.float32).mean(1)
        if spectral is not None:
            out["spectral_pooled"] = other.astype(jnp.float32).mean(1)
        return out

    def _images(self, image, spectral):
        """Return (RGB image, spectral image or None)."""
        count, rgb = self.spectral_channels, self.rgb_channels
        channels = image.shape[-1]
        if not count:
            if spectral is not None:
                raise ValueError("HViT: a spectral image needs spectral_channels=S")
            return image, None
        if spectral is None and channels == rgb + count:
            return image[..., :rgb], image[..., rgb:]
        if channels != rgb or (spectral is not None and spectral.shape[-1] != count):
            got = "" if spectral is None else f" and {spectral.shape[-1]}"
            raise ValueError(
                f"HViT: {channels}{got} channels; want rgb_channels={rgb} and "
                f"spectral_channels={count}, apart or as {rgb + count} in one image"
            )
        return image, spectral

    def _join(self, rgb, spectral, train):
        """Return the joined tokens [B, N, D] of [B, N, D] and [B, M, D']."""
        if self.fusion == "none":
            return rgb
        if self.fusion == "concat":
            if rgb.shape != spectral.shape:
                logging.log_first_n(
                    logging.WARNING,
                    "HViT: fusion=concat needs tokens of one shape, not %s and %s; the "
                    "spectral ones are not used",
                    1,
                    rgb.shape,
                    spectral.shape,
                )
                return rgb
            return self.concat(jnp.concatenate([rgb, spectral], axis=-1))
        if rgb.shape[-1] != self.fused_width:
            rgb = self.rgb_to_dfca(rgb)
        if spectral.shape[-1] != self.fused_width:
            spectral = self.spectral_to_dfca(spectral)
        return self.dfca(rgb, spectral, train)

    def apart(self, image, how="mean", blocks=(), train=False):
        """Return ({stream: [B, D]}, {n: [B, D]}, [B, D]): parts, and `pooled`.

        The mean token of each stream, "rgb" and, if the images have it, "spectral"; and
        that of the RGB stream after n of `blocks`, of `exits`, without a norm.
        """
        out = self(image, train=train)
        names = [n for n in ("rgb", "spectral") if n in out]
        maps = {n: out["stages"][self.exits.index(n)] for n in blocks}
        early = {n: x.astype(jnp.float32).mean((1, 2)) for n, x in maps.items()}
        return {n: out[f"{n}_pooled"] for n in names}, early, self._pool(out, how)

    @property
    def exits(self) -> tuple[int, ...]:
        """After how many blocks `apart` has features: those that end a stage."""
        return tuple(itertools.accumulate(self.depths))

    def pooled(self, image, how="mean", train=False):
        """Return one vector per image: [B, D].

        "mean" is that of the tokens, "gap" of the RGB stream's before its last norm.

        Raises:
            ValueError: any other `how`: there is no class token.
        """
        return self._pool(self(image, train=train), how)

    def pooled_from(self, x, first, how="mean", train=False, size=None):
        """Return what `pooled` does, of the tokens [B, N, D] after `first` blocks."""
        x = self._through(x.astype(self.dtype), first, self.depth, size, train)
        if how == "mean":
            x = self.norm(x)
        return x.astype(jnp.float32).mean(1)

    def store_faults(self) -> Iterator[str]:
        """Yield why no store can stand for the first blocks."""
        if self.spectral_channels:
            yield (
                f"model.spectral_channels={self.spectral_channels}: tokens of one "
                "stream are kept, not of two"
            )

    def _pool(self, out, how):
        if how == "mean":
            return out["pooled"]
        if how == "gap":
            return out["stages"][-1].astype(jnp.float32).mean((1, 2))
        raise ValueError(f"HViT: how={how!r}; one of mean, gap")

    def features(self, image, train=False):
        """Return {"tokens" [B, N, D], "mean", "gap" [B, D]}; see `ViT.features`."""
        out = self(image, train=train)
        tokens = out["tokens"].astype(jnp.float32)
        return {"tokens": tokens} | {k: self._pool(out, k) for k in self.poolings}

    @property
    def poolings(self) -> tuple[str, ...]:
        """What `pooled` knows."""
        return ("mean", "gap")

    def check_channels(self, channels: int) -> Iterator[str]:
        """Yield why images of so many channels do not fit, if they do not."""
        both = self.rgb_channels + self.spectral_channels
        if self.spectral_channels and channels not in (both, self.rgb_channels):
            yield (
                f"{channels}: want model.rgb_channels={self.rgb_channels} and "
                f"model.spectral_channels={self.spectral_channels} together, or the "
                "first alone"
            )

    def check_image(self, size: sizes.Size) -> Iterator[str]:
        """Yield why images of this size, in pixels, do not fit, if they do not."""
        yield from sizes.faults(size, self.patch)

    def attention_maps(self, image):
        """Return (maps [B, layers, heads, N, N] of the last stage, its grid).

        Of the RGB stream; see `ViT.attention_maps`. Earlier stages have other grids.
        """
        out = self(image)
        return layers.sown_maps(self.block[-self.depths[-1] :]), out["grids"][-1]

    def freeze_layers(self, prefix: str = "") -> tuple:
        """Return `FreezeOut.layers`; see `freezeout.hvit_layers`."""
        return freezeout.hvit_layers(self.depths, prefix)

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the fields."""
        yield from super().check()
        if not self.spectral_channels:
            return
        other, heads = self.spectral_width or self.width, self.heads
        for s, n in enumerate(heads[: len(self.depths)]):
            if other * 2**s % n:
                yield f"spectral_width={other}: heads={heads} does not divide stage {s}"
        if self.fusion == "dfca" and self.fused_width % self.dfca_heads:
            yield (
                f"dfca_heads={self.dfca_heads}: does not divide {self.fused_width}, "
                "the width of the last stage"
            )
        if self.fusion == "concat" and other != self.width:
            yield f"fusion=concat: spectral_width={other} must be width={self.width}"
