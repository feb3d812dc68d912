"""`vitssl report RUN`: everything a run left behind, on one self-contained page."""

import base64
import itertools
import pathlib
import re

import numpy as np

from vitssl import errors, tree
from vitssl.data import decode, npy
from vitssl.evals import accuracy, suite, verdict
from vitssl.pictures import curves
from vitssl.run import log
from vitssl.tools import charts, html, workdir

_KINDS = {".png": "png", ".gif": "gif", ".jpg": "jpeg", ".svg": "svg+xml"}
# Files of more than this are named, not embedded: a page must stay light.
MOST_BYTES = 8_000_000
# Of more classes a confusion matrix is a list of the worst pairs.
MOST_CLASSES = 30

# What a picture shows: the start of its file name, the heading, the sentence. The first
# that fits counts.
NEAR, SEES = "Neighbours", "What it sees"
GUESS, CROPS = "What it predicts", "Crops and masks"
CAPTIONS = (
    (
        "neighbours",
        NEAR,
        "Test images and the training images with the nearest features.",
    ),
    ("feature_space", NEAR, "Test images as points: near ones have like features."),
    ("features", NEAR, "How far, and in how many directions, the features spread."),
    ("tokens", SEES, "Patch tokens: equal colours in a row are like features."),
    ("attention_layers", SEES, "Where the image as a whole looks, from early to late."),
    ("attention_heads", SEES, "Where each head of each layer looks."),
    ("attention_patch", SEES, "Where one patch looks."),
    ("attention", SEES, "Where the tokens look."),
    ("part", SEES, "Parts found in single images."),
    ("segment", SEES, "Segmentation of single images."),
    ("prediction_levels", GUESS, "Error and cosine of predictions, level by level."),
    ("prediction", GUESS, "Where predicted features differ from the true ones."),
    ("reconstruct", GUESS, "Hidden patches, filled in."),
    ("crops", CROPS, "Training crops as the network gets them."),
    ("masks_combined", CROPS, "All levels of a mask in one."),
    ("masks_multicrop", CROPS, "The masks of every crop of an image."),
    ("masks_samplers", CROPS, "Ways to draw a mask, compared."),
    ("masks_single", CROPS, "One mask, five ways."),
    ("masks_statistics", CROPS, "How much, and where, many masks hide and ask for."),
    ("masks_animation", CROPS, "A mask, block by block."),
    ("masks", CROPS, "What is hidden and what is to be predicted."),
    ("collapse", "Health", "Signs of a collapse."),
    ("landscape", "Health", "The loss around the trained parameters."),
)
# The page draws these itself, from the same numbers.
DRAWN = ("training", "confusion")
# Curves by heading: how the names of their metrics begin.
LOSS, EVALUATION, REST, TIMES = "Loss", "Evaluation", "Of the method", "Time and memory"
GROUPS = {
    LOSS: ("loss",),
    EVALUATION: ("knn/", "probe/", "quality/", "test/"),
    REST: (),
    "Optimisation": ("lr", "wd", "momentum", "grad_norm", "param_norm", "nonfinite"),
    TIMES: ("time/", "memory/", "compile/", "freeze/"),
}
# What others say as well.
LEFT_OUT = (
    "time/eta_seconds",
    "time/images_per_second_per_device",
    verdict.COLLAPSED,
)
HINT = "Hover for values, drag to zoom, double-click to go back."


def page(run: workdir.Workdir) -> str:
    """Return the page of a run, finished or not."""
    shown = pictures(run.path / "pictures")
    sections = {
        "Results": list(_results(run)),
        **_curves(run),
        **_pictures(shown),
        **_confusion(run),
        "Config": list(_config(run)),
    }
    title = f"{run.name}: {run.config.get('method', '?')}"
    head = [html.element("h1", title), _subtitle(run), *_verdict(run), _tiles(run)]
    body = [html.section(heading, *content) for heading, content in sections.items()]
    body = [*head, html.navigation(sections), *body]
    return html.document(f"vitssl: {title}", body, charts.SCRIPT)


def _verdict(run):
    found = verdict.verdict(run.metrics)
    if found is not None:
        kind = f"verdict {found.short.split(' ')[0].rstrip(',')}"
        yield html.element("p", found.text, class_=kind)


def pictures(folder) -> dict[str, list[tuple[pathlib.Path, str]]]:
    """Return {heading: [(file, caption)]} of the pictures in a folder, in order.

    A link could put any file of this machine on the page: none is followed.
    """
    there = [] if folder.is_symlink() else folder.rglob("*")
    files = [p for p in there if p.suffix.lower() in _KINDS and not p.is_symlink()]
    found = {heading: [] for _, heading, _ in CAPTIONS} | {"More pictures": []}
    starts = [start for start, _, _ in CAPTIONS]
    known = {
        p: [i for i, s in enumerate(starts) if p.name.startswith(s)] for p in files
    }
    for path in sorted(files, key=lambda p: (known[p][:1] or [len(starts)], p)):
        if path.name.startswith(DRAWN):
            continue
        if known[path]:
            _, heading, caption = CAPTIONS[known[path][0]]
            found[heading].append((path, caption))
        else:
            found["More pictures"].append((path, path.stem.replace("_", " ")))
    return {heading: each for heading, each in found.items() if each}


