"""What each KV cache saves and what it costs, on a model and a text of your own.

`bench(model, text)` measures and returns `Results`; `save` writes them as a page, JSON and Parquet; `make_plan` picks
the setting that `regard.apply` installs.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from regard.bench.console import summary
from regard.bench.files import read, save
from regard.bench.page import render
from regard.bench.planning import make_plan
from regard.bench.results import MEASURES, Results, Row, Setting
from regard.bench.run import BUDGETS, METHODS, Bench, bench

__all__ = [
    "BUDGETS",
    "MEASURES",
    "METHODS",
    "Bench",
    "Results",
    "Row",
    "Setting",
    "bench",
    "make_plan",
    "read",
    "render",
    "save",
    "summary",
]


class _Room(ModuleType):
    """Lets `regard.bench(model, text)` work although `regard.bench` is also a package."""

    def __call__(self, model: Any = "smollm2", text: str | None = None, **options: Any) -> Results:
        return bench(model, text, **options)


sys.modules[__name__].__class__ = _Room
