"""The report in a terminal: what was run, the findings, and each measure's range over the heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.report.markup import change, interval, number, quantity
from regard.report.schema import Finding, ReportData, Stack

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_COLOURS = {"high": "red", "notable": "yellow", "good": "green", "info": "blue"}


def summary(data: ReportData) -> RenderableType:
    """The report as one rich renderable. Text of the model or the input is never read as markup."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_header(data), Text()]
    for finding in data.findings:
        parts += [_finding(finding), Text()]
    parts += [_measures(stack) for stack in data.stacks if stack.measures]
    return Group(*parts)


def _plain(text: str) -> str:
    """Text from a model or an input without control characters, which could steer the terminal."""
    return "".join(c if c.isprintable() or c == "\u202f" else " " for c in text)


def _header(data: ReportData) -> RenderableType:
    from rich.text import Text

    h, stack = data.header, data.stacks[0]
    reading = f"1 in {round(1 / h.rows)} query rows" if h.sampled else "exact"
    facts = [f"{stack.layers} x {stack.heads} heads", f"{number(h.tokens)} tokens", reading]
    if h.cost_ratio is not None:
        facts.append(f"{number(h.cost_ratio)} x a plain forward")
    if h.equality is not None:
        facts.append(f"max |Δ logit| {number(h.equality, 2)}")
    return Text.assemble((_plain(h.model), "bold"), "\n", (" · ".join(facts), "dim"))


def _finding(finding: Finding) -> RenderableType:
    from rich.text import Text

    colour = _COLOURS[finding.severity]
    text = Text.assemble(("▍ ", colour), (_plain(finding.title), f"bold {colour}"))
    text.append(f"\n  {_plain(finding.sentence)}")
    if finding.proof:
        p = finding.proof
        effect = f"{_plain(p.label)}: {change(p.effect, p.unit)} {interval(p.low, p.high, p.unit)}"
        if p.controls:
            effect += f", controls {change(float(np.mean(p.controls)), p.unit, 2)}"
        text.append(f"\n  {effect}", style="dim")
    return text


def _measures(stack: Stack) -> Table:
    from rich.table import Table
    from rich.text import Text

    title = "Heads" if not stack.name else f"Heads of {_plain(stack.label)}"
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("Measure")
    for name in ("lowest", "median", "highest"):
        table.add_column(name, justify="right")
    table.add_column("most in")
    for measure in stack.measures:
        values = measure.values.astype(float)
        if not np.isfinite(values).any():
            continue
        unit = measure.definition.unit
        low, middle, high = np.nanquantile(values, [0, 0.5, 1])
        order = np.argsort(-np.nan_to_num(values, nan=-np.inf), axis=None)[:3]
        best = " ".join(f"L{i // values.shape[1]}H{i % values.shape[1]}" for i in order.tolist())
        cells = (quantity(float(v), unit) for v in (low, middle, high))
        table.add_row(Text(_plain(measure.definition.label)), *cells, best)
    return table
