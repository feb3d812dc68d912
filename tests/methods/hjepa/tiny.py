"""A tiny H-JEPA on random images, and its loss compiled once per configuration."""

import functools

import jax
import numpy as np

from vitssl.data import crops
from vitssl.methods import base
from vitssl.methods.hjepa import levels, masks, objective, predictor
from vitssl.methods.hjepa import method as hjepa
from vitssl.models import vit

# Compiling is most of the time of these tests: two and a half times faster this way.
QUICK = {"xla_backend_optimization_level": 0}

MODEL = dict(width=16, depth=1, heads=2, patch=4, image_size=24)
PREDICTOR = dict(depth=1, heads=2, mlp_ratio=2.0)
LEVELS = dict(pooling="spatial")
MULTICROP = dict(
    num_global_crops=2,
    num_local_crops=4,
    global_crop_size=24,
    local_crop_size=12,
    global_crop_scale=(0.4, 1.0),
    local_crop_scale=(0.05, 0.4),
    global_color_jitter=0.4,
    local_color_jitter=0.4,
    color_jitter_prob=1.0,
    horizontal_flip_prob=0.5,
    interpolation="bicubic",
    colour="host",
)
MASKING = dict(
    strategy="cross_crop_prediction",
    sampler="original",
    num_hierarchies=2,
    num_target_masks=4,
    scale_progression="geometric",
    base_scale=(0.05, 0.15),
    aspect_ratio_range=(0.75, 1.5),
    max_attempts=10,
    min_keep=2,
    targets_per_level="constant",
    levels="per_level",
    mode="drop",
    slots=1.0,
)
OBJECTIVE = dict(type="mse", normalize=False, weights=(1.0, 0.5), slices=16)
EMA = dict(start=0.9, end=1.0)


@functools.cache
def _method(key, dtype, batch_size):
    own = {section: dict(values) for section, values in key}
    return hjepa.HJEPA(
        run=base.Run(
            total_steps=10,
            steps_per_epoch=2,
            batch_size=batch_size,
            classes=0,
            channels=3,
            mean=(0.5, 0.4, 0.3),
            std=(0.25, 0.2, 0.3),
            dtype=dtype,
        ),
        model=vit.ViT(**MODEL | dict(dtype=dtype) | own.get("model", {})),
        predictor=predictor.Spec(**PREDICTOR | own.get("predictor", {})),
        levels=levels.Spec(**LEVELS | own.get("levels", {})),
        multicrop=crops.MultiCrop(**MULTICROP | own.get("multicrop", {})),
        masking=masks.Masking(**MASKING | own.get("masking", {})),
        objective=objective.Objective(**OBJECTIVE | own.get("objective", {})),
        ema=hjepa.Ema(**EMA | own.get("ema", {})),
    )


def method(*, dtype="float32", batch_size=3, **sections):
    """Return H-JEPA with some keys of some sections changed."""
    key = tuple((k, tuple(sorted(v.items()))) for k, v in sorted(sections.items()))
    return _method(key, dtype, batch_size)


def batch(of, seed=0, size=None):
    """Return a batch of random images through the method's own transform."""
    transform, rng = of.transform(), np.random.default_rng(seed)
    examples = []
    for i in range(size or of.run.batch_size):
        image = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        example = dict(image=image, label=0, index=i, epoch=0)
        examples.append(transform(example, np.random.default_rng((seed, i))))
    return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


@functools.cache
def init(of, seed=0):
    """Return (params, extra) of fresh networks."""
    shapes = jax.eval_shape(lambda: batch(of))
    fresh = jax.jit(
        lambda: of.init(jax.random.key(seed), shapes), compiler_options=QUICK
    )
    return fresh()


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def loss(of, params, extra, batch, rng):
    """Return (loss, (extra, metrics))."""
    return of.loss(params, extra, batch, rng, phase=None)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def grad(of, params, extra, batch, rng):
    """Return ((loss, (extra, metrics)), gradient of the parameters)."""
    value = jax.value_and_grad(of.loss, has_aux=True)
    return value(params, extra, batch, rng, phase=None)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def terms(of, params, extra, batch):
    """Return `forward.Terms` in evaluation mode."""
    return of.terms(of.networks(params, extra, train=False), batch)


KEY = jax.random.key(7)
