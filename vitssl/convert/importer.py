"""From a file of published weights to a `Backbone`."""

import collections
import dataclasses
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from vitssl import config, convert, disk, errors, sizes, tree
from vitssl.convert import (
    backbone,
    beside,
    families,
    family,
    positions,
    reader,
    shards,
)
from vitssl.data import decode
from vitssl.models import MODELS, vit

_KERNEL = "encoder/patch_embed/kernel"
_RULES = typing.get_args(positions.Rule)


def read(
    path: disk.AnyPath,
    *,
    name: str = "auto",
    part: str = "",
    options: family.Options | None = None,
) -> backbone.Backbone:
    """Return the network of a file.

    Nothing large is read or copied yet: arrays are rearranged views of the file.

    Args:
        path: `.pth`, `.safetensors` or `.npz`; also a `.safetensors` of ours, a
            folder of a hub, or the index of a file in shards.
        name: of the family.
        part: which dict of a training checkpoint; "" = the family's first choice.
        options: what the tensors do not tell.

    Raises:
        CheckpointError: the file is refused or damaged, is of no known family, or
            has keys without a place or places without a key (all named).
        UsageError: no such family or part, or an option is missing or impossible.
    """
    path = shards.file_of(path)
    options = options or family.Options()
    notes: list[str] = []
    said = beside.flags(options)
    found = shards.read(path)
    if backbone.KEY in found.metadata:
        return _own(path, name, part, options)
    one, raw, place = families.find(found.tree, name, part, options, notes)
    notes += [f"read from {place!r} of the file"] if place else []
    try:
        return _read(path, one, raw, _Said(said, found, options), notes)
    except errors.VitsslError:
        raise
    except KeyError as e:
        raise errors.CheckpointError(
            f"{path}: family {one.name}: the checkpoint lacks {e.args[0]}"
        ) from e
    except (ValueError, TypeError, IndexError, ArithmeticError, AttributeError) as e:
        # Arrays of other ranks than the family's: any line may be the first to mind.
        raise errors.CheckpointError(
            f"{path}: family {one.name}: an array has not the form it should ({e})"
        ) from e


@dataclasses.dataclass(frozen=True)
class _Said:
    """Everything that is said of weights, by whom it may be."""

    flags: dict[str, beside.Fact]
    found: reader.Weights
    options: family.Options

    def facts(self, one, state, path, notes) -> dict[str, beside.Fact]:
        """Return {key: fact}; who disagrees is in the notes."""
        tells = {
            k: beside.Fact(v, "the tensors' shapes")
            for k, v in one.tells(state).items()
        }
        for key, fact in tells.items():
            flag = self.flags.get(key)
            if flag and flag.value != fact.value:
                raise errors.UsageError(
                    f"{flag.where}={flag.value}: the tensors' shapes say {fact.value}"
                )
        nearby = beside.read(path, self.found.metadata, notes)
        nearby = [_fitting(source, one, state, notes) for source in nearby]
        return beside.merged([self.flags, tells, *nearby], notes)

    def config(self, one) -> dict:
        """Return what the checkpoint says in its code's own words."""
        recipe = self.found.metadata.get("vitssl.recipe", "{}")
        return one.told(self.found.tree) or json.loads(recipe)


def _read(path, one, raw, said, notes) -> backbone.Backbone:
    """Return the network of a family's state; arguments as in `read`."""
    state, header = one.prepare(raw, notes), beside.header(said.found.metadata)
    facts = said.facts(one, state, path, notes)
    table_options = _completed(said, one, state, path, facts, notes)
    fields = one.model(state, table_options)
    table = one.table(fields)
    about = backbone.About(
        model={},
        mean=one.mean,
        std=one.std,
        family=one.name,
        rule=header["rule"] if header.get("rule") in _RULES else one.rule,
        source=decode.printable(path.name),
    )
    if one.whole:
        leaves = convert.by_name(state, table)
        _check_kinds(leaves)
        notes += _aside(state, table)
        mean, std = _pixels(facts, about, len(about.mean), notes)
        built = _config(one, state, table_options, (mean, std), notes)
        classes = tuple(map(str, range(one.classes(state))))
        more = dict(mean=mean, std=std, config=built, classes=classes)
        return _noted(about, leaves, notes, **more)
    if header.get("resampling") and one.kind == "vit":
        fields["resampling"] = header["resampling"]
    _say_of_fields(one, fields, facts, table_options, notes)
    _check(one, fields)
    shapes = one.shapes or (lambda f, s: _like(f, s, table))
    leaves = _views(state, shapes(fields, state), table)
    notes += _aside(state, table)
    options = dataclasses.replace(said.options, config={})
    leaves, fields = _adapt(leaves, fields, about, options, notes)
    mean, std = _pixels(facts, about, backbone.channels(leaves), notes)
    pool = facts["pool"].value if "pool" in facts else one.pool
    pool = pool if fields.get("cls") else "mean"
    model = {"name": one.kind, **fields}
    return _noted(about, leaves, notes, model=model, mean=mean, std=std, pool=pool)


