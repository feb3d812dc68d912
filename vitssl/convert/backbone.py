"""A network with its weights in one file: what an import writes and a run can export.

FOLDER/weights.safetensors holds leaves by name ("encoder/block_0/attn/qkv/kernel") and,
in its header under "vitssl", a JSON text that says which model they are of and how
pixels are normalised. The file alone is enough; the model card beside it says the same
to people.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vitssl import config, disk, errors, ranges, sizes, tree
from vitssl.convert import beside, reader, safetensors
from vitssl.models import MODELS, patches

FILE = "weights.safetensors"
FORMAT = 1
KEY = "vitssl"
NO_FEATURES = "no features of its own: "  # A note of imports that tell no config.


@dataclasses.dataclass(frozen=True)
class About:
    """What is said of weights beside the weights.

    Attributes:
        model: a config section `model`: {"name": "vit", "width": ...}; {} where the
            weights are a whole method's.
        mean, std: pixel normalisation, of [0, 1] values.
        pool: "cls" or "mean" (of patch tokens): the feature of an image.
        family: where the weights come from; "vitssl" for a run of ours.
        rule: how that family resamples position tables.
        source: name of the file or run.
        sha256: of the source file; "" for a run.
        notes: what the conversion added, folded or left out.
        config: of the run; of an import, what builds a whole method, or {}.
        classes: names, of a whole method that has some.
        metrics: the run's last scores.
    """

    model: dict
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: str = "cls"
    family: str = "vitssl"
    rule: str = "antialias"
    source: str = ""
    sha256: str = ""
    notes: tuple[str, ...] = ()
    config: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Weights {"encoder/...": array, "head/kernel": ...}, and what they are of.

    Arrays may be views of a file, in any float dtype.
    """

    about: About
    leaves: Mapping[str, np.ndarray]

    def module(self, **fields: Any) -> Any:
        """Return the linen module, with some fields changed (a `models.Backbone`).

        Raises:
            CheckpointError: the description fits no model of this version.
        """
        values = dict(self.about.model)
        if not values:
            raise errors.CheckpointError(
                f"{self.about.source}: all parameters of a method, no encoder alone; "
                "start a run from it with --config.init.from, or vitssl.load it"
            )
        name = values.pop("name", "vit")
        if name not in MODELS:
            raise errors.CheckpointError(
                f"model {name!r}: this version has {', '.join(MODELS)}"
            )
        problems = config.Problems()
        made = config.section(MODELS[name], values | fields, "model", problems)
        if problems:
            raise errors.CheckpointError("weights: " + "; ".join(problems))
        return made

    def encode(self, pool: str = "") -> "Encode":
        """Return the function from images to features; the module's own pool is "".

        Raises:
            CheckpointError: as `module`.
            UsageError: there is no such pool.
        """
        module, pool = self.module(), pool or self.about.pool
        known = [name for name in ("cls", "mean") if name in module.poolings]
        if pool not in known:
            more = "" if "cls" in known else " (there is no class token)"
            raise errors.UsageError(f"pool={pool}: {' or '.join(known)}{more}")
        return Encode(module, self.about.mean, self.about.std, pool)

    def encoder(self) -> dict:
        """Return the nested parameters of the module, as float32 arrays."""
        return self._under("encoder/", "params").get("params", {})

    def variables(self) -> dict:
        """Return what the module is applied with: parameters, batch statistics."""
        return {"params": self.encoder()} | self._under("stats/encoder/", "batch_stats")

    def _under(self, prefix, name) -> dict:
        """Return {name: nested float32 leaves under a prefix}, {} without any."""
        found = {
            key.removeprefix(prefix): np.asarray(leaf, np.float32)
            for key, leaf in self.leaves.items()
            if key.startswith(prefix)
        }
        return {name: tree.nest(found)} if found else {}

    @property
    def channels(self) -> int:
        """Channels of an image: of both streams, if there are two."""
        return channels(self.leaves)

    def check(self) -> None:
        """Compare the encoder with its description; nothing of whole methods.

        Raises:
            CheckpointError: naming parameters that are missing or of other shapes.
        """
        if not self.about.model:
            return
        module = self.module()
        size = getattr(module, "table_size", None)
        size = size or sizes.pair(getattr(module, "image_size", 64))
        image = jax.ShapeDtypeStruct((1, *size, self.channels or 3), jnp.float32)
        made, faults = jax.eval_shape(module.init, jax.random.key(0), image), []
        want = {"encoder": made["params"]}
        if "batch_stats" in made:
            want["stats"] = {"encoder": made["batch_stats"]}
        for name, leaf in tree.flat(want).items():
            if name not in self.leaves:
                faults.append(f"{name} is missing")
            elif self.leaves[name].shape != leaf.shape:
                there = self.leaves[name].shape
                faults.append(f"{name} is {there}, the description says {leaf.shape}")
        if faults:
            more = f"; {len(faults) - 3} more" if len(faults) > 3 else ""
            raise errors.CheckpointError(
                f"{self.about.source}: {'; '.join(faults[:3])}{more}"
            )

    @property
    def size(self) -> int:
        """Number of parameters."""
        return tree.size(dict(self.leaves))


