"""From a config to the objects of a run; every fault of the config in one message.

The sections the trainer owns are fields of `Settings`. All other sections belong to
the method: its fields name them and their types.
"""

import dataclasses
import logging
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import ml_collections

from vitssl import config, errors, ranges, sizes
from vitssl.data import dataset, sources
from vitssl.evals import extraction, suite
from vitssl.methods import base, growing
from vitssl.methods import table as methods_table
from vitssl.models import MODELS
from vitssl.optim import freezeout, optimizer
from vitssl.run import checkpoint, devices, log, warmstart

logger = logging.getLogger(__name__)

# Keys whose value decides which other keys a section has.
CHOICES = ("data.source", config.OPEN, "model.name")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys and sections of a config that the trainer owns.

    Attributes:
        method: key of `methods.table.METHODS`.
        seed: of weights, data order, augmentation and everything random.
        batch_size: images per optimizer step over all devices and micro-batches.
        epochs: length of the run, in passes over the training set; 0 evaluates what
            init.from names and trains nothing.
        steps: if not 0, length of the run in optimizer steps, instead of `epochs`.
        accumulate: micro-batches per optimizer step.
        per_device: if not 0, images that a device takes at a time; `accumulate` then
            follows from batch_size and the number of devices.
        precision: compute dtype; parameters, losses and moments stay float32.
    """

    method: str
    seed: int
    batch_size: ranges.Count
    epochs: ranges.NotNegative
    data: dataset.Data
    optim: optimizer.Optim
    evals: suite.Evals
    log: log.Log
    checkpoint: checkpoint.Checkpoint
    steps: ranges.OrNone = 0
    accumulate: ranges.Count = 1
    per_device: ranges.OrNone = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    mesh: devices.Mesh = devices.Mesh()
    init: warmstart.Init = warmstart.Init()
    freeze: freezeout.FreezeOut = freezeout.FreezeOut()

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        if not 0 <= self.seed < 2**63:
            yield f"seed={self.seed}: 0 or more, below 2^63"
        if self.steps >= 2**31:
            yield f"steps={self.steps}: below 2^31, in which steps are counted"
        if not self.epochs and not self.steps and not self.init.from_:
            line = "epochs=0: evaluates only, so it needs init.from (or set steps)"
            yield "; ".join(filter(None, (line, self.init.wanted)))
        if self.batch_size % self.accumulate:
            yield f"accumulate={self.accumulate} does not divide {self.batch_size=}"
        if self.evals.final_of == "best" and not self.checkpoint.keep_best:
            yield "evals.final_of=best: needs checkpoint.keep_best=1 or more"
        if self.mesh.gradients != "float32" and self.precision == "float32":
            yield (
                f"mesh.gradients={self.mesh.gradients}: only with precision=bfloat16; "
                "set mesh.gradients=float32"
            )
        if not self.steps and self.optim.warmup_epochs >= self.epochs > 0:
            yield (
                f"optim.warmup_epochs={self.optim.warmup_epochs} leaves nothing of "
                f"epochs={self.epochs}"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config: the trainer's settings and how to build the method.

    Attributes:
        settings: typed sections of the trainer.
        sections: typed sections of the method, by field name.
        config: the resolved config, as data.
    """

    settings: Settings
    sections: dict
    config: ml_collections.ConfigDict

    @property
    def kind(self) -> type:
        """Class of the method."""
        return methods_table.METHODS[self.settings.method]

    @property
    def training_size(self) -> sizes.Size:
        """Size of the training images."""
        return self.kind.training_size(self.config)

    def on(self, devices: int) -> "Experiment":
        """Return the experiment with `accumulate` for so many devices.

        Raises:
            UsageError: the batch is no multiple of what the devices take at a time, or
                the method cannot have it in such parts.
        """
        s = self.settings
        if not s.per_device:
            return self
        whole = s.per_device * devices
        # Fewer images than the devices could take at a time are one micro-batch.
        count = max(1, -(-s.batch_size // whole))
        if s.batch_size % (count * devices):
            raise errors.UsageError(
                f"batch_size={s.batch_size} does not split into micro-batches of "
                f"per_device={s.per_device} on {devices} device(s); set accumulate"
            )
        found = self.accumulating(count)
        config.Problems(found.faults()).stop()
        return found

    def accumulating(self, count: int) -> "Experiment":
        """Return the experiment with so many micro-batches per step, unchecked."""
        settings = dataclasses.replace(self.settings, accumulate=count)
        return dataclasses.replace(self, settings=settings)

    def faults(self) -> Iterator[str]:
        """Yield what the sections, each fine by itself, cannot be together."""
        s, method = self.settings, self.method(self.run())
        found = list(method.check())
        yield from found
        if s.freeze.grow_depth:
            yield from growing.faults(method.method, s.freeze.grow_depth)
        for size in s.freeze.grow_batch:
            grown = self.method(dataclasses.replace(self.run(), batch_size=size))
            yield from (f"freeze.grow_batch: {f}" for f in grown.check() if not found)
        if s.freeze.store.views:
            yield from method.store_faults()
        # What is wrong with the training size is said by now, and by its own key.
        if not found or s.evals.image_size != self.training_size:
            yield from _size_faults(method, s)
        if s.accumulate > 1 and not method.divisible:
            yield (
                f"accumulate={s.accumulate}: this loss compares the samples of a "
                "batch; set accumulate=1"
            )

    def method(self, run: base.Run) -> base.Method:
        """Return the method for a run whose length and data are known."""
        made, stairs = (
            self.kind(run=run, **self.sections),
            self.settings.freeze.grow_depth,
        )
        return growing.Growing(made, stairs) if stairs else made

    def run(
        self, *, total_steps=1, steps_per_epoch=1, classes=0, counts=()
    ) -> base.Run:
        """Return what the method may know of the run."""
        s = self.settings
        return base.Run(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=s.batch_size,
            classes=classes,
            channels=s.data.channels,
            mean=s.data.mean,
            std=s.data.std,
            dtype=s.precision,
            counts=counts,
            accumulate=s.accumulate,
            log_every=s.log.every_steps,
            weights=_weights,
        )


def _weights(path: str, part: str = ""):
    from vitssl.run import opened  # Which reads the configs of runs by this module.

    return opened.past(path).network(part)


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Return a config file's config, complete, with overrides applied.

    Overrides of `data.source`, `data.options` as a whole and `model.name` go first:
    they decide which other keys there are.

    Raises:
        UsageError: no such file or argument; every override that does not fit: it
            names no key, or has another type than the value it replaces.
    """
    c = config.recipe(spec)
    apply(c, overrides)
    return c


def apply(c: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Complete a config and apply "key.path=value" overrides to it; see `load`."""
    problems = config.Problems()
    first = [o for o in overrides if o.partition("=")[0] in CHOICES]
    for key, _, value in (o.partition("=") for o in first):
        if key == "data.source" and "source" in c.get("data", {}):
            _choose_source(c.data, value)
        elif key == "model.name" and isinstance(
            c.get("model"), ml_collections.ConfigDict
        ):
            _choose_model(c.model, value)
        elif key == config.OPEN:
            config.override(c, [f"{key}={value}"], problems)
    problems.stop()
    complete(c)
    config.override(c, [o for o in overrides if o not in first], problems)
    problems.stop()


def _choose_source(data, name: str):
    """Set data.source; options that the new one lacks are dropped."""
    if name in sources.SOURCES and name != data.source:
        _keep(data.options, sources.options_of(name), f"data.source={name}")
    data.source = name


def _choose_model(model, name: str):
    """Set model.name; keys that the new one lacks are dropped."""
    if name in MODELS and name != model.get("name", "vit"):
        _keep(model, ("name", *config.schema(MODELS[name])), f"model.name={name}")
    model.name = name


def _keep(section, known, choice: str):
    dropped = [key for key in section if key not in known]
    if dropped:
        logger.warning("%s has no %s: dropped", choice, ", ".join(dropped))
    for key in dropped:
        del section[key]


def complete(c: ml_collections.ConfigDict) -> None:
    """Add the keys that a config file may leave out, with their defaults."""
    config.fill(c, Settings)
    if isinstance(study := c.get("study"), ml_collections.ConfigDict):
        study.update({"only": study.get("only", ())})
    data = c.get("data")
    data = data if isinstance(data, ml_collections.ConfigDict) else {}
    options = data.get("options")
    if isinstance(options, ml_collections.ConfigDict) and str(data.get("source")) in (
        sources.SOURCES
    ):
        for key, default in sources.options_of(data.source).items():
            # The number of channels is `data.channels`, once for the whole run.
            if key != "channels" and key not in options:
                options[key] = default
    cls = methods_table.METHODS.get(str(c.get("method")))
    for key, (annotation, default) in (_sections_of(cls) if cls else {}).items():
        # A section that is not there could not be overridden.
        if key not in c and dataclasses.is_dataclass(default):
            c[key] = ml_collections.ConfigDict()
        section = c.get(key)
        if key == "model" and isinstance(section, ml_collections.ConfigDict):
            model = MODELS.get(section.get("name", "vit"))
            if model is not None:
                config.fill(section, model)
                # The compute dtype is `precision`, once for the whole run.
                if "dtype" in section:
                    del section["dtype"]
        elif isinstance(section, ml_collections.ConfigDict):
            config.fill(section, annotation)


def read(c: ml_collections.ConfigDict) -> Experiment:
    """Check a config and return its typed form.

    An `evals.image_size` or `model.image_size` of 0 becomes the training size.

    Raises:
        UsageError: every unknown, missing, ill-typed or impossible value of it.
    """
    problems = config.Problems()
    c = c.copy_and_resolve_references()
    for key, value in _leaves(c):
        if fault := ranges.beyond(value):
            problems.append(f"{key}={_short(value)}: {fault}")
    problems.stop()
    own = config.schema(Settings)
    cls = None
    if "method" in c:
        table = methods_table.METHODS
        cls = config.choose(table, c.method, "method", problems)
    complete(c)
    if cls:
        _follow(c, cls)
    wanted = _sections_of(cls) if cls else {}
    for key in c:
        if key not in own and key not in wanted and cls and key != "study":
            known = [*own, *wanted]
            problems.append(f"{key}: {config.unknown(key, known)}")
    settings = config.section(Settings, {k: c[k] for k in c if k in own}, "", problems)
    precision = c.get("precision", "float32")
    sections = {}
    for key, (annotation, default) in wanted.items():
        if key in c:
            sections[key] = _section(annotation, c[key], key, precision, problems)
        elif default is dataclasses.MISSING:
            problems.append(f"{key}: missing; {ranges.describe(annotation)}")
    problems.stop()
    experiment = Experiment(settings, sections, c)
    problems.extend(experiment.faults())
    problems.stop()
    return experiment


def _leaves(c, path="") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a config."""
    for key, value in c.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _short(value) -> str:
    # Python writes no integer of more than 4,300 digits.
    large = isinstance(value, int) and abs(value) >= 2**63
    return "an integer" if large else repr(value)


def _follow(c, cls) -> None:
    """Give sizes that are 0 the training size; the position table whole patches."""
    try:
        size = cls.training_size(c)
    except (AttributeError, TypeError, ValueError):
        return  # A key is missing or ill-typed, which is reported by its own name.
    for section in (c.get("evals"), c.get("model")):
        if isinstance(section, ml_collections.ConfigDict) and not ranges.fault(
            sizes.Size, size
        ):
            patch = section.get("patch", 1)
            if section.get("image_size") == 0 and not ranges.fault(int, patch):
                with section.ignore_type():
                    section.image_size = sizes.whole(size, max(1, patch))


def _size_faults(method, settings) -> Iterator[str]:
    """Yield why evaluation images or the position table cannot have their sizes."""
    size, model = settings.evals.image_size, getattr(method, "model", None)
    sides = {"evals": size, "model": getattr(model, "image_size", 0)}
    flat = [k for k, v in sides.items() if not isinstance(v, int)]
    for key in flat if not method.rectangles else ():
        yield (
            f"{key}.image_size={sides[key]}: method={settings.method} takes squares; "
            "give one number"
        )
    if method.rectangles or "evals" not in flat:
        yield from method.check_size(size)
    for scale in settings.evals.scales if hasattr(model, "square") else ():
        for fault in model.check_image(
            extraction.scaled(sizes.pair(size), scale, model.square)
        ):
            yield f"evals.scales: at {scale:g}: {fault}"


def with_noise(experiment: Experiment) -> Experiment:
    """Return an experiment on random pixels of the same kind: for sizes, no data."""
    s = experiment.settings
    options = {"count": max(256, s.batch_size), "channels": s.data.channels}
    options |= {"multilabel": experiment.method(experiment.run()).several}
    source = "fake"
    if "modalities" in sources.options_of(s.data.source):  # Samples, no pictures.
        source, given = "fields", dict(s.data.options)
        del options["multilabel"]
        options |= {k: given[k] for k in ("modalities",) if given.get(k)}
        options["size"] = 128
    data = dataclasses.replace(
        s.data, source=source, root="", split="train", options=options
    )
    return dataclasses.replace(experiment, settings=dataclasses.replace(s, data=data))


def _sections_of(cls) -> dict:
    """Return {section: (annotation, default)} of a method's class."""
    fields = config.schema(cls)
    fields.pop("run")
    return fields


def _section(annotation: Any, values, path: str, precision: str, problems):
    """Build one section of a method.

    The key `name` chooses a model, among those that the annotation names.
    """
    kinds = typing.get_args(annotation) or (annotation,)
    known = {name: kind for name, kind in MODELS.items() if kind in kinds}
    if known:
        values = dict(values)
        name = values.pop("name", "vit")
        annotation = config.choose(known, name, f"{path}.name", problems)
        if annotation is None:
            return None
        given = {}
        if "dtype" in config.schema(annotation) and "dtype" not in values:
            given["dtype"] = precision
        return config.section(annotation, values, path, problems, **given)
    return config.typed(annotation, values, path, problems)