def _fitting(source, one, state, notes) -> dict:
    """Return what a file says, or nothing if it is of a model of other sizes."""
    shape = _kernel_shape(one, state)
    for key, here in zip(("width", "patch"), shape, strict=False):
        if key in source and source[key].value != here:
            notes.append(
                f"{source[key].where} beside the file is of another model ({key} "
                f"{source[key].value}, here {here}); nothing of it is used"
            )
            return {}
    return source


def _kernel_shape(one, state) -> tuple[int, ...]:
    """Return (width, patch) of a ViT's state; () where it is another network's."""
    if one.kind != "vit" or one.whole:
        return ()
    fields = one.model(state, family.Options(heads=1))
    return fields["width"], fields["patch"]


def _completed(said, one, state, path, facts, notes) -> family.Options:
    """Return the options with what is said elsewhere, for `Family.model`.

    A published name decides about heads where nothing else does.
    """
    width = next(iter(_kernel_shape(one, state)), 0)
    off = next((n for n in notes if n.startswith("read below the prefix")), "")
    named = beside.published(path, off, beside.architecture(path), width)
    for key, fact in named.items():
        facts.setdefault(key, fact)
    values = {k: f.value for k, f in facts.items()}
    config, heads = said.config(one), values.get("heads", 0)
    if isinstance(heads, tuple):  # Of every stage; the families call it so.
        config, heads = {**config, "num_heads": heads}, 0
    size = values.get("image_size", 0)
    beside.check_activation(facts)
    return dataclasses.replace(
        said.options,
        heads=heads,
        eps=values.get("eps", 0.0),
        image_size=size if isinstance(size, int) else 0,
        config=config,
    )


def _say_of_fields(one, fields, facts, options, notes):
    """Complete the fields of a model by what is said, and say what is a guess."""
    own = {f.name: f.default for f in dataclasses.fields(MODELS[one.kind])}
    if "norm_eps" in own:
        eps = options.eps or fields.get("norm_eps", own["norm_eps"])
        fields["norm_eps"] = eps
        _guess("eps", eps, f"the usual one of family {one.name}", facts, notes)
    elif "eps" in facts and facts["eps"].where[:2] == "--":
        raise errors.UsageError(f"--eps: a {one.kind} has no such field")
    if one.kind == "vit":
        fields["heads"] = options.heads or fields["heads"]
        why = f"as published models of width {fields['width']} have"
        if fields["width"] == 384:
            why += "; MoCo v3's has 12"
        _guess("heads", fields["heads"], why, facts, notes)
        why = "the exact one; no other is supported"
        _guess("activation", "gelu", why, facts, notes)
        _say_of_size(fields, facts, notes)
    elif one.kind == "hvit" and "num_heads" not in options.config:
        _guess("heads", fields["heads"], "32 channels each", facts, notes)


def _say_of_size(fields, facts, notes):
    """Compare the size that is said with that of the position table."""
    size, said = fields["image_size"], facts.get("image_size")
    if fields.get("positions") == "none":  # Nothing in the tensors tells it.
        _guess("image_size", size, "positions are computed", facts, notes)
    elif said and said.where[:2] != "--" and not beside.same(said.value, size):
        notes.append(
            f"{said.where}: images of {sizes.written(said.value)}; the position table "
            f"is for {sizes.written(size)}; --image_size=N resamples it"
        )


def _guess(key, value, why, facts, notes):
    """Say that a value is a guess, unless someone knows it."""
    fact = facts.get(key)
    if fact is None:
        notes.append(beside.guess(key, value, why))
    elif not fact.sure:
        why = "it was one when these weights were imported first"
        notes.append(beside.guess(key, fact.value, why))
    else:
        notes.append(f"{key}={fact.value}: {fact.where}")


