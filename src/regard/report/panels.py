"""Panels on the residual stream, the text, its rhythm, and the key-value budget."""

from __future__ import annotations

import math

import numpy as np

from regard.report.definitions import definition
from regard.report.markup import (
    Real,
    about,
    escape,
    interval,
    legend,
    number,
    quantity,
    table,
    text_table,
    visible_token,
)
from regard.report.schema import Budget, Sequence, Skyline, Stack
from regard.report.sections import section
from regard.report.svg import (
    axis,
    band,
    bar,
    chart,
    curves,
    dot,
    layer_labels,
    line,
    nice_ticks,
    polyline,
    position,
    text,
)

STATIC_TOKENS = 320
"""Tokens of the text that the page shows without a script (in print, in a mail preview)."""

RHYTHM_BINS = 250


def skyline(stack: Stack, index: int) -> str:
    """Largest activation after each block, who writes and erases it, what capping it costs."""
    sky = stack.skyline
    if sky is None:
        return ""
    tokens = stack.sequence.tokens if stack.sequence else []
    side = _dose(sky) + _writers(sky)
    body = (
        f'<div class="split"><div>{_peaks(sky, tokens)}{_writes(sky, stack.layers)}'
        f"{_skyline_table(sky, tokens)}</div><div>{side}</div></div>"
        f'<div class="abouts">{about(definition("peak"))}{about(definition("write"))}</div>'
    )
    top = int(np.nanargmax(sky.peak))
    lead = (
        f"The largest entry of the residual stream is {number(float(sky.peak[top]))}, "
        f"{number(float(sky.peak[top] / max(sky.median[top], 1e-9)), 2)} times the median there: "
        f"dimension {int(sky.peak_dimension[top])} of token {int(sky.peak_token[top])}."
    )
    return section("skyline", index, escape(lead), body)


def _site(site: int) -> str:
    return "embedding" if site == 0 else f"layer {site - 1}"


def _peaks(sky: Skyline, tokens: list[str]) -> str:
    height, sites = 190, len(sky.peak)
    low = 10 ** math.floor(math.log10(max(float(np.nanmin(sky.median)), 1e-3)))
    high = 10 ** math.ceil(math.log10(float(np.nanmax(sky.peak)) * 1.02))

    def place(value: Real) -> Real:
        return height * (1 - position(value, low, high, "log"))

    decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
    marks = [axis((10.0**d for d in decades), place)]
    width = 100 / sites
    common = int(sky.dimension)
    for site in range(sites):
        value, where = float(sky.peak[site]), int(sky.peak_token[site])
        name = f" “{visible_token(tokens[where])}”" if where < len(tokens) else ""
        tip = (
            f"{_site(site)}: {number(value)}, dimension {int(sky.peak_dimension[site])}, "
            f"token {where}{name}; median {number(float(sky.median[site]))}"
        )
        css = "tower lit" if int(sky.peak_dimension[site]) == common else "tower"
        y = place(value)
        marks.append(bar(site * width + 0.12 * width, y, 0.76 * width, height - y, css, tip))
        y = place(float(sky.median[site]))
        marks.append(line(site * width, y, (site + 1) * width, y, "median"))
    if sky.first_norm is not None and sky.median_norm is not None:
        xs = [(site + 0.5) * width for site in range(sites)]
        lines = [
            ("norm first", polyline(xs, [place(float(v)) for v in sky.first_norm])),
            ("norm", polyline(xs, [place(float(v)) for v in sky.median_norm])),
        ]
        marks.append(curves(lines, height))
    marks.append(layer_labels(sites, height + 18, -1))
    keys = [
        ("box lit", f"peak in dimension {common}"),
        ("box", "peak elsewhere"),
        ("rule", "median |activation|"),
    ]
    if sky.first_norm is not None:
        keys += [("wave first", "norm of token 0"), ("wave", "median token norm")]
    label = "Largest absolute activation of the residual stream after each block, log scale"
    return f"<h3>Largest |activation| by layer, log scale</h3>{legend(*keys)}" + chart(
        "".join(marks), height, label
    )