@dataclasses.dataclass(frozen=True)
class Encode:
    """(variables, image) -> features of a backbone of `models.MODELS`."""

    module: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: str

    def __call__(self, variables: Mapping, image: Any) -> dict[str, Any]:
        """Return pooled [B, D] and patch tokens [B, N, D] of images [B, H, W, C]."""
        x = patches.normalise(image, self.mean, self.std)
        found = self.module.apply(variables, x, method="features")
        return {"pooled": found[self.pool], "tokens": found["tokens"]}


_READS = r".*patch_embed/kernel|(.*/)?(encoder|backbone)/(conv1|stem)/kernel"


def reads(leaves: Iterable[str]) -> list[str]:
    """Return the names of the kernels that read pixels."""
    return [name for name in leaves if re.fullmatch(_READS, name)]


def channels(leaves: Mapping[str, Any]) -> int:
    """Return the channels of an image: of both streams, if there are two."""
    return sum(leaves[k].shape[2] for k in reads(leaves))


def is_backbone(path: disk.AnyPath) -> bool:
    """Return whether a path is a file or a folder of this format, by its name."""
    path = pathlib.Path(path)
    return path.suffix == ".safetensors" or (path / FILE).is_file()


def read(path: disk.AnyPath) -> Backbone:
    """Return the weights of a file, or of a folder with `weights.safetensors`.

    Arrays are read-only views of the file.

    Raises:
        CheckpointError: no such file, damage, or not of this format.
    """
    path = pathlib.Path(path)
    file = path / FILE if path.is_dir() else path
    found = reader.read(file)
    if KEY not in found.metadata:
        raise errors.CheckpointError(
            f"{file}: not converted yet; run python -m vitssl.convert import {file} "
            "--to=FOLDER"
        )
    try:
        text = json.loads(found.metadata[KEY])
        version = text.pop("format")
        about = About(**_tuples(text)) if version == FORMAT else None
        faults = [] if about is None else _faults(about)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise errors.CheckpointError(f"{file}: damaged description ({e})") from e
    if about is None:
        raise errors.CheckpointError(
            f"{file}: format {version}, this version reads {FORMAT}"
        )
    if faults:
        raise errors.CheckpointError(f"{file}: damaged description ({faults[0]})")
    return Backbone(about, found.tree)


def _faults(about) -> list[str]:
    """Return what is wrong with the normalisation and the pool of a description."""
    told = [(key, beside.PIXELS[key], getattr(about, key)) for key in ("mean", "std")]
    found = [f"{k}={v}: {why}" for k, kind, v in told if (why := ranges.fault(kind, v))]
    return found + [f"pool={about.pool}"] * (about.pool not in _POOLS)


def write(
    path: disk.AnyPath,
    backbone: Backbone,
    sha256: Callable[[], str] | None = None,
    dtype: str = "float32",
) -> pathlib.Path:
    """Write weights in one dtype, two arrays at a time; return the file.

    Args:
        path: a folder (made if need be) or a `.safetensors` file.
        backbone: arrays of any float dtype.
        sha256: () -> digest to describe the weights by instead of their own, asked
            last, so that it may be computed meanwhile.
        dtype: "float32", or "float16" for half the file; reading gives float32 again.

    Raises:
        CheckpointError: weights that are no finite numbers.
    """
    if faults := _faults(backbone.about):
        raise errors.UsageError(f"{backbone.about.source}: {faults[0]}")
    path = pathlib.Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    leaves = backbone.leaves
    shapes = {n: (tuple(x.shape), np.dtype(dtype)) for n, x in leaves.items()}

    def text(digest):
        about = dataclasses.replace(backbone.about, sha256=digest)
        return {KEY: describe(about)} | beside.facts_of(about)

    first, last = text(backbone.about.sha256), None
    if sha256 is not None:
        first, last = text("0" * 64), lambda: text(sha256())
    order = safetensors.order(shapes)

    def make(name):
        with np.errstate(over="ignore"):  # What float16 cannot hold is told next.
            array = contiguous(leaves[name]).astype(dtype, copy=False)
        return check_finite(name, array)

    with futures.ThreadPoolExecutor(1) as pool:
        made = _ahead(pool, make, order)
        safetensors.write_lazily(file, shapes, made, first, last)
    return file


def _ahead(pool, make, names):
    """Yield (name, make(name)), the next one being made while one is used."""
    waiting = None
    for name in names:
        one = name, pool.submit(make, name)
        if waiting:
            yield waiting[0], waiting[1].result()
        waiting = one
    if waiting:
        yield waiting[0], waiting[1].result()


def check_finite(name: str, x: np.ndarray) -> np.ndarray:
    """Return weights as they are.

    Raises:
        CheckpointError: some are not finite.
    """
    bad = x.size - int(np.isfinite(x).sum())
    if bad:
        raise errors.CheckpointError(
            f"{name}: {bad} of {x.size} values are not finite (NaN, or beyond "
            f"{x.dtype}): their training had failed; take an earlier checkpoint"
        )
    return x


