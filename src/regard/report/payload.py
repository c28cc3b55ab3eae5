"""The numbers that the page's script draws: one JSON text and one block of bytes, both deflated.

Long series and maps are stored as one byte a value with their range, in the JSON as
`{"at", "size", "low", "high", "scale", "steps"}`: value = low + (high - low) * byte / steps on the named
scale ("linear", "log", "cube": the cube of the linear value). Byte order, layout and scale are the
script's only contract with this file.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.report.markup import script_json
from regard.report.panels import series_range
from regard.report.schema import Measure, ReportData, Sequence, Stack, pooled_shares
from regard.report.svg import colour_range

TARGET = 500_000
"""Bytes a page aims at; detail is reduced until the numbers fit their part of it."""


@dataclass(frozen=True)
class Detail:
    """How finely the bulky parts are stored: levels of a head map and its blocks, levels of the text by
    layer (which only shades tokens), and `steady`: a value keeps its neighbour's level while it is
    within so many levels of it (0.5 is plain rounding), which deflates far better."""

    map_steps: int
    map_blocks: int
    layer_steps: int
    steady: float


LADDER = (
    Detail(40, 64, 10, 0.5),
    Detail(32, 64, 10, 0.8),
    Detail(24, 64, 8, 0.8),
    Detail(20, 64, 6, 0.8),
    Detail(20, 64, 6, 1.0),
    Detail(16, 64, 6, 1.0),
    Detail(14, 64, 5, 1.2),
    Detail(12, 64, 4, 1.3),
    Detail(20, 32, 4, 1.0),
    Detail(12, 16, 4, 1.0),
    Detail(12, 16, 0, 1.0),  # no shading by layer: texts beyond about a hundred thousand tokens
)

LEAST = 0.05
"""Fewer base64 bytes a map cell than this has never been seen; steps that cannot fit are not tried."""

KEPT_BINS = 360
"""Columns of the kept-positions strip; about one a pixel on a wide screen."""


def settle(levels: np.ndarray, steady: float) -> np.ndarray:
    """Round along the first axis, keeping the last level while the value is within `steady` of it."""
    if steady <= 0.5 or levels.ndim < 2:
        return np.rint(levels)
    out = np.rint(levels)
    for i in range(1, len(out)):
        out[i] = np.where(np.abs(levels[i] - out[i - 1]) <= steady, out[i - 1], out[i])
    return out


class Bytes:
    """Collects byte arrays and hands out their addresses."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, array: np.ndarray) -> int:
        raw = np.ascontiguousarray(array, dtype=np.uint8).tobytes()
        start, self.size = self.size, self.size + len(raw)
        self.parts.append(raw)
        return start

    def quantise(
        self,
        values: np.ndarray,
        scale: str = "linear",
        steps: int = 254,
        bounds: tuple[float, float] | None = None,
        steady: float = 0.5,
    ) -> dict[str, Any]:
        """Store `values` in `steps + 1` levels; 255 marks a missing value."""
        values = np.asarray(values, dtype=float)
        finite = values[np.isfinite(values) & ((values > 0) | (scale != "log"))]
        if bounds is None:
            bounds = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        low, high = (float(f"{bound:.4g}") for bound in bounds)
        if scale == "log":
            low = max(low, 1e-12)
            high = max(high, low * (1 + 1e-9))
            t = (np.log(np.maximum(values, low)) - math.log(low)) / max(math.log(high / low), 1e-12)
        else:
            t = (values - low) / ((high - low) or 1.0)
        bytes_ = settle(np.clip(np.nan_to_num(t), 0, 1) * steps, steady)
        at = self.add(np.where(np.isfinite(values), bytes_, 255))
        return {
            "at": at, "size": int(values.size), "low": low, "high": high,
            "scale": scale, "steps": steps,
        }  # fmt: skip

    def joined(self) -> bytes:
        return b"".join(self.parts)


