"""A bench in a terminal: one line for each setting, with the names that `--methods` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.bench.charts import size_label
from regard.bench.results import FULL, LIBRARY, MEASURES, Results, Setting
from regard.report.markup import number, quantity

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("kept", "kl", "needle", "multikey", "variables", "copy", "decode")
NAMES = {FULL: "full cache", LIBRARY: "DynamicCache"}
HEADS = {"multikey": "keys", "variables": "vars", "decode": "ms"}


def summary(results: Results) -> RenderableType:
    """A table for each length. Needles to copy: log-probability lost against the full cache on the same documents."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for length in results.lengths():
        count = len({row.document for row in results.rows if row.length == length})
        table = Table(
            box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="bold"
        )
        table.title = f"{number(length)} tokens, {count} document{'s' if count > 1 else ''}"
        table.add_column("Cache", no_wrap=True)
        table.add_column("budget", justify="right", no_wrap=True)
        for key in COLUMNS:
            measure = MEASURES[key]
            head = HEADS.get(key, measure.label.lower())
            table.add_column(head, justify="right", no_wrap=True, min_width=6)
        front = set(results.pareto(length, "needle", "kept"))
        for setting in (s for s in results.settings() if s.length == length):
            name = Text(NAMES.get(setting.method, setting.method))
            if setting in front and setting.method not in (FULL, LIBRARY):
                name.stylize("bold green")
            budget = "" if setting.method in (FULL, LIBRARY) else size_label(setting.budget)
            table.add_row(name, budget, *(_cell(results, setting, key) for key in COLUMNS))
        parts.append(table)
    parts.append(
        Text(
            "needle, keys, vars, copy: nats lost a token against the full cache. Green: no other keeps needles "
            "better in as little memory. ms: a generated token.",
            style="dim",
        )
    )
    return Group(*parts)


def _cell(results: Results, setting: Setting, key: str) -> str:
    lost = key in ("needle", "multikey", "variables", "copy")
    found = results.lost(setting, key) if lost else results.estimate(setting, key)
    if found is None:
        return ""
    unit = "share" if MEASURES[key].unit == "share" else ""
    return quantity(found.mean, unit, 2)