def _subtitle(run):
    versions = run.versions
    parts = [
        decode.printable(run.path.resolve()),
        f"vitssl {versions.get('vitssl', '?')}",
    ]
    if versions.get("commit", "unknown") != "unknown":  # Said by earlier versions.
        parts.append(f"commit {versions['commit']}")
    parts += [f"{k} {versions[k]}" for k in ("jax", "flax", "python") if k in versions]
    return html.element("p", " · ".join(parts), class_="note")


def _tiles(run):
    total = run.status.get("total_steps")
    pairs = [(run.state, "state"), (f"{run.step}/{total or '?'}", "steps")]
    finished = run.last("final/trained/knn/top1") is not None
    for key, name, form in (
        ("loss", "last loss", "{:.4g}"),
        ("knn/top1", "k-NN, online", "" if not finished else None),
        ("final/test/top1", "test top-1", ""),
        ("final/trained/knn/top1", "k-NN", ""),
        ("final/untrained/knn/top1", "k-NN, untrained", ""),
        ("final/trained/linear/top1", "linear probe", ""),
        ("time/images_per_second", "images/s", "{:.0f}"),
        ("time/mfu_percent", "MFU", "{:.1f} %"),
    ):
        value = run.last(key)
        if value is None or form is None:
            continue
        if not form:  # An accuracy.
            count = run.last(f"{key.rpartition('/')[0]}/images")
            share, _, interval = accuracy.written(value, count).partition(" ")
            name += f" {interval}" if interval else ""
            pairs.append((share, name))
        else:
            pairs.append((form.format(value), name))
    if run.state == "training" and run.status.get("eta_seconds") is not None:
        pairs.append((log.duration(run.status["eta_seconds"]), "left"))
    return html.tiles(pairs)


def _results(run):
    """Yield the error of a run that failed, and the table of the final evaluation."""
    if run.status.get("error"):
        yield html.element("pre", run.status["error"])
    rows = final_rows(run)
    if rows:
        headings, *body = suite.cells(rows)
        yield html.table(headings, body)
        yield html.element("p", _protocol(run), class_="note")
    else:
        text = "The final evaluation has not run yet, or the config asks for none."
        yield html.element("p", text, class_="note")


def _protocol(run) -> str:
    section = run.section("evals")
    k = section.get("knn_k")
    k = k[0] if isinstance(k, list) and k else "?"
    counts = [run.last(f"final/trained/{key}") for key in ("knn/images", "query")]
    count = next((n for n in counts if n), None)
    return (
        f"{count or 0:.0f} test images; in brackets: 95 % by Wilson's interval; "
        f"features: {section.get('features', '?')}; k-NN with k = {k}; linear probe by "
        f"{section.get('probe', '?')}; data: {run.section('data').get('source', '?')}"
    )


def final_rows(run) -> list[dict]:
    """Return the rows of the final evaluation: the inverse of `suite.flat`."""
    rows = {}
    for key in run.metrics:
        if key.startswith("final/") and key.count("/") > 1:
            _, row, metric = key.split("/", 2)
            rows.setdefault(row, {"features": row.replace("_", " ")})
            rows[row][metric] = run.last(key)
    return list(rows.values())


def _curves(run) -> dict:
    """Return {heading: content} of the groups of metrics."""
    groups = {heading: [] for heading in GROUPS}
    for key in sorted(run.metrics, key=charts.importance):
        if not key.startswith("final/") and key not in LEFT_OUT:
            heading = next((h for h, s in GROUPS.items() if key.startswith(s)), REST)
            groups[heading].append(key)
    found = {h: list(_group(run, h, keys)) for h, keys in groups.items() if keys}
    if found:
        next(iter(found.values())).insert(0, html.element("p", HINT, class_="note"))
    return found


def _group(run, heading, keys):
    """Yield the charts of a group, and the last values of what does not move."""
    # A flat line says no more than its value.
    moving = [key for key in keys if len(set(run.metrics[key][1])) > 1]
    calm = heading not in (LOSS, EVALUATION)
    plots = [_chart(run, each, calm) for each in families(moving)]
    yield html.grid([], plots)
    still = [k for k in keys if heading == TIMES or k not in moving]
    rows = [[key, f"{run.last(key):.5g}"] for key in sorted(still, key=tree.natural)]
    if rows:
        yield html.folded("last values", html.table(["metric", "last value"], rows))


def families(keys) -> list[list[str]]:
    """Return keys that differ in numbers alone together, such as the levels' losses."""
    found = {}
    for key in keys:
        found.setdefault(
            re.sub(r"\d+", "#", key) if "top" not in key else key, []
        ).append(key)
    return [sorted(each, key=tree.natural) for each in found.values()]


