"""Divergence between heads against the definition on whole maps, and its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruments.reference import (
    eager_maps,
    fixed_map,
    full_maps,
    observe_call,
    random_call,
    tiny,
    token_batch,
)
from regard.attach import attach
from regard.instruments.between_heads import HeadDivergence, js_divergence_between_heads

pytestmark = pytest.mark.usefixtures("blocks")


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """By two Kullback-Leibler divergences from the mean."""
    middle = (one + other) / 2

    def from_middle(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(rows > 0, rows * (rows / middle).log(), 0).nan_to_num().sum(-1)

    return (from_middle(one) + from_middle(other)) / 2


def by_pairs(maps: torch.Tensor) -> torch.Tensor:
    heads = maps.shape[1]
    rows = [[divergence(maps[:, i], maps[:, j]).mean() for j in range(heads)] for i in range(heads)]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergence_is_that_of_eager_maps(family: str) -> None:
    model, ids, found = tiny(family), token_batch(), HeadDivergence()
    maps = eager_maps(model, input_ids=ids)
    with torch.no_grad(), attach(model, found):
        model(input_ids=ids)
    for key, full in maps.items():
        torch.testing.assert_close(found.compute()[key], by_pairs(full), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            js_divergence_between_heads(full).float(), by_pairs(full), rtol=0, atol=1e-5
        )


def test_closed_forms() -> None:
    first, second = torch.zeros(6, 6), torch.zeros(6, 6)
    first[:, 0] = 1  # everything on key 0
    second[torch.arange(6), torch.arange(6)] = 1  # everything on itself: the same in row 0 alone
    found = observe_call(HeadDivergence(), fixed_map(torch.stack([first, second, second])))
    table = found.compute()["", 0]
    assert table[0, 1] == pytest.approx(5 / 6 * math.log(2), rel=1e-6)
    assert table[1, 2] == pytest.approx(0, abs=1e-7)
    assert torch.equal(table, table.T)
    mean = found.measures()["divergence from other heads"]
    assert mean["L0H0"] == pytest.approx(5 / 6 * math.log(2), rel=1e-6)
    assert mean["L0H1"] == pytest.approx(5 / 12 * math.log(2), rel=1e-6)


def test_padding_queries_are_left_out() -> None:
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[0, :40] = False
    call = random_call(valid=valid)
    found = observe_call(HeadDivergence(), call).compute()["", 0]
    maps = full_maps(random_call())
    rows = maps.transpose(1, 2)[valid]  # [rows, heads, keys]
    torch.testing.assert_close(found, by_pairs(rows.transpose(0, 1)[None]), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        js_divergence_between_heads(maps, valid).float(), found, rtol=0, atol=1e-6
    )


def test_sampled_rows_are_near_all_rows() -> None:
    whole = observe_call(HeadDivergence(), random_call()).compute()["", 0]
    some = observe_call(HeadDivergence(), random_call(), rows=0.5).compute()["", 0]
    torch.testing.assert_close(some, whole, rtol=0.2, atol=0)


def test_batches_add_up_and_instruments_merge() -> None:
    calls = [random_call(seed=seed) for seed in (0, 1)]
    both = HeadDivergence()
    for call in calls:
        observe_call(both, call)
    one, other = (observe_call(HeadDivergence(), call) for call in calls)
    torch.testing.assert_close(one.merge(other).compute()["", 0], both.compute()["", 0])


def test_rows_in_which_a_head_attends_nowhere_are_left_out() -> None:
    maps = torch.softmax(torch.randn(1, 2, 5, 5, dtype=torch.float64), -1)
    maps[0, 1, 2:] = 0
    torch.testing.assert_close(
        js_divergence_between_heads(maps), by_pairs(maps[:, :, :2]).to(maps), atol=1e-7, rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000), st.floats(0.1, 50))
def test_divergence_lies_between_0_and_ln_2(tokens: int, seed: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = sharpness * torch.randn(1, 3, tokens, tokens, generator=generator)
    found = js_divergence_between_heads(scores.softmax(-1))
    assert found.min() >= 0
    assert found.max() <= math.log(2) + 1e-6
