"""The report: one self-contained page, the same numbers as data, and a summary for the terminal.

`ReportData` (see `regard.report.schema`) holds everything the page shows; `render` draws it as HTML,
`write_page` and `write_data` save it, `Report` shows it in a notebook or a terminal. Nothing in this
part of the package runs a model.
"""

from __future__ import annotations

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
    "to_frame",
    "write_data",
    "write_page",
]
