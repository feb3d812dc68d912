"""What is said of weights outside of their tensors: beside the file, in its header.

    config.json               timm's hub ("architecture", "pretrained_cfg") and
                              transformers ("num_attention_heads", ...)
    preprocessor_config.json  transformers: mean, std and size of an image
    a safetensors header      "vitssl.facts", which our own exports carry
    published names           architectures of timm, files and keys of MoCo v3

What a person says on the command line comes first, then the files, which a person may
edit, then the header, then published names; who disagrees with an earlier one is told.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from vitssl import errors, ranges
from vitssl.convert import family

KEY = "vitssl.facts"
GUESSED = "GUESSED"
FLAGS = ("mean", "std", "heads", "eps", "activation", "image_size")

_OF_255 = "values in 0..255 are divided by 255"
PIXELS = {
    "mean": tuple[Annotated[float, ranges.Range(0, 1, hint=_OF_255)], ...],
    "std": tuple[Annotated[float, ranges.Range(0, 1, True, hint=_OF_255)], ...],
}
_KINDS = PIXELS | {
    "heads": ranges.Count | tuple[ranges.Count, ...],
    "eps": Annotated[float, ranges.Range(0, 1, True, True)],
    "activation": str,
    "pool": Literal["cls", "mean"],
    "image_size": ranges.Count | tuple[ranges.Count, ranges.Count],
    "width": ranges.Count,
    "patch": ranges.Count,
}
_EXACT = ("gelu", "gelu_python")  # Names of the exact GELU.

# timm's architectures: the beginning of the name, and {width: heads}.
_TIMM = {
    "vit_tiny": {192: 3},
    "vit_wee": {256: 4},
    "vit_pwee": {256: 4},
    "vit_dwee": {256: 4},
    "vit_little": {320: 5},
    "vit_dlittle": {320: 5},
    "vit_small": {384: 6},
    "vit_medium": {512: 8},
    "vit_betwixt": {640: 10},
    "vit_base": {768: 12},
    "vit_large": {1024: 16},
    "vit_so": {1152: 16},
    "vit_huge": {1280: 16},
    "vit_giant": {1408: 16, 1536: 24},
    "vit_gigantic": {1664: 16},
    "vit_7b": {4096: 32},
    "deit_tiny": {192: 3},
    "deit_small": {384: 6},
    "deit_base": {768: 12},
    "deit3_small": {384: 6},
    "deit3_medium": {512: 8},
    "deit3_base": {768: 12},
    "deit3_large": {1024: 16},
    "deit3_huge": {1280: 16},
    "flexivit_small": {384: 6},
    "flexivit_base": {768: 12},
    "flexivit_large": {1024: 16},
}
# Chen et al. 2021, arXiv:2104.02057: twelve heads for its ViT-S too.
_MOCO_V3 = {384: 12, 768: 12, 1024: 16, 1280: 16}
_MOCO_V3_FILE = re.compile(r"(linear-)?vit-[bslh]-\d+ep\b.*")
_ACTIVATIONS = re.compile(r"quick_?gelu")


@dataclasses.dataclass(frozen=True)
class Fact:
    """A value, and who says it.

    Attributes:
        sure: the one who says it had not guessed it before.
    """

    value: Any
    where: str
    sure: bool = True


def flags(options: family.Options) -> dict[str, Fact]:
    """Return what the user says.

    Raises:
        UsageError: a value that cannot be.
    """
    found = {}
    for key in FLAGS:
        if value := getattr(options, key):
            if fault := ranges.fault(_KINDS[key], value):
                raise errors.UsageError(f"--{key}={_text(value)}: {fault}")
            found[key] = Fact(value, f"--{key}")
    return found


def read(path: pathlib.Path, metadata: Mapping, notes: list) -> list[dict[str, Fact]]:
    """Return what a header and the files beside weights say, the nearest first.

    Args:
        path: of the weights.
        metadata: texts of a safetensors header.
        notes: told which file is there and cannot be read.
    """
    config, where = _json(path.parent / "config.json", notes), "config.json"
    pixels = _json(path.parent / "preprocessor_config.json", notes)
    timm = "architecture" in config or "pretrained_cfg" in config
    named = _named(_of_timm(config) if timm else _of_transformers(config))
    return [
        {k: Fact(v, where) for k, v in named.items()},
        {k: Fact(v, "preprocessor_config.json") for k, v in _processor(pixels).items()},
        _header(metadata),
    ]


def published(path: pathlib.Path, prefix: str, architecture: str, width: int) -> dict:
    """Return what a published name says of a ViT of a width.

    Args:
        prefix: what was taken off every key.
        architecture: of timm, or "".
    """
    names = [n for n in _TIMM if architecture.startswith(n)]
    if names and width in _TIMM[max(names, key=len)]:
        heads = _TIMM[max(names, key=len)][width]
        return {"heads": Fact(heads, f"timm's {architecture}")}
    moco = "base_encoder." in prefix or _MOCO_V3_FILE.fullmatch(path.name)
    if moco and width in _MOCO_V3:
        return {"heads": Fact(_MOCO_V3[width], "MoCo v3, by its names")}
    return {}


def architecture(path: pathlib.Path) -> str:
    """Return timm's name of the weights in the config.json beside them, or ""."""
    found = _json(path.parent / "config.json", [])
    return str(found.get("architecture", ""))


