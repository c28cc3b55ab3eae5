"""The report: one self-contained page, the same numbers as data, and a summary for the terminal.

`ReportData` (see `schema`) holds everything; `render` draws it as HTML, `write_page` and
`write_data` save it, `Report` wraps it for notebooks. Nothing here runs a model.
"""

from __future__ import annotations

from regard.report.definitions import DEFINITIONS, definition, measure
from regard.report.files import check_writable, read_data, to_frame, write_data
from regard.report.schema import ReportData

__all__ = [
    "DEFINITIONS",
    "ReportData",
    "check_writable",
    "definition",
    "measure",
    "read_data",
    "to_frame",
    "write_data",
]