def _writes(sky: Skyline, layers: int) -> str:
    if sky.mlp_write is None and sky.attention_write is None:
        return ""
    zero = np.zeros(layers)
    mlp = sky.mlp_write if sky.mlp_write is not None else zero
    attention = sky.attention_write if sky.attention_write is not None else zero
    reach = float(max(np.nanmax(np.abs(mlp)), np.nanmax(np.abs(attention)), 1e-9))
    height = 120

    def place(value: Real) -> Real:  # signed square root: small writes stay visible
        return height / 2 * (1 - math.copysign(math.sqrt(min(abs(value) / reach, 1.0)), value))

    unit = 10 ** math.floor(math.log10(reach))
    ticks = [s * v for v in (unit * math.floor(reach / unit), unit / 10) for s in (1, -1)]
    marks = [axis([0.0, *ticks], place), line(0, height / 2, 100, height / 2, "axis")]
    width = 100 / layers
    for layer in range(layers):
        for k, (name, values) in enumerate((("attention", attention), ("mlp", mlp))):
            value = float(values[layer])
            y = place(value)
            tip = f"{name} of layer {layer} adds {number(value, sign=True)}"
            x = (layer + 0.14 + 0.37 * k) * width
            marks.append(
                bar(x, min(y, height / 2), 0.34 * width, abs(y - height / 2), f"write {name}", tip)
            )
    marks.append(layer_labels(layers, height + 18))
    label = f"What attention and MLP of each layer add to dimension {sky.dimension}"
    return (
        f"<h3>Writers and erasers of dimension {int(sky.dimension)}, token {int(sky.token)}</h3>"
        + legend(
            ("box mlp", "MLP"),
            ("box attention", "attention"),
            ("", "up writes, down erases; square-root scale"),
        )
        + chart("".join(marks), height, label)
    )


def _dose(sky: Skyline) -> str:
    points = sorted(sky.dose, key=lambda p: -p.cap)
    if len(points) < 2:
        return ""
    height = 150
    highs = [p.high if p.high is not None else p.delta for p in points]
    lows = [p.low if p.low is not None else p.delta for p in points]
    low, high = min(0.0, *lows), max(highs) * 1.05 or 1.0
    xs = [100 * (i + 0.5) / len(points) for i in range(len(points))]

    def place(value: Real) -> Real:
        return height * (1 - (value - low) / (high - low))

    marks = [axis(nice_ticks(low, high), place)]
    marks.append(
        curves(
            [
                ("area", band(xs, [place(v) for v in lows], [place(v) for v in highs])),
                ("stroke", polyline(xs, [place(p.delta) for p in points])),
            ],
            height,
        )
    )
    for x, p in zip(xs, points, strict=True):
        tip = f"capped at {number(p.cap)}: {number(p.delta, sign=True)} nats"
        marks.append(dot(x, place(p.delta), 4, "effect", f"{tip} {interval(p.low, p.high, '')}"))
        marks.append(text(x, height + 18, _thousands(p.cap), "tick mid"))
    rows = [
        (number(p.cap), quantity(p.delta, "nats", sign=True), interval(p.low, p.high, ""))
        for p in points
    ]
    return (
        "<h3>Loss change when the peak is capped</h3>"
        + chart("".join(marks), height, "Loss change in nats against the cap on the activation")
        + legend(("", "nats per token, by cap on |activation|; band: interval"))
        + text_table("As text", table(("Cap", "Δ loss", "Interval"), rows))
    )


def _thousands(value: Real) -> str:
    return f"{number(value / 1000)}k" if value >= 1000 else number(value)


def _writers(sky: Skyline) -> str:
    if not sky.writers:
        return ""
    rows = [
        (
            f"<code>{escape(w.site)}</code>",
            number(w.contribution, sign=True),
            quantity(w.share, "share", 2) if w.share is not None else "–",
        )
        for w in sky.writers
    ]
    return "<h3>By neuron or head</h3>" + table(("Site", "Writes", "Of the peak"), rows)


