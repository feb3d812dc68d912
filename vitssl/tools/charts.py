"""Line charts as SVG: light enough for a page with dozens of them."""

import html as text_html
import math

import numpy as np

from vitssl.pictures import curves, panels
from vitssl.tools import html

COLOURS = tuple(panels.COLOURS[i] for i in (5, 4, 2, 0, 3, 1, 6))
_WIDTH, _HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 28, 26
_MOST = 400  # Points of a curve that are drawn; more are not seen at this width.


def importance(key: str):
    """Return a sort key: the loss, then evaluations, then the plumbing."""
    evals = ("test/", "knn/", "probe/", "quality/", "final/")
    order = ("loss", *evals, "lr", "grad", "time/")
    for i, start in enumerate(order):
        if key.startswith(start):
            return i, key
    return len(order) - (1.5 if "loss" in key else 0.5), key


def lines(title: str, series) -> html.Safe:
    """Return a chart of one metric: series are [(name, steps [n], values [n])].

    Each has a colour, in this order; curves of 30 points and more are drawn pale, and
    smoothed over it.
    """
    series = [(n, *_finite(steps, values)) for n, steps, values in series]
    series = [one for one in series if len(one[1])]
    if not series:
        return html.element("div", f"{title}: no finite value", class_="note")
    logarithmic = _wants_log([values for _, _, values in series])
    scale = np.log10 if logarithmic else np.asarray
    every = np.concatenate([scale(v) for _, _, v in series])
    high = max(float(steps[-1]) for _, steps, _ in series)
    ys = _ticks(*_padded(every))
    low, top = ys[0], ys[-1]

    def place(steps, values):
        x = _LEFT + np.asarray(steps) / max(high, 1) * (_WIDTH - _LEFT - _RIGHT)
        share = (scale(values) - low) / (top - low)
        return x, _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(8, 15, title + (" (log)" if logarithmic else ""), "title", "start")]
    for y in ys:
        at = _HEIGHT - _BOTTOM - (y - low) / (top - low) * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(_text(_LEFT - 5, at + 4, _label(10**y if logarithmic else y)))
    for x in (0.0, high / 2, high):
        at = _LEFT + x / max(high, 1) * (_WIDTH - _LEFT - _RIGHT)
        anchor = "start" if x == 0 else "end" if x == high else "middle"
        parts.append(_text(at, _HEIGHT - 8, _label(x), anchor=anchor))
    for i, (name, steps, values) in enumerate(series):
        parts.append(_curve(place, name, steps, values, COLOURS[i % len(COLOURS)]))
    label = text_html.escape(title)
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}"'
    return html.Safe(f"<svg {box}>{''.join(parts)}</svg>")


def legend(names) -> html.Safe:
    """Return which colour is which run."""
    each = []
    for i, name in enumerate(names):
        mark = html.element("i", style=f"background:{COLOURS[i % len(COLOURS)]}")
        each.append(html.element("span", mark, name))
    return html.element("div", *each, class_="legend")


def _finite(steps, values):
    steps, values = np.asarray(steps), np.asarray(values, float)
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _wants_log(values) -> bool:
    """Return whether values are positive and span three orders of magnitude."""
    every = np.concatenate(values)
    return bool(every.min() > 0 and every.max() / every.min() > 1000)


def _padded(values):
    low, high = float(values.min()), float(values.max())
    if high == low:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low, high


def _ticks(low, high, most=5):
    """Return round values that enclose [low, high], evenly spaced, about `most`."""
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label(value) -> str:
    if value == 0:
        return "0"
    if 1e4 <= abs(value) < 1e9:
        for unit, size in (("k", 1e3), ("M", 1e6)):
            if abs(value) < size * 1e3:
                return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _text(x, y, content, kind="", anchor="end") -> str:
    of = f' class="{kind}"' if kind else ""
    inner = text_html.escape(str(content))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of}>{inner}</text>'


def _curve(place, name, steps, values, colour) -> str:
    last = f"{name}: {values[-1]:.5g} after step {steps[-1]}"
    title = f"<title>{text_html.escape(last)}</title>"
    if len(values) == 1:
        x, y = place(steps, values)
        dot = f'<circle cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3" fill="{colour}">'
        return f"{dot}{title}</circle>"
    if len(values) < 30:
        return _path(place, steps, values, colour, "", title)
    smoothed = curves.smooth(values, len(values) / 60)
    pale = _path(place, steps, values, colour, ' class="raw"', "")
    return pale + _path(place, steps, smoothed, colour, "", title)


def _path(place, steps, values, colour, kind, title) -> str:
    keep = np.unique(np.linspace(0, len(values) - 1, _MOST).astype(int))
    x, y = place(np.asarray(steps)[keep], np.asarray(values)[keep])
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<path d="M{points}" stroke="{colour}"{kind}>{title}</path>'
