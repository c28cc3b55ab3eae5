"""The parts of the bench page, each as HTML: what was run, what follows from it, fronts, tables, texts, definitions."""

from __future__ import annotations

from typing import Any

from regard.bench.charts import cell, depth_table, methods_of, pareto, size_label, speed
from regard.bench.results import FULL, LIBRARY, MEASURES, QUALITY, Results, Setting
from regard.report.markup import THIN, command, escape, number, quantity, table, text_table

SECTIONS = {
    "fronts": "Quality against memory",
    "numbers": "Every setting",
    "depth": "Loss by depth",
    "speed": "Time and memory",
    "texts": "What it writes",
    "appendix": "Definitions",
}


def hero(results: Results) -> str:
    """What was run."""
    about = results.about
    owner, _, name = str(about.get("model", "model")).rstrip("/").rpartition("/")
    lengths = results.lengths()
    documents = {row.document for row in results.rows}
    settings = [s for s in results.settings() if s.method not in (FULL, LIBRARY)]
    full = results.estimate(Setting(lengths[0], FULL, "1"), "bytes") if lengths else None
    facts = [
        ("Documents", number(len(documents)), ", ".join(sorted({r.kind for r in results.rows}))),
        ("Context", " / ".join(number(n) for n in lengths), "tokens"),
        ("Settings", number(len(settings)), f"of {len({s.method for s in settings})} methods"),
    ]
    if full:
        facts.append(("Full cache", f"{number(full.mean)} MB", f"at {number(lengths[0])} tokens"))
    if about.get("bandwidth"):
        facts.append(
            (
                "Read bandwidth",
                f"{number(about['bandwidth'] / 1e9)} GB/s",
                f"threads: {about.get('threads')}",
            )
        )
    if not results.complete:
        facts.append(("Unfinished", "Partial", "run the command again to go on"))
    cards = "".join(
        f"<div><dt>{escape(a)}</dt><dd><b>{escape(b)}</b> <span>{escape(c)}</span></dd></div>"
        for a, b, c in facts
    )
    sub = " · ".join(str(about[k]) for k in ("architecture", "dtype") if about.get(k))
    return (
        '<section class="hero" id="top"><div class="hero-text">'
        f'<p class="eyebrow">Cache bench{f" · {escape(owner)}" if owner else ""}</p>'
        f'<h1>{escape(name)}</h1><p class="sub">{escape(sub)}</p></div>'
        f'<dl class="facts">{cards}</dl>{_run(about)}</section>'
    )


def _run(about: dict[str, Any]) -> str:
    rows = []
    for key, value in about.items():
        if key in ("methods", "model") or value in (None, "", []):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        cell = command(str(value)) if key == "command" else escape(value)
        rows.append(f"<dt>{escape(key.replace('_', ' ').capitalize())}</dt><dd>{cell}</dd>")
    return f'<details class="run"><summary>Run details</summary><dl>{"".join(rows)}</dl></details>'


def findings(results: Results, titles: dict[str, str]) -> str:
    """For each budget, what loses least on needles and what stays closest to the full cache's predictions."""
    items = []
    for length in results.lengths():
        budgets = dict.fromkeys(
            s.budget
            for s in results.settings()
            if s.length == length and s.method not in (FULL, LIBRARY)
        )
        for budget in budgets:
            found = _finding(results, length, budget, titles)
            if found:
                items.append(found)
    return f'<div class="findings verdicts">{"".join(items)}</div>' if items else ""


def _finding(results: Results, length: int, budget: str, titles: dict[str, str]) -> str:
    settings = [Setting(length, m, budget) for m in methods_of(results, length)]
    needles = {s: e for s in settings if (e := results.lost(s, "needle"))}
    texts = {s: e for s in settings if (e := results.estimate(s, "kl"))}
    if not needles or not texts:
        return ""
    keeper = min(needles, key=lambda s: needles[s].mean)
    close = min(texts, key=lambda s: texts[s].mean)
    name = escape(titles.get(keeper.method, keeper.method))
    sentence = f"<b>{name}</b> loses {_loss(needles[keeper].mean)} on needles"
    if close.method == keeper.method:
        sentence += f" and stays closest to the full cache’s predictions (KL {quantity(texts[close].mean, '', 2)})"
    else:
        other = escape(titles.get(close.method, close.method))
        worse = needles[close].mean - needles[keeper].mean > 0.2
        sentence += (
            f"; <b>{other}</b> stays closest on the running text (KL {quantity(texts[close].mean, '', 2)}) "
            f"{'but' if worse else 'and'} loses {_loss(needles[close].mean)} on needles"
        )
    return (
        f'<div class="verdict"><p class="tag">{number(length)} tokens, budget {escape(size_label(budget))}</p>'
        f'<p class="sentence">{sentence}.</p></div>'
    )


def _loss(nats: float) -> str:
    return "nothing" if nats < 0.005 else f"{quantity(nats, 'nats', 2)} a token"


def _section(key: str, lead: str, body: str) -> str:
    return (
        f'<section id="{key}" class="panel"><div class="title"><h2>{escape(SECTIONS[key])}</h2>'
        f'<p class="lead">{lead}</p></div>{body}</section>'
    )