def _skyline_table(sky: Skyline, tokens: list[str]) -> str:
    rows = []
    for site in range(len(sky.peak)):
        where = int(sky.peak_token[site])
        rows.append(
            (
                _site(site),
                number(float(sky.peak[site])),
                number(float(sky.median[site])),
                str(int(sky.peak_dimension[site])),
                f"{where} {escape(visible_token(tokens[where]))}" if where < len(tokens) else where,
                number(float(sky.attention_write[site - 1]), sign=True)
                if site and sky.attention_write is not None
                else "–",
                number(float(sky.mlp_write[site - 1]), sign=True)
                if site and sky.mlp_write is not None
                else "–",
            )
        )
    head = ("After", "Peak", "Median", "Dimension", "Token", "Attention adds", "MLP adds")
    return text_table("As text", table(head, [[str(c) for c in row] for row in rows]))


def text_strip(stack: Stack, index: int) -> str:
    """The input itself, shaded; the script adds all of it, the layers and the other shadings."""
    sequence = stack.sequence
    if sequence is None or not len(sequence.received):
        return ""
    options = [("received", "Received")]
    named = (("fai", "FAI"), ("waad", "WAAD"), ("entropy", "Entropy"), ("surprisal", "Surprisal"))
    named += (("kept", "Kept at 20 %"),)
    options += [(k, label) for k, label in named if getattr(sequence, k) is not None]
    radios = "".join(
        f'<button type="button" role="radio" aria-checked="{"true" if i == 0 else "false"}" '
        f'tabindex="{0 if i == 0 else -1}" data-series="{key}">{label}</button>'
        for i, (key, label) in enumerate(options)
    )
    slider = (
        '<label class="layer-pick">Layer <input type="range" min="-1" '
        f'max="{stack.layers - 1}" value="-1" step="1"><output>all</output></label>'
        if sequence.received_by_layer is not None
        else ""
    )
    keys = [
        ("m sink", "sink"),
        ("m anchor", "anchor (FAI)"),
        ("m peak", "opens a chunk (WAAD)"),
        ("ramp", "little to much, log scale"),
    ]
    matrix = (
        '<figure class="segments only-script"><canvas role="img" aria-label="Attention between '
        'segments of the text, all heads"></canvas><figcaption>Segment to segment, <span>all heads'
        "</span>: queries downwards, keys to the right. Click to read there.</figcaption></figure>"
        if any(card.map is not None for card in stack.cards)
        else ""
    )
    body = (
        f'<div class="controls only-script"><div class="chips" role="radiogroup" '
        f'aria-label="Shade tokens by">{radios}</div>{slider}</div>{legend(*keys)}'
        f'<canvas class="minimap only-script" height="44" role="img" aria-label="The whole text: '
        'attention received; click to jump"></canvas>'
        f'<div class="reader{" with-matrix" if matrix else ""}"><div class="tokens" tabindex="0" '
        f'role="region" aria-label="Text, shaded">{static_tokens(sequence)}</div>{matrix}</div>'
        f'<div class="abouts">{about(definition("received"))}{about(definition("fai"))}'
        f"{about(definition('waad'))}</div>{_top_tokens(sequence)}"
    )
    lead = "The stronger a token’s shade, the more later tokens attend to it."
    return section("text", index, lead, body, "Text" if sequence.tokens else "Positions")


def static_tokens(sequence: Sequence) -> str:
    """The first tokens as shaded spans."""
    values = np.asarray(sequence.received, dtype=float)
    low, high = series_range(values, "log")
    sinks, anchors, peaks = set(sequence.sinks), set(sequence.anchors), set(sequence.peaks)
    tokens = sequence.tokens or [str(i) for i in range(len(values))]
    spans = []
    shown = STATIC_TOKENS if sequence.grid is None else len(tokens)
    for i, token in enumerate(tokens[:shown]):
        mark = " sink" if i in sinks else " anchor" if i in anchors else ""
        mark += " peak" if i in peaks else ""
        level = round(position(float(values[i]), low, high, "log") * 10)
        word = escape(token.replace("\n", "↵\n") if sequence.tokens else f" {token}")
        spans.append(f'<span class="t s{level}{mark}">{word}</span>')
    if sequence.grid is not None:
        columns = f"grid-template-columns:repeat({int(sequence.grid[1])},1fr)"
        return f'<div class="patch-grid" style="{columns}">{"".join(spans)}</div>'
    if len(tokens) > STATIC_TOKENS:
        rest = number(len(tokens) - STATIC_TOKENS)
        spans.append(f'<span class="more"> … {rest} more tokens</span>')
    return "".join(spans)


