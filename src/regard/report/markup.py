"""Text for the page: escaping, numbers with their units, tables and definitions as HTML."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from typing import Any

from regard.report.schema import Definition

Real = float | int

MINUS, THIN = "\u2212", "\u202f"


def escape(text: object) -> str:
    """Any text as HTML content or as a quoted attribute."""
    return html.escape(str(text), quote=True)


def script_json(value: Any) -> str:
    """JSON that is safe inside `<script>`: no `<`, `>`, `&` or line separators survive."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def number(value: Real | None, digits: int = 3, sign: bool = False) -> str:
    """A number to `digits` significant digits with thin thousands spaces and a true minus sign."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1000:
        text = f"{size:,.0f}".replace(",", THIN)
    elif float(value).is_integer():
        text = f"{size:.0f}"
    elif size < 10**-4:
        text = f"{size:.1e}".replace("e-0", "e-")
        base, _, power = text.partition("e-")
        text = f"{base}{THIN}×{THIN}10⁻{''.join('⁰¹²³⁴⁵⁶⁷⁸⁹'[int(d)] for d in power)}"
    else:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    if value < 0 and text.strip("0."):
        return MINUS + text
    return ("+" if sign and value > 0 else "") + text


def quantity(value: Real | None, unit: str, digits: int = 3, sign: bool = False) -> str:
    """A number with its unit; shares print as per cent."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "share":
        return f"{_percent(100 * value, digits, sign)}{THIN}%"
    if unit == "ratio":
        return f"{number(value, digits, sign)}{THIN}×"
    return number(value, digits, sign) + (f" {unit}" if unit else "")


def _percent(value: Real, digits: int, sign: bool) -> str:
    """Per cent with the decimals of `digits` significant digits (2 below 10 %), also when round."""
    size = abs(value)
    if 0 < size < 0.01:
        return "<0.01" if value > 0 else f">{MINUS}0.01"
    if size == 0 or size > 999:
        return number(value, 2, sign)
    shown = digits if size >= 10 else min(digits, 2)
    text = f"{size:.{max(0, shown - 1 - math.floor(math.log10(size)))}f}"
    text = "100" if text.startswith("100.") else text
    return (MINUS if value < 0 else "+" if sign and value > 0 else "") + text


def change(value: Real | None, unit: str, digits: int = 3) -> str:
    """A signed difference with its unit; differences of shares print as percentage points."""
    if unit == "share" and value is not None:
        return quantity(100 * value, "points", digits, sign=True)
    return quantity(value, unit, digits, sign=True)


def interval(low: Real | None, high: Real | None, unit: str, digits: int = 3) -> str:
    """`[low, high]` in the unit's scale, without repeating the unit; empty when not measured."""
    if low is None or high is None:
        return ""
    factor = 100 if unit == "share" else 1
    return f"[{number(low * factor, digits)}, {number(high * factor, digits)}]"


def visible_token(token: str) -> str:
    """A token as a reader should see it in a table: white space made visible."""
    shown = token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return shown.replace(" ", "·") if not shown.strip() else shown.strip() or "∅"


def about(definition: Definition, label: str = "") -> str:
    """A definition that opens in place: what it is, its formula, its source."""
    return (
        f'<details class="about"><summary aria-label="Definition of {escape(definition.name)}">'
        f"{escape(label or definition.name)}</summary><div>{definition_body(definition)}</div></details>"
    )


def definition_body(definition: Definition) -> str:
    """The three lines of a definition."""
    return (
        f"<p>{escape(definition.short)}</p><p><code>{escape(definition.formula)}</code></p>"
        f'<p class="quiet">{escape(definition.source)}</p>'
    )


def table(
    head: Iterable[str],
    rows: Iterable[Iterable[str]],
    caption: str = "",
    css: str = "",
    numeric_from: int = 1,
) -> str:
    """A table of ready-made HTML cells; columns from `numeric_from` on are set as figures."""
    mark = [' class="l"' if 0 < i < numeric_from else "" for i in range(64)]
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if i == 0 else f"<td{mark[i]}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    titles = "".join(f'<th scope="col"{mark[i]}>{cell}</th>' for i, cell in enumerate(head))
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{css}">{title}<thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def text_table(summary: str, content: str) -> str:
    """The same numbers as text, folded away below a chart."""
    return f'<details class="as-table"><summary>{escape(summary)}</summary>{content}</details>'


def legend(*items: tuple[str, str]) -> str:
    """A row of keys: (class of the mark, its label); a label without a mark is a remark."""
    keys = "".join(
        "<span>" + (f'<i class="{mark}"></i>' if mark else "") + escape(label) + "</span>"
        for mark, label in items
    )
    return f'<p class="legend">{keys}</p>'


def head_link(head: str, stack: str = "") -> str:
    """A link that opens the head's card."""
    name = f"{stack}.{head}" if stack else head
    return f'<a class="head" href="#{escape(name)}">{escape(head)}</a>'


def command(text: str) -> str:
    """A command line with a button that copies it."""
    return (
        f'<span class="command"><code>{escape(text)}</code>'
        f'<button type="button" class="copy" data-copy="{escape(text)}">Copy</button></span>'
    )
