"""What a family of published weights is, and what its members share."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from vitssl import errors
from vitssl.convert import Table, positions, vit_names

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

HEADS = {  # Width: heads of the published models; others need to be told.
    192: 3,
    384: 6,
    768: 12,
    1024: 16,
    1152: 16,
    1280: 16,
    1408: 16,
    1536: 24,
    4096: 32,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says of a file, for what cannot be read off its tensors.

    Attributes:
        heads: 0 = those of the published model of this width.
        image_size: side in pixels to resample the position table for; 0 = as stored.
        channels: to convert the patch embedding to; 0 = as stored.
        eps: of every LayerNorm; 0 = what the files beside say.
        activation: of the MLPs; "" = what the files beside say.
        mean, std: pixel normalisation, of [0, 1] values; () = as the files beside say.
        prefix: of the keys to read, "model.backbone."; None = the one that fits.
        ignore: names or globs of keys to leave aside, and all below them.
        config: what a training checkpoint says of its model, in its own words, or {}.
    """

    heads: int = 0
    image_size: int = 0
    channels: int = 0
    eps: float = 0.0
    activation: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    prefix: str | None = None
    ignore: tuple[str, ...] = ()
    config: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of weights.

    Attributes:
        name: what `--family` calls it.
        about: one line for a person.
        fits: whether a state dict, its wrapping stripped, is of this family.
        model: (state, options) -> fields of the model; of a whole method, what `table`
            needs to know.
        table: fields -> `Table` from the state that `prepare` returns into
            {"encoder": ..., "head": ...}.
        prepare: (state, notes) -> state: keys as `table` knows them; says in `notes`
            what it added, folded or left out.
        places: dicts of a training checkpoint to look into, best first.
        strip: prefixes to take off every key that has one.
        named: fits only the dicts of a training checkpoint that `places` names.
        whole: not an encoder but all parameters of a method, see `families`.
        config: of a whole method: (state, options, mean, std, notes) -> config.
        classes: of a whole method: state -> how many its classifier names.
        kind: key of `models.MODELS`; `model` returns its fields.
        shapes: (fields, state) -> nested shapes of {"encoder", "head"}, where they are
            not those of a ViT and a linear layer.
        told: (what the file holds beside arrays) -> `Options.config`.
        tells: prepared state -> {"heads": n} where tensors tell them after all.
        rule: how its code resamples position tables.
        mean, std: pixel normalisation it was trained with, of [0, 1] values.
        pool: what its users call the feature of an image.
    """

    name: str
    about: str
    fits: Callable[[Mapping], bool]
    model: Callable[[Mapping, Options], dict]
    table: Callable[[dict], Table]
    prepare: Callable[[Mapping, list], dict] = lambda state, notes: dict(state)
    places: tuple[str, ...] = ("model", "state_dict", "module", "")
    strip: tuple[str, ...] = ("module.",)
    named: bool = False
    whole: bool = False
    config: Callable[..., dict] | None = None
    classes: Callable[[Mapping], int] = lambda state: 0
    kind: str = "vit"
    shapes: Callable[[dict, Mapping], dict] | None = None
    told: Callable[[Mapping], dict] = lambda tree: {}
    tells: Callable[[Mapping], dict] = lambda state: {}
    rule: positions.Rule = "antialias"
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    pool: str = "cls"


def encoder_and_head(table: Table, head: str = "head") -> Table:
    """Return an encoder's table and that of a classifier's linear layer, of key `head`.

    Both go under their names here, "encoder/" and "head/".
    """
    aside = tuple(name for name in table.ignore if name != "head.{*}")
    rules = Table(table.rules, aside).under(flax="encoder/")
    return Table(vit_names.linear(head, "head")) + rules


def stripped(state: Mapping, prefixes: Iterable[str]) -> dict:
    """Return the state with prefixes taken off every key, in their order.

    Raises:
        CheckpointError: two keys become one.
    """
    found = {}
    for key, value in state.items():
        if (short := short_name(key, prefixes)) in found:
            raise errors.CheckpointError(f"{key}: another key is {short} too")
        found[short] = value
    return found


def short_name(key: str, prefixes: Iterable[str]) -> str:
    """Return a key without prefixes, taken off in their order."""
    for prefix in prefixes:
        key = key.removeprefix(prefix)
    return key


def depth(state: Mapping, template: str) -> int:
    """Return the number of blocks: 1 + the largest integer {i} of a template."""
    pattern = re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))
    found = [int(m[1]) for key in state if (m := pattern.match(key))]
    return 1 + max(found, default=-1)


def heads(width: int, options: Options) -> int:
    """Return the number of heads.

    Raises:
        UsageError: neither options nor the width say it.
    """
    known = options.heads or HEADS.get(width, 0)
    if not known:
        raise errors.UsageError(
            f"a width of {width} is none of the published ones; say --heads=N"
        )
    return int(known)


def geometry(state: Mapping, names: Mapping[str, str], options: Options) -> dict:
    """Return the fields of `models.vit.ViT` that tensors tell.

    Args:
        names: keys of "kernel" (patch embedding, O I H W), "fc1" (an MLP's first
            weight, out x in), "cls", "registers", "pos_embed", "ls1" and "block", the
            template of any key of a block.
    """
    out, _, patch, _ = state[names["kernel"]].shape
    has_cls = names["cls"] in state
    registers = (
        state[names["registers"]].shape[-2] if names["registers"] in state else 0
    )
    fields = dict(
        width=out,
        depth=depth(state, names["block"]),
        heads=heads(out, options),
        patch=patch,
        mlp_ratio=state[names["fc1"]].shape[0] / out,
        layerscale=1e-5 if names["ls1"] in state else 0.0,
        cls=has_cls,
        registers=registers,
    )
    if names["pos_embed"] in state:
        rows = state[names["pos_embed"]].shape[1]
        extra = positions.prefix(rows, (1, 0) if has_cls else (0,))
        fields["class_position"] = bool(extra)
        fields["image_size"] = patch * positions.side(rows - extra)
    else:
        fields["image_size"] = options.image_size or 224
        fields["positions"] = "none"
    return fields


def add_zero_bias(state: dict, keys: Iterable[str], notes: list) -> None:
    """Add biases that a model does without, as zeros: the same numbers.

    The state is changed in place, and `notes` told.
    """
    added = [key for key in keys if key not in state]
    for key in added:
        weight = state[key.replace(".bias", ".weight")]
        state[key] = np.zeros(weight.shape[0], weight.dtype)
    if added:
        notes.append(f"{len(added)} biases the model does without: zeros ({added[0]})")


def is_vit(state: Mapping) -> bool:
    """Return whether a state dict has timm's names of a ViT."""
    return (
        "patch_embed.proj.weight" in state
        and np.ndim(state["patch_embed.proj.weight"]) == 4
        and any(key.startswith("blocks.0.") for key in state)
    )
