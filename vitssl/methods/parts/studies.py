"""What the final evaluation of part discovery measures once: see `Measures`.

Sources: ananthu-aniraj/ifam calculate_part_logit_thresholds.py (removal of patches of
low confidence); Xiao et al. 2020, arXiv:2006.09994 (ImageNet-9, the challenge).
"""

import json
import os

import numpy as np

from vitssl.data.sources import in9
from vitssl.methods.parts import scores as partscores


def scores(method, rows) -> dict:
    """Return {name: float, or array for WORKDIR/scores.npz}.

    Args:
        method: Parts.
        rows: rows(function, *arguments, split="test" | "bank", source=None) returns
            {name: [M, ...]} of function(params, extra, *arguments, batch) over images.
    """
    found = {}
    if method.measures.thresholds:
        found |= confident(method, rows)
    if method.measures.backgrounds:
        found |= backgrounds(method, rows)
    return found


def confident(method, rows) -> dict:
    """Return scores without each part's least confident patches, "<name>_least_<q>"."""
    shares = method.measures.thresholds
    seen = rows(method.confidence, split="bank")
    limits = partscores.least(seen["owner"], seen["value"], method.parts.count, shares)
    found = {"thresholds": np.stack([limits[q] for q in shares])}
    for q in shares:
        values = rows(method.thresholded, limits[q].astype(np.float32))
        for name, value in partscores.scores(values).items():
            if not np.ndim(value):
                found[f"{name}_least_{q:g}"] = value
    return found


def backgrounds(method, rows) -> dict:
    """Return the accuracy on every variant of ImageNet-9, the gap and the challenge."""
    m, channels, found = method.measures, method.run.channels, {}
    mapping = _mapping(m.mapping, method.run.classes)
    right = lambda r: partscores.coarse(r["guess"], mapping) == r["label"]  # noqa: E731
    root = os.path.expanduser(m.backgrounds)
    for name in in9.variants(root):
        if name == in9.BACKGROUNDS:
            continue  # No object in them.
        values = rows(method.guesses, source=in9.open(root, name, channels=channels))
        found[f"in9_{name}"] = float(right(values).mean())
    pair = [found.get(f"in9_mixed_{kind}") for kind in ("same", "rand")]
    if None not in pair:
        found["in9_bg_gap"] = partscores.background_gap(*pair)
    if m.challenge:
        source = in9.challenge(root, m.challenge, channels=channels)
        values = rows(method.guesses, source=source)
        wrong = ~right(values).reshape(-1, len(source.chosen))
        found["in9_challenge"] = partscores.challenge(wrong)
    return found


def _mapping(path, classes):
    if not path:
        return {c: c for c in range(classes)}
    with open(os.path.expanduser(path)) as file:
        return {int(fine): int(group) for fine, group in json.load(file).items()}
