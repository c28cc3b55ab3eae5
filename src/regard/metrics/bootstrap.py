"""Bootstrap intervals of a mean: what another draw of the same kind of documents might have given.

The units that are drawn again must be independent of each other: documents, not the tokens or
questions inside one. Percentile intervals (Efron 1979); with fewer than about ten units they are
too narrow, and with one there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regard._errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` units with the interval [low, high] at 95 % (NaN when n = 1)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval; None where there is none."""
        return None if math.isnan(self.low) else (self.low, self.high)

    def at_least(self, bound: float | int) -> bool | None:
        """Whether the mean is at or above `bound`; None while the interval holds numbers of both sides.

        >>> [Estimate(mean, mean - 1, mean + 1, 9).at_least(0) for mean in (2.0, -2.0, 0.5)]
        [True, False, None]
        """
        return True if self.low >= bound else False if self.high < bound else None


def bootstrap(
    units: Sequence[float], *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of `units` and its percentile bootstrap interval.

    Args:
        units: one number for each independent unit; NaN marks a unit without one and is left out.
        draws: how many resamples.
        level: of the interval, in (0, 1).
        seed: the same units, draws and seed give the same interval.

    Raises:
        InputError: no unit has a number, or a level outside (0, 1).

    Cost: O(draws x units) time and memory.

    >>> bootstrap([1.0, 1.0, 1.0])
    Estimate(mean=1.0, low=1.0, high=1.0, n=3)
    """
    if not 0 < level < 1:
        raise InputError.of("level", given=level, expected="in (0, 1)")
    values = np.asarray([unit for unit in units if not math.isnan(unit)], dtype=float)
    if values.size == 0:
        raise InputError("bootstrap needs at least one unit with a number, got none")
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    picks = np.random.default_rng(seed).integers(values.size, size=(draws, values.size))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), int(values.size))


def student(units: Sequence[float]) -> Estimate:
    """The mean of `units` and Student's 95 % interval, for a few runs that scatter normally.

    >>> student([1.0, 2.0, 3.0]).n
    3
    """
    from scipy.stats import t

    values = np.asarray(units, dtype=float)
    mean, count = float(values.mean()), values.size
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    half = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def paired(
    units: Sequence[float], reference: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """The mean of `units - reference`, unit by unit, with its interval.

    Differences on the same documents have a far smaller spread than the numbers themselves.

    >>> paired([1.0, 5.0], [0.5, 4.5]).mean
    0.5
    """
    if len(units) != len(reference):
        raise InputError(
            f"paired needs one reference for each unit, got {len(units)} units and {len(reference)} references"
        )
    return bootstrap([a - b for a, b in zip(units, reference, strict=True)], draws=draws, seed=seed)
