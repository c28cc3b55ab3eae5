"""Slots over layers: they add up, stay within caps, are proportional, and fall when a layer is added."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import allocate_layer_budgets, pyramid_budgets

preferences = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(preferences, st.integers(0, 5000), st.integers(0, 400))
def test_adds_up_within_caps(preference, total, cap):
    slots = allocate_layer_budgets(torch.tensor(preference, dtype=torch.float64), total, cap)
    assert int(slots.sum()) == min(total, cap * len(preference))
    assert bool(((slots >= 0) & (slots <= cap)).all())


@settings(deadline=None, max_examples=60)
@given(preferences, st.integers(0, 3000), st.integers(1, 400))
def test_adding_layers_never_gives_an_earlier_layer_more(preference, total, cap):
    """The property on which a cascade rests: what was dropped is never missed."""
    before = torch.full((len(preference),), cap)
    for count in range(1, len(preference) + 1):
        weights = torch.tensor(preference[:count], dtype=torch.float64)
        slots = allocate_layer_budgets(weights, total, cap)
        assert bool((slots[: count - 1] <= before[: count - 1]).all())
        before = slots


@settings(deadline=None, max_examples=40)
@given(preferences, st.integers(1, 3000))
def test_proportional_where_no_cap_binds(preference, total):
    weights = torch.tensor(preference, dtype=torch.float64)
    slots = allocate_layer_budgets(weights, total, total)
    # Webster's rule stays within half a slot of weight / price for one price
    price_low = (weights / (slots + 0.5)).max()
    price_high = (weights / (slots - 0.5).clamp_min(1e-9))[slots > 0].min()
    assert price_low <= price_high * (1 + 1e-9)


def test_even_where_nothing_is_preferred():
    slots = allocate_layer_budgets(torch.zeros(4), 10, 100)
    assert sorted(slots.tolist()) == [2, 2, 3, 3]


def test_a_layer_that_is_full_leaves_its_share_to_others():
    slots = allocate_layer_budgets(torch.tensor([100.0, 1.0, 3.0]), 20, torch.tensor([8, 50, 50]))
    assert slots.tolist() == [8, 3, 9]


@pytest.mark.parametrize("preference", [[-1.0, 2.0], [float("nan"), 1.0]])
def test_refuses_preferences_that_are_none(preference):
    with pytest.raises(InputError, match="preference"):
        allocate_layer_budgets(torch.tensor(preference), 4, 4)


@pytest.mark.parametrize("mean", [10.0, 60.0, 400.0])
def test_pyramid_by_its_formula(mean):
    layers, longest, beta = 7, 1000, 20
    least, most = mean / beta, 2 * mean - mean / beta
    if most > longest:
        most, least = longest, 2 * mean - longest
    expected = [most - layer * (most - least) / (layers - 1) for layer in range(layers)]
    slots = pyramid_budgets(layers, mean, longest, beta)
    torch.testing.assert_close(slots, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(slots.mean(), torch.tensor(mean, dtype=torch.float64))


def test_pyramid_where_the_top_exceeds_what_there_is():
    slots = pyramid_budgets(5, 60.0, 80)
    assert slots[0] == 80 and slots[-1] == 40


def test_pyramid_refuses_a_flat_beta():
    with pytest.raises(InputError, match="beta"):
        pyramid_budgets(5, 60.0, 80, beta=0.5)
