from __future__ import annotations

import numpy as np
import pytest

from regard.report import measure
from regard.report.colour import diverging, sequential
from regard.report.svg import colour_range, level_class, nice_ticks, polyline


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_scales_order_by_lightness_alone(dark: bool) -> None:
    steps = np.diff([luminance(c) for c in sequential(dark)])
    assert (steps > 0).all() if dark else (steps < 0).all()
    both = [luminance(c) for c in diverging(dark)]
    away = np.diff(both[len(both) // 2 :])
    assert (away > 0).all() if dark else (away < 0).all()


def test_colour_range_follows_the_scale() -> None:
    values = np.array([[0.0, 0.2], [0.5, np.nan]])
    assert colour_range(measure("entropy_normalised", values)) == (0.0, 1.0)
    assert colour_range(measure("sink", values)) == (0.0, 0.5)
    assert colour_range(measure("entropy", values)) == (0.0, 0.5)
    low, high = colour_range(measure("ablation", np.array([[-0.3, 0.1]])))
    assert -low == high <= 0.3
    assert colour_range(measure("distance", np.array([[1.0, 400.0]]))) == (1.0, 400.0)
    assert colour_range(measure("entropy", np.full((2, 2), np.nan))) == (0.0, 1.0)
    low, high = colour_range(measure("entropy", np.full((2, 2), 3.0)))
    assert low < high


def test_levels_cover_the_scale_and_clip() -> None:
    assert level_class(0.0, 0, 1, "linear") == "q0"
    assert level_class(7.0, 0, 1, "linear") == "q31"
    assert level_class(10.0, 1, 100, "log") == "q16"
    assert level_class(-1.0, 1, 100, "log") == "q0"
    assert level_class(0.0, -2, 2, "diverging") == "d12"
    assert level_class(float("nan"), 0, 1, "linear") == "none"


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(0.7, 0.98, 3) == [0.7, 0.8, 0.9]
    assert nice_ticks(2, 2) == [2]


def test_a_missing_value_breaks_the_line() -> None:
    assert polyline([0, 1, 2], [1.0, float("nan"), 3.0]) == "M0 1M20 3"