def merged(sources: list[dict[str, Fact]], notes: list) -> dict[str, Fact]:
    """Return {key: fact} of the first source that has it; who disagrees is told.

    Raises:
        CheckpointError: a file says a value that cannot be, and no flag another.
    """
    found: dict[str, Fact] = {}
    for source in sources:
        for key, fact in source.items():
            first = found.get(key)
            if first is None:
                if fault := ranges.fault(_KINDS[key], fact.value):
                    way_out = f"; say --{key}=..." if key in FLAGS else ""
                    raise errors.CheckpointError(
                        f"{fact.where}: {key}={_text(fact.value)}: {fault}{way_out}"
                    )
                found[key] = fact
            elif not same(first.value, fact.value):
                notes.append(
                    f"{key}={_text(first.value)} by {first.where} contradicts "
                    f"{_text(fact.value)} of {fact.where}; {first.where} decides"
                )
    return found


def check_activation(facts: Mapping[str, Fact]) -> None:
    """Refuse any other than the exact GELU.

    Raises:
        UsageError: a flag says so.
        CheckpointError: a file does.
    """
    fact = facts.get("activation")
    if fact is None or fact.value in _EXACT:
        return
    kind = errors.UsageError if fact.where[:2] == "--" else errors.CheckpointError
    raise kind(
        f"{fact.where}: hidden_act={fact.value}; the blocks here have the exact GELU, "
        "gelu (--activation=gelu takes the weights all the same)"
    )


def guess(key: str, value: Any, why: str) -> str:
    """Return the line that says that a value is a guess, and which flag decides."""
    return f"{GUESSED} {key}={_text(value)} ({why}); --{key}=... says it"


def same(a: Any, b: Any) -> bool:
    """Return whether two values agree; one number stands for one of every channel."""
    a, b = (list(x) if isinstance(x, list | tuple) else [x] for x in (a, b))
    if len(set(map(str, a))) == 1 or len(set(map(str, b))) == 1:
        n = max(len(a), len(b))
        a, b = (x * n if len(x) == 1 else x for x in (a, b))
    if len(a) != len(b):
        return False
    return all(
        abs(x - y) <= 1e-6 * max(abs(x), abs(y), 1e-6)
        if isinstance(x, int | float) and isinstance(y, int | float)
        else x == y
        for x, y in zip(a, b, strict=True)
    )


def facts_of(about: Any) -> dict[str, str]:
    """Return the entries of a safetensors header that say a `backbone.About`."""
    model = about.model
    said = dict(mean=about.mean, std=about.std, pool=about.pool, rule=about.rule)
    if model:
        said |= dict(heads=model.get("heads"), image_size=model.get("image_size"))
        said |= dict(activation="gelu", resampling=model.get("resampling"))
        if model.get("name", "vit") == "vit":
            said["eps"] = model.get("norm_eps", 1e-6)
    found = [n.split(" ", 1)[1].split("=")[0] for n in about.notes if is_guess(n)]
    said["guessed"] = sorted(set(found))
    return {KEY: json.dumps({k: v for k, v in said.items() if v is not None})}


