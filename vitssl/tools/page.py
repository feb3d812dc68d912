"""`vitssl report RUN`: everything a run left behind, on one self-contained page."""

import base64
import itertools
import pathlib

import numpy as np

from vitssl import errors
from vitssl.data import decode, npy
from vitssl.evals import suite
from vitssl.pictures import curves
from vitssl.run import log
from vitssl.tools import charts, html, workdir

_KINDS = {".png": "png", ".gif": "gif", ".jpg": "jpeg", ".svg": "svg+xml"}
# Files of more than this are named, not embedded: a page must stay light.
MOST_BYTES = 8_000_000
# Of more classes a confusion matrix is a list of the worst pairs.
MOST_CLASSES = 30

# What a picture shows: the start of its file name, the heading, the sentence.
CAPTIONS = (
    ("neighbours", "Neighbours", "Test images and those with the nearest features."),
    ("confusion", "Neighbours", "What k-NN takes the images of each class for."),
    ("feature", "Features", "The features of test images."),
    ("tokens", "What it sees", "Tokens in three principal components."),
    ("attention", "What it sees", "Where the tokens look."),
    ("part", "What it sees", "Parts found in single images."),
    ("segment", "What it sees", "Segmentation of single images."),
    ("prediction", "What it predicts", "Predicted and true features."),
    ("reconstruct", "What it predicts", "Hidden patches, filled in."),
    ("crops", "Crops and masks", "Training crops as the network gets them."),
    ("masks", "Crops and masks", "What is hidden and what is to be predicted."),
    ("collapse", "Health", "Signs of a collapse."),
    ("landscape", "Health", "The loss around the trained parameters."),
)
# Curves by heading: how the names of their metrics begin.
GROUPS = {
    "Evaluation while training": ("knn/", "probe/", "quality/", "test/"),
    "Timing and memory": ("time/", "memory/", "compile/"),
}


def page(run: workdir.Workdir) -> str:
    """Return the page of a run, finished or not."""
    shown = pictures(run.path / "pictures")
    sections = [
        html.section("Results", *_results(run)),
        *_curves(run),
        *_pictures(shown),
        *_confusion(run),
        html.section("Config", *_config(run)),
    ]
    title = f"{run.name}: {run.config.get('method', '?')}"
    return html.document(
        f"vitssl: {title}",
        [html.element("h1", title), _subtitle(run), _tiles(run), *sections],
    )


def pictures(folder) -> dict[str, list[tuple[pathlib.Path, str]]]:
    """Return {heading: [(file, caption)]} of the pictures in a folder, in order.

    A link could put any file of this machine on the page: none is followed.
    """
    there = [] if folder.is_symlink() else sorted(folder.rglob("*"))
    files = [p for p in there if p.suffix.lower() in _KINDS and not p.is_symlink()]
    found = {heading: [] for _, heading, _ in CAPTIONS} | {"More pictures": []}
    for path in files:
        if path.name.startswith("training"):
            continue  # The page draws those curves itself.
        for start, heading, caption in CAPTIONS:
            if path.name.startswith(start):
                found[heading].append((path, caption))
                break
        else:
            found["More pictures"].append((path, path.stem.replace("_", " ")))
    return {heading: each for heading, each in found.items() if each}


def _subtitle(run):
    versions = run.versions
    parts = [
        decode.printable(run.path.resolve()),
        f"vitssl {versions.get('vitssl', '?')}",
    ]
    if versions.get("commit", "unknown") != "unknown":
        parts.append(f"commit {versions['commit']}")
    parts += [f"{k} {versions[k]}" for k in ("jax", "flax", "python") if k in versions]
    return html.element("p", " · ".join(parts), class_="note")


def _tiles(run):
    total = run.status.get("total_steps")
    pairs = [(run.state, "state"), (f"{run.step}/{total or '?'}", "steps")]
    for key, name, form in (
        ("loss", "last loss", "{:.4g}"),
        ("knn/top1", "k-NN, online", "{:.1%}"),
        ("test/top1", "test top-1", "{:.1%}"),
        ("final/trained/knn/top1", "k-NN, final", "{:.1%}"),
        ("final/untrained/knn/top1", "k-NN, untrained", "{:.1%}"),
        ("final/trained/linear/top1", "linear probe", "{:.1%}"),
        ("time/images_per_second", "images/s", "{:.0f}"),
        ("time/mfu_percent", "MFU", "{:.1f} %"),
    ):
        value = run.last(key)
        if value is not None:
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
    return (
        f"Features: {section.get('features', '?')}; k-NN with k = {k}; linear probe by "
        f"{section.get('probe', '?')}; "
        f"data: {run.section('data').get('source', '?')}"
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


def _curves(run):
    """Yield a section per group of metrics."""
    groups = {"Training": [], **{heading: [] for heading in GROUPS}}
    for key in sorted(run.metrics, key=charts.importance):
        if not key.startswith("final/"):
            heading = next((h for h, s in GROUPS.items() if key.startswith(s)), "")
            groups[heading or "Training"].append(key)
    for heading, keys in groups.items():
        # A flat line says no more than its value.
        moving = [key for key in keys if len(set(run.metrics[key][1])) > 1]
        plots = [charts.lines(key, [(key, *run.metrics[key])]) for key in moving]
        all_values = heading == "Timing and memory"
        still = [key for key in keys if all_values or key not in moving]
        rows = [[key, f"{run.last(key):.5g}"] for key in still]
        if keys:
            values = html.table(["metric", "last value"], rows) if rows else html.Safe()
            yield html.section(heading, html.grid([], plots), values)


def _pictures(shown):
    """Yield a section per heading, each picture inside the page."""
    if not shown:
        note = (
            "None yet. They are drawn at the end of a run with log.pictures=True, or "
            "now with `vitssl report RUN --draw`."
        )
        yield html.section("Pictures", html.element("p", note, class_="note"))
    for heading, each in shown.items():
        yield html.section(heading, *itertools.starmap(figure, each))


def figure(path: pathlib.Path, caption: str) -> html.Safe:
    """Return a picture with its caption, embedded unless it is very large."""
    text = html.element("figcaption", f"{caption} ({path.name})")
    try:
        data = decode.contents(path, MOST_BYTES)
    except errors.DataError as e:
        return html.element("p", f"{e}; open it itself", class_="note")
    data = base64.b64encode(data).decode("ascii")
    source = f"data:image/{_KINDS[path.suffix.lower()]};base64,{data}"
    image = html.Safe(f'<img src="{source}" alt="{html.escape(caption)}">')
    return html.element("figure", image, text)


def _confusion(run):
    """Yield the confusion matrices that a method wrote to scores.npz.

    Raises:
        UsageError: the file is damaged.
    """
    path = run.path / "scores.npz"
    if not path.is_file():
        return
    try:
        stored = npy.archive(path)
        found = {k: _counts(k, x) for k, x in stored.items() if k.endswith("confusion")}
    except (OSError, ValueError) as e:
        raise errors.UsageError(
            f"{path}: damaged ({errors.told(e)}); evaluate again"
        ) from e
    for key, matrix in found.items():
        note = html.element(
            "p", f"{curves.printable(key)}. Rows: truth. Columns: prediction."
        )
        many = len(matrix) > MOST_CLASSES
        show = _worst_pairs if many else _coloured
        yield html.section("Confusion matrix", note, show(matrix))


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
