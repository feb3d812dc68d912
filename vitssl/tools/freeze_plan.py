"""When the layers of a finished run had settled: what to freeze, and when.

    vitssl freeze-plan WORKDIR [--alike=0.95] [--still=0.2] [--images=256]

Reads the kept checkpoints (checkpoint.keep_every_epochs; three or more), and says for
every layer, at every one of them:

  update   how far its weights moved since the checkpoint before, per step, against
           their length, as a share of the most they ever did
  gradient its mean norm since then against the interval before; needs log.histograms
  CKA      how alike its output on training images is to that of the last checkpoint

A layer has settled at the first checkpoint from which on its CKA stays above --alike
(networks without blocks: its update below --still), and all layers before it have. The
two lines at the end are overrides for the next run of the same length: what settled, at
its share of the run, and the FreezeOut schedule that comes closest.

Sources: Liu et al. 2021, arXiv:2102.01386 (AutoFreeze: gradients that change little);
Wang et al. 2022, arXiv:2201.06227 (Egeria: outputs like those of a reference);
Kornblith et al. 2019, arXiv:1905.00414, equation 4 (linear CKA).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors, tree
from vitssl.data import pipeline
from vitssl.methods import growing
from vitssl.models import patches, vit
from vitssl.optim import freezeout
from vitssl.run import histograms, log, opened, seals
from vitssl.tools import listing


@dataclasses.dataclass(frozen=True)
class Course:
    """What became of the layers of a run.

    Attributes:
        steps: of the checkpoints, K.
        total, warmup: steps of the run, and of its warm-up.
        names: {layer index: names of its parameters}.
        update: [K - 1, L] as in the module's text.
        gradient: [K - 1, L], nan where nothing is logged.
        cka: [K, L] with the last checkpoint; nan of layers that are no block.
    """

    steps: tuple[int, ...]
    total: int
    warmup: int
    names: dict[int, tuple[str, ...]]
    update: np.ndarray
    gradient: np.ndarray
    cka: np.ndarray

    def settled(self, alike: float, still: float) -> dict[int, int]:
        """Return {layer: step from which on it can be frozen}, of the first ones."""
        found, since = {}, 0
        for i, layer in enumerate(sorted(self.names)[:-1]):  # The last never freezes.
            known = self.cka[:-1, i]
            if np.isnan(known).all():
                calm, steps = self.update[:, i] <= still, self.steps[1:]
            else:
                calm, steps = known >= alike, self.steps[:-1]
            first = len(calm) - int(np.argmin(calm[::-1])) if not calm.all() else 0
            if first == len(calm):
                break
            since = max(since, steps[first])
            if since >= self.total:
                break
            found[layer] = since
        return found


def main(argv: list[str]) -> int:
    """Print the table and the overrides; return the exit code of `vitssl.main`."""
    parser = errors.Parser("vitssl freeze-plan", __doc__)
    parser.add_argument("workdir")
    parser.add_argument("--alike", type=float, default=0.95)
    parser.add_argument("--still", type=float, default=0.2)
    parser.add_argument("--images", type=int, default=256)
    return errors.exit_code(_main, parser, argv)


def _main(parser, argv):
    o = parser.parse_args(argv)
    for key in ("alike", "still"):
        if not 0 < getattr(o, key) < 1:
            raise errors.UsageError(f"--{key}={getattr(o, key)}: between 0 and 1")
    if o.images < 2:
        raise errors.UsageError(f"--images={o.images}: 2 or more")
    found = course(o.workdir, o.images)
    print(text(found, found.settled(o.alike, o.still)))
    return 0


def course(workdir, images: int = 256) -> Course:
    """Measure the kept checkpoints of a run.

    Raises:
        CheckpointError: fewer than three.
        UsageError: a method without a table of layers.
    """
    last = opened.past(workdir)
    steps = tuple(seals.sealed(last.directory))
    if len(steps) < 3:
        raise errors.CheckpointError(
            f"{workdir}: {len(steps)} checkpoints; a plan needs 3 or more: train with "
            "checkpoint.keep_every_epochs"
        )
    made = last.experiment
    parts, _ = opened.past(workdir).state()
    method, section = parts.method, made.settings.freeze
    section = dataclasses.replace(
        section, layers=section.layers or method.freeze_layers()
    )
    each = [opened.past(f"{workdir}@{step}").params() for step in steps]
    index = section.index(section.table(list(each[0]), "freeze-plan"))
    layers = sorted({i for i in index.values() if i != freezeout.NEVER})
    names = {i: tuple(k for k, v in index.items() if v == i) for i in layers}
    moved = np.array(
        [
            [_moved(a, b, names[i]) / (t - s) for i in layers]
            for a, b, s, t in zip(each, each[1:], steps, steps[1:], strict=False)
        ]
    )
    blocks = _blocks(parts, each, images)
    cka = np.full((len(steps), len(layers)), np.nan)
    for k, outputs in enumerate(blocks):
        for i, layer in enumerate(layers):
            if 0 < layer <= len(outputs):
                pair = outputs[layer - 1], blocks[-1][layer - 1]
                cka[k, i] = alike(*pair)
    gradient = _gradients(last.workdir, steps, [names[i] for i in layers])
    most = np.maximum(moved.max(0), 1e-30)
    length = parts.run.total_steps, parts.optimizer.warmup_steps
    return Course(steps, *length, names, moved / most, gradient, cka)


def _moved(a, b, names) -> float:
    """Return |b - a| / |b| of some leaves."""
    apart = sum(float(np.square(b[k] - a[k]).sum()) for k in names)
    return (apart / max(1e-30, sum(float(np.square(b[k]).sum()) for k in names))) ** 0.5


def alike(x, y) -> float:  # [M, D], [M, E]
    """Return linear CKA: 1 where one is a turned and scaled copy of the other."""
    x, y = x - x.mean(0), y - y.mean(0)
    # Of M x M products: M is less than a width squared.
    p, q = x @ x.T, y @ y.T
    return float((p * q).sum() / max(1e-30, np.linalg.norm(p) * np.linalg.norm(q)))


def _blocks(parts, each, images):
    """Return [checkpoint][block] of mean patch tokens [M, D]; [] without blocks."""
    method, s = parts.method, parts.experiment.settings
    model = getattr(method, "model", None)
    net = next(
        (n for n in growing.NETS if any(k.startswith(f"{n}/") for k in each[0])), None
    )
    if not isinstance(model, vit.ViT) or net is None:
        return [[] for _ in each]
    transform = method.evaluation_transform(s.evals.image_size)
    count = min(images, len(parts.source))
    with pipeline.evaluate(parts.source, transform, batch_size=count) as batches:
        image = patches.normalise(next(batches)["image"], s.data.mean, s.data.std)

    @jax.jit
    def outputs(params):
        _, out = model.apply({"params": params}, image)
        return [x[:, model.prefix :].mean(1).astype(jnp.float32) for x in out["blocks"]]

    return [jax.device_get(outputs(tree.nest(params)[net])) for params in each]


def _gradients(workdir, steps, groups):
    """Return mean gradient norms since the checkpoint before [K - 1, L], or nan."""
    found = np.full((len(steps) - 1, len(groups)), np.nan)
    rows = [row for _, row in log.lines(workdir / "metrics.jsonl")]
    for k, (a, b) in enumerate(zip(steps, steps[1:], strict=False)):
        for i, names in enumerate(groups):
            keys = {f"grad_norm/{histograms.module(name)}" for name in names}
            seen = [
                sum(float(row[key]) ** 2 for key in keys & row.keys()) ** 0.5
                for row in rows
                if a < row.get("step", -1) <= b and keys & row.keys()
            ]
            if seen:
                found[k, i] = np.mean(seen)
    return found


def closest(shares: dict[int, float], last: int) -> tuple[str, float]:
    """Return (freeze.schedule, freeze.t_0) nearest, by squares, to {layer: share}."""
    grid = np.linspace(0.05, 1.0, 96)
    tried = [
        (
            sum(
                (freezeout.ratio(name, t_0, layer, last) - share) ** 2
                for layer, share in shares.items()
            ),
            name,
            round(float(t_0), 2),
        )
        for name in freezeout.POWERS
        for t_0 in grid
    ]
    return min(tried)[1:]


def covering(names, every) -> str:
    """Return a short pattern that matches these names and no others of `every`."""
    names, others, found = set(names), set(every) - set(names), []
    for name in sorted(names, key=tree.natural):
        parts = name.split("/")
        heads = ["/".join(parts[:n]) + "/" for n in range(1, len(parts))]
        free = (h for h in heads if not any(o.startswith(h) for o in others))
        head = next(free, None)
        found.append(re.escape(name) if head is None else f"{re.escape(head)}.*")
    return "|".join(dict.fromkeys(found))


def text(found: Course, settled: dict[int, int]) -> str:
    """Return the table of a course and the overrides of what settled."""
    layers, rows = sorted(found.names), []
    for i, layer in enumerate(layers):
        for k, step in enumerate(found.steps):
            moved = found.update[k - 1, i] if k else np.nan
            slope = found.gradient[k - 1, i] if k else np.nan
            before = found.gradient[k - 2, i] if k > 1 else np.nan
            numbers = (moved, slope / before, found.cka[k, i])
            cells = ["-" if np.isnan(x) else f"{x:.3f}" for x in numbers]
            rows.append([str(layer), str(step), *cells])
    table = listing.text(["layer", "step", "update", "gradient", "CKA"], rows)
    if not settled:
        return f"{table}\nno layer settled before the end: nothing to freeze"
    every = [name for names in found.names.values() for name in names]
    together = {}
    for layer, step in settled.items():
        together.setdefault(step, []).extend(found.names[layer])
    rules = "".join(
        f"('{covering(names, every)}', {step / found.total:.4g}), "
        for step, names in together.items()
    )
    trained = found.total - found.warmup
    shares = {k: max(0.0, v - found.warmup) / trained for k, v in settled.items()}
    name, t_0 = closest(shares, layers[-1])
    return (
        f"{table}\nsettled: "
        + ", ".join(f"layer {k} from step {v}" for k, v in settled.items())
        + f'\n  --config.optim.freeze="({rules.rstrip()})"'
        + f"\nor, nearest to that,\n  --config.freeze.schedule={name} "
        f"--config.freeze.t_0={t_0} --config.freeze.layerwise_lr=False"
    )