def _pixels(facts, about, channels, notes):
    """Return (mean, std) for so many channels; say where they come from."""
    made = []
    for key in ("mean", "std"):
        why = f"the usual one of family {about.family}"
        values = facts[key].value if key in facts else getattr(about, key)
        values = values if isinstance(values, tuple) else (values,)
        if key in facts and facts[key].where[:2] == "--":
            if len(values) not in (1, channels):
                raise errors.UsageError(
                    f"--{key}: {len(values)} values for {channels} channels"
                )
        if len(values) != channels and len(values) > 1:
            values = _spread(values, channels)
            why = f"for {channels} channels"
            notes.append(beside.guess(key, values, why))
        else:
            values = values * channels if len(values) == 1 else values
            _guess(key, values, why, facts, notes)
        made.append(tuple(map(float, values)))
    return made


def _views(state, like, table):
    """Return `convert.views`, all of numbers that may be weights.

    Raises:
        CheckpointError: also the way out for keys that have no place.
    """
    try:
        leaves = convert.views(state, like, table)
    except convert.Misfit as e:
        if not e.surplus:
            raise errors.CheckpointError(str(e)) from e
        names = ",".join(dict.fromkeys(e.surplus[:3]))
        more = ",..." if len(e.surplus) > 3 else ""
        raise errors.CheckpointError(
            f"{e}\n  keys that are not needed can be left aside by name or glob: "
            f"--ignore={names}{more}"
        ) from e
    _check_kinds(leaves)
    return leaves


def _check_kinds(leaves):
    """Refuse whole numbers, which are weights only with the scales they lack."""
    for name, leaf in leaves.items():
        if np.asarray(leaf).dtype.kind in "iub":
            raise errors.CheckpointError(
                f"{name}: {np.asarray(leaf).dtype}, quantised weights without scales; "
                "save them dequantised, as float32 or float16"
            )


def _config(one, state, options, pixels, notes) -> dict:
    """Return the config of a whole method; {} where the file does not tell it."""
    try:
        return one.config(state, options, *pixels, notes)
    except errors.VitsslError as e:  # A run may start from it all the same.
        notes.append(f"{backbone.NO_FEATURES}{e}")
        return {}


def _noted(about, leaves, notes, **more) -> backbone.Backbone:
    about = dataclasses.replace(about, notes=tuple(notes), **more)
    return backbone.Backbone(about, leaves)


def _own(path, name, part, options):
    """Return a network that this package wrote, for another image size or channels.

    Raises:
        UsageError: an option that says what the file says itself.
    """
    own = ("heads", "eps", "activation", "mean", "std", "prefix", "ignore")
    given = {"family": name.replace("auto", ""), "part": part}
    for key, value in (given | {key: getattr(options, key) for key in own}).items():
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
    leaves, fields = _adapt(found.leaves, fields, about, options, notes)
    mean, std = about.mean, about.std
    if (count := backbone.channels(leaves)) != len(mean):
        mean, std = _spread(mean, count), _spread(std, count)
        notes += [f"mean={mean}, std={std}: spread over {count} channels"]
    sized = {k: fields[k] for k in ("image_size",) if k in fields}
    model = dict(about.model) | sized
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
    used, groups = set(), collections.Counter[str]()
    for key in set(state) - out:
        parts = key.replace("/", ".").split(".")
        used |= {tuple(parts[:n]) for n in range(1, len(parts) + 1)}
    for key in out:
        parts = tuple(key.replace("/", ".").split("."))
        free = [n for n in range(1, len(parts)) if parts[:n] not in used]
        groups[".".join(parts[: min(free, default=len(parts))])] += 1
    order = sorted(groups, key=tree.natural)
    return [f"left aside: {name} ({groups[name]} keys)" for name in order]


def _adapt(leaves, fields, one, options, notes):
    """Return (leaves, fields) for the channels and size asked for."""
    leaves = dict(leaves)
    had = backbone.channels(leaves)
    if options.channels < 0:
        raise errors.UsageError(
            f"--channels={options.channels}: 1 or more, 0 as stored"
        )
    if options.channels and options.channels != had:
        if fields.get("spectral_channels"):
            raise errors.UsageError(
                f"--channels={options.channels}: this model takes {had}, those of two "
                "images"
            )
        (kernel,) = backbone.reads(leaves)
        leaves[kernel] = channels(leaves[kernel], options.channels)
        notes.append(
            f"patch embedding of {had} channels converted to {options.channels} "
            f"({'summed' if options.channels == 1 else 'repeated and scaled'})"
        )
    if "patch" not in fields:  # A convolutional network has no size.
        if options.image_size:
            raise errors.UsageError(
                f"--image_size={options.image_size}: this network takes images of any "
                "size; leave it out"
            )
        return leaves, fields
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
    return leaves, fields | {"image_size": size}


def channels(kernel: npt.ArrayLike, count: int) -> np.ndarray:
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
