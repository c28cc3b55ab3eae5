"""Charts as SVG that needs no script: widths in per cent, so they fit a phone, paper and a wide screen.

A chart is an outer `<svg>` of fixed height with an inner one for the plot area. Marks and labels sit at
per-cent x positions and pixel y positions; curves live in a third `<svg>` that is stretched without
stretching its strokes. Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from regard.report.colour import LEVELS, SIDE
from regard.report.markup import Real, change, escape, number
from regard.report.schema import Measure, Proof

Position = Callable[[Real], Real]


def pixels(value: Real) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def chart(
    body: str, height: Real, label: str, css: str = "", left: int = 46, foot: int = 24
) -> str:
    """The frame of a chart whose plot area is `height` pixels tall; `body` uses per-cent x."""
    return (
        f'<svg class="chart {css}" role="img" aria-label="{escape(label)}" style="--left:{left}px" '
        f'height="{pixels(height + foot + 12)}"><svg class="plot" y="12" width="100%" '
        f'height="{pixels(height)}">{body}</svg></svg>'
    )


def text(x: Real, y: Real, content: str, css: str = "", dx: Real = 0, dy: Real = 0) -> str:
    shift = (f' dx="{pixels(dx)}"' if dx else "") + (f' dy="{pixels(dy)}"' if dy else "")
    mark = f' class="{css}"' if css else ""
    return f'<text x="{pixels(x)}%" y="{pixels(y)}"{shift}{mark}>{escape(content)}</text>'


def line(x1: Real, y1: Real, x2: Real, y2: Real, css: str = "grid") -> str:
    return (
        f'<line class="{css}" x1="{pixels(x1)}%" y1="{pixels(y1)}" '
        f'x2="{pixels(x2)}%" y2="{pixels(y2)}"/>'
    )


def bar(x: Real, y: Real, width: Real, height: Real, css: str, tip: str = "") -> str:
    data = f' data-tip="{escape(tip)}"' if tip else ""
    return (
        f'<rect class="{css}" x="{pixels(x)}%" y="{pixels(y)}" width="{pixels(width)}%" '
        f'height="{pixels(max(height, 0.5))}"{data}/>'
    )


def dot(x: Real, y: Real, radius: Real, css: str, tip: str = "") -> str:
    data = f' data-tip="{escape(tip)}"' if tip else ""
    return f'<circle class="{css}" cx="{pixels(x)}%" cy="{pixels(y)}" r="{pixels(radius)}"{data}/>'


def curves(paths: Iterable[tuple[str, str]], height: Real) -> str:
    """Paths in a 1000 x `height` box stretched over the plot area: (css class, path data)."""
    drawn = "".join(f'<path class="{css}" d="{data}"/>' for css, data in paths)
    return (
        f'<svg class="stretch" viewBox="0 0 1000 {pixels(height)}" width="100%" '
        f'height="{pixels(height)}" preserveAspectRatio="none">{drawn}</svg>'
    )


def polyline(xs: Sequence[Real], ys: Sequence[Real]) -> str:
    """Path data for `curves` through points with x in per cent; a NaN breaks the line."""
    parts, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        parts.append(f"{pen}{x * 10:.0f} {pixels(round(y, 1))}")
        pen = "L"
    return "".join(parts)


def band(xs: Sequence[Real], low: Sequence[Real], high: Sequence[Real]) -> str:
    """Path data of the area between two curves."""
    back = polyline(list(xs)[::-1], list(low)[::-1]).replace("M", "L", 1)
    return polyline(xs, high) + back + "Z"


def axis(ticks: Iterable[Real], place: Position, show: Callable[[Real], str] = number) -> str:
    """Horizontal grid lines with labels left of the plot area."""
    marks = []
    for tick in ticks:
        y = place(tick)
        marks.append(line(0, y, 100, y) + text(0, y, show(tick), "tick end", dx=-8, dy=4))
    return "".join(marks)


def nice_ticks(low: Real, high: Real, count: int = 4) -> list[float]:
    """Round values within [low, high], about `count` of them."""
    if not high > low:
        return [float(low)]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(float(i * step), 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def layer_labels(layers: int, y: Real, start: int = 0, title: str = "layer") -> str:
    """Layer numbers below a plot of `layers` equal columns, every fifth or so; all tips have all."""
    step = next(s for s in (1, 2, 5, 10, 20, 50) if layers / s <= 16)
    marks = []
    for layer in range(layers):
        shown = layer + start
        if shown < 0 or shown % step:
            continue
        marks.append(text(100 * (layer + 0.5) / layers, y, str(shown), "tick mid"))
    return "".join(marks) + text(0, y, title, "tick end", dx=-8)


def colour_range(measure: Measure) -> tuple[float, float]:
    """Where a measure's colour scale begins and ends."""
    values = measure.values[np.isfinite(measure.values)].astype(float)
    if values.size == 0:
        return (0.0, 1.0)
    if measure.scale == "diverging":
        reach = (
            measure.high if measure.high is not None else float(np.quantile(np.abs(values), 0.98))
        )
        reach = reach or float(np.abs(values).max()) or 1.0
        return (-reach, reach)
    if measure.scale == "log":
        positive = values[values > 0]
        values = positive if positive.size else np.array([1e-6, 1.0])
    low = measure.low if measure.low is not None else float(values.min())
    high = measure.high if measure.high is not None else float(values.max())
    if measure.scale == "log":
        low = max(low, high * 1e-4, 1e-12)
    return (low, high if high > low else low + (abs(low) or 1.0))


