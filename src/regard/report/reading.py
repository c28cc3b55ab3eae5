"""The observed forward pass of a report: which instruments run, and how their results become the page's stacks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from regard.attach import Session
from regard.attach.equality import check_finite
from regard.engine import Site
from regard.instruments.base import HeadMeasure, Instrument
from regard.instruments.distance import WAAD, Distance
from regard.instruments.entropy import Entropy
from regard.instruments.influence import FutureInfluence
from regard.instruments.maps import PooledMaps
from regard.instruments.norms import HeadOutputNorms
from regard.instruments.observe import model_inputs
from regard.instruments.profile import PatternProfile
from regard.instruments.rhythm import split_heads
from regard.instruments.sinks import SinkMass, Sinks
from regard.instruments.stream import ResidualPeaks
from regard.instruments.values import ValueDrain
from regard.report.definitions import measure
from regard.report.schema import HeadCard, Measure, Sequence, Stack, TopKey, pool_levels

BLOCKS = 64
MEASURES = {
    "sink": "sink mass",
    "entropy": "entropy",
    "entropy_normalised": "normalised entropy",
    "distance": "distance",
    "local": "local share",
    "global": "global share",
    "uniform": "uniformity",
    "drain": "value drain",
    "output_norm": "output norm",
}
"""The page's key of each measure -> the instruments' name."""


def report_instruments() -> list[Instrument]:
    """Everything that a report reads in its one pass."""
    return [
        PooledMaps(BLOCKS),
        Entropy(),
        PatternProfile(),  # before WAAD, which reads some of the same diagonals
        Distance(),
        WAAD(),
        FutureInfluence(),
        SinkMass(),
        Sinks(),
        ValueDrain(),
        HeadOutputNorms(),
        ResidualPeaks(),
    ]


@dataclass
class Reading:
    """What one pass over the text gave, and what it cost beside a plain pass."""

    instruments: dict[str, Instrument]
    sites: list[Site]
    measures: dict[str, HeadMeasure]
    plain_seconds: float
    seconds: float
    extra_memory_mb: float | None


def _status_mb(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process; OSError where the system does not say."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field}")


def _watch_memory() -> float | None:
    """Resets the process's peak (Linux) and returns what is resident now; None where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_mb("VmRSS")
    except OSError:
        return None


def read(model: nn.Module, ids: Tensor, rows: float | None, seed: int) -> Reading:
    """A plain forward pass and an observed one over `ids` `[1, tokens]`."""
    inputs = model_inputs(model, ids)
    with torch.inference_mode():
        model(**model_inputs(model, ids[:, : min(64, ids.shape[1])]))
        start = time.perf_counter()
        output = model(**inputs)
        plain = time.perf_counter() - start
        check_finite(model, output)
        del output
        before, instruments = _watch_memory(), report_instruments()
        start = time.perf_counter()
        with Session(model, *instruments, rows=rows, seed=seed) as session:
            model(**inputs)
        seconds = time.perf_counter() - start
    extra = None if before is None else max(0.0, _status_mb("VmHWM") - before)
    named = {type(instrument).__name__: instrument for instrument in instruments}
    measures: dict[str, HeadMeasure] = {}
    for instrument in instruments:
        if instrument.state and any(instrument.state.values()):
            measures.update(instrument.measures())
    return Reading(named, list(session.sites.values()), measures, plain, seconds, extra)


def stacks(reading: Reading, pieces: list[str]) -> list[Stack]:
    """One `Stack` for each tower of attention layers, the main one first."""
    sites: dict[str, list[Site]] = {}
    for site in reading.sites:
        sites.setdefault(site.stack, []).append(site)
    names = sorted(sites, key=lambda name: name != "")
    return [_stack(reading, name, sites[name], pieces if name == "" else []) for name in names]


def _stack(reading: Reading, name: str, sites: list[Site], pieces: list[str]) -> Stack:
    first = sites[0]
    stack = Stack(
        layers=max(site.layer for site in sites) + 1,
        heads=max(site.heads for site in sites),
        measures=_measures(reading, name),
        name=name,
        label=_label(name, first),
        kv_heads=first.kv_heads,
        kind=first.kind,
        causal=first.causal,
    )
    if pieces:
        stack.sequence = _sequence(reading, name, pieces)
    profile = reading.instruments["PatternProfile"]
    width = profile.width if isinstance(profile, PatternProfile) and first.causal else 0
    if width:
        inner = [0, 1, *(2**n for n in range(1, 20) if 2**n < width), width]
        stack.distance_edges = [*inner, max(len(pieces), 2 * width)]
    stack.cards = _cards(reading, stack, pieces)
    return stack


def _label(name: str, site: Site) -> str:
    if site.kind == "cross":
        return "Cross-attention"
    return {"": "Text layers", "encoder": "Encoder", "vision": "Vision tower"}.get(
        name, name.title()
    )


