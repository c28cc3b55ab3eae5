"""A report in hand: it shows itself in a notebook, prints a summary, and saves page and data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regard.report.console import summary
from regard.report.files import check_writable, write_atomic, write_data
from regard.report.markup import escape
from regard.report.page import render
from regard.report.schema import ReportData

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


@dataclass
class Report:
    """The result of `regard.report`: `data` holds every number of the page."""

    data: ReportData

    def html(self) -> str:
        """The page as HTML text."""
        return render(self.data)

    def save(self, path: str | os.PathLike[str], data: bool = True) -> list[Path]:
        """Write the page to `path` and, beside it, the same numbers as JSON and Parquet.

        Returns the files written. `OutputError` before anything is written when `path` cannot be.
        """
        target = check_writable(path)
        written = [write_atomic(target, self.html())]
        if data:
            written += write_data(self.data, target.with_suffix(""))
        return written

    def show(self, console: Console | None = None) -> None:
        """Print the summary to the terminal."""
        from rich.console import Console

        (console or Console()).print(self.__rich__())

    def __rich__(self) -> RenderableType:
        return summary(self.data)

    def __repr__(self) -> str:
        header = self.data.header
        return (
            f"Report({header.model!r}, {header.tokens} tokens, {len(self.data.findings)} findings)"
        )

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.html())}" title="{escape(repr(self))}" width="100%" '
            'height="780" style="border:0;border-radius:8px" loading="lazy"></iframe>'
        )