def digest(*paths: disk.AnyPath) -> str:
    """Return the sha256 of a file, in hexadecimal; of several, one after the other."""
    found = hashlib.sha256()
    for path in paths:
        with pathlib.Path(path).open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()


def write_card(
    file: pathlib.Path,
    source: Backbone,
    layout: str,
    snippet: str,
    digested: bool = True,
) -> None:
    """Write the model card of a file beside it, see `card_of`.

    Args:
        file: the exported file.
        source: what was exported.
        layout: its layout.
        snippet: lines that load it; {file} and {folder} are filled in.
        digested: read the file for its sha256; of an import that of its source is
            enough.
    """
    about = source.about
    code = snippet.replace("{file}", file.name).replace("{folder}", ".")
    data = about.config.get("data", {})
    facts = {
        "Parameters": f"{source.size:,}",
        "Model": _inline(about.model),
        "Normalisation": f"mean {about.mean}, std {about.std} of pixels in [0, 1]",
        "Feature of an image": _POOLS[about.pool],
        "Family": about.family,
        "Source": _without_places(about.source) or "unknown",
        "sha256 of the source": about.sha256,
        "sha256 of this file": digest(file) if digested else "",
        "Training data": _inline(
            {k: data[k] for k in ("source", "split") if k in data}
        ),
        "Scores": _inline(about.metrics),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)
    notes = "\n".join(f"- {placeless(note)}" for note in about.notes)
    parts = [
        *([_front(layout, source)] if is_of_hub(file) else []),
        f"# {_title(file)}",
        f"Weights in the layout `{layout}`, written by vitssl.",
        f"| | |\n|---|---|\n{rows}",
        f"```python\n{code}```",
    ]
    if notes:
        parts.append(f"## What the conversion did\n\n{notes}")
    if about.config:
        settings = json.dumps(_without_places(about.config), indent=1)
        parts.append(f"## Config of the run\n\n```json\n{settings}\n```")
    text = "\n\n".join(parts) + "\n"
    card_of(file).write_text(text, "utf-8", "backslashreplace")


# A path that begins somewhere: /a/b, ~/a, ../a, C:\\a. An address (//) is none.
_PLACE = re.compile(
    r"(?<![\w:/.~])(?:(?:~|\.{1,2})?/(?![/\s])|[A-Za-z]:\\)[^\s'\",;)]*"
)


def placeless(text: str) -> str:
    """Return a text whose paths are cut to their last name: a card may be published."""
    return _PLACE.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _without_places(value, key=""):
    """Return a config without the folders of the machine it ran on."""
    if isinstance(value, Mapping):
        return {k: _without_places(v, k) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_without_places(v, key) for v in value]
    placed = isinstance(value, str) and (
        _PLACE.match(value) or key in ("root", "masks")
    )
    return _last(value) if placed else value


def is_of_hub(file: pathlib.Path) -> bool:
    """Return whether a file is the one that hubs know, in a folder of its own."""
    return file.name == "model.safetensors"


def card_of(file: pathlib.Path) -> pathlib.Path:
    """Return where the model card of a file is: README.md of a hub, else NAME.md."""
    return file.with_name("README.md") if is_of_hub(file) else file.with_suffix(".md")


def _title(file) -> str:
    return file.absolute().parent.name if is_of_hub(file) else file.stem


def _front(layout, source) -> str:
    """Return the front matter of a card, by which a hub lists a model."""
    heads = layout == "timm" and "head/bias" in source.leaves
    lines = ["tags:", "- vitssl", "- self-supervised"]
    if layout in ("timm", "hf"):
        library = "transformers" if layout == "hf" else "timm"
        task = "classification" if heads else "feature-extraction"
        lines += [f"library_name: {library}", f"pipeline_tag: image-{task}"]
    return "\n".join(["---", *lines, "---"])


_POOLS = {
    "cls": "the class token after the last norm",
    "mean": "the mean of the patch tokens after the last norm",
}


def _inline(values) -> str:
    return ", ".join(f"{key}={value}" for key, value in dict(values).items())


def describe(about: About) -> str:
    """Return the JSON text of a description."""
    return json.dumps({"format": FORMAT, **_plain(dataclasses.asdict(about))})


def contiguous(x: Any) -> np.ndarray:
    """Return an array as float32 in C order; transposes go block by block.

    numpy walks the whole source once per column of a large transpose, past every
    cache; in blocks it is several times faster.
    """
    x = np.asarray(x)
    block = 256
    if x.ndim != 2 or x.flags.c_contiguous or min(x.shape) < 2 * block:
        return np.array(x, np.float32, order="C")
    out = np.empty(x.shape, np.float32)
    for i in range(0, x.shape[0], block):
        for j in range(0, x.shape[1], block):
            part = slice(i, i + block), slice(j, j + block)
            out[part] = x[part]
    return out


def _plain(value: Any):
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return value
