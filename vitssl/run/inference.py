"""Features of images from trained weights: in a notebook, for a folder, as a program.

import vitssl
features = vitssl.load("runs/hjepa-demo")      # or weights of vitssl.convert
features = vitssl.load("demo:localmim")         # or a small network that came along
features(images)["pooled"]                      # images: uint8 [B, H, W, C]
vitssl.load("runs/finetune_hvit").predict(images)["class"]      # of any sizes

vitssl extract WEIGHTS --images=FOLDER --to=FEATURES.npz
vitssl extract WEIGHTS --program=FOLDER

Whole methods of others are loaded as runs are, once they are converted:

vitssl convert import ifam_cub.pth --to=ifam
found = vitssl.load("ifam")(images)             # "maps" [B, h, w, K + 1]: each patch
                                                # to K parts, the background last
vitssl convert import olmoearth_nano.pth --to=olmo
found = vitssl.load("olmo")(samples, raw=True)  # {"sentinel2_l2a": [B, H, W, T, 12],
                                                # "timestamps": [B, T, 3]}
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np

from vitssl import disk, errors, sizes, tree
from vitssl.convert import backbone, beside, positions
from vitssl.methods import base
from vitssl.models import hybrid_vit, patches, upsample, vit
from vitssl.run import opened

logger = logging.getLogger(__name__)

Images = np.ndarray | jax.Array
NAMES = ("pooled", "tokens")
MAPS = "maps"  # Of methods that find parts, too.
PIXELS = (np.uint8, np.uint16)  # Dtypes of images that are not normalised yet.
UPSAMPLINGS = ("shift", "bilinear", "nearest")  # Those that need no training.


@dataclasses.dataclass(frozen=True)
class Features:
    """A function from images to features, with its weights.

    Attributes:
        apply: (state, image) -> {"pooled": [B, D], "tokens": [B, N, D], ...}.
        state: pytree of the weights.
        image_size: side, or (height, width), in pixels that the weights were trained
            for; other sizes that the patch divides work too, each compiled once.
        channels: of an image.
        mean, std: normalisation of pixels in [0, 1].
        name: what the weights are called.
        method: of a run as a whole; it knows the evaluation's views, and classes.
        classes: their names.
        notes: what of the weights is a guess, a line each.
    """

    apply: Callable[[Any, Any], dict]
    state: Any
    image_size: sizes.Size
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = ""
    method: base.Method | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __call__(
        self, images: Images | Mapping[str, Images], *, raw: bool = False
    ) -> dict[str, jax.Array]:
        """Return {"pooled": [B, D], "tokens": [B, N, D]} of images.

        A method that finds parts adds "maps" [B, h, w, K + 1], the share of each patch
        in every part and, last, in the background.

        Args:
            images: [B, H, W, C], uint8 or uint16 pixels, or float32 already normalised;
                of a method that reads several sensors a dict of them, see its `sample`.
            raw: the values of that dict are in the sensors' own units.

        Raises:
            UsageError: another rank, dtype or number of channels, or floats that are
                not normalised.
        """
        if isinstance(images, Mapping):
            if self.method is None:
                raise errors.UsageError(f"{self.name}: takes [B, H, W, C], not a dict")
            sample = self.method.sample(dict(images), raw=raw)
            return _kept(_compiled(self.apply)(self.state, sample))
        if raw:
            raise errors.UsageError("raw=True: pixels have no units; give uint8")
        images = np.asarray(images) if not hasattr(images, "dtype") else images
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise errors.UsageError(
                f"images {tuple(images.shape)}: want [B, H, W, {self.channels}]"
            )
        whole = images.dtype in PIXELS
        if not whole and not jnp.issubdtype(images.dtype, jnp.floating):
            raise errors.UsageError(
                f"images are {images.dtype}: want uint8 pixels, or floats normalised "
                "by mean and std"
            )
        self._check_normalised(images)
        self._check_size(images.shape[1:3])
        return _kept(_compiled(self.apply)(self.state, images))

    def _check_normalised(self, images) -> None:
        """Refuse floats that no pixel becomes by mean and std."""
        if images.dtype in PIXELS or isinstance(images, jax.core.Tracer):
            return
        ends = (np.array([[0.0], [1.0]]) - self.mean) / self.std
        most = float(abs(images).max(initial=0))
        if most > max(10.0, 2 * abs(ends).max()):
            raise errors.UsageError(
                f"images are floats up to {most:.4g}: want (x / 255 - mean) / std with "
                f"mean={self.mean}, std={self.std}, or uint8 pixels"
            )

    def _check_size(self, size) -> None:
        """Refuse images of sides that the patch does not divide; say others, once."""
        module = getattr(self.apply, "module", None)
        if module is None:
            return
        if faults := list(module.check_image(tuple(size))):
            raise errors.UsageError(f"images of {size[0]} x {size[1]} px: {faults[0]}")
        if self.image_size and tuple(size) != sizes.pair(self.image_size):
            here = sizes.written(tuple(size))
            _say(f"{self.name} is for {sizes.written(self.image_size)}, not {here}")

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what an image gives, {name: shape [1, ...]}; nothing is computed.

        Raises:
            CheckpointError: the weights lack parameters.
        """
        size = sizes.pair(self.image_size)
        image = jax.ShapeDtypeStruct((1, *size, self.channels), np.uint8)
        if self.method is not None:
            image = self.method.sample_shapes(size, self.channels)
        with _complete(self.name):
            return jax.eval_shape(self.apply, self.state, image)

    @property
    def headline(self) -> str:
        """Return which weights and views name the classes, such as "ema_tta".

        Raises:
            UsageError: none do.
        """
        if self.method is None:
            raise errors.UsageError(
                f"{self.name}: an encoder names no classes; give a run, without `part`"
            )
        shape = (1, *sizes.pair(self.image_size), self.channels)
        image = jax.ShapeDtypeStruct(shape, np.uint8)
        with _complete(self.name):
            (name,) = jax.eval_shape(self.method.class_logits, *self.state, image)
        return name

    def predict(
        self, images: Images | Sequence[Images], *, batch_size: int = 64
    ) -> dict[str, Any]:
        """Return the classes of images, by what the run's headline is of.

        Args:
            images: uint8 [B, H, W, C], or a list of [H, W, C] of any sizes; they go
                through the run's evaluation transform.
            batch_size: images at once.

        Returns:
            {"probability": float32 [M, K], "label": int [M] the likeliest, "class":
            its name for every image, "weights": the `headline`}; of a run that learned
            several labels an image also "classes": the names of those whose
            probability is above one half.

        Raises:
            UsageError: no images, or such as the run cannot have; the weights name no
                classes.
        """
        weights = self.headline
        rows = [self._view(i, image) for i, image in enumerate(images)]
        if not rows:
            raise errors.UsageError("images: there is none")
        size = min(batch_size, len(rows))
        found = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            # Filled up to one shape, which is compiled once.
            full = np.stack(part + part[-1:] * (size - len(part)))
            logits = _class_logits(self.state, full, method=self.method)
            found.append(np.asarray(logits)[: len(part)])
        logits = np.concatenate(found)
        label = logits.argmax(-1)
        several = getattr(self.method, "several", False)
        share = (jax.nn.sigmoid if several else jax.nn.softmax)(logits)
        made = {
            "probability": np.asarray(share),
            "label": label,
            "class": [self.classes[i] for i in label],
            "weights": weights,
        }
        if several:
            names = np.array(self.classes, object)
            made["classes"] = [names[row > 0].tolist() for row in logits]
        return made

    def _view(self, i, image):
        """Return image i as the run evaluates it, [h, w, C]."""
        image = np.asarray(image)
        shape = (*image.shape[:2], self.channels)
        if image.dtype not in PIXELS or image.shape != shape or 0 in shape:
            raise errors.UsageError(
                f"images[{i}] is {image.dtype} {image.shape}: want uint8 "
                f"[H, W, {self.channels}]"
            )
        return self.method.evaluation_transform(self.image_size)({"image": image})[
            "image"
        ]


