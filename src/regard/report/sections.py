"""The frame of the page: what was run, the findings, the head atlas, before/after, the appendix."""

from __future__ import annotations

import re
from collections.abc import Container

import numpy as np

from regard.report.definitions import DEFINITIONS
from regard.report.markup import (
    THIN,
    about,
    change,
    command,
    definition_body,
    escape,
    head_link,
    interval,
    number,
    quantity,
    table,
    text_table,
)
from regard.report.schema import Definition, Finding, Header, Intervention, Proof, ReportData, Stack
from regard.report.svg import atlas, proof_plot, thumbnail

SEVERITIES = {"high": "Major", "notable": "Notable", "info": "Note", "good": "Good"}
PANELS = {
    "atlas": "Head atlas",
    "skyline": "Residual skyline",
    "text": "Text",
    "rhythm": "Rhythm",
    "retrieval": "Retrieval and probes",
    "dormant": "Dormant heads",
    "domains": "Domains",
    "budget": "KV budget",
    "causal": "Before and after",
    "appendix": "Appendix",
}


NAVIGATION = PANELS | {
    "atlas": "Atlas",
    "skyline": "Skyline",
    "retrieval": "Retrieval",
    "dormant": "Dormant",
    "causal": "Before / after",
}


def section(panel: str, stack: int, lead: str, body: str, title: str = "") -> str:
    """One section of the page, addressed as `#panel` (or `#panel-1` for the second stack)."""
    suffix = f"-{stack}" if stack else ""
    return (
        f'<section id="{panel}{suffix}" class="panel panel-{panel}" data-stack="{stack}">'
        f'<div class="title"><h2>{escape(title or PANELS[panel])}</h2>'
        f'<p class="lead">{lead}</p></div>{body}</section>'
    )


def hero(data: ReportData) -> str:
    """The header card: model, input, exactness, cost, and the proof that nothing was changed."""
    h, stack = data.header, data.stacks[0]
    owner, _, name = h.model.rstrip("/").rpartition("/")
    kv = f" ({stack.kv_heads} KV)" if stack.kv_heads and stack.kv_heads != stack.heads else ""
    about_model = [f"{stack.layers} layers × {stack.heads} heads{kv}"]
    if h.parameters:
        about_model.append(f"{number(h.parameters / 1e6)}{THIN}M parameters")
    about_model.append(
        f"{h.quantisation.split(' ')[0]}, computed in {h.dtype}" if h.quantisation else h.dtype
    )
    emblem = next((thumbnail(m) for m in stack.measures if np.isfinite(m.values).any()), "")
    return (
        '<section class="hero" id="top"><div class="hero-text">'
        f'<p class="eyebrow">Attention report{f" · {escape(owner)}" if owner else ""}</p>'
        f'<h1>{escape(name)}</h1><p class="sub">{escape(" · ".join(about_model))}</p></div>'
        f'<a class="hero-emblem" href="#atlas" tabindex="-1" aria-hidden="true">{emblem}</a>'
        f'<dl class="facts">{_facts(h)}</dl>{_run_details(h)}</section>'
    )


def _facts(h: Header) -> str:
    facts = [("Input", f"{number(h.tokens)} tokens", h.text_source)]
    if h.sampled:
        facts.append(
            ("Reading", f"1 in {round(1 / h.rows)} query rows", "sampled, ± standard error")
        )
    else:
        facts.append(("Reading", "Exact", "every query row"))
    if h.cost_ratio is not None:
        extra = f", +{number(h.extra_memory_mb)} MB" if h.extra_memory_mb is not None else ""
        facts.append(("Cost", f"{number(h.cost_ratio)}{THIN}×", f"a plain forward{extra}"))
    if h.equality is not None:
        limit = h.equality_tolerance
        good = limit is None or h.equality <= limit
        facts.append(
            (
                "Model unchanged" if good else "Model changed",
                number(h.equality, 2),
                f"max |Δ logit|, limit {number(limit, 1)}"
                if limit is not None
                else "max |Δ logit|",
            )
        )
    if h.first_key_is_bos is not None:
        facts.append(("First key", "BOS" if h.first_key_is_bos else "Not BOS", "the text’s own start"
                      if not h.first_key_is_bos else "a start token"))  # fmt: skip
    return "".join(
        f"<div><dt>{escape(a)}</dt><dd><b>{escape(b)}</b> <span>{escape(c)}</span></dd></div>"
        for a, b, c in facts
    )


