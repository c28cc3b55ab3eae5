"""Panels on sets of heads: retrieval and probes, definitions of dormant, domains."""

from __future__ import annotations

from collections import Counter

import numpy as np

from regard.report.definitions import definition
from regard.report.markup import (
    Real,
    about,
    change,
    escape,
    head_link,
    legend,
    number,
    quantity,
    table,
    text_table,
)
from regard.report.schema import DomainTable, DormantSet, Retrieval, Stack
from regard.report.sections import proof_block, section
from regard.report.svg import axis, band, bar, chart, curves, dot, line, polyline, text


def retrieval(stack: Stack, index: int) -> str:
    """The heads that fetch a needle, what silencing them does, and the generated probes."""
    found = stack.retrieval
    if found is None and not stack.probes:
        return ""
    parts, lead = [], "Heads that do one thing on generated probes, and what silencing them does."
    if found is not None:
        scores = next((m.values for m in stack.measures if m.key == "retrieval"), None)
        if scores is None:
            scores = np.array([h.score for h in found.heads])
        above = int((scores >= found.threshold).sum())
        lead = (
            f"{above} heads score at least {quantity(found.threshold, 'share', 2)} on the needle task "
            f"({found.answered} of {found.runs} questions answered)."
        )
        rows = [
            (
                head_link(h.head, stack.name),
                _meter(h.score),
                quantity(h.score, "share"),
                quantity(h.activation, "share", 2) if h.activation is not None else "–",
                quantity(h.delta, "nats", 2, sign=True) if h.delta is not None else "–",
            )
            for h in found.heads
        ]
        head = ("Head", "", "Score", "Active in", "Δ loss")
        listed, curve = table(head, rows, numeric_from=2), _masking(found)
        parts.append(
            f'<div class="split even"><div>{listed}</div><div>{curve}</div></div>'
            if curve
            else f'<div class="narrow">{listed}</div>'
        )
    if stack.probes:
        parts.append(f'<div class="probes">{"".join(_probes(stack))}</div>')
    defined = about(definition("retrieval")) + "".join(about(p.definition) for p in stack.probes)
    body = "".join(parts) + f'<div class="abouts">{defined}</div>'
    return section("retrieval", index, escape(lead), body)


def _meter(value: Real) -> str:
    return (
        '<svg class="meter" height="10" aria-hidden="true"><rect class="rail" width="100%" '
        f'height="10"/><rect class="fill" width="{max(0.0, min(100.0, 100 * value)):.1f}%" '
        'height="10"/></svg>'
    )


def _probes(stack: Stack) -> list[str]:
    blocks = []
    for probe in stack.probes:
        heads = "".join(
            f"<li>{head_link(head, stack.name)} {_meter(score)} "
            f"<span>{escape(quantity(score, probe.definition.unit))}</span></li>"
            for head, score in zip(probe.heads, probe.scores, strict=True)
        )
        proof = proof_block(probe.proof) if probe.proof else ""
        blocks.append(
            f'<article class="probe"><h3>{escape(probe.definition.name)}</h3><ol>{heads}</ol>{proof}'
            "</article>"
        )
    return blocks


def _masking(found: Retrieval) -> str:
    points = found.masking
    if not points:
        return ""
    height, count = 170, len(points) + (found.base_recall is not None)
    start = count - len(points)
    xs = [100 * (i + 0.5) / count for i in range(count)]

    def place(value: Real) -> Real:
        return height * (1 - value)

    base = [] if found.base_recall is None else [found.base_recall]
    tops, random = base + [p.top for p in points], base + [p.random for p in points]
    low = base + [p.random if p.random_low is None else p.random_low for p in points]
    high = base + [p.random if p.random_high is None else p.random_high for p in points]
    marks = [axis((0, 0.25, 0.5, 0.75, 1), place, lambda v: quantity(v, "share", 2))]
    drawn = [
        ("area", band(xs, [place(v) for v in low], [place(v) for v in high])),
        ("stroke other", polyline(xs, [place(v) for v in random])),
        ("stroke", polyline(xs, [place(v) for v in tops])),
    ]
    marks.append(curves(drawn, height))
    names = ["none"] * start + [str(p.k) for p in points]
    for x, name, best, other in zip(xs, names, tops, random, strict=True):
        marks.append(
            dot(x, place(other), 3.2, "control", f"{name} random: {quantity(other, 'share')}")
        )
        marks.append(dot(x, place(best), 4, "effect", f"{name} best: {quantity(best, 'share')}"))
        marks.append(text(x, height + 18, name, "tick mid"))
    rows = [(str(p.k), quantity(p.top, "share"), quantity(p.random, "share")) for p in points]
    label = "Needle recall by number of silenced heads: best heads against random heads"
    drawn_as = f" ({found.control_label})" if found.control_label else ""
    return (
        "<h3>Recall when heads are silenced</h3>"
        + legend(("dot effect", "the best K heads"), ("dot control", f"K random heads{drawn_as}"))
        + chart("".join(marks), height, label)
        + legend(("", "K, heads silenced"))
        + text_table("As text", table(("K", "Best", "Random"), rows))
    )


