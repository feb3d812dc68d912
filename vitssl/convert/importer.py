"""From a file of published weights to a `Backbone`."""

import collections
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import config, convert, errors
from vitssl.convert import backbone, families, family, positions, reader
from vitssl.models import MODELS, vit

_KERNEL = "encoder/patch_embed/kernel"


def read(
    path,
    *,
    name: str = "auto",
    part: str = "",
    options: family.Options | None = None,
) -> backbone.Backbone:
    """Return the network of a file.

    Nothing large is read or copied yet: arrays are rearranged views of the file.

    Args:
        path: `.pth`, `.safetensors` or `.npz`; also a `.safetensors` of ours.
        name: of the family.
        part: which dict of a training checkpoint; "" = the family's first choice.
        options: what the tensors do not tell.

    Raises:
        CheckpointError: the file is refused or damaged, is of no known family, or
            has keys without a place or places without a key (all named).
        UsageError: no such family or part, or an option is missing or impossible.
    """
    path = pathlib.Path(path)
    options = options or family.Options()
    found = reader.read(path)
    if backbone.KEY in found.metadata:
        return _own(path, name, part, options)
    one, raw, place = families.find(found.tree, name, part)
    beside, told = _config_beside(path)
    options = dataclasses.replace(options, config=beside or one.told(found.tree))
    notes = [f"read from {place!r} of the file"] if place else []
    notes += [told] if told else []
    state = one.prepare(raw, notes)
    fields = one.model(state, options)
    table = one.table(fields)
    about = backbone.About(
        model={},
        mean=one.mean,
        std=one.std,
        family=one.name,
        rule=one.rule,
        source=path.name,
    )
    if one.whole:
        leaves = convert.by_name(state, table)
        notes += _aside(state, table)
        return _noted(about, leaves, notes)
    _check(one, fields)
    shapes = one.shapes or (lambda f, s: _like(f, s, table))
    leaves = convert.views(state, shapes(fields, state), table)
    notes += _aside(state, table)
    if told and (pixels := _pixels_beside(path)):
        one = dataclasses.replace(one, mean=pixels[0], std=pixels[1])
        notes.append("mean and std from the preprocessor_config.json beside the file")
    leaves, fields, mean, std = _adapt(leaves, fields, one, options, notes)
    pool = one.pool if fields.get("cls") else "mean"
    model = {"name": one.kind, **fields}
    return _noted(about, leaves, notes, model=model, mean=mean, std=std, pool=pool)


def _noted(about, leaves, notes, **more) -> backbone.Backbone:
    about = dataclasses.replace(about, notes=tuple(notes), **more)
    return backbone.Backbone(about, leaves)


def _own(path, name, part, options):
    """Return a network that this package wrote, for another image size or channels.

    Raises:
        UsageError: an option that says what the file says itself.
    """
    for key, value in (
        ("family", name.replace("auto", "")),
        ("part", part),
        ("heads", options.heads),
    ):
        if value:
            raise errors.UsageError(
                f"--{key}={value}: {path} is in the layout vitssl, which says it itself"
            )
    found = backbone.read(path)
    if not (options.image_size or options.channels):
        return found
    about = found.about
    if not about.model:
        raise errors.UsageError(
            f"--image_size, --channels: {path} holds a whole method, not one encoder"
        )
    module, notes = found.module(), list(about.notes)
    keys = ("image_size", "patch", "cls", "class_position", "spectral_channels")
    fields = {key: getattr(module, key) for key in keys if hasattr(module, key)}
    leaves, fields, mean, std = _adapt(found.leaves, fields, about, options, notes)
    model = dict(about.model) | {"image_size": fields["image_size"]}
    return _noted(about, leaves, notes, model=model, mean=mean, std=std)


def _check(one, fields):
    """Raise UsageError where fields fit no model."""
    problems = config.Problems()
    config.section(MODELS[one.kind], fields, "", problems)
    if problems:
        raise errors.UsageError(f"{one.name}: {'; '.join(problems)}; see --heads=N")


def _like(fields, state, table):
    """Return the shapes of {"encoder", "head"}, as nested dicts.

    Blocks are alike, so only one is traced.
    """
    module = vit.ViT(**fields | {"depth": 1})
    kernel = next(
        np.shape(value)
        for key, value in state.items()
        if table.forward(key)[1] == _KERNEL
    )
    # [O, I, H, W] of torch or [H, W, I, O] of Flax.
    channels = kernel[1] if kernel[0] == fields["width"] else kernel[2]
    side = fields["image_size"]
    image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    block = shapes.pop("block_0")
    shapes |= {f"block_{i}": block for i in range(fields["depth"])}
    like = {"encoder": shapes}
    for key, value in state.items():
        if table.forward(key)[1] == "head/kernel" and np.ndim(value) == 2:
            out, width = value.shape if key.endswith("weight") else value.shape[::-1]
            like["head"] = {
                "kernel": jax.ShapeDtypeStruct((width, out), jnp.float32),
                "bias": jax.ShapeDtypeStruct((out,), jnp.float32),
            }
    return like


