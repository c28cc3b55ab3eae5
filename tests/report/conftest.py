"""Reports with made-up numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the made-up report, `synthetic`


@pytest.fixture(scope="session")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written report of 600 tokens, with every panel and a second stack."""
    from synthetic import make_report

    from regard.report import write_page

    report = make_report(600, stacks=("vision",))
    return write_page(report, tmp_path_factory.mktemp("page") / "report.html")