def series_range(values: np.ndarray, scale: str) -> tuple[float, float]:
    """Colour range of a per-token series: its central 97 %, so that a sink does not flatten it."""
    finite = values[np.isfinite(values)]
    if scale == "log":
        finite = finite[finite > 0]
    if finite.size == 0:
        return (1e-6, 1.0) if scale == "log" else (0.0, 1.0)
    low, high = np.quantile(finite, [0.02, 0.99])
    return (float(low), float(high) if high > low else float(low) * 1.01 + 1e-9)


def _top_tokens(sequence: Sequence) -> str:
    order = np.argsort(-np.nan_to_num(np.asarray(sequence.received)))[:15]
    rows = []
    for i in order.tolist():
        token = sequence.tokens[i] if i < len(sequence.tokens) else ""
        marks = [
            name
            for name, group in (
                ("sink", sequence.sinks), ("anchor", sequence.anchors), ("peak", sequence.peaks),
            )
            if i in group
        ]  # fmt: skip
        fai = "–" if sequence.fai is None else quantity(float(sequence.fai[i]), "share")
        row = (str(i), f"<code>{escape(visible_token(token))}</code>", ", ".join(marks) or "–")
        rows.append((*row, quantity(float(sequence.received[i]), "share"), fai))
    head = ("Position", "Token", "Marked", "Received", "FAI")
    return text_table("Most attended tokens as text", table(head, rows, numeric_from=3))


def rhythm(stack: Stack, index: int) -> str:
    """WAAD and FAI along the text on one axis."""
    sequence = stack.sequence
    if sequence is None or sequence.waad is None or sequence.fai is None or len(sequence.waad) < 3:
        return ""
    count = len(sequence.waad)
    charts = "".join(
        _rhythm_chart(title, np.asarray(values, dtype=float), scale, marks, css, count)
        for title, values, scale, marks, css in (
            ("WAAD, tokens", sequence.waad, "linear", sequence.peaks, "peak"),
            ("FAI", sequence.fai, "log", sequence.anchors, "anchor"),
        )
    )
    body = (
        legend(
            ("m peak", "WAAD peak: local heads look far back, a chunk opens"),
            ("m anchor", "FAI anchor: later tokens keep looking at it"),
        )
        + f'<div class="rhythm-over" data-tokens="{count}">{charts}<div class="brush only-script" '
        'role="slider" tabindex="0" aria-label="Window of tokens below" aria-valuemin="0" '
        f'aria-valuemax="{count}" aria-valuenow="0"></div></div>'
        '<div class="rhythm-detail only-script"></div>'
    )
    lead = (
        "Where the text opens a new chunk and which tokens it leans on afterwards. "
        "Drag the window to read a passage token by token."
    )
    return section("rhythm", index, lead, body)