def _chart(run, keys, calm):
    """Return the chart of one metric, or of several that belong together."""
    unit, scale = ("epoch", run.per_epoch) if run.per_epoch else ("step", 1)
    series = [(k, run.metrics[k][0] / scale, run.metrics[k][1]) for k in keys]
    if len(keys) > 1:
        title = re.sub(r"\d+", "#", keys[0])
        drawn = charts.lines(title, series, unit=unit, calm=calm)
        return html.element("figure", drawn, charts.legend(keys), class_="group")
    (key,) = keys
    rows = {r["features"]: r[key] for r in final_rows(run) if key in r}
    finals = (
        [("final", run.step / scale, rows.pop("trained"))] if "trained" in rows else []
    )
    marks = dict(finals=finals, levels=rows.items())
    return charts.lines(key, series, unit=unit, calm=calm, **marks)


def _pictures(shown) -> dict:
    """Return {heading: content}, each picture inside the page."""
    if not shown:
        note = (
            "None yet. They are drawn at the end of a run with log.pictures=True, or "
            "now with `vitssl report RUN --draw`."
        )
        return {"Pictures": [html.element("p", note, class_="note")]}
    return {
        heading: [html.element("div", *itertools.starmap(figure, e), class_="pictures")]
        for heading, e in shown.items()
    }


def figure(path: pathlib.Path, caption: str) -> html.Safe:
    """Return a picture with its caption, embedded unless it is very large."""
    text = html.element("figcaption", caption, title=path.name)
    try:
        data = decode.contents(path, MOST_BYTES)
    except errors.DataError as e:
        return html.element("p", f"{e}; open it itself", class_="note")
    data = base64.b64encode(data).decode("ascii")
    source = f"data:image/{_KINDS[path.suffix.lower()]};base64,{data}"
    image = html.Safe(f'<img src="{source}" alt="{html.escape(caption)}">')
    return html.element("figure", image, text)


def _confusion(run) -> dict:
    """Return {heading: content} of the confusion matrices in scores.npz.

    Raises:
        UsageError: the file is damaged.
    """
    path = run.path / "scores.npz"
    if not path.is_file():
        return {}
    try:
        stored = npy.archive(path)
        found = {k: _counts(k, x) for k, x in stored.items() if k.endswith("confusion")}
    except (OSError, ValueError) as e:
        raise errors.UsageError(
            f"{path}: damaged ({errors.told(e)}); evaluate again"
        ) from e
    if "knn_confusion" in found:  # The probe's is much the same.
        found.pop("linear_confusion", None)
    content = (_matrix(key, matrix) for key, matrix in found.items())
    return {"Confusion": list(itertools.chain.from_iterable(content))} if found else {}


def _matrix(key, matrix):
    name = curves.printable(key).removesuffix("confusion").rstrip("_/")
    name = {"knn": "k-NN", "linear": "linear probe"}.get(name, name)
    count = int(matrix.sum())
    right = accuracy.written(np.trace(matrix) / max(1, count), count)
    text = f"{right} of {count} right. Rows: truth. Columns: prediction."
    text = f"{name}: {text}" if name else text
    yield html.element("p", text, class_="note")
    yield _worst_pairs(matrix) if len(matrix) > MOST_CLASSES else _coloured(matrix)


def _counts(key, matrix):
    """Return a confusion matrix [C, C], if it is one."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or not np.isfinite(matrix).all() or np.abs(matrix).max() > 2**53:
        raise ValueError(f"{key}: no confusion matrix")
    return matrix


def _coloured(matrix) -> html.Safe:
    """Return a confusion matrix [C, C] as a table, each row coloured by its shares."""
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    rows = []
    for i, row in enumerate(matrix):
        cells = [
            html.Safe(
                f'<span style="background:rgba(0,114,178,{0.75 * share:.2f});'
                f'padding:2px 6px;border-radius:4px">{int(n)}</span>'
            )
            for n, share in zip(row, shares[i], strict=True)
        ]
        rows.append([i, *cells])
    return html.table(["", *range(len(matrix))], rows)


def _worst_pairs(matrix, most=20) -> html.Safe:
    """Return the most frequent confusions of a matrix too large to show."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(i, wrong.shape) for i in order]
    rows = [[t, p, int(wrong[t, p])] for t, p in pairs if wrong[t, p]]
    return html.table(["true class", "predicted", "images"], rows)


def _config(run):
    """Yield the resolved config, section by section, and what ran it."""
    plain = {k: v for k, v in run.config.items() if not isinstance(v, dict)}
    yield html.code(plain)
    for key, value in run.config.items():
        if isinstance(value, dict):
            first = ", ".join(f"{k}={v}" for k, v in list(value.items())[:3])
            yield html.folded(key, html.code(value), note=first[:90])
    yield html.folded("versions", html.code(run.versions))
