"""`ops.boundary_ratio` against the definition written out, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops.boundary_ratio import boundary_mass, boundary_ratio, mass_ratio


def causal_map(length: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(length, length, generator=generator, dtype=torch.float64)
    hidden = torch.ones(length, length).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def naive(attention: torch.Tensor, window: int, reach: int | None = None) -> torch.Tensor:
    """Four nested loops over the definition."""
    length = len(attention)
    found = torch.zeros(length, dtype=torch.float64)
    for i in range(2 * window - 1, length - 2 * window):
        last = length if reach is None else min(length, i + window + reach)
        past = future = 0.0
        for row in range(i + window, last):
            for j in range(i - window + 1, i + 1):
                past += float(attention[row, j])
            for j in range(i + 1, i + window + 1):
                future += float(attention[row, j])
        found[i] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    return found


def integral_image(attention: torch.Tensor, window: int) -> torch.Tensor:
    """The same through a 2-D integral image over the whole map."""
    length = len(attention)
    table = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    table[1:, 1:] = attention.double().cumsum(0).cumsum(1)

    def box(row: int, left: int, right: int) -> float:
        return float(
            table[length, right] - table[length, left] - table[row, right] + table[row, left]
        )

    found = torch.zeros(length, dtype=torch.float64)
    for i in range(2 * window - 1, length - 2 * window):
        past = box(i + window, i - window + 1, i + 1)
        future = box(i + window, i + 1, i + window + 1)
        found[i] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    return found


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("reach", [None, 5])
def test_equals_the_definition_whatever_the_blocks(window, rows, reach):
    attention = causal_map(37)
    found = boundary_ratio(attention, window, reach=reach, rows=rows)
    torch.testing.assert_close(found, naive(attention, window, reach), atol=0, rtol=1e-9)


def test_equals_the_integral_image_on_a_longer_map():
    attention = causal_map(300, spread=4.0)
    found = boundary_ratio(attention.float(), rows=64)
    # the image subtracts large sums: it is good to about 1e-12 of them, and the floor is 1e-6
    torch.testing.assert_close(found, integral_image(attention.float(), 4), atol=0, rtol=1e-5)


def test_finds_a_planted_break():
    attention = torch.zeros(40, 40, dtype=torch.float64)
    attention[25:, :20] = 1 / 20  # nobody looks back at tokens 20 .. 24
    ratio = boundary_ratio(attention)
    assert int(ratio.argmax()) == 19
    assert float(ratio[10]) == pytest.approx(1)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_is_at_least_one_inside_and_zero_at_the_ends(length, window, seed):
    ratio = boundary_ratio(causal_map(length, seed), window)
    inside = torch.zeros(length, dtype=torch.bool)
    inside[2 * window - 1 : max(length - 2 * window, 2 * window - 1)] = True
    assert bool((ratio[inside] >= 1).all()) and bool((ratio[~inside] == 0).all())


@given(st.floats(0.1, 10), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_mass_is_linear_and_the_ratio_has_no_scale(factor, seed):
    attention = causal_map(24, seed)
    past, future = boundary_mass(attention, 0, 2)
    scaled = boundary_mass(attention * factor, 0, 2)
    torch.testing.assert_close(scaled[0], past * factor)
    torch.testing.assert_close(
        mass_ratio(*scaled, window=2), mass_ratio(past, future, 2), rtol=1e-3, atol=0
    )


def test_refuses_an_empty_window():
    with pytest.raises(InputError, match="window must be at least 1, got 0"):
        boundary_ratio(causal_map(8), 0)