def _rhythm_chart(
    title: str, values: np.ndarray, scale: str, marks: list[int], css: str, count: int
) -> str:
    height, bins = 84, min(RHYTHM_BINS, count)
    parts = np.array_split(np.nan_to_num(values), bins)
    low, high = float(np.quantile(values, 0.01)), float(np.nanmax(values))
    if scale == "log":
        positive = values[values > 0]
        low = float(np.quantile(positive, 0.02)) if positive.size else 1e-6
    else:
        low = 0.0
    high = high if high > low else low + 1.0

    def place(value: Real) -> Real:
        return height * (1 - position(value, low, high, scale))

    xs = [100 * (i + 0.5) / bins for i in range(bins)]
    top = [place(float(p.max())) for p in parts]
    bottom = [place(float(p.min())) for p in parts]
    middle = [place(float(np.median(p))) for p in parts]
    rug = "".join(f"M{100 * (m + 0.5) / count:.2f} 0V6" for m in marks[:600])
    drawn = curves([("area", band(xs, bottom, top)), ("stroke thin", polyline(xs, middle))], height)
    ticks = (
        [10.0**d for d in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        if scale == "log"
        else nice_ticks(low, high, 3)
    )
    show = (lambda v: quantity(v, "share", 2)) if title == "FAI" else number
    under = f'<svg class="stretch" y="{height + 3}" viewBox="0 0 100 6" width="100%" height="6" '
    under += f'preserveAspectRatio="none"><path class="rug {css}" d="{rug}"/></svg>'
    labels = "".join(
        text(100 * tick / count, height + 24, number(tick), "tick mid")
        for tick in nice_ticks(0, count, 6)
        if tick / count < 0.97
    )
    return f"<h3>{escape(title)}</h3>" + chart(
        axis(ticks[-4:], place, show) + drawn + under + labels,
        height,
        f"{title} along the text: median and range of {bins} bins",
        foot=30,
    )


def budget(stack: Stack, index: int) -> str:
    """What a key-value cache of a tenth, a fifth, a half would keep and lose."""
    plan: Budget | None = stack.budget
    if plan is None or not plan.levels:
        return ""
    height, layers = 150, stack.layers
    levels = sorted(plan.levels, key=lambda level: level.fraction)
    low = min(0.9, float(min(np.nanmin(level.retained) for level in levels)))
    low = math.floor(low * 10) / 10

    def place(value: Real) -> Real:
        return height * (1 - (value - low) / (1 - low))

    marks = [axis(nice_ticks(low, 1.0), place, lambda v: quantity(v, "share", 2))]
    xs = [100 * (i + 0.5) / layers for i in range(layers)]
    drawn = []
    for k, level in enumerate(levels):
        ys = [place(float(v)) for v in level.retained]
        drawn.append((f"stroke budget-{k % 3}", polyline(xs, ys)))
        for x, y, layer in zip(xs, ys, range(layers), strict=True):
            if math.isnan(y):
                continue
            kept = quantity(float(level.retained[layer]), "share")
            tip = (
                f"layer {layer}: {kept} of attention kept at {quantity(level.fraction, 'share', 2)}"
            )
            marks.append(dot(x, y, 2.6, f"budget-{k % 3}", tip))
    marks.insert(1, curves(drawn, height))
    marks.append(layer_labels(layers, height + 18))
    rows = []
    for level in levels:
        row = [
            f'<i class="swatch budget-{levels.index(level) % 3}"></i>'
            f"{quantity(level.fraction, 'share', 2)}",
            quantity(float(np.nanmean(level.retained)), "share"),
            f"{quantity(float(np.nanmin(level.retained)), 'share')} "
            f"(layer {int(np.nanargmin(level.retained))})",
            "not measured"
            if level.delta is None
            else f"{quantity(level.delta, 'nats', sign=True)} {interval(level.low, level.high, '')}",
        ]
        if plan.bytes_per_token:
            size = plan.bytes_per_token * level.fraction * level.kept.shape[1] / 1e6
            row.append(f"{number(size)} MB")
        rows.append(row)
    head = ["Budget", "Attention kept", "Least", "Δ loss"] + ["Cache"] * bool(plan.bytes_per_token)
    radios = "".join(
        f'<button type="button" role="radio" aria-checked="{"true" if k == 0 else "false"}" '
        f'tabindex="{0 if k == 0 else -1}" data-budget="{k}">'
        f"{quantity(level.fraction, 'share', 2)}</button>"
        for k, level in enumerate(levels)
    )
    body = (
        table(head, rows)
        + '<div class="split even"><div><h3>Attention kept, by layer</h3>'
        + chart("".join(marks), height, "Share of attention kept, by layer and budget")
        + f'</div><div class="only-script"><h3>Positions kept, by layer</h3><div class="controls">'
        f'<div class="chips" role="radiogroup" aria-label="Budget">{radios}</div></div>'
        '<canvas class="kept" role="img" aria-label="Positions kept: layers downwards, text to the '
        'right"></canvas>'
        + legend(
            (
                "",
                "Text to the right, layers downwards; the darker, the more KV heads hold it. "
                "The text above can be shaded by what is kept at 20 %.",
            )
        )
        + f'</div></div><div class="abouts">{about(definition("retained"))}{about(definition("kept"))}</div>'
    )
    lead = f"What a smaller key-value cache would hold on to, keys chosen by {escape(plan.scorer)} (regard.cache)."
    return section("budget", index, lead, body)