def table(found: HeadMeasure, stack: str, *, error: bool = False) -> np.ndarray | None:
    """`[layers, heads]` of one stack, None when the measure has nothing for it."""
    values = found.error if error else found.values
    if stack not in {name for name, _ in values}:
        return None
    return found.matrix(stack, error=error).numpy()


def _measures(reading: Reading, stack: str) -> list[Measure]:
    found = []
    for key, name in MEASURES.items():
        values = table(reading.measures[name], stack) if name in reading.measures else None
        if values is not None and not np.isnan(values).all():
            found.append(measure(key, values, table(reading.measures[name], stack, error=True)))
    for key, name in (("waad", "WAAD"), ("fai", "FutureInfluence")):
        series = reading.instruments[name].compute()
        if stack in {name for name, _ in series.values}:
            found.insert(4, measure(key, _mean(series.tensor(stack).numpy(), -1)))
    return found


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the numbers that were measured; NaN where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _sequence(reading: Reading, stack: str, pieces: list[str]) -> Sequence:
    sinks = reading.instruments["Sinks"].compute()
    importance = sinks.importance.tensor(stack).numpy()
    by_layer = _mean(importance, 1)
    sequence = Sequence(
        tokens=pieces,
        received=_mean(by_layer, 0),
        received_by_layer=by_layer,
        sinks=[sink.position for sink in sinks.sinks(stack)[:12]],
    )
    waad = reading.instruments["WAAD"].compute()
    distance = (
        table(reading.measures["distance"], stack) if "distance" in reading.measures else None
    )
    if distance is not None and stack in {name for name, _ in waad.values}:
        local, wide = (mask.numpy() for mask in split_heads(torch.from_numpy(distance)))
        fai = reading.instruments["FutureInfluence"].compute().tensor(stack).numpy()
        rhythm, influence = waad.tensor(stack).numpy()[local].mean(0), fai[wide].mean(0)
        tokens = len(pieces)
        most = max(1, tokens // 40)
        sequence.waad, sequence.fai = rhythm, influence
        watched = tokens - max(10, tokens // 10)  # the last tokens have few later queries
        sequence.anchors = sorted(np.argsort(-influence[:watched])[:most].tolist())
        sequence.peaks = _peaks(rhythm, 0.9)
    return sequence


def _peaks(values: np.ndarray, quantile: float) -> list[int]:
    """Local maxima above a quantile of the series."""
    level = np.nanquantile(values, quantile)
    middle = values[1:-1]
    found = (middle > level) & (middle >= values[:-2]) & (middle > values[2:])
    return (np.flatnonzero(found) + 1).tolist()


def _cards(reading: Reading, stack: Stack, pieces: list[str]) -> list[HeadCard]:
    maps = reading.instruments["PooledMaps"].compute()
    profile = reading.instruments["PatternProfile"]
    bands = profile.bands() if isinstance(profile, PatternProfile) else {}
    importance = reading.instruments["Sinks"].compute().importance
    known = {name for name, _ in importance.values}
    received = importance.tensor(stack.name).numpy() if stack.name in known else None
    cards = []
    for layer in range(stack.layers):
        key = (stack.name, layer)
        if key not in maps:
            continue
        for head in range(maps[key].shape[0]):
            name = f"{stack.name}.L{layer}H{head}" if stack.name else f"L{layer}H{head}"
            card = HeadCard(name, map=pool_levels(maps[key][head].numpy()))
            if received is not None:
                row = received[layer, head]
                card.received = _pool(row, BLOCKS)
                card.top_keys = _top_keys(row, pieces)
            if key in bands and stack.distance_edges:
                card.distance = _distances(bands[key][head].double().numpy(), stack.distance_edges)
            cards.append(card)
    return cards


def _pool(row: np.ndarray, blocks: int) -> np.ndarray:
    """Means over `blocks` stretches of the text, NaN counted as 0; shorter texts leave the rest 0."""
    count = min(blocks, len(row))
    edges = np.arange(count) * len(row) // count
    sums = np.add.reduceat(np.nan_to_num(row), edges)
    pooled = sums / np.diff(np.append(edges, len(row)))
    return np.pad(pooled, (0, blocks - count))


def _distances(bands: np.ndarray, edges: list[int]) -> np.ndarray:
    near = [bands[lo:hi].sum() for lo, hi in pairwise(edges[:-1])]
    return np.array([*near, max(0.0, 1.0 - sum(near))])


def _top_keys(row: np.ndarray, pieces: list[str], count: int = 6, tail: int = 8) -> list[TopKey]:
    if not pieces:
        return []
    seen = row[: max(1, len(row) - tail)]
    order = np.argsort(-np.nan_to_num(seen))[:count]
    return [TopKey(int(k), pieces[int(k)], float(seen[k])) for k in order]