def _aside(state, table) -> list[str]:
    """Return one line per group of keys that were left aside.

    A group is the shortest prefix, cut at a dot, of which no key is used.
    """
    out = set(convert.left_aside(state, table))
    used, groups = set(), collections.Counter()
    for key in set(state) - out:
        parts = key.replace("/", ".").split(".")
        used |= {tuple(parts[:n]) for n in range(1, len(parts) + 1)}
    for key in out:
        parts = tuple(key.replace("/", ".").split("."))
        free = [n for n in range(1, len(parts)) if parts[:n] not in used]
        groups[".".join(parts[: min(free, default=len(parts))])] += 1
    return [f"left aside: {name} ({n} keys)" for name, n in sorted(groups.items())]


def _adapt(leaves, fields, one, options, notes):
    """Return (leaves, fields, mean, std) for the channels and size asked for."""
    leaves, mean, std = dict(leaves), one.mean, one.std
    had = _channels(leaves)
    if options.channels and options.channels != had:
        if fields.get("spectral_channels"):
            raise errors.UsageError(
                f"--channels={options.channels}: this model takes {had}, those of two "
                "images"
            )
        leaves[_KERNEL] = channels(leaves[_KERNEL], options.channels)
        notes.append(
            f"patch embedding of {had} channels converted to {options.channels} "
            f"({'summed' if options.channels == 1 else 'repeated and scaled'})"
        )
        had = options.channels
    if had != len(mean):
        mean, std = _spread(mean, had), _spread(std, had)
        notes.append(f"normalisation of {had} channels guessed: {mean}, {std}")
    size, patch = options.image_size or fields["image_size"], fields["patch"]
    if size % patch:
        raise errors.UsageError(
            f"--image_size={size}: must be a multiple of the patch, {patch}"
        )
    tables = [name for name in leaves if name.endswith("pos_embed")]
    if size != fields["image_size"] and tables:
        first = int(fields.get("cls", False) and fields.get("class_position", True))
        for name in tables:
            table = leaves[name]
            leaves[name] = positions.resample(table, first, size // patch, one.rule)
        notes.append(
            f"position table resampled from {fields['image_size']} to {size} px "
            f"({one.rule})"
        )
    return leaves, fields | {"image_size": size}, mean, std


def _channels(leaves) -> int:
    """Return the channels of an image: of both streams, if there are two."""
    kernels = [k for k in leaves if k.endswith("patch_embed/kernel")]
    return sum(leaves[k].shape[2] for k in kernels)


def channels(kernel, count: int) -> np.ndarray:
    """Return a patch embedding [p, p, C, D] for `count` channels.

    One channel: the sum, so that grey pixels give what they gave as three equal
    channels. Others: channels repeated in turn and scaled by C / count, so that the
    sum over channels keeps its size.

    Source: timm, models/_manipulate.py (adapt_input_conv).
    """
    kernel = np.asarray(kernel, np.float32)
    had = kernel.shape[2]
    if count == 1:
        return kernel.sum(2, keepdims=True)
    return kernel[:, :, np.arange(count) % had] * np.float32(had / count)


def _spread(values, count):
    """Return per-channel numbers for another number of channels."""
    if count == 1:
        return (float(np.mean(values)),)
    return tuple(values[i % len(values)] for i in range(count))


def _config_beside(path) -> tuple[dict, str]:
    """Return (the config.json beside a file, what to say of it).

    Raises:
        CheckpointError: it names another activation than the exact GELU.
    """
    found = _json(path.parent / "config.json")
    if "num_attention_heads" not in found:
        return {}, ""
    if found.get("hidden_act", "gelu") != "gelu":
        raise errors.CheckpointError(
            f"{path.parent / 'config.json'}: hidden_act={found['hidden_act']}; the "
            "blocks here have the exact GELU, gelu"
        )
    return found, "heads and epsilon from the config.json beside the file"


def _pixels_beside(path) -> tuple[tuple, tuple] | None:
    """Return (mean, std) of the preprocessor_config.json beside a file, if any."""
    found = _json(path.parent / "preprocessor_config.json")
    mean, std = found.get("image_mean"), found.get("image_std")
    if isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std):
        return tuple(map(float, mean)), tuple(map(float, std))
    return None


def _json(file) -> dict:
    """Return a JSON object; {} if there is no such file or it holds another thing."""
    try:
        found = json.loads(file.read_text())
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}