def _kept(found) -> dict:
    return {name: found[name] for name in (*NAMES, MAPS) if name in found}


@contextlib.contextmanager
def _complete(name):
    """Raise CheckpointError where a network misses parameters."""
    try:
        yield
    except (flax.errors.FlaxError, KeyError) as e:
        why = str(e).split(". (")[0]
        raise errors.CheckpointError(
            f"{name}: does not hold what its config describes: {why}"
        ) from e


@functools.cache
def _say(line):
    logger.warning(line)


@functools.partial(jax.jit, static_argnames="method")
def _class_logits(state, image, *, method):  # -> float32 [B, K]
    (logits,) = method.class_logits(*state, image).values()
    return logits.astype(jnp.float32)


@functools.cache
def _compiled(apply):
    return jax.jit(apply)


def load(
    path: disk.AnyPath,
    *,
    part: str = "",
    pool: str = "",
    image_size: int = 0,
    output_patch: int = 0,
    upsampling: str = "shift",
) -> Features:
    """Return the features of weights on disk.

    Args:
        path: a run's workdir, one checkpoint of it, converted weights (of an encoder,
            or of a whole method), or "demo:NAME", see `convert.demos`.
        part: of a run: "" = what its evaluations use; "target" or "encoder" = that
            encoder alone, without what the method puts on top.
        pool: "cls" or "mean"; "" = what the weights' family uses. Of a run: needs
            `part`.
        image_size: of converted weights: resample the position table for it; of a
            whole method: the size of images that `predict` and `vitssl extract` make.
        output_patch: "tokens" are those of patches of this side, a divisor of the
            ViT's own: [B, (H / q) (W / q), D], row by row; 0 = its own. Of a run: of
            its encoder alone.
        upsampling: how: "shift" (no training, real features at every place, the cost
            of (p / q)^2 forward passes), "bilinear" or "nearest".

    Raises:
        CheckpointError: nothing there, damaged, or of another format.
        UsageError: an option does not fit the weights.
    """
    past = opened.past(path)
    if past.imported and not past.weights.about.model:
        for key, value in dict(part=part, pool=pool, output_patch=output_patch).items():
            if value:
                raise errors.UsageError(f"{key}={value}: {path} holds a whole method")
        return _of_whole(past, image_size)
    if past.imported:
        found = past.weights
    elif part or output_patch:
        found = past.encoder(part)
    else:
        return _of_run(past, pool, image_size)
    features = of_backbone(found, pool=pool, image_size=image_size)
    if not output_patch:
        return features
    apply = _finer(features.apply, output_patch, upsampling, features.channels)
    return dataclasses.replace(features, apply=apply)


