"""Finished cells on disk, so that an interrupted bench goes on where it stopped.

A file of JSON lines: the first says what is being measured, each further one is a cell (a document read by one
method at one budget, say) with its rows. A line is written in one piece when its cell is finished; a last
line cut short by a crash is left out. A file that was made for something else is started afresh.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regard._errors import OutputError


class Store:
    """Cells by name; `Store(None, ...)` keeps them in memory only.

    Args:
        path: of the file.
        purpose: whatever decides the numbers (model, settings, versions). Cells of another purpose are not reused.
    """

    def __init__(self, path: Path | None, purpose: dict[str, Any]) -> None:
        self.path = path
        self.cells: dict[str, Any] = {}
        head = json.dumps({"purpose": purpose}, sort_keys=True)
        self.resumed = False
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines and lines[0] == head:
            whole = lines[1:-1]  # what follows the last line break was never finished
            self.cells = {cell["name"]: cell["value"] for cell in map(json.loads, whole)}
            self.resumed = bool(self.cells)
            if lines[-1]:
                self._write("\n".join([head, *whole, ""]), "w")
        else:
            self._write(head + "\n", "w")

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The kept value of a cell, or `compute()`, kept from now on. Values are plain JSON types."""
        if name not in self.cells:
            self.put(name, compute())
        return self.cells[name]

    def put(self, name: str, value: Any) -> None:
        self.cells[name] = json.loads(json.dumps(value))
        self._write(json.dumps({"name": name, "value": value}, allow_nan=False) + "\n", "a")

    def __contains__(self, name: str) -> bool:
        return name in self.cells

    def clear(self) -> None:
        """Removes the file: the results have been written elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, text: str, mode: str) -> None:
        if self.path is None:
            return
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot keep results in {self.path}: {error.strerror}") from error
