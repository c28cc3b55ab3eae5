"""The page of a vision analysis: one HTML file with inline SVG, light and dark, no script and no network."""

from __future__ import annotations

import base64
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard._errors import OutputError
from regard.instruments.vision.importance import METRICS
from regard.instruments.vision.patterns import layout

if TYPE_CHECKING:
    from regard.instruments.results import HeadMeasure
    from regard.instruments.vision.analyzer import PatternView, ViTAnalyzer

# Viridis at five places, enough for a straight interpolation in between.
_RAMP = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
_GROUPS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994f00",
           "#40b0a6", "#5d3a9b", "#e66100", "#1a85ff")  # fmt: skip
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1e;--soft:#63636a;--line:#d8d8de;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--soft:#a4a4ad;--line:#3a3a40;--page:#161618}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}p,figcaption{color:var(--soft)}
figure{margin:0;display:inline-block;vertical-align:top;margin-right:1.5rem}
svg text{fill:var(--ink);font:11px system-ui,sans-serif}svg{max-width:100%;height:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}.wide{overflow-x:auto}img{image-rendering:pixelated}
"""


def colours(values: Tensor) -> Tensor:
    """Numbers in [0, 1] as RGB bytes, `[..., 3]`."""
    place = values.float().nan_to_num(0).clamp(0, 1) * (len(_RAMP) - 1)
    low = place.floor().long().clamp(max=len(_RAMP) - 2)
    part = (place - low)[..., None]
    return (_RAMP[low] * (1 - part) + _RAMP[low + 1] * part).round().to(torch.uint8)


def png(pixels: Tensor) -> str:
    """`[height, width, 3]` bytes as a data URI."""
    height, width, _ = pixels.shape
    raw = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    )
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    code = base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()
    return f"data:image/png;base64,{code}"


def thumbnail(pattern: Tensor) -> str:
    """A relative map as a small picture, on the logarithmic scale of the autoencoder."""
    scaled = (1e-4 + pattern).log()
    low, high = scaled.min(), scaled.max()
    return png(colours((scaled - low) / (high - low).clamp_min(1e-6)))


def matrix(measure: HeadMeasure, title: str, note: str) -> str:
    """A layer x head table of coloured cells; the darkest is the smallest."""
    cells, top = [], max(float(v.max()) for v in measure.values.values())
    low = min(0.0, min(float(v.min()) for v in measure.values.values()))
    layers = [layer for _, layer in measure.values]
    width = 30 + 34 * max(len(v) for v in measure.values.values())
    for row, ((_, layer), values) in enumerate(measure.values.items()):
        cells.append(f'<text x="0" y="{row * 26 + 17}">L{layer}</text>')
        for head, value in enumerate(values.tolist()):
            share = (value - low) / max(top - low, 1e-12)
            red, green, blue = colours(torch.tensor(share)).tolist()
            ink = "#000" if share > 0.6 else "#fff"
            x, y = 30 + 34 * head, 26 * row
            cells.append(
                f'<g><title>L{layer}H{head}: {value:.4g}</title><rect x="{x}" y="{y}" width="32" height="24" '
                f'fill="rgb({red},{green},{blue})"/><text x="{x + 16}" y="{y + 16}" text-anchor="middle" '
                f'style="fill:{ink}">{_short(value)}</text></g>'
            )
    height = 26 * len(layers)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    picture = f'<svg role="img" aria-label="{escape(title)} by layer and head" {size}>'
    return f"<figure>{picture}{''.join(cells)}</svg><figcaption><b>{escape(title)}</b><br>{escape(note)}</figcaption></figure>"


def _short(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".") if abs(value) < 9.995 else f"{value:.0f}"


def strength_bars(analyzer: ViTAnalyzer) -> str:
    """One bar for each head, sorted by mean hop: attention on CLS and at each hop."""
    bars = []
    for (_, layer), hops in analyzer.hops().items():
        for head in range(len(hops.share)):
            shares = [float(hops.special[head]), *hops.share[head].tolist()]
            bars.append((float(hops.mean_hop[head]), f"L{layer}H{head}", shares))
    bars.sort(key=lambda bar: bar[0])
    steps = len(bars[0][2]) - 1
    parts = []
    for column, (mean, name, shares) in enumerate(bars):
        y = 0.0
        for hop, share in enumerate(shares):
            red, green, blue = colours(torch.tensor((hop - 1) / max(1, steps - 1))).tolist()
            fill = "#999" if hop == 0 else f"rgb({red},{green},{blue})"
            label = "CLS" if hop == 0 else f"hop {hop - 1}"
            parts.append(
                f'<rect x="{column * 34}" y="{y:.1f}" width="30" height="{200 * share:.1f}" fill="{fill}">'
                f"<title>{name}, {label}: {100 * share:.1f} %</title></rect>"
            )
            y += 200 * share
        parts.append(
            f'<text x="{column * 34 + 15}" y="214" text-anchor="middle">{name}</text>'
            f'<text x="{column * 34 + 15}" y="228" text-anchor="middle">{mean:.1f}</text>'
        )
    width = 34 * len(bars)
    return (
        f'<div class="wide"><svg role="img" aria-label="attention by distance for each head" width="{width}" '
        f'height="232" viewBox="0 0 {width} 232">{"".join(parts)}</svg></div>'
    )


def scatter(analyzer: ViTAnalyzer, view: PatternView) -> str:
    """Heads in the plane of the first two principal components of their codes, with their mean relative map."""
    means = torch.stack([view.codes[view.head == i].mean(0) for i in range(len(view.heads))])
    points = layout(torch.cat([view.codes, means]))
    low, high = points.amin(0), points.amax(0)
    placed = (points - low) / (high - low).clamp_min(1e-9) * torch.tensor([680.0, 360.0]) + 30
    parts = []
    for (x, y), label in zip(
        placed[: len(view.codes)].tolist(), view.clusters.label.tolist(), strict=True
    ):
        parts.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="2" fill="{_GROUPS[label % 12]}" opacity=".5"/>'
        )
    pictures = analyzer.relative().mean(1)
    rows = zip(
        placed[len(view.codes) :].tolist(),
        view.heads,
        view.group(),
        view.names,
        pictures,
        strict=True,
    )
    for (x, y), head, group, name, picture in rows:
        colour = _GROUPS[group % 12]
        box = f'x="{x - 18:.0f}" y="{y - 18:.0f}" width="36" height="36"'
        parts.append(
            f"<g><title>{head}: {name}, group {group}</title>"
            f'<image href="{thumbnail(picture)}" {box}/>'
            f'<rect {box} fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{x:.0f}" y="{y + 30:.0f}" text-anchor="middle">{head}</text></g>'
        )
    return (
        '<svg role="img" aria-label="pattern map of all heads" width="740" height="440" viewBox="0 0 740 440">'
        f"{''.join(parts)}</svg>"
    )


def examples(analyzer: ViTAnalyzer, chosen: Sequence[int]) -> str:
    """Single images with the importance of every head for them."""
    parts, table = [], analyzer.importance().images["divergence"]
    for index in chosen:
        if index >= len(analyzer.images):
            continue
        image = analyzer.images[index].mean(0)
        grey = ((image - image.min()) / (image.max() - image.min()).clamp_min(1e-6) * 255).to(
            torch.uint8
        )
        values = torch.stack([v[:, index] for v in table.values()])
        heat = png(colours(values / values.max().clamp_min(1e-9)))
        layers, heads = values.shape
        label = int(analyzer.labels[index])
        parts.append(
            f'<figure><img alt="image {index}" width="96" height="96" src="{png(grey[..., None].expand(-1, -1, 3))}"> '
            f'<img alt="importance of each head" width="{16 * heads}" height="{16 * layers}" src="{heat}">'
            f"<figcaption>image {index}, class {label}; most: {float(values.max()):.3f} nats</figcaption></figure>"
        )
    return "".join(parts)


def table(analyzer: ViTAnalyzer, view: PatternView) -> str:
    """All numbers."""
    measures = {**analyzer.strength(), **analyzer.importance().measures()}
    head = "".join(
        f"<th>{escape(name.replace('_', ' '))}</th>"
        for name in ("head", "pattern", "group", *measures)
    )
    rows = []
    for which, name, group in zip(view.heads, view.names, view.group(), strict=True):
        cells = "".join(f"<td>{measure[which]:.3f}</td>" for measure in measures.values())
        rows.append(f"<tr><td>{which}</td><td>{escape(name)}</td><td>{group}</td>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def page(analyzer: ViTAnalyzer, view: PatternView, chosen: Sequence[int]) -> str:
    """The whole page as text."""
    importance = analyzer.importance()
    name = escape(type(analyzer.model).__name__)
    matrices = "".join(matrix(importance.measure(m), m, METRICS[m][1]) for m in METRICS)
    count, accuracy = len(analyzer.images), 100 * importance.accuracy
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Heads of {name}</title><style>{_STYLE}</style>
<h1>What the {len(view.heads)} heads of {name} do</h1>
<p>{count} images, accuracy {accuracy:.1f} %. A head is pruned by setting its output to zero.</p>
<h2>Importance</h2>{matrices}
<h2>Strength: how far patches look</h2>
<p>Attention of patches on CLS (grey) and on patches 0, 1, 2, ... hops away (dark to light);
heads sorted by mean hop, printed below each bar.</p>{strength_bars(analyzer)}
<h2>Patterns</h2><p>Each dot is one head on one image, placed by the first two principal components of its 16-number code and
coloured by group (silhouette {view.clusters.silhouette:.2f});
the pictures are mean relative maps, the centre is the patch itself.</p>
{scatter(analyzer, view)}
<h2>Single images</h2><p>Jensen-Shannon divergence of the prediction when each head is pruned (rows are layers).</p>
{examples(analyzer, chosen)}
<h2>Numbers</h2>{table(analyzer, view)}
</html>
"""


def write_page(analyzer: ViTAnalyzer, view: PatternView, path: Path, chosen: Sequence[int]) -> Path:
    """Writes the page in one piece: either the old file stays or the new one is whole."""
    text = page(analyzer, view, chosen)
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror}); choose another place"
        ) from error
    return path
