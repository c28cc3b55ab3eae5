"""`ops.nms1d` against a comparison of every candidate with every kept one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops.nms import nms1d


def naive(scores: list[float], distance: int, most: int | None, forced: list[int]) -> list[int]:
    kept = list(dict.fromkeys(forced))
    for position in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if most is not None and len(kept) >= most:
            break
        far = all(abs(position - other) > distance for other in kept) if distance else True
        if scores[position] > float("-inf") and position not in kept and far:
            kept.append(position)
    return sorted(kept)


numbers = st.one_of(
    st.floats(-5, 5, width=32), st.just(float("-inf")), st.integers(0, 3).map(float)
)


@given(st.data(), st.lists(numbers, min_size=1, max_size=40), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_equals_the_naive_loop(data, scores, distance):
    most = data.draw(st.none() | st.integers(0, 12))
    forced = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=2))
    found = nms1d(torch.tensor(scores), distance, most=most, forced=forced)
    assert found.tolist() == naive(scores, distance, most, forced)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_everything_dropped_is_near_something_kept_that_is_no_lower(scores, distance):
    kept = nms1d(torch.tensor(scores), distance).tolist()
    held = torch.tensor(scores).tolist()
    assert all(b - a > distance for a, b in itertools.pairwise(kept))
    for i in set(range(len(scores))) - set(kept):
        assert any(abs(i - k) <= distance and held[k] >= held[i] for k in kept)


def test_nan_is_no_candidate():
    assert nms1d(torch.tensor([float("nan"), 1.0, float("nan")]), 0).tolist() == [1]


def test_refuses_what_makes_no_sense():
    with pytest.raises(InputError, match="distance must be at least 0, got -1"):
        nms1d(torch.zeros(3), -1)
    with pytest.raises(InputError, match=r"forced must be positions in 0..2, got 3"):
        nms1d(torch.zeros(3), 1, forced=[3])
