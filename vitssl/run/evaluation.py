"""The evaluations of one run: its images, when they are due, what they print."""

import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors, progress, tree
from vitssl.data import pipeline
from vitssl.data.sources import wrappers
from vitssl.evals import accuracy, extraction, suite
from vitssl.run import agreement, devices

logger = logging.getLogger(__name__)

_NONE = "no final evaluation (evals.final is empty)"
# Arrays with the average precision of every label: as the headline prefers them.
AVERAGES = ("ema_tta_ap", "tta_ap", "ema_ap", "ap")
LEAST = 2  # Images that an evaluation needs.


def check(settings, method, source=None) -> None:
    """Open the splits that an evaluation will read, if any will.

    Args:
        source: of the split that trains, if it is open.

    Raises:
        DataError: one is not there, has too few images, or no class of the others.
    """
    data, section = settings.data, settings.evals
    if not reads(section, method) and not settings.log.pictures:
        return
    opened = {} if source is None else {data.split: source}
    splits = {"data.bank_split": data.bank_split, "data.test_split": data.test_split}
    splits["evals.final_split"] = section.final_split
    for key, split in splits.items():
        if split in ("", *opened):
            continue
        opened[split] = data.open(split, settings.seed)
        count = len(opened[split])
        if count < LEAST:
            raise errors.DataError(
                f"{key}={split!r}: {count} image(s) of {data.source}; evaluations "
                f"need {LEAST} or more"
            )
    # The bank teaches k-NN and probes; a classifier learns from what trains.
    taught = {data.bank_split: "data.bank_split"}
    if method.labelled and source is not None:
        taught |= {data.split: "data.split"}
    keys = {split: key for key, split in reversed(splits.items())} | taught
    named = {
        split: (f"{keys[split]}={split!r}", agreement.present(found))
        for split, found in opened.items()
        if split in keys
    }
    for split in taught:
        for scored in sorted({data.test_split, section.final_split} - {"", split}):
            agreement.same_classes(named[split], named[scored])


def reads(section: suite.Evals, method) -> bool:
    """Return whether any evaluation of a run reads images."""
    return bool(section.every_epochs or section.final or method.scored)


