"""Line charts as SVG; a script reads them off, without it they stand still."""

import dataclasses
import html as text_html
import json
import math
import pathlib

import matplotlib
import numpy as np

from vitssl import tree
from vitssl.pictures import curves, panels
from vitssl.tools import html

COLOURS = tuple(panels.COLOURS[i] for i in (5, 4, 2, 0, 3, 1, 6))
_WIDTH, _HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 28, 34
_SIDE = 1000  # Of the square of the curves, which is stretched to the plot.
_MOST = 400  # Points of a curve that are drawn; more are not seen at this width.
SCRIPT = pathlib.Path(__file__).with_suffix(".js").read_text()


def importance(key: str):
    """Return a sort key: the loss, then evaluations, then the plumbing."""
    evals = ("test/", "knn/", "probe/", "quality/", "final/")
    order = ("loss", *evals, "lr", "grad", "time/")
    for i, start in enumerate(order):
        if key.startswith(start):
            return i, tree.natural(key)
    return len(order) - (1.5 if "loss" in key else 0.5), tree.natural(key)


def lines(title, series, *, unit="step", finals=(), levels=(), calm=False) -> html.Safe:
    """Return a chart: [(name, steps [n], values [n])], each with a colour, in order.

    Curves of 30 points and more are drawn pale, and smoothed over it. With `SCRIPT` on
    the page one reads values off and zooms in.

    Args:
        unit: of the steps.
        finals: [(name, step, value)], rings.
        levels: [(name, value)], dashed lines over the whole width.
        calm: whether small changes of a large value are drawn small.
    """
    series = [(n, *_finite(steps, values)) for n, steps, values in series]
    series = [one for one in series if len(one[1])]
    finals = [one for one in finals if math.isfinite(one[2])]
    levels = [one for one in levels if math.isfinite(one[1])]
    if not series:
        return html.element("div", f"{title}: no finite value", class_="note")
    marks = [np.array([v for *_, v in finals] + [v for _, v in levels])]
    every = [v for _, _, v in series] + [v for v in marks if len(v)]
    logarithmic = _wants_log(every)
    scale = np.log10 if logarithmic else np.asarray
    high = max(float(steps[-1]) for _, steps, _ in series)
    high = 1.015 * max([high, *(float(step) for _, step, _ in finals)]) or 1.0
    ys = _ticks(*_padded(scale(np.concatenate(every)), calm and not logarithmic))
    frame = _Frame(high, ys[0], ys[-1], scale)
    parts = [_text(8, 15, title + (" (log)" if logarithmic else ""), "title", "start")]
    for y in ys:
        at = _HEIGHT - _BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * _PLOT[1]
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(_text(_LEFT - 5, at + 4, _label(10**y if logarithmic else y), "y"))
    for x in _ticks(0.0, high, 4):
        if x <= high:
            at = _LEFT + x / high * _PLOT[0]
            middle = "end" if at > _WIDTH - 30 else "middle"
            parts.append(_text(at, _HEIGHT - 20, _label(x), "x", middle))
    parts.append(_text(_LEFT + _PLOT[0] / 2, _HEIGHT - 6, unit, "unit", "middle"))
    inner = [_level(frame, *level) for level in levels]
    for i, (name, steps, values) in enumerate(series):
        inner.append(_curve(frame, name, steps, values, colour(i, len(series))))
    for i, (name, step, value) in enumerate(finals):
        inner.append(_dot(frame, name, step, value, colour(i, len(series))))
    parts.append(
        f'<svg class="plot" x="{_LEFT}" y="{_TOP}" width="{_PLOT[0]}" '
        f'height="{_PLOT[1]}" viewBox="0 0 {_SIDE} {_SIDE}" '
        f'preserveAspectRatio="none">{"".join(inner)}</svg>'
    )
    for name, value in levels:
        at = _TOP + frame.y(value) / _SIDE * _PLOT[1] - 3
        parts.append(_text(_WIDTH - _RIGHT, at, name, "level", "end"))
    label = text_html.escape(title)
    data = text_html.escape(json.dumps(_read_off(frame, series, finals, unit)))
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}"'
    return html.Safe(
        f'<svg class="chart" {box} data-chart="{data}">{"".join(parts)}</svg>'
    )