def is_guess(note: str) -> bool:
    """Return whether a note says that a value is a guess."""
    return note.startswith(f"{GUESSED} ")


def header(metadata: Mapping) -> dict:
    """Return what our own exports say in their header; {} of other files."""
    try:
        found = json.loads(metadata.get(KEY, "{}"))
    except ValueError:
        return {}
    if not isinstance(found, dict) or not isinstance(found.get("guessed", []), list):
        return {}
    return found


def _header(metadata) -> dict[str, Fact]:
    said = header(metadata)
    guessed = said.get("guessed") or ()
    where = "the file's header"
    return {
        key: Fact(_tuple(value), where, key not in guessed)
        for key, value in said.items()
        if key in _KINDS
    }


def _of_timm(config) -> dict:
    """Return what a config.json of timm's hub says; older ones are flat."""
    cfg = config.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else config
    more = config.get("model_args")
    more = more if isinstance(more, dict) else {}
    size = cfg.get("input_size")
    pools = {"token": "cls", "avg": "mean"}
    act = more.get("act_layer")
    if act is None and _ACTIVATIONS.search(str(config.get("architecture", ""))):
        act = "quick_gelu"
    return dict(
        mean=cfg.get("mean"),
        std=cfg.get("std"),
        image_size=size[1:] if isinstance(size, list) and len(size) == 3 else None,
        heads=more.get("num_heads"),
        width=more.get("embed_dim"),
        patch=more.get("patch_size"),
        pool=pools.get(str(config.get("global_pool"))),
        activation=act,
    )


def _of_transformers(config) -> dict:
    config = config.get("vision_config") or config  # Of a model of two modalities.
    if not isinstance(config, dict) or "num_attention_heads" not in config:
        return {}
    return dict(
        heads=config.get("num_attention_heads"),
        eps=config.get("layer_norm_eps"),
        activation=config.get("hidden_act"),
        image_size=config.get("image_size"),
        width=config.get("hidden_size"),
        patch=config.get("patch_size"),
    )


def _named(said) -> dict:
    """Return what is said as our types: sizes and lists as one number or a tuple."""
    found = {k: _tuple(v) for k, v in said.items() if v is not None}
    size = found.get("image_size")
    if isinstance(size, tuple) and len(set(map(str, size))) == 1:
        found["image_size"] = size[0]
    for key in ("mean", "std"):
        if key in found and isinstance(found[key], int | float):
            found[key] = (found[key],)
    return found


def _processor(pixels) -> dict:
    """Return what a preprocessor_config.json says, for pixels in [0, 1].

    It multiplies pixels in 0..255 by `rescale_factor`, then subtracts the mean and
    divides by the standard deviation; either may be switched off.
    """
    if not {"image_mean", "image_std", "do_normalize"} & set(pixels):
        return {}
    factor = pixels.get("rescale_factor", 1 / 255)
    if not pixels.get("do_rescale", True):
        factor = 1.0
    size = pixels.get("crop_size") or pixels.get("size")
    if isinstance(size, dict):
        sides = size.get("height"), size.get("width")
        size = sides if None not in sides else size.get("shortest_edge")
    mean, std = pixels.get("image_mean"), pixels.get("image_std")
    if not pixels.get("do_normalize", True):
        mean, std = 0.0, 1.0
    said = dict(mean=_scaled(mean, factor), std=_scaled(std, factor), image_size=size)
    return _named(said)


def _scaled(values, factor):
    """Return numbers of pixels times 255 times a factor for pixels in [0, 1]."""
    try:
        scale = 255 * float(factor)
        if abs(scale - 1) < 1e-6:
            return values
        if isinstance(values, list):
            return [float(v) / scale for v in values]
        return None if values is None else float(values) / scale
    except (TypeError, ValueError, ZeroDivisionError):
        return values  # What it is, is refused where ranges are.


def _json(file, notes) -> dict:
    """Return a JSON object; {} if there is none, which is told where a file is."""
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError, RecursionError) as e:
        notes.append(f"{file.name} beside the file cannot be read ({e}); left aside")
        return {}
    return found


def _tuple(value):
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value


def _text(value) -> str:
    """Return a value as its flag takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
