from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import make_results

from regard._errors import InputError
from regard.bench.results import FULL, LIBRARY, Results, Row, Setting


def row(
    method: str,
    budget: str,
    measure: str,
    value: float,
    document: str = "d1",
    depth: float | None = None,
) -> Row:
    return Row(document, "prose", 512, method, budget, measure, value, depth)


def test_a_document_counts_once_however_many_questions_it_has():
    rows = [row("a", "0.2", "needle", v) for v in (-1.0, -3.0)]
    rows += [row("a", "0.2", "needle", -5.0, "d2")]
    found = Results(rows).estimate(Setting(512, "a", "0.2"), "needle")
    assert found is not None
    assert (found.mean, found.n) == (-3.5, 2)


def test_losses_are_positive_for_either_direction_and_paired_by_document():
    rows = [row(FULL, "1", "needle", -0.2), row("a", "0.2", "needle", -0.9)]
    rows += [row(FULL, "1", "nll", 2.0), row("a", "0.2", "nll", 2.5)]
    rows += [row("a", "0.2", "needle", -9.0, "only here")]
    results = Results(rows)
    setting = Setting(512, "a", "0.2")
    assert results.lost(setting, "needle").mean == pytest.approx(0.7)
    assert results.lost(setting, "nll").mean == pytest.approx(0.5)
    assert results.lost(setting, "copy") is None


def test_pareto_leaves_out_what_another_beats_in_both():
    rows = []
    points = {
        "cheap": (10, 0.9),
        "good": (50, 0.1),
        "bad": (60, 0.5),
        "middle": (30, 0.3),
        "same": (50, 0.1),
    }
    for method, (held, kl) in points.items():
        rows += [row(method, "x", "bytes", float(held)), row(method, "x", "kl", kl)]
        rows += [row(method, "x", "needle", -kl)]
    results = Results(rows)
    for measure in ("kl", "needle"):
        assert [s.method for s in results.pareto(512, measure)] == ["cheap", "middle", "good"]


def test_depth_falls_into_fifths():
    rows = [row("a", "x", "needle", -d, depth=d) for d in (0.0, 0.1, 0.19, 0.2, 1.0)]
    found = Results(rows).by_depth(Setting(512, "a", "x"), "needle")
    assert found[0] == pytest.approx(-0.29 / 3)
    assert found[1:] == [-0.2, None, None, -1.0]


def test_baselines_come_first():
    settings = make_results().settings()
    assert {settings[0].method, settings[1].method} == {FULL, LIBRARY}


def test_json_keeps_everything():
    results = make_results()
    again = Results.from_json(json.loads(json.dumps(results.to_json())))
    assert again == results
    with pytest.raises(InputError, match="expected the results of a bench"):
        Results.from_json({"schema": 99})


def test_the_frame_is_tidy():
    results = make_results()
    frame = results.to_frame()
    assert frame.columns == [
        "document",
        "kind",
        "length",
        "method",
        "budget",
        "measure",
        "value",
        "depth",
    ]
    import polars as pl

    kept = frame.filter(
        pl.col("method") == "h2o", pl.col("budget") == "0.2", pl.col("measure") == "kl"
    )
    found = results.estimate(Setting(2048, "h2o", "0.2"), "kl")
    assert kept["value"].mean() == pytest.approx(found.mean)
    assert not any(math.isnan(value) for value in frame["value"])