def _run_details(h: Header) -> str:
    rows = [
        ("Command", command(h.command)),
        ("Model", escape(h.model)),
        ("Architecture", escape(h.architecture)),
        ("Weights, sha256", f"<code>{escape(h.weights_sha)}</code>" if h.weights_sha else ""),
        ("Numbers", escape(", ".join(x for x in (h.quantisation, h.dtype) if x))),
        ("Seed", escape(h.seed)),
        ("Date", escape(h.date)),
        ("Hardware", escape(h.hardware)),
        ("Duration", f"{number(h.seconds)} s" if h.seconds is not None else ""),
        ("Versions", escape(", ".join(f"{k} {v}" for k, v in h.versions.items()))),
        ("Notes", "<br>".join(escape(note) for note in h.notes)),
    ]
    items = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in rows if v)
    return f'<details class="run"><summary>Run details</summary><dl>{items}</dl></details>'


def figures_bold(sentence: str) -> str:
    """The sentence as HTML with its figures set in bold."""
    parts = re.split(
        r"((?<![\w.])[+\u2212-]?\d+(?:[.,]\d+)*(?:[ \u202f]\d{3})*(?:[ \u202f]?%)?)", sentence
    )
    return "".join(
        f"<b>{escape(part)}</b>" if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def findings(data: ReportData, panels: Container[str] = PANELS) -> str:
    """The first screen's sentences, each with its proof; links go to `panels` that are on the page."""
    if not data.findings:
        return ""
    items = "".join(_finding(f, panels) for f in data.findings)
    return (
        '<section id="findings" class="findings"><h2 class="only-heard">Findings</h2>'
        f"{items}</section>"
    )


def _finding(finding: Finding, panels: Container[str]) -> str:
    actions = []
    if finding.heads:
        count = len(finding.heads)
        what = "the head" if count == 1 else f"the {count} heads"
        actions.append(
            f'<button type="button" class="show" data-heads="{escape(" ".join(finding.heads))}" '
            f'data-measure="{escape(finding.measure or "")}">Show {what}</button>'
        )
    if finding.panel in PANELS and finding.panel in panels:
        actions.append(f'<a href="#{finding.panel}">{escape(PANELS[finding.panel])}</a>')
    right = proof_block(finding.proof) if finding.proof else ""
    return (
        f'<article class="finding sev-{escape(finding.severity)}"><div class="say">'
        f'<p class="tag"><span>{SEVERITIES[finding.severity]}</span> {escape(finding.title)}</p>'
        f'<p class="sentence">{figures_bold(finding.sentence)}</p>'
        f'<p class="method">{escape(finding.method)}</p>'
        f'<p class="actions">{command(finding.command)}{" ".join(actions)}</p></div>{right}</article>'
    )


def proof_block(proof: Proof) -> str:
    """Effect, interval and controls as a figure and as words."""
    between = interval(proof.low, proof.high, proof.unit)
    level = f" {round(100 * proof.level)}{THIN}%" if between else ""
    lines = [f"<b>{escape(change(proof.effect, proof.unit))}</b> {between}{level}"]
    if proof.controls:
        factor, unit = (100, "points") if proof.unit == "share" else (1, proof.unit)
        mean, low, high = (
            number(factor * float(f(proof.controls)), 2, sign=True) for f in (np.mean, min, max)
        )
        shown = f"{mean}, from {low} to {high} {unit}"
        name = escape(proof.control_label or f"{len(proof.controls)} controls")
        lines.append(f'<span class="quiet">Controls: {escape(shown)}, {name}</span>')
    if proof.tokens:
        lines.append(f'<span class="quiet">{number(proof.tokens)} {escape(proof.counted)}</span>')
    return (
        f'<div class="proof"><p class="proof-label">{escape(proof.label)}</p>{proof_plot(proof)}'
        f"<p>{'<br>'.join(lines)}</p></div>"
    )


def head_atlas(stack: Stack, index: int) -> str:
    """The layer x head grid with its measures; the script adds switching, tooltips and cards."""
    if not stack.measures:
        return ""
    first = stack.measures[0]
    options = "".join(
        f'<button type="button" role="radio" aria-checked="{"true" if i == 0 else "false"}" '
        f'tabindex="{0 if i == 0 else -1}" data-measure="{escape(m.key)}">'
        f"{escape(m.definition.label)}</button>"
        for i, m in enumerate(stack.measures)
    )
    patterns = (
        '<button type="button" class="patterns" aria-pressed="false">Patterns</button>'
        if any(card.map is not None for card in stack.cards)
        else ""
    )
    rows = [
        (
            head_link(f"L{layer}H{head}", stack.name),
            escape(quantity(float(first.values[layer, head]), first.definition.unit)),
        )
        for layer, head in _ranked(first.values)[:20]
    ]
    values = text_table(
        "As text", table(("Head", escape(first.definition.name)), rows, css="atlas-table")
    )
    body = (
        f'<div class="controls only-script"><div class="chips" role="radiogroup" '
        f'aria-label="Measure">{options}</div>{patterns}</div>'
        f'<div class="atlas-row"><div class="atlas-map">{atlas(first, "Heads by layer")}'
        f'<canvas class="pattern-layer" aria-hidden="true"></canvas></div>'
        f'<aside class="reading" aria-live="polite"><h3>{escape(first.definition.name)}</h3>'
        f'<div class="reading-body">{definition_body(first.definition)}</div></aside></div>{values}'
    )
    name = f"{stack.label}: head atlas" if index else "Head atlas"
    lead = "One cell is one head: layers to the right, heads downwards. Choose a head to open its card."
    return section("atlas", index, lead, body, name)


def _ranked(values: np.ndarray) -> list[tuple[int, int]]:
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), axis=None)
    return [(int(i) // values.shape[1], int(i) % values.shape[1]) for i in order]


def causal(rows: list[Intervention]) -> str:
    """What each change to the model did, beside what random changes of the same size did."""
    if not rows:
        return ""
    body = "".join(
        f'<article class="change"><div><h3>{escape(r.name)}</h3><p class="quiet">'
        f"{escape(f'{r.metric} {quantity(r.before, r.unit)} → {quantity(r.after, r.unit)}')}</p>"
        f"{command(r.command) if r.command else ''}</div>{proof_block(_as_proof(r))}</article>"
        for r in rows
    )
    lead = (
        "Each change alone, everything else untouched. Filled: the change; open: random controls."
    )
    return section("causal", 0, lead, f'<div class="changes">{body}</div>')


def _as_proof(r: Intervention) -> Proof:
    low, high = (None if end is None else end - r.before for end in (r.low, r.high))
    controls = [value - r.before for value in r.controls]
    effect = r.after - r.before
    return Proof(f"Δ {r.metric}", r.unit, effect, low, high, 0.95, controls, r.control_label)


def appendix(data: ReportData) -> str:
    """Every definition, the limits of the run, and the data."""
    known: dict[str, Definition] = {}
    for stack in data.stacks:
        known |= {m.key: m.definition for m in stack.measures}
        known |= {p.definition.key: p.definition for p in stack.probes}
        known |= {d.definition.key: d.definition for d in stack.dormant}
    for key in ("received", "surprisal", "peak", "write", "retained"):
        known.setdefault(key, DEFINITIONS[key])
    entries = "".join(about(item) for item in known.values())
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in data.limits)
    body = (
        f'<h3>Definitions</h3><div class="definitions">{entries}</div>'
        + (f'<h3>Limits</h3><ul class="limits">{limits}</ul>' if limits else "")
        + '<h3 class="only-script">Data</h3><p class="downloads only-script">'
        '<button type="button" data-download="json">Download JSON</button> '
        '<button type="button" data-download="csv">Download heads as CSV</button> '
        '<span class="quiet">The numbers this page draws, rounded for drawing. The files written '
        "beside it have full precision.</span></p>"
        '<p class="quiet notation">A[t,s] is the attention weight from query t to key s; rows sum to 1.'
        " Coordinates: L5H3 is head 3 of layer 5, both counted from 0.</p>"
    )
    return section("appendix", 0, "What the figures mean and where they stop.", body)
