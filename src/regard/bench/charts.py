"""The bench's pictures, as SVG and HTML that need no script: Pareto fronts, loss by depth, time against its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from regard.bench.results import FULL, LIBRARY, MEASURES, Results, Setting
from regard.metrics import Estimate
from regard.report.colour import LEVELS
from regard.report.markup import Real, escape, interval, quantity, table
from regard.report.svg import axis, chart, curves, dot, line, nice_ticks, pixels, polyline, text

LEAST_KL = 1e-4  # a KL below this is drawn here: its axis is logarithmic
HEIGHT = 340


def size_label(budget: str) -> str:
    """A budget as a reader says it.

    >>> size_label("0.2"), size_label("512"), size_label("64MB")
    ('20 %', '512 tokens', '64MB')
    """
    try:
        size = float(budget)
    except ValueError:
        return budget
    return f"{size * 100:g} %" if "." in budget and size <= 1 else f"{size:g} tokens"


def shown(estimate: Estimate | None, measure: str, digits: int = 3) -> str:
    """A mean with its unit and interval, as plain text."""
    if estimate is None:
        return "–"
    unit = MEASURES[measure].unit
    spread = ""
    if not math.isnan(estimate.low):
        spread = " " + interval(estimate.low, estimate.high, unit, digits)
    return quantity(estimate.mean, unit, digits) + spread


def cell(estimate: Estimate | None, measure: str) -> str:
    """A mean over its interval, as HTML for a table."""
    if estimate is None:
        return "–"
    unit = MEASURES[measure].unit
    mean = quantity(estimate.mean, "share" if unit == "share" else "")
    if math.isnan(estimate.low):
        return mean
    return f'{mean}<small class="spread">{interval(estimate.low, estimate.high, unit, 2)}</small>'


def methods_of(results: Results, length: int) -> list[str]:
    """The methods measured at a length, without the baselines."""
    found = dict.fromkeys(s.method for s in results.settings() if s.length == length)
    return [name for name in found if name not in (FULL, LIBRARY)]


def pareto(results: Results, length: int, measure: str, titles: dict[str, str]) -> str:
    """One measure against the memory held: a line for each method, a ring around what nothing beats."""
    settings = [s for s in results.settings() if s.length == length and s.method != LIBRARY]
    points = {
        s: (cost.mean, worth)
        for s in settings
        if (cost := results.estimate(s, "kept")) and (worth := results.estimate(s, measure))
    }
    compressed = [s for s in points if s.method != FULL]
    if not compressed:
        return ""
    log = measure == "kl"
    ends = [
        e for _, worth in points.values() for e in (worth.mean, worth.low, worth.high) if e == e
    ]
    low, high = min(ends), max(ends)
    if log:
        least = min(points[s][1].mean for s in compressed)
        low = max(least / 2, LEAST_KL)
        high = max(high, 4 * low)
    left = min(points[s][0] for s in compressed) * 0.9

    def across(kept: Real) -> Real:
        return 100 * math.log(max(kept, left) / left) / math.log(1.08 / left)

    def place(value: Real) -> Real:
        if log:
            share = (math.log(max(value, low)) - math.log(low)) / (
                math.log(high) - math.log(low) or 1
            )
        else:
            share = (value - low) / (high - low or 1)
        return HEIGHT - 10 - (HEIGHT - 24) * share

    unit = MEASURES[measure].unit
    ticks = (
        [t for p in range(-4, 2) for t in (10**p, 3 * 10**p) if low <= t <= high]
        if log
        else nice_ticks(low, high, 5)
    )
    marks = [axis(ticks, place, lambda v: quantity(v, unit, 2))]
    for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0):
        if left <= share <= 1:
            marks.append(text(across(share), HEIGHT + 18, f"{share * 100:g} %", "tick mid"))
    full = Setting(length, FULL, "1")
    if full in points:
        y = place(points[full][1].mean)
        marks.append(line(0, y, 100, y, "zero") + text(0, y, "full cache", "tick", dx=6, dy=-6))
    front = set(results.pareto(length, measure, "kept"))
    paths, dots = [], []
    for number, method in enumerate(methods_of(results, length)):
        own = sorted((s for s in compressed if s.method == method), key=lambda s: points[s][0])
        xs = [across(points[s][0]) for s in own]
        ys = [place(points[s][1].mean) for s in own]
        paths.append((f"stroke thin method method-{number}", polyline(xs, ys)))
        for setting, x, y in zip(own, xs, ys, strict=True):
            kept, worth = points[setting]
            tip = f"{titles.get(method, method)}, {quantity(kept, 'share', 2)} kept: {shown(worth, measure)}"
            css = f"method method-{number}"
            if not math.isnan(worth.low):
                dots.append(line(x, place(worth.low), x, place(worth.high), f"whisker {css}"))
            if setting in front:
                dots.append(dot(x, y, 8, f"front {css}"))
            dots.append(dot(x, y, 4, f"point {css}", tip))
    body = "".join(marks) + curves(paths, HEIGHT) + "".join(dots)
    label = f"{MEASURES[measure].label} against memory kept, {length} tokens"
    return chart(body, HEIGHT, label, left=86, foot=26)


def depth_table(
    results: Results, settings: Sequence[Setting], measure: str, titles: dict[str, str]
) -> str:
    """What each setting loses of the full cache, by where in the context the answer stands."""
    full = Setting(settings[0].length, FULL, "1")
    reference = results.by_depth(full, measure)
    rows = {
        s: [
            None if ours is None or base is None else base - ours
            for ours, base in zip(results.by_depth(s, measure), reference, strict=True)
        ]
        for s in settings
    }
    worst = max((v for row in rows.values() for v in row if v is not None), default=0.0)
    head = ["Method", "Budget", *(f"{20 * part}–{20 * part + 20} %" for part in range(5))]
    body = [
        [
            escape(titles.get(s.method, s.method)),
            escape(size_label(s.budget)),
            *(_heat(value, worst) for value in row),
        ]
        for s, row in rows.items()
    ]
    return table(head, body, css="heat")


def _heat(value: Real | None, worst: Real) -> str:
    if value is None:
        return "–"
    level = round(min(max(value / worst, 0), 1) * (LEVELS - 1)) if worst > 0 else 0
    css = "cell deep" if level > LEVELS // 2 else "cell"
    return f'<span class="{css}" style="--level:var(--q{level})">{quantity(value, "", 2)}</span>'


def speed(results: Results, length: int, titles: dict[str, str]) -> str:
    """Time of a generated token for each setting: the part that memory bandwidth demands, and the rest."""
    settings = [s for s in results.settings() if s.length == length]
    times = {s: e.mean for s in settings if (e := results.estimate(s, "decode"))}
    if not times:
        return ""
    longest = max(times.values()) * 1.12
    rows = []
    for setting, took in times.items():
        floor = results.estimate(setting, "floor")
        least = floor.mean if floor else 0.0
        name = titles.get(setting.method, setting.method)
        kept = "" if setting.method in (FULL, LIBRARY) else size_label(setting.budget)
        said = f"{took:.0f} ms, floor {least:.0f} ms"
        bar = (
            f'<svg class="meter" height="14" role="img" aria-label="{escape(said)}">'
            f'<rect class="rail" width="100%" height="14"/>'
            f'<rect class="rest" width="{pixels(100 * took / longest)}%" height="14"/>'
            f'<rect class="floor" width="{pixels(100 * min(least, took) / longest)}%" height="14"/></svg>'
        )
        cells = [escape(name), escape(kept), bar, quantity(took, "ms"), quantity(least, "ms")]
        for measure in ("prefill", "peak", "bytes"):
            found = results.estimate(setting, measure)
            cells.append(quantity(found.mean, MEASURES[measure].unit) if found else "–")
        rows.append(cells)
    head = [
        "Cache",
        "Kept",
        "A generated token",
        "took",
        "floor",
        "prefill",
        "prefill peak",
        "holds",
    ]
    return table(head, rows, css="speed", numeric_from=3)
