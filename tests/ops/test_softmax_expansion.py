"""The series of the softmax against the exponential and against its features."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import exponential_features, feature_count, truncated_exponential


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_features_multiply_to_the_series(order):
    query, key = torch.randn(
        2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).unbind()
    found = exponential_features(query, order) @ exponential_features(key, order).T
    scores = query @ key.T / math.sqrt(3)
    expected = sum(scores**p / math.factorial(p) for p in range(order + 1))
    torch.testing.assert_close(found, torch.as_tensor(expected).expand_as(found))
    torch.testing.assert_close(truncated_exponential(scores, order), found)
    assert exponential_features(query, order).shape[-1] == feature_count(3, order)


@given(st.floats(-4, 4), st.integers(0, 20))
def test_what_is_cut_off_is_bounded_by_the_next_term(score, order):
    found = float(truncated_exponential(torch.tensor(score, dtype=torch.float64), order))
    rest = abs(score) ** (order + 1) / math.factorial(order + 1) * math.exp(max(score, 0))
    assert abs(found - math.exp(score)) <= rest + 1e-12


def test_even_orders_are_weights_and_odd_ones_are_not():
    scores = torch.linspace(-30, 30, 400, dtype=torch.float64)
    assert all(truncated_exponential(scores, order).min() > 0 for order in (0, 2, 4, 8))
    assert all(truncated_exponential(scores, order).min() < 0 for order in (1, 3, 7))


def test_too_many_features_are_refused():
    with pytest.raises(InputError, match="order must be 0 or more, with at most a million"):
        exponential_features(torch.ones(2, 64), 4)
    with pytest.raises(InputError, match="order"):
        exponential_features(torch.ones(2, 4), -1)
