"""Numbers of several seeds as a mean with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from regard.labs.results import Series, interval


def mean_of(values: np.ndarray) -> tuple[float, float]:
    """Mean and half of its interval; NaN for no value at all."""
    if not len(values):
        return math.nan, math.nan
    mean, half = interval(values)
    return float(mean), float(half)


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means, and halves of intervals."""
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def over_seeds(
    name: str,
    x: Sequence[float],
    values: Sequence[np.ndarray],
    x_label: str,
    y_label: str,
    panel: str = "",
    level: float = math.nan,
) -> Series:
    """One number a seed at each x, NaN where a seed has none; an x without any is left out. `level` is a line to compare with."""
    numbers = [np.asarray(one, float) for one in values]
    kept = [
        (at, one[np.isfinite(one)])
        for at, one in zip(x, numbers, strict=True)
        if np.isfinite(one).any()
    ]
    pairs = [mean_of(one) for _, one in kept]
    where = np.array([at for at, _ in kept], float)
    return Series(
        name, where, *columns(pairs), np.full(len(where), level), x_label, y_label, panel=panel
    )