class Evaluation:
    """Online and final evaluation with images read once and kept if they fit.

    Args:
        section, data: `evals` and `data` of the config; the bank_split teaches, the
            test_split is scored.
        workdir: where snapshots of the test split go.
    """

    def __init__(self, section: suite.Evals, data, method, mesh, workdir="", seed=0):
        self._section, self._data = section, data
        self._method, self._mesh = method, mesh
        self._workdir, self._seed = pathlib.Path(workdir), seed
        self.arrays = {}  # Of the last scores: what is no number.
        self._scored = method.scored

    def leave_out(self, state, skipped) -> None:
        """Leave out the scores that need parameters which nobody trained.

        They are made NaN, for one batch: what is NaN then needs them.

        Raises:
            UsageError: all that was asked for does.
        """
        leaves = tree.flat(state.params)
        dark = {k: x * jnp.nan if k in skipped else x for k, x in leaves.items()}
        params = tree.nest(dark)
        extra = self._method.adopt(params, state.extra)
        batch = next(iter(self._final_images[1]))
        names = self._section.names if self._section.final else ()
        found = jax.jit(self._method.features)(params, extra, extraction.picture(batch))
        blind = [name for name in names if _has_nan(found[name])]
        rows = jax.jit(self._method.outputs)(params, extra, batch)
        needs = self._scored and _has_nan(rows)
        some = ", ".join(skipped[:3]) + ", ..." * (len(skipped) > 3)
        if blind or (needs and not names):
            what = f"evals.features={blind[0]}" if blind else "the test scores"
            raise errors.UsageError(
                f"epochs=0: {what} need {some}, which init.skip leaves at random "
                "values; set init.skip to what the checkpoint really lacks, () for none"
            )
        if needs:
            logger.info("no test scores: they need %s, random by init.skip", some)
            self._scored = False

    def due(self, at: int, run) -> bool:
        """Return whether an online evaluation is due after `at` updates."""
        every = round(self._section.every_epochs * run.steps_per_epoch)
        return every > 0 and at % every == 0

    @functools.cache  # noqa: B019 - one object of a run.
    def _source(self, split):
        return self._data.open(split, self._seed)

    @functools.cached_property
    def _online_images(self):
        s, data = self._section, self._data
        counts = (s.online_samples_train, s.online_samples_test)
        return self._images((data.bank_split, data.test_split), counts)

    @functools.cached_property
    def _final_images(self):
        s, data = self._section, self._data
        counts = (s.final_samples_train, s.final_samples_test)
        return self._images((data.bank_split, s.final_split or data.test_split), counts)

    def _images(self, splits, counts):
        found, size = [], self._section.batch_size
        for split, count in zip(splits, counts, strict=True):
            source = self._source(split)
            chosen = extraction.subset(len(source), count)
            make = functools.partial(self._batches, wrappers.Subset(source, chosen))
            kept = extraction.Cached(make, self._section.cache_bytes)
            found.append(_Told(kept, f"evaluating {split}", -(-len(chosen) // size)))
        return found

    def _batches(self, source):
        """Return the evaluation batches of a source, read anew."""
        s, data, count = self._section, self._data, jax.device_count()
        return pipeline.evaluate(
            source,
            self._method.evaluation_transform(s.image_size),
            batch_size=-(-s.batch_size // count) * count,  # Splits over the devices.
            threads=data.threads,
            process=(jax.process_index(), jax.process_count()),
            on_bad_image=data.on_bad_image,
            bad_share=data.bad_share,
        )

    @property
    def _sharding(self):
        return devices.batch_sharding(self._mesh)

    @property
    def _classes(self):
        return len(self._source(self._data.bank_split).classes)

    def online(self, state) -> dict[str, float]:
        """Return a few numbers of the state; {} if the run has no online evaluation."""
        if not self._section.every_epochs:
            return {}
        values = self._scores(state, self._online_images[1])
        self._snapshots(state, self._online_images[1])
        if self._section.online:
            values |= suite.online(
                self._section,
                self._method.features,
                (state.params, state.extra),
                *self._online_images,
                classes=self._classes,
                sharding=self._sharding,
            )
        return {k: float(v) for k, v in values.items()}

    def _scores(self, state, images) -> dict[str, float]:
        """Return the method's own scores on the test split, "test/<name>"."""
        if not self._scored:
            return {}
        rows = self._outputs(state, images, self._method.outputs)
        self.arrays = {}
        return self._kept(self._method.scores(rows))

    def _kept(self, found) -> dict[str, float]:
        """Return the numbers as metrics; the arrays are kept aside."""
        self.arrays |= {k: v for k, v in found.items() if np.ndim(v)}
        return {f"test/{k}": float(v) for k, v in found.items() if not np.ndim(v)}

    def _outputs(self, state, images, function, *arguments):
        return extraction.outputs(
            function,
            (state.params, state.extra, *arguments),
            images,
            sharding=self._sharding,
        )

    def _final_scores(self, state) -> dict[str, float]:
        """Return what the method measures once, at the end."""

        def rows(function, *arguments, split="test", source=None):
            images = self._final_images[int(split == "test")]
            if source is not None:
                images = self._batches(source)
            return self._outputs(state, images, function, *arguments)

        return self._kept(self._method.final_scores(rows))

    def _snapshots(self, state, images):
        """Draw some batches of the test split, if the method does that now."""
        if not devices.is_main():
            return
        at = int(state.step)
        share = self._method.drawn(at)
        if not share:
            return
        leaves = jax.tree.leaves((state.params, state.extra))
        if not all(x.is_fully_addressable or x.is_fully_replicated for x in leaves):
            logger.warning("no snapshots: the weights are spread over several hosts")
            return
        params, extra = jax.device_get((state.params, state.extra))
        folder, name = self._workdir / "pictures" / "maps", self._data.source
        for number, batch in enumerate(images):
            rng = np.random.default_rng((self._seed, at, number))
            if rng.random() < share and batch["valid"].any():
                path = folder / f"{at:06d}_{number:04d}_{name}.jpg"
                self._method.snapshot(params, extra, batch, path)

    def line(self, at: int, values: dict) -> str:
        """Return the line of an online evaluation, with a warning on low rank.

        Contrastive features that work well may use a tenth of their directions, so the
        line gives the number and lets the reader judge.
        """
        own = {k[5:]: v for k, v in values.items() if k[:5] == "test/"}
        shown = accuracy.told(own, 4)
        count = values.get("knn/images")
        for key, name in (("knn/top1", "k-NN"), ("probe/top1", "probe")):
            if key in values:
                shown.append(f"{name} {accuracy.written(values[key], count)}")
        if count:
            shown[-1] += f" of {count:.0f} images"
        for key, form in (
            ("knn/map", "k-NN mAP {:.1%}"),
            ("probe/map", "probe mAP {:.1%}"),
            ("quality/rankme", "RankMe {:.1f}"),
            ("quality/std", "std {:.3g}"),
        ):
            if key in values:
                shown.append(form.format(values[key]))
        text = f"  after step {at}: " + "  ".join(shown)
        # Those of an untrained network lie close together, too.
        if at and values.get("quality/collapsed"):
            rank = values.get("quality/effective_rank", float("nan"))
            text += f"  WARNING: few directions in use ({rank:.1f}; collapsed: near 1)"
        return text

    def final(self, state, untrained) -> tuple[dict[str, float], str]:
        """Compare the state with an untrained one and raw pixels.

        Returns:
            flat metrics "final/<row>/<metric>", and the table as text.
        """
        section = self._section
        if not reads(section, self._method):
            return {}, _NONE
        scores = self._scores(state, self._final_images[1])
        scores |= self._final_scores(state) if self._scored else {}
        self._snapshots(state, self._final_images[1])
        text = self._method.written({k[5:]: v for k, v in scores.items()})
        text = text and f"test split:{_gap(text)}{text}"
        text += _by_class(self.arrays, self._source(self._data.test_split).classes)
        scores = {f"final/{k}": v for k, v in scores.items()}
        if not section.final:
            return scores, text or _NONE
        rows = suite.final(
            section,
            self._method.features,
            {
                "trained": (state.params, state.extra),
                "untrained": (untrained.params, untrained.extra),
            },
            *self._final_images,
            classes=self._classes,
            side=getattr(getattr(self._method, "model", None), "square", 0),
            sharding=self._sharding,
        )
        self.arrays |= {
            key.replace("/", "_"): value
            for row in rows
            for key, value in row.items()
            if row["features"] == "trained" and np.ndim(value)
        }
        values = suite.flat(rows)
        values = scores | {k: v for k, v in values.items() if np.isfinite(v)}
        table = suite.format_table(rows, section.protocol())
        return values, f"{table}\n{text}" if text else table


class _Told:
    """Batches that tell how far a pass through them is."""

    def __init__(self, batches, what, total):
        self._batches, self._what, self._total = batches, what, total

    def __iter__(self):
        return progress.each(self._batches, self._what, self._total)


def _has_nan(rows) -> bool:
    found = [np.asarray(x) for x in jax.tree.leaves(rows)]
    return any(np.isnan(x).any() for x in found if np.issubdtype(x.dtype, np.floating))


def _by_class(arrays, classes) -> str:
    """Return the average precisions of labels as a line, the highest first, or ""."""
    ap = next((arrays[k] for k in AVERAGES if k in arrays), None)
    if ap is None:
        return ""
    order = np.argsort(-np.nan_to_num(ap, nan=-1.0), kind="stable")
    named = [f"{classes[i]} {ap[i]:.1%}" for i in order if np.isfinite(ap[i])]
    unseen = len(ap) - len(named)
    more = f" ({unseen} labels without a test image left out)" if unseen else ""
    return f"\naverage precision: {', '.join(named)}{more}"


def _gap(text) -> str:
    """Return what separates a heading from a text of one or more lines."""
    return "\n" if "\n" in text else " "