def fronts(results: Results, titles: dict[str, str]) -> str:
    """A chart for each quality measure; chips switch between them, legend buttons single out a method."""
    charts = []
    for length in results.lengths():
        for measure in QUALITY:
            drawn = pareto(results, length, measure, titles)
            if drawn:
                charts.append((length, measure, drawn))
    if not charts:
        return ""
    measures = dict.fromkeys(measure for _, measure, _ in charts)
    chips = "".join(
        f'<button type="button" role="radio" aria-checked="{str(i == 0).lower()}" data-show="{m}">'
        f"{escape(MEASURES[m].label)}</button>"
        for i, m in enumerate(measures)
    )
    drawn = "".join(
        f'<figure class="front" data-measure="{measure}"><figcaption>{escape(MEASURES[measure].label)}'
        f" <span>{escape(MEASURES[measure].short)}; {number(length)} tokens, "
        f"{'higher' if MEASURES[measure].higher else 'lower'} is better</span></figcaption>{chart}</figure>"
        for length, measure, chart in charts
    )
    names = dict.fromkeys(m for n in results.lengths() for m in methods_of(results, n))
    legend = "".join(
        f'<button type="button" class="key" data-method="{i}" aria-pressed="false"><i class="mark method-{i}"></i>'
        f"{escape(titles.get(name, name))}</button>"
        for i, name in enumerate(names)
    )
    return _section(
        "fronts",
        "Memory held after the context has been read, as a share of the full cache. A ring marks a setting that no other "
        "beats in both memory and quality. Whiskers: 95 % bootstrap intervals over documents.",
        f'<div class="controls only-script"><div class="chips" role="radiogroup" aria-label="Measure">{chips}</div></div>'
        f'{drawn}<div class="keys" aria-label="Methods">{legend}</div>',
    )


def numbers(results: Results, titles: dict[str, str]) -> str:
    """Every setting with every quality measure."""
    body = []
    for setting in results.settings():
        kept = results.estimate(setting, "kept")
        name = escape(titles.get(setting.method, setting.method))
        budget = "" if setting.method in (FULL, LIBRARY) else escape(size_label(setting.budget))
        cells = [
            name,
            budget,
            number(setting.length),
            quantity(kept.mean, "share") if kept else "–",
        ]
        for measure in QUALITY:
            cells.append(cell(results.estimate(setting, measure), measure))
        if any(cell != "–" for cell in cells[4:]):
            body.append(cells)
    head = ["Method", "Budget", "Tokens", "Held", *(MEASURES[m].label for m in QUALITY)]
    return _section(
        "numbers",
        "Means over documents with 95 % bootstrap intervals. KL, NLL and top-1 are of the text that really follows; the others "
        "are log-probabilities of answers, closer to zero is better.",
        table(head, body, css="numbers"),
    )


def depth(results: Results, titles: dict[str, str]) -> str:
    """Needle loss by depth for each budget."""
    parts = []
    for length in results.lengths():
        settings = [
            s
            for s in results.settings()
            if s.length == length
            and s.method not in (FULL, LIBRARY)
            and results.estimate(s, "needle")
        ]
        budgets = dict.fromkeys(s.budget for s in settings)
        for budget in budgets:
            own = [s for s in settings if s.budget == budget]
            parts.append(
                f"<h3>{number(length)} tokens, budget {escape(size_label(budget))}</h3>"
                + depth_table(results, own, "needle", titles)
            )
    lead = "Needle log-probability lost against the full cache, nats a token, by the place of the needle in the context."
    return _section("depth", lead, "".join(parts)) if parts else ""


def times(results: Results, titles: dict[str, str]) -> str:
    """Decoding time against its floor, prefill time, peak and memory held."""
    parts = [
        f"<h3>{number(length)} tokens</h3>" + drawn
        for length in results.lengths()
        if (drawn := speed(results, length, titles))
    ]
    return (
        _section(
            "speed",
            "The coloured part of a bar is the time that reading weights and cache once takes at the measured bandwidth; no "
            "cache can be faster. Compare with the full cache of regard, which drops nothing, before crediting a method.",
            "".join(parts),
        )
        if parts
        else ""
    )


def texts(results: Results, titles: dict[str, str]) -> str:
    """What the model went on to write, greedily, from each cache."""
    if not results.texts:
        return ""
    cells = "".join(
        f"<article><h3>{escape(titles.get(t['method'], t['method']))} <span>"
        f"{'' if t['method'] in (FULL, LIBRARY) else escape(size_label(t['budget']))}</span></h3>"
        f"<p>{escape(t['text'])}</p></article>"
        for t in results.texts
    )
    document = escape(results.texts[0].get("document", ""))
    lead = f"Greedy continuation of {document} from each cache, after the same prefill."
    return _section("texts", lead, f'<div class="written">{cells}</div>')


def appendix(results: Results) -> str:
    """What every measure and method is."""
    used = {row.measure for row in results.rows}
    measures = [
        [escape(m.label), escape(m.unit), escape(m.short)]
        for m in MEASURES.values()
        if m.key in used
    ]
    methods = [
        [escape(entry["title"]), escape(key), escape(entry["source"])]
        for key, entry in results.about.get("methods", {}).items()
    ]
    body = table(["Measure", "Unit", "What it is"], measures, numeric_from=9)
    if methods:
        body += "<h3>Methods</h3>" + table(["Method", "Name", "Source"], methods, numeric_from=9)
    sample = text_table(
        "What these numbers cannot say",
        "<p>Intervals are over the documents of this run, and with fewer than ten of them they are too narrow. Times are of this "
        "machine under its load at the time; compare them with each other only. A context is read once and compressed before "
        "any question is known; methods that see the question first do better on that question.</p>",
    )
    return _section("appendix", f"Units, sources and limits.{THIN}", body + sample)