def position(value: Real, low: Real, high: Real, scale: str) -> Real:
    """Where `value` lies between `low` and `high`, clipped to [0, 1]."""
    if scale == "log":
        if value <= 0:
            return 0.0
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(max((value - low) / (high - low), 0.0), 1.0)


def level_class(value: Real, low: Real, high: Real, scale: str) -> str:
    """The colour class of a cell: `q0 … q31`, `d0 … d24`, or `none` for a missing value."""
    if not math.isfinite(value):
        return "none"
    t = position(value, low, high, scale)
    return f"d{round(t * 2 * SIDE)}" if scale == "diverging" else f"q{round(t * (LEVELS - 1))}"


def row_height(heads: int) -> int:
    """Height of an atlas row, so that few heads get large cells and many still fit a screen."""
    return max(9, min(30, 420 // heads))


def atlas(measure: Measure, label: str) -> str:
    """The layer x head grid: one cell a head, layers to the right, heads downwards."""
    layers, heads = measure.values.shape
    low, high = colour_range(measure)
    size = row_height(heads)
    cells = []
    for layer in range(layers):
        for head in range(heads):
            css = level_class(float(measure.values[layer, head]), low, high, measure.scale)
            cells.append(
                f'<rect class="c {css}" x="{pixels(100 * layer / layers)}%" y="{head * size}"/>'
            )
    step = 1 if size >= 13 else 4 if size >= 10 else 8
    names = "".join(
        text(0, (head + 0.5) * size + 4, f"H{head}", "tick end", dx=-8)
        for head in range(0, heads, step)
    )
    style = f"--left:34px;--w:{pixels(100 / layers)}%;--h:{size}px"
    height = heads * size
    return (
        f'<svg class="chart grid-map" height="{height + 28}" style="{style}">'
        f'<svg class="plot" y="2" width="100%" height="{height}">'
        f'<g class="cells" role="grid" aria-label="{escape(label)}">{"".join(cells)}</g>'
        f'<g class="names">{names}{layer_labels(layers, height + 18, title="")}</g></svg></svg>'
    )


def thumbnail(measure: Measure) -> str:
    """The atlas as a picture without labels, in one path a colour (the page's emblem)."""
    layers, heads = measure.values.shape
    low, high = colour_range(measure)
    paths: dict[str, list[str]] = {}
    for layer in range(layers):
        for head in range(heads):
            css = level_class(float(measure.values[layer, head]), low, high, measure.scale)
            paths.setdefault(css, []).append(f"M{layer * 10} {head * 10}h9v9h-9z")
    drawn = "".join(f'<path class="{css}" d="{"".join(d)}"/>' for css, d in paths.items())
    return (
        f'<svg class="emblem" viewBox="0 0 {layers * 10 - 1} {heads * 10 - 1}" '
        f'aria-hidden="true">{drawn}</svg>'
    )


def proof_plot(proof: Proof) -> str:
    """Effect and interval (filled) beside its controls (open dots) on one axis that includes 0."""
    ends = [proof.effect, 0.0, *proof.controls]
    ends += [v for v in (proof.low, proof.high) if v is not None]
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def place(value: Real) -> Real:
        return 100 * (value - low) / (high - low)

    y = 16
    marks = [line(0, y, 100, y, "axis"), line(place(0), 6, place(0), 26, "zero")]
    marks += [dot(place(v), y, 3.2, "control") for v in proof.controls]
    if proof.low is not None and proof.high is not None:
        marks.append(line(place(proof.low), y, place(proof.high), y, "range"))
    marks.append(dot(place(proof.effect), y, 5, "effect"))
    marks.append(text(place(0), 38, "0", "tick mid"))
    label = f"{proof.label}: {change(proof.effect, proof.unit)}"
    return (
        f'<svg class="proof-plot" role="img" aria-label="{escape(label)}" height="42">'
        f"{''.join(marks)}</svg>"
    )
