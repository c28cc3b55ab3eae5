"""The report: one self-contained page, the same numbers as data, and a summary for the terminal.

`ReportData` (see `regard.report.schema`) holds everything the page shows; `render` draws it as HTML,
`write_page` and `write_data` save it, `Report` shows it in a notebook or a terminal. A model is run by
`report` alone (`collect`, `reading`, `measuring`, `budget`).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from regard.report.definitions import DEFINITIONS, definition, measure
from regard.report.document import Report
from regard.report.files import check_writable, read_data, to_frame, write_data
from regard.report.page import render, write_page
from regard.report.schema import ReportData, pool_levels

__all__ = [
    "DEFINITIONS",
    "Report",
    "ReportData",
    "check_writable",
    "definition",
    "measure",
    "pool_levels",
    "read_data",
    "render",
    "report",
    "to_frame",
    "write_data",
    "write_page",
]


def report(model: Any = "smollm2", text: Any = None, **options: Any) -> Report:
    """Run a model over a text and return its `Report`; see `regard.report.collect.report` for all options."""
    from regard.report.collect import report as run

    return run(model, text, **options)


class _Room(ModuleType):
    """Lets `regard.report(model, text)` work although `regard.report` is also a package."""

    def __call__(self, model: Any = "smollm2", text: Any = None, **options: Any) -> Report:
        return report(model, text, **options)


sys.modules[__name__].__class__ = _Room