def short(value: float | None, digits: int = 5) -> float | None:
    """A float with few digits, None for NaN."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def payload(data: ReportData, room: int = TARGET) -> tuple[str, bytes]:
    """The JSON text and the block of bytes for `data`, as finely as fits in about `room` bytes.

    The size counted is that of the deflated numbers in base64. The last step of the ladder is returned
    when none fits.
    """
    found = ("", b"")
    heads = sum(card.map is not None for stack in data.stacks for card in stack.cards)
    for detail in LADDER:
        if LEAST * heads * detail.map_blocks**2 > room and detail is not LADDER[-1]:
            continue
        found = _payload(data, detail)
        packed = len(zlib.compress(found[0].encode(), 6)) + len(zlib.compress(found[1], 6))
        if packed * 4 / 3 <= room:
            break
    return found


def _payload(data: ReportData, detail: Detail) -> tuple[str, bytes]:
    block = Bytes()
    body = {
        "model": data.header.model,
        "tokens": data.header.tokens,
        "rows": data.header.rows,
        "command": data.header.command,
        "date": data.header.date,
        "findings": [f.sentence for f in data.findings],
        "stacks": [_stack(stack, block, detail) for stack in data.stacks],
    }
    return script_json(body), block.joined()


def _stack(stack: Stack, block: Bytes, detail: Detail) -> dict[str, Any]:
    return {
        "name": stack.name,
        "label": stack.label,
        "layers": stack.layers,
        "heads": stack.heads,
        "causal": stack.causal,
        "measures": [_measure(m) for m in stack.measures],
        "sequence": _sequence(stack.sequence, block, detail) if stack.sequence else None,
        "edges": stack.distance_edges,
        "cards": _cards(stack, block, detail),
        "budget": _kept(stack, block),
    }


def _measure(measure: Measure) -> dict[str, Any]:
    d, (low, high) = measure.definition, colour_range(measure)
    error = measure.error
    return {
        "key": d.key, "name": d.name, "label": d.label, "unit": d.unit,
        "short": d.short, "formula": d.formula, "source": d.source,
        "scale": measure.scale, "low": short(low, 6), "high": short(high, 6),
        "values": [short(float(v), 3) for v in measure.values.ravel()],
        "error": None if error is None else [short(float(v), 2) for v in error.ravel()],
    }  # fmt: skip


def _sequence(sequence: Sequence, block: Bytes, detail: Detail) -> dict[str, Any]:
    series: dict[str, Any] = {}
    for key, name, unit, scale in (
        ("received", "Received", "share", "log"),
        ("fai", "FAI", "share", "log"),
        ("waad", "WAAD", "tokens", "linear"),
        ("entropy", "Norm. entropy", "share", "linear"),
        ("surprisal", "Surprisal", "nats", "linear"),
        ("kept", "Kept", "share", "linear"),
    ):
        values = getattr(sequence, key)
        if values is None:
            continue
        packed = block.quantise(values, scale)
        shade = series_range(np.asarray(values, dtype=float), scale)
        series[key] = {"name": name, "unit": unit, "shade": [short(v) for v in shade], **packed}
    layers = None
    if sequence.received_by_layer is not None and detail.layer_steps:
        by_layer = np.asarray(sequence.received_by_layer, dtype=float)
        layers = block.quantise(
            by_layer,
            "log",
            detail.layer_steps,
            series_range(by_layer.ravel(), "log"),
            detail.steady,
        )
    return {
        "tokens": sequence.tokens,
        "count": len(sequence.received),
        "series": series,
        "layers": layers,
        "sinks": sequence.sinks,
        "anchors": sequence.anchors,
        "peaks": sequence.peaks,
        "grid": sequence.grid,
    }


def _cards(stack: Stack, block: Bytes, detail: Detail) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tokens = stack.sequence.tokens if stack.sequence else []
    for card in stack.cards:
        one: dict[str, Any] = {}
        if card.map is not None:
            shares = _pool(pooled_shares(card.map), detail.map_blocks)
            levels = settle(np.cbrt(shares) * detail.map_steps, detail.steady)
            size = len(levels)
            seen = (
                np.triu_indices(size) if stack.causal else np.indices((size, size)).reshape(2, -1)
            )
            one["map"] = [block.add(levels.T[seen[0], seen[1]]), size]  # column by column
        if card.received is not None:
            one["received"] = block.quantise(card.received, "log", 24)
        if card.distance is not None:
            one["distance"] = [short(float(v), 2) for v in card.distance]
        if card.top_keys:
            one["keys"] = [
                [k.position, short(k.mass, 3)]
                + ([] if k.position < len(tokens) and tokens[k.position] == k.token else [k.token])
                for k in card.top_keys
            ]
        if card.tags:
            one["tags"] = card.tags
        found[card.head] = one
    return {"steps": detail.map_steps, "of": found}


def _pool(shares: np.ndarray, blocks: int) -> np.ndarray:
    """Merge a map's blocks so that at most `blocks` are left: mean over queries, sum over keys."""
    size = shares.shape[0]
    merge = -(-size // blocks)
    if merge == 1:
        return shares
    starts = np.arange(0, size, merge)
    rows = np.add.reduceat(shares, starts, axis=0) / np.diff([*starts, size])[:, None]
    return np.add.reduceat(rows, starts, axis=1)


def _kept(stack: Stack, block: Bytes) -> list[dict[str, Any]]:
    if stack.budget is None:
        return []
    found = []
    for level in sorted(stack.budget.levels, key=lambda level: level.fraction):
        kept = np.asarray(level.kept, dtype=float)
        bins = min(KEPT_BINS, kept.shape[1])
        edges = np.linspace(0, kept.shape[1], bins + 1).astype(int)
        total = np.concatenate([np.zeros((kept.shape[0], 1)), kept.cumsum(1)], axis=1)
        share = (total[:, edges[1:]] - total[:, edges[:-1]]) / np.diff(edges)
        packed = block.quantise(share, "linear", 7, (0.0, 1.0))
        found.append({"fraction": level.fraction, "bins": bins, "kept": packed})
    return found


def packed_script(identity: str, content: bytes, compress: bool) -> str:
    """A data block for the page: base64 of the raw deflate stream, or of the bytes themselves."""
    encoding = "deflate-raw" if compress else "none"
    if compress:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        content = deflate.compress(content) + deflate.flush()
    text = base64.b64encode(content).decode()
    return (
        f'<script type="application/octet-stream" id="{identity}" '
        f'data-encoding="{encoding}">{text}</script>'
    )