def dormant(stack: Stack, index: int) -> str:
    """The heads each definition calls dormant, and which definitions agree on which heads."""
    sets = stack.dormant
    if not sets:
        return ""
    members = [set(s.heads) for s in sets]
    everyone = sorted(set().union(*members), key=_order)
    groups: dict[tuple[bool, ...], list[str]] = {}
    for head in everyone:
        groups.setdefault(tuple(head in m for m in members), []).append(head)
    counts = Counter({key: len(heads) for key, heads in groups.items()})
    all_agree = counts.get((True,) * len(sets), 0)
    lead = (
        f"{len(everyone)} heads are dormant by at least one definition, {all_agree} by all "
        f"{len(sets)}. Each column is one combination."
    )
    defined = "".join(about(s.definition, f"{s.definition.label}: {s.threshold}") for s in sets)
    if not counts:
        none = "No head is dormant by any of the definitions."
        return section("dormant", index, none, f'<div class="abouts">{defined}</div>')
    rows = [
        (
            " and ".join(escape(s.definition.label) for s, on in zip(sets, key, strict=True) if on),
            str(count),
            f'<span class="heads">{" ".join(head_link(h, stack.name) for h in groups[key])}</span>',
        )
        for key, count in counts.most_common()
    ]
    listing = text_table(
        "The heads of each combination", table(("Dormant by", "Heads", "Which"), rows)
    )
    body = f'{_upset(sets, counts)}{listing}<div class="abouts">{defined}</div>'
    return section("dormant", index, escape(lead), body)


def _order(head: str) -> tuple[int, int]:
    layer, _, number_ = head.removeprefix("L").partition("H")
    return (int(layer), int(number_)) if layer.isdigit() and number_.isdigit() else (0, 0)


def _upset(sets: list[DormantSet], counts: Counter[tuple[bool, ...]]) -> str:
    """Combinations as columns: a bar of how many heads, dots for the definitions that agree."""
    columns = counts.most_common(12)
    height, row = 120, 46
    most = max(counts.values())
    width = 100 / len(columns)
    marks = []
    for k in range(len(sets)):
        y = height + 24 + k * row
        marks.append(line(0, y, 100, y, "grid"))
    for i, (key, count) in enumerate(columns):
        x = (i + 0.5) * width
        tall = (height - 16) * count / most
        names = " and ".join(s.definition.label for s, on in zip(sets, key, strict=True) if on)
        css = "tower lit" if all(key) else "tower"
        tip = f"{count} heads: {names}"
        wide = min(0.5 * width, 9)
        marks.append(bar(x - wide / 2, height - tall, wide, tall, css, tip))
        marks.append(text(x, height - tall - 6, str(count), "value mid"))
        on = [k for k, flag in enumerate(key) if flag]
        if len(on) > 1:
            y1, y2 = height + 24 + on[0] * row, height + 24 + on[-1] * row
            marks.append(line(x, y1, x, y2, "join"))
        for k in range(len(sets)):
            marks.append(dot(x, height + 24 + k * row, 5.5, "member" if key[k] else "absent", tip))
    names = "".join(
        f'<li style="height:{row}px"><b>{escape(s.definition.label)}</b> '
        f'<span class="quiet">{escape(s.threshold)}, {len(s.heads)} heads</span></li>'
        for s in sets
    )
    total = height + 24 + len(sets) * row
    picture = chart(
        "".join(marks), total - 20, "Heads by combination of definitions", left=8, foot=8
    )
    return f'<div class="upset"><ul style="padding-top:{height + 21}px">{names}</ul>{picture}</div>'


def domains(stack: Stack, index: int) -> str:
    """Heads that rest in one kind of text and work in another."""
    found = stack.domains
    if found is None or not found.rows:
        return ""
    setting = ""
    if found.windows and found.window_tokens:
        setting = f" {found.windows} windows of {found.window_tokens} tokens for each domain."
    lead = f"Mass on the first key by kind of text, the {len(found.rows)} largest differences.{setting}"
    keys = [(f"dot domain-{k % 4}", name) for k, name in enumerate(found.domains)]
    rows = [
        [
            head_link(r.head, stack.name),
            _dumbbell(found, r.values),
            *(quantity(v, "share", 2) for v in r.values),
            change(r.difference, "share", 2),
            number(r.p_value, 2) if r.p_value is not None else "–",
        ]
        for r in found.rows
    ]
    head = ["Head", "", *map(escape, found.domains), "Difference", "p"]
    body = legend(*keys) + table(head, rows, css="wide", numeric_from=2)
    return section("domains", index, escape(lead), body)


def _dumbbell(found: DomainTable, values: list[float]) -> str:
    place = [max(0.0, min(100.0, 100 * v)) for v in values]
    marks = line(0, 10, 100, 10, "grid") + line(min(place), 10, max(place), 10, "join")
    for k, x in enumerate(place):
        tip = f"{found.domains[k]}: {quantity(values[k], 'share')}"
        marks += dot(x, 10, 5, f"domain-{k % 4}", tip)
    return f'<svg class="dumbbell" height="20" aria-hidden="true">{marks}</svg>'