def _finer(encode, q, mode, channels):
    """Return the function of a ViT with tokens of another patch size."""
    module = encode.module
    if not isinstance(module, vit.ViT):
        name = type(module).__name__
        raise errors.UsageError(f"output_patch={q}: needs a ViT, not {name}")
    if mode not in UPSAMPLINGS:
        known = ", ".join(UPSAMPLINGS)
        raise errors.UsageError(f"upsampling={mode}: one of {known}")
    if faults := list(upsample.faults(module.patch, q)):
        raise errors.UsageError(f"output_patch={q}: {faults[0]}")
    net = hybrid_vit.HybridViT(module, module.patch, q, mode, channels=channels)
    return _EncodeFiner(net, encode.mean, encode.std, encode.pool)


def of_backbone(
    found: backbone.Backbone, *, pool: str = "", image_size: int = 0
) -> Features:
    """Return the features of a converted network; see `load`.

    Raises:
        UsageError: the pool asked for does not exist, or the patch does not divide
            the image size.
    """
    found.check()
    encode = found.encode(pool)
    # A convolutional network has none.
    stored = getattr(encode.module, "image_size", 0)
    if stored and image_size and image_size != stored:
        found = _resized(found, image_size)
        encode = found.encode(pool)
    about = found.about
    variables = found.variables()
    for name, leaf in tree.flat(variables["params"]).items():
        backbone.check_finite(f"{about.source}: {name}", leaf)
    return Features(
        encode,
        jax.device_put(variables),
        image_size or stored,
        found.channels,
        about.mean,
        about.std,
        about.source,
        notes=tuple(filter(beside.is_guess, about.notes)),
    )


