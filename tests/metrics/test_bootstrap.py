from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from regard._errors import InputError
from regard.metrics import bootstrap, paired, student


def test_interval_matches_the_normal_approximation():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = bootstrap(values.tolist(), draws=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_interval_covers_the_mean_of_the_population():
    draw = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        found = bootstrap(draw.exponential(1.0, size=30).tolist(), draws=400, seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert 0.86 <= hits / 200 <= 0.99  # 95 % asked for; skewed samples of 30 give a little less


def test_paired_is_narrower_than_either():
    level = np.random.default_rng(3).normal(0, 5, size=20)
    changed = level + 0.5
    found = paired(changed.tolist(), level.tolist())
    assert found.mean == pytest.approx(0.5)
    assert found.high - found.low < 1e-9
    wide = bootstrap(changed.tolist())
    assert wide.high - wide.low > 1


def test_one_unit_has_no_interval_and_nan_is_left_out():
    found = bootstrap([2.0, math.nan])
    assert (found.mean, found.n) == (2.0, 1)
    assert math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("units", [[], [math.nan]])
def test_nothing_to_average_is_an_error(units: list[float]):
    with pytest.raises(InputError, match="at least one unit"):
        bootstrap(units)


def test_bad_arguments():
    with pytest.raises(InputError, match="level must be in"):
        bootstrap([1.0], level=1.0)
    with pytest.raises(InputError, match="2 units and 1 references"):
        paired([1.0, 2.0], [1.0])


def test_same_seed_same_interval():
    values = list(np.random.default_rng(4).normal(size=12))
    assert bootstrap(values, seed=7) == bootstrap(values, seed=7)
    assert bootstrap(values, seed=7) != bootstrap(values, seed=8)


def test_student_is_the_interval_of_a_paired_test() -> None:
    first, second = [3.0, 4.5, 2.0], [1.0, 2.0, 1.5]
    found = student([a - b for a, b in zip(first, second, strict=True)])
    expected = ttest_rel(first, second).confidence_interval(0.95)
    assert found.ends == pytest.approx((expected.low, expected.high))
    alone = student([2.0])
    assert (alone.mean, alone.n, alone.ends, alone.at_least(0)) == (2.0, 1, None, None)


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [
        ([1.0, 2.0], [0.0, 0.5], True),
        ([0.0, 0.5], [1.0, 2.0], False),
        ([1.0, 0.0], [0.0, 1.0], None),
    ],
)
def test_a_difference_is_decided_where_its_interval_says_so(
    own: list[float], other: list[float], verdict: bool | None
) -> None:
    assert paired(own, other).at_least(0) is verdict
