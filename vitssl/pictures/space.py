"""Pictures of whole images as points: neighbours, two dimensions, distributions."""

import matplotlib
import numpy as np

from vitssl.evals import knn
from vitssl.pictures import panels

SAME, OTHER = panels.COLOURS[2], panels.COLOURS[4]  # Frames of neighbours.


@panels.picture
def neighbours(queries, bank, features, *, labels=None, classes=(), count=5, total=0):
    """Draw images and the images whose features are most like theirs.

    Args:
        queries, bank: [Q, H, W, C] and [M, H, W, C].
        features: ([Q, D], [M, D]).
        labels: (int [Q], int [M]) or None; a neighbour of the same class gets a green
            frame, one of another class a red, dashed one.
        count: neighbours per image.
        total: images that these of the bank are the nearest of; 0 is all of it.
    """
    similarity, found = knn.search(*features[::-1], min(count, len(bank)))
    title = f"Test images and the nearest of {total or len(bank):,} training images"
    title += " (number: cosine)"
    key = [(SAME, "of the same class"), (OTHER, "of another (dashed)")]
    figure, axes = panels.tiles(
        len(queries),
        1 + found.shape[1],
        title,
        size=1.1,
        label=False,
        key=[] if labels is None else key,
    )
    queries, bank = panels.rgb(queries), panels.rgb(bank)
    for q, row in enumerate(axes):
        name = "query" if labels is None else f"query: {_name(labels[0][q], classes)}"
        panels.show(row[0], queries[q], name)
        for axis, i, cosine in zip(row[1:], found[q], similarity[q], strict=True):
            if labels is None:
                panels.show(axis, bank[i], f"{cosine:.4f}")
                continue
            panels.show(axis, bank[i], f"{_name(labels[1][i], classes)}  {cosine:.4f}")
            same = labels[1][i] == labels[0][q]
            axis.spines[:].set(
                visible=True,
                color=SAME if same else OTHER,
                linestyle="-" if same else (0, (3, 2)),
                linewidth=2,
            )
    return figure


def _name(label, classes):
    return classes[label] if 0 <= label < len(classes) else str(label)


def embed(features, method, *, seed=42):  # [M >= 3, D] -> [M, 2]
    """Return features in two dimensions by "pca", or by "tsne".

    t-SNE is of perplexity 30, less for few rows, after PCA to 50.
    """
    # Nobody else here needs scikit-learn, which takes a second to import.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    x = np.asarray(features, np.float64)
    count = 2 if method == "pca" else min(50, *x.shape)
    x = PCA(count, svd_solver="full").fit_transform(x)
    if method == "pca":
        return x
    perplexity = min(30.0, (len(x) - 1) / 3)
    # On a busy machine its threads wait for each other most of the time.
    with threadpool_limits(1):
        return TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(x)


@panels.picture
def feature_space(features, labels=None, *, classes=(), seed=42):
    """Draw every image as a point: principal components, and t-SNE.

    Args:
        features: [M, D]; a few thousand rows at most, since t-SNE is slow.
        labels: int [M], -1 unknown; or None.
        classes: names; the legend has at most 14.
    """
    title = f"Features of {len(features)} images"
    figure, axes = panels.charts(2, title, columns=2, size=(3.6, 3.4))
    labels = np.full(len(features), -1) if labels is None else np.asarray(labels)
    names = {"pca": "two principal components", "tsne": "t-SNE"}
    present = np.unique(labels)
    colours = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20"]
    for axis, (method, name) in zip(axes, names.items(), strict=True):
        points = embed(features, method, seed=seed)
        for i, label in enumerate(present):
            chosen = points[labels == label]
            colour = "#8A8D99" if label < 0 else colours(i % colours.N)
            text = _name(label, classes) if label >= 0 else "unlabelled"
            axis.scatter(*chosen.T, s=9, alpha=0.75, color=colour, lw=0, label=text)
        axis.set(title=name, xticks=[], yticks=[])
        axis.grid(False)
    if 1 < len(present) <= 14:
        axes[1].legend(
            bbox_to_anchor=(1, 0.5), loc="center left", markerscale=2, fontsize=7
        )
    return figure


@panels.picture
def distributions(features):
    """Draw how features are spread: norms, deviation per dimension, spectrum.

    A collapse shows as a low curve in the middle, or a steep one at the right.
    `features` is {name: [M, D]}, such as of the trained network and the untrained.
    """
    figure, axes = panels.charts(3, "Distribution of features")
    norms = {k: np.linalg.norm(np.asarray(x), axis=1) for k, x in features.items()}
    bins = np.histogram_bin_edges(np.concatenate(list(norms.values())), 50)
    for name, each in features.items():
        x = np.asarray(each, np.float64)
        axes[0].hist(norms[name], bins, density=True, alpha=0.6, label=name)
        deviation = np.sort(x.std(0))[::-1]
        axes[1].plot(np.arange(1, len(deviation) + 1), deviation, label=name)
        spectrum = np.linalg.svd(x - x.mean(0), compute_uv=False)
        spectrum = spectrum / max(spectrum[0], 1e-30)
        axes[2].plot(np.arange(1, len(spectrum) + 1), spectrum, label=name)
    axes[0].set(title="length of a feature vector", ylabel="density")
    axes[1].set(title="standard deviation per dimension", xlabel="dimension, sorted")
    axes[2].set(title="singular values, relative", xlabel="component")
    axes[1].set_ylim(bottom=0)
    axes[2].set(yscale="log", ylim=(1e-4, 1.5))
    for axis in axes:
        axis.legend(fontsize=7)
    return figure