def _resized(found, size):
    """Return a backbone with the position tables for another image size."""
    module = found.module()
    if size % module.patch or size < 1:
        raise errors.UsageError(
            f"image_size={size}: must be a multiple of the patch, {module.patch}"
        )
    leaves, side = dict(found.leaves), size // module.patch
    first = int(module.cls and module.class_position)
    for name in [name for name in leaves if name.endswith("pos_embed")]:
        leaves[name] = positions.resample(leaves[name], first, side, found.about.rule)
    model = dict(found.about.model) | {"image_size": size}
    about = dataclasses.replace(found.about, model=model)
    return backbone.Backbone(about, leaves)


@dataclasses.dataclass(frozen=True)
class _EncodeFiner:
    """(variables, image) -> features of a ViT with more tokens than it processes."""

    net: hybrid_vit.HybridViT
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: str

    def __call__(self, variables, image) -> dict:
        """Return pooled [B, D] and tokens [B, (H / q) (W / q), D] of [B, H, W, C]."""
        x = patches.normalise(image, self.mean, self.std)
        dense = self.net.apply({"vit": variables["params"]}, x)
        coarse = dense.tokens_p.astype(jnp.float32).mean((1, 2))
        pooled = dense.prefix[:, 0] if self.pool == "cls" else coarse
        tokens = einops.rearrange(dense.features_q, "b h w d -> b (h w) d")
        return {"pooled": pooled, "tokens": tokens.astype(jnp.float32)}


def _of_run(past: opened.Past, pool="", image_size=0) -> Features:
    """Return the features that a run's own evaluations use.

    Raises:
        UsageError: they are asked for at another size, or pooled otherwise.
    """
    checked = past.experiment
    size = checked.settings.evals.image_size
    asked = [f"pool={pool}"] * bool(pool)
    asked += [f"image_size={image_size}"] * bool(image_size and image_size != size)
    if asked:
        raise errors.UsageError(
            f"{asked[0]}: {past.path} is a run, whose features are those of its "
            f"evaluations ({sizes.written(size)}); with part=encoder or target (of "
            "extract --part) they can be had otherwise"
        )
    classes = tuple(past.meta.get("classes", ()))
    method = checked.method(checked.run(classes=len(classes)))
    stored = past.trees("params", "extra")
    state = tuple(tree.nest(stored[key]) for key in ("params", "extra"))
    data = checked.settings.data
    return Features(
        _Method(method),
        jax.device_put(state),
        size,
        data.channels,
        data.mean,
        data.std,
        past.path,
        method,
        classes,
    )


def _of_whole(past: opened.Past, image_size: int) -> Features:
    """Return the features of a whole method that was imported.

    Raises:
        CheckpointError: a leaf is missing, or has another shape than its method's.
    """
    found = _of_run(past)
    found = dataclasses.replace(found, image_size=image_size or found.image_size)
    found.shapes()  # Complains of what is missing.
    return found


@dataclasses.dataclass(frozen=True)
class _Method:
    """((params, extra), image) -> features of a method."""

    method: Any

    def __call__(self, state, image) -> dict:
        """Return pooled [B, D] and tokens [B, N, D] of images [B, H, W, C]."""
        return _kept(self.method.features(*state, image))
