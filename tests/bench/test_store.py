from __future__ import annotations

from pathlib import Path

import pytest

from regard._errors import OutputError
from regard.bench.store import Store

PURPOSE = {"model": "a", "seed": 0}


def test_cells_are_computed_once(tmp_path: Path):
    path = tmp_path / "cells.jsonl"
    calls: list[int] = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"value": 0.1 + 0.2}

    first = Store(path, PURPOSE)
    assert not first.resumed
    value = first.get("a/b", compute)
    again = Store(path, PURPOSE)
    assert again.resumed and "a/b" in again
    assert again.get("a/b", compute) == value == {"value": 0.1 + 0.2}
    assert len(calls) == 1


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path):
    path = tmp_path / "cells.jsonl"
    store = Store(path, PURPOSE)
    for name in "abc":
        store.put(name, {"rows": [name] * 10})
    text = path.read_text()
    for cut in range(len(text.split("\n")[0]) + 1, len(text)):
        path.write_text(text[:cut])
        kept = Store(path, PURPOSE)
        whole = text[:cut].count("\n") - 1
        assert list(kept.cells) == list("abc")[:whole]
        kept.put("d", 1)
        assert list(Store(path, PURPOSE).cells) == [*"abc"[:whole], "d"]


def test_another_purpose_starts_afresh(tmp_path: Path):
    path = tmp_path / "cells.jsonl"
    Store(path, PURPOSE).put("a", 1)
    assert not Store(path, {**PURPOSE, "seed": 1}).cells
    path.write_text("something else\n")
    assert not Store(path, PURPOSE).cells


def test_without_a_file_cells_stay_in_memory():
    store = Store(None, PURPOSE)
    assert store.get("a", lambda: (1, 2)) == [1, 2]  # as it would come back from a file
    store.clear()


def test_numbers_that_are_none_and_places_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(ValueError, match="Out of range float"):
        Store(tmp_path / "c.jsonl", PURPOSE).put("a", float("nan"))
    with pytest.raises(OutputError, match="cannot keep results"):
        Store(tmp_path / "no" / "c.jsonl", PURPOSE)
