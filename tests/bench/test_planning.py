from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import make_results

from regard.bench.planning import best_setting
from regard.bench.results import Results, Row, Setting


def results(points: dict[str, tuple[float, list[float], float]]) -> Results:
    """Points: kept, KL of each document, needle."""
    rows = []
    for method, (kept, kls, needle) in {"full": (1.0, [0.0] * 3, -0.2), **points}.items():
        budget = "1" if method == "full" else "0.2"
        for number, kl in enumerate(kls):
            for measure, value in (("kept", kept), ("kl", kl), ("needle", needle)):
                rows.append(Row(f"d{number}", "prose", 512, method, budget, measure, value))
    return Results(rows)


def test_the_least_memory_within_the_bound():
    found = results(
        {
            "h2o": (0.2, [0.2] * 3, -1.0),
            "snapkv": (0.5, [0.01] * 3, -1.0),
            "tova": (0.7, [0.001] * 3, -0.2),
        }
    )
    assert best_setting(found, 0.05).method == "snapkv"
    assert best_setting(found, 0.5).method == "h2o"


def test_the_worse_end_of_the_interval_counts():
    found = results({"h2o": (0.2, [0.0, 0.0, 0.12], -1.0), "snapkv": (0.5, [0.04] * 3, -1.0)})
    assert best_setting(found, 0.05).method == "snapkv"  # h2o's mean is 0.04, too


def test_of_about_equal_memory_needles_decide():
    found = results({"streaming": (0.2, [0.01] * 3, -2.8), "h2o": (0.205, [0.02] * 3, -0.6)})
    assert best_setting(found, 0.05).method == "h2o"
    found = results({"streaming": (0.2, [0.01] * 3, -2.8), "h2o": (0.25, [0.02] * 3, -0.6)})
    assert best_setting(found, 0.05).method == "streaming"


def test_baselines_are_no_plan_and_bad_bounds_name_the_closest():
    found = make_results()
    assert best_setting(found, 10.0).method not in ("full", "library")
    assert best_setting(found, 10.0, length=2048).budget == "0.1"
    with pytest.raises(ValueError, match=r"the closest is snapkv at 0\.5"):
        best_setting(found, 1e-9)
    assert isinstance(best_setting(found, 0.05), Setting)
