"""The catalogue and the evidence as rich tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from regard.papers._catalogue import Entry
from regard.papers._paper import Claim

STATUS_STYLE = {"measured": "green", "runnable": "yellow", "planned": "dim"}


def number(value: object, unit: str = "") -> str:
    """A measured value to three significant digits, with its unit.

    >>> number(0.04444, " %"), number(22713.4), number({"prose": 65.3, "code": 77})
    ('0.0444 %', '22713', 'prose 65.3, code 77')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number(item, unit)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(number(item, unit) for item in value)
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value}{unit}"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2e}{unit}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


def measured(row: Mapping[str, Any], unit: str = "") -> str:
    """What was measured for a claim, with its interval: `4.4 % [3.1, 5.9]`."""
    text = number(row["here"], unit)
    if row["interval"] is not None:
        low, high = row["interval"]
        text += f" [{number(low)}, {number(high)}]"
    return text


def verdict(holds: bool | None) -> str:
    """`yes`, `no` or `not shown`."""
    return {True: "yes", False: "no", None: "not shown"}[holds]


def tally(evidence: Mapping[str, Any]) -> str:
    """How many claims held, in one line: `5 hold, 1 does not, 2 not shown`."""
    verdicts = [row["holds"] for row in evidence["claims"]]
    yes, no, open_ = verdicts.count(True), verdicts.count(False), verdicts.count(None)
    parts = [
        f"{yes} hold{'s' if yes == 1 else ''}" if yes else "",
        f"{no} do{'es' if no == 1 else ''} not" if no else "",
        f"{open_} not shown" if open_ else "",
    ]
    return ", ".join(part for part in parts if part)


def papers_table(entries: Iterable[Entry]) -> Table:
    """One line a paper: slug, status, year, title."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("paper", no_wrap=True, style="cyan")
    table.add_column("status", no_wrap=True)
    table.add_column("year", no_wrap=True, style="dim")
    table.add_column("title", overflow="fold")
    for row in entries:
        status = Text(row.status, style=STATUS_STYLE[row.status])
        table.add_row(row.slug, status, str(row.date.year), escape(row.title))
    return table


def details(row: Entry) -> RenderableType:
    """Who a paper is, and what one can do with it here."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("what", escape(row.what))
    facts.add_row("topic", escape(row.topic))
    facts.add_row("arXiv", f"{row.arxiv}, {row.date:%d %B %Y}".replace(", 0", ", "))
    if row.venue:
        facts.add_row("published", escape(row.venue))
    if row.also:
        facts.add_row("also called", escape(row.also))
    facts.add_row("link", row.url)
    facts.add_row("status", Text(row.status, style=STATUS_STYLE[row.status]))
    if row.status != "planned":
        facts.add_row("run it", f"regard reproduce {row.slug}")
    return Group(Text(row.title, style="bold"), Text(), facts)


def verdict_table(evidence: Mapping[str, Any], claims: Sequence[Claim] = ()) -> RenderableType:
    """`claim | paper | here | holds`, one row a claim, the note under the claim.

    Args:
        evidence: as returned by `reproduce` or read from its file.
        claims: the paper's claims, for units and for the rule each is judged by; may be left out.
    """
    known = {claim.claim: claim for claim in claims}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    table.add_column("claim", ratio=5, overflow="fold")
    table.add_column("paper", ratio=2, overflow="fold")
    table.add_column("here", ratio=2, overflow="fold")
    table.add_column("holds", no_wrap=True)
    style = {True: "green", False: "bold red", None: "dim"}
    for row in evidence["claims"]:
        claim = known.get(row["claim"])
        text = Text(row["claim"])
        if claim is not None and claim.expect:
            text.append(f"\nholds if {claim.expect}", style="dim")
        if row["note"]:
            text.append(f"\n{row['note']}", style="dim italic")
        here = measured(row, claim.unit if claim else "")
        holds = Text(verdict(row["holds"]), style=style[row["holds"]])
        table.add_row(text, Text(row["paper"] or "–"), Text(here), holds)
        table.add_row()
    return table