_PLOT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM  # Of the curves.


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where steps up to `right` and values, scaled, from `low` to `top` lie."""

    right: float
    low: float
    top: float
    scale: object

    def x(self, steps):
        return np.asarray(steps) / self.right * _SIDE

    def y(self, values):
        return (self.top - self.scale(values)) / (self.top - self.low) * _SIDE


def colour(i: int, count: int) -> str:
    """Return the i-th of so many colours: apart, or from dark to light if many."""
    if count <= len(COLOURS):
        return COLOURS[i]
    ramp = matplotlib.colormaps["viridis"](0.9 * i / (count - 1))
    return matplotlib.colors.to_hex(ramp)


def legend(names) -> html.Safe:
    """Return which colour is which run or metric; a click hides it."""
    each = []
    for i, name in enumerate(names):
        mark = html.element("i", style=f"background:{colour(i, len(names))}")
        each.append(html.element("span", mark, name, data_name=name))
    return html.element("div", *each, class_="legend")


def _read_off(frame, series, finals, unit):
    """Return what the script needs: the frame, and what can be read off."""
    read = []
    for name, steps, values in series:
        keep = _thinned(len(steps))
        read.append([name, *(_short(np.asarray(a)[keep]) for a in (steps, values))])
    read += [[name, _short([step]), _short([value])] for name, step, value in finals]
    log = frame.scale is np.log10
    return dict(
        unit=unit, right=frame.right, low=frame.low, top=frame.top, log=log, series=read
    )


def _short(values) -> list:
    return [float(f"{v:.5g}") for v in values]


def _thinned(count):
    return np.unique(np.linspace(0, count - 1, _MOST).astype(int))


def _finite(steps, values):
    steps, values = np.asarray(steps), np.asarray(values, float)
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _wants_log(values) -> bool:
    """Return whether values are positive and span three orders of magnitude."""
    every = np.concatenate(values)
    return bool(every.min() > 0 and every.max() / every.min() > 1000)


def _padded(values, calm=False):
    low, high = float(values.min()), float(values.max())
    if calm and high - low < 0.2 * max(abs(low), abs(high)):
        middle, half = (low + high) / 2, 0.1 * max(abs(low), abs(high))
        low, high = middle - half, middle + half
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


def _curve(frame, name, steps, values, shade) -> str:
    if len(values) == 1:
        return _dot(frame, name, steps[0], values[0], shade)
    if len(values) < 30:
        return _path(frame, name, steps, values, shade)
    smoothed = curves.smooth(values, len(values) / 60)
    pale = _path(frame, name, steps, values, shade, "raw")
    return pale + _path(frame, name, steps, smoothed, shade)


def _path(frame, name, steps, values, shade, kind="curve") -> str:
    keep = _thinned(len(values))
    x, y = frame.x(np.asarray(steps)[keep]), frame.y(np.asarray(values)[keep])
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return _drawn(f"M{points}", name, shade, kind)


def _dot(frame, name, step, value, shade) -> str:
    # A round end of no line: a circle would be stretched with the plot.
    return _drawn(f"M{frame.x(step):.1f},{frame.y(value):.1f}h0", name, shade, "dot")


def _level(frame, name, value) -> str:
    return _drawn(f"M0,{frame.y(value):.1f}H{_SIDE}", name, "", "dashed")


def _drawn(path, name, shade, kind) -> str:
    stroke = f' stroke="{shade}"' if shade else ""
    of = text_html.escape(name)
    return f'<path d="{path}" class="{kind}"{stroke} data-name="{of}"/>'
